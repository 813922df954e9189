"""The run folder: create it, open it again, locate its files, and export the bundle.

config.json  history.jsonl  checkpoints/  tokenizer/  log.jsonl  tensorboard/  profile/  bundle/
results.json  report.html, base.json if an adapter is trained, rollback.json after a rollback
"""

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vlm._version import __version__
from vlm.bundle import Bundle
from vlm.cluster.processes import broadcast_text
from vlm.config import Experiment, from_dict, to_dict
from vlm.config.defaults import resumed_experiment
from vlm.config.resume import changes_between
from vlm.errors import CheckpointError, ConfigError, brief
from vlm.heads import zero_shot
from vlm.inputs.tokenizer import Tokenizer
from vlm.paths import as_config_error, as_path, replace_text
from vlm.training.changes import check_changes, settings_digest
from vlm.training.console import log
from vlm.training.fewer_devices import DEVICE_FIELDS, devices_before, fitted
from vlm.training.history import FILE, history_text, read_history
from vlm.training.preflight import check_folder, check_same_everywhere
from vlm.training.step import Trainer, TrainState
from vlm.weights.adapter import AdapterOrigin


class Run:
    """A run's folder. Only process 0 writes its files."""

    def __init__(self, folder: epath.Path, experiment: Experiment, resumed: bool = False):
        self.folder, self.experiment, self.resumed = folder, experiment, resumed
        self.config, self.history = folder / "config.json", folder / FILE
        self.base_file, self.class_file = folder / "base.json", folder / "classes.json"
        self.checkpoints, self.tokenizer = folder / "checkpoints", folder / "tokenizer"
        self.log, self.results = folder / "log.jsonl", folder / "results.json"
        self.bundle, self.classifier = folder / "bundle", folder / zero_shot.FILE
        self.rollback = folder / "rollback.json"
        # [before, now] of each field that a resumed run changes, and its experiment before
        self.changes: dict[str, list[Any]] = {}
        self.before = experiment
        # Whether config.json has changed since the last start: a start that was killed while it
        # recorded its changes, or an edit by hand.
        self.edited = False
        # [in the config, now] of each field that is fitted to fewer devices
        self.fitted: dict[str, list[Any]] = {}
        self._devices: int | None = None  # that the config was chosen for; None: those of now
        self._existing: set[str] | None = None  # names in a new run's folder before the run

    @classmethod
    def create(cls, experiment: Experiment) -> "Run":
        """Create a folder for `experiment`, at its `run_dir` or under runs/ by name and date.

        Raises:
            ConfigError: the folder holds a run already, or cannot be made; or the processes do
                not agree on the experiment, or cannot all read the folder.
        """
        check_same_everywhere(experiment, resumed=False)
        folder, failure = "", ""
        if jax.process_index() == 0:
            try:
                folder = os.fspath(_new_folder(experiment))
            except ConfigError as error:
                failure = str(error)
        folder, failure = json.loads(broadcast_text(json.dumps([folder, failure])))
        if failure:
            raise ConfigError(failure)
        run = cls(as_path(folder), experiment)
        if jax.process_index() == 0:
            run._existing = {path.name for path in run.folder.iterdir()} - {"config.json"}
        with run.starting():
            check_folder(run.folder)
        return run

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        change: Callable[[Experiment], Experiment] = lambda experiment: experiment,
    ) -> "Run":
        """Open the run in `folder`, to resume it as `change` returns its experiment.

        Raises:
            CheckpointError: no run there, or a config that this version cannot read.
            ConfigError: a change that would make its checkpoints invalid; or the processes do
                not agree, or cannot all read the folder.
        """
        folder = as_path(folder)
        before = experiment_in(folder)
        run = cls(folder, resumed_experiment(change(before), before), resumed=True)
        run.changes, run.before = check_changes(before, run.experiment), before
        check_same_everywhere(run.experiment, resumed=True)
        check_folder(folder)
        rows = run.starts() if jax.process_index() == 0 else []
        known = broadcast_text(json.dumps([run._is_edited(rows), devices_before(rows)]))
        run.edited, devices = json.loads(known)
        if run.edited:
            log.info(f"{run.config} has changed since the last start of the run")
        if not run.edited and not any(name.startswith(DEVICE_FIELDS) for name in run.changes):
            run._devices = devices
        return run

    def _is_edited(self, rows: list[dict[str, Any]]) -> bool:
        """Return the value of `edited`, from the history."""
        last = rows[-1] if rows else {}
        # Another version may have other fields.
        recorded = last.get("settings") if last.get("vlm") == __version__ else None
        return recorded is not None and recorded != settings_digest(self.before)

    def for_devices(self, experiment: Experiment) -> Experiment:
        """Return an experiment of the run for the devices of this start, which may be fewer."""
        before, now = self._devices, jax.device_count()
        tpu = jax.default_backend() == "tpu"
        return experiment if before is None else fitted(experiment, before, now, tpu=tpu)

    def report_fitted(self, experiment: Experiment) -> None:
        """Log the changes of `for_devices`, and add them to the next row of the history."""
        changes = changes_between(experiment, self.for_devices(experiment))
        self.fitted = {change.name: [change.old, change.new] for change in changes}
        for name, (old, new) in self.fitted.items():
            log.info(
                f"{name} is {brief(new)} on {jax.device_count()} devices; it is {brief(old)} on "
                f"the {self._devices} that the config was chosen for"
            )

    def record_start(self, step: int, total: int, data: Mapping[str, Any] | None = None) -> None:
        """Append a line to the history: one for every start, with the changed fields.

        `data` are the columns of the data.
        """
        if jax.process_index() != 0:
            return
        if self.changes:
            self._write(self.config, json.dumps(to_dict(self.experiment), indent=2))
        self._add_to_history(step, total, self.changes, data)

    def record_phase(
        self,
        number: int,
        step: int,
        total: int,
        changes: dict[str, list[Any]],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a line to the history: the begin of a phase, with its changed fields."""
        if jax.process_index() == 0:
            self._add_to_history(step, total, changes, data, phase=number)

    def record_rollback(self, rollback: dict[str, Any]) -> None:
        """Append a line to the history: a rollback, once."""
        names = ("rollbacks", "left", "reason", "skipped")
        row = {name: rollback[name] for name in names}
        if jax.process_index() == 0 and row not in [r.get("rollback") for r in self.starts()]:
            self._add_to_history(rollback["step"], rollback["total"], {}, None, rollback=row)

    def _add_to_history(
        self,
        step: int,
        total: int,
        changes: dict[str, list[Any]],
        data: Mapping[str, Any] | None,
        **more: Any,
    ) -> None:
        row = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **more,
            "step": step,
            "total_steps": total,
            "changes": changes,
            **(data or {}),
            **({"fitted": self.fitted} if self.fitted else {}),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "settings": settings_digest(self.experiment),
            "vlm": __version__,
            "jax": jax.__version__,
        }
        rows = [*self.starts(), row]
        self._write(self.history, "".join(json.dumps(row) + "\n" for row in rows))

    def record_base(self, model: str, fingerprint: str) -> None:
        """Record the base model of the run's adapter."""
        if jax.process_index() == 0:
            about = {"model": model, "fingerprint": fingerprint}
            self._write(self.base_file, json.dumps(about, indent=2) + "\n")

    def base(self) -> tuple[str, str]:
        """Return the base model of the run's adapter as (argument of `vlm.load`, fingerprint)."""
        try:
            about = json.loads(self.base_file.read_text())
            return about["model"], about["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{self.base_file} does not name the base model of the run's adapter: "
                "start a new run"
            ) from None

    def check_base(self, fingerprint: str) -> None:
        """Raise a CheckpointError if the base model of the run's adapter has changed."""
        model, wanted = self.base()
        if fingerprint != wanted:
            raise CheckpointError(
                f"init_from {self.experiment.init_from!r} has changed (fingerprint "
                f"{fingerprint[:12]}; the run began with {wanted[:12]} of {model}): restore "
                "that model, or start a new run"
            )

    def record_classes(self, labels: Sequence[str]) -> None:
        """Write the labels of the classification head, in the order of its rows."""
        if jax.process_index() == 0:
            self._write(self.class_file, json.dumps(list(labels), indent=2) + "\n")

    def check_classes(self, labels: Sequence[str]) -> None:
        """Raise a CheckpointError unless the head's rows are still in the order of `labels`."""
        if not self.class_file.exists():
            raise CheckpointError(
                f"{self.folder} has no {self.class_file.name}, so the classes of its head are not "
                "known: it was started by an older version, which ordered them otherwise; start "
                "a new run"
            )
        if json.loads(self.class_file.read_text()) != list(labels):
            raise CheckpointError(
                f"the classes of {self.experiment.data.source} differ from {self.class_file}, or "
                "are in another order: restore the data, or start a new run"
            )

    def last_total(self) -> int | None:
        """Return the total steps of the run when it was last started; None if not recorded."""
        rows = self.starts()
        return rows[-1]["total_steps"] if rows else None

    def starts(self) -> list[dict[str, Any]]:
        """Return the run's history: a row for each start, phase and rollback."""
        return read_history(self.folder)

    def history_text(self) -> str:
        """Describe the run's history: each start, rollback, and change with old and new value."""
        return history_text(self.starts())

    def export(self, trainer: Trainer, state: TrainState, tokenizer: Tokenizer) -> Bundle:
        """Write and return the trained model as a bundle; in an adapter run, only the adapter."""
        e = trainer.experiment
        origin = None if e.adapter is None else AdapterOrigin(e.adapter, *self.base())
        bundle = Bundle(
            trainer.model(state),
            trainer.preprocess,
            tokenizer,
            name=e.name,
            adapter=origin,
            templates=e.data.templates,
        )
        (bundle.save if origin is None else bundle.save_adapter)(self.bundle)
        return bundle

    def _write(self, file: epath.Path, text: str) -> None:
        with as_config_error(f"{file} cannot be written", "make it writable, and resume the run"):
            replace_text(file, text)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Context of a run's preparation: if it fails, the files of a new run are removed."""
        try:
            yield
        except BaseException:
            if self._existing is not None:
                # A folder in a bucket vanishes with its last file, so there may be none to remove.
                for path in self.folder.iterdir() if self.folder.is_dir() else ():
                    if path.name not in self._existing:
                        path.rmtree() if path.is_dir() else path.unlink()
                if not self._existing and self.folder.is_dir():
                    self.folder.rmdir()
            raise


def experiment_in(folder: epath.Path) -> Experiment:
    """Read the experiment of the run in `folder`.

    Raises:
        CheckpointError: no run there, or a config that this version cannot read.
        ConfigError: the folder cannot be read; the message has the reason.
    """
    config = folder / "config.json"
    with as_config_error(f"{config} cannot be read", "check the path and its permissions"):
        text = config.read_text() if config.exists() else None
    if text is None:
        raise CheckpointError(
            f"{folder} is no run folder (it has no config.json): give a folder made by `vlm train`"
        )
    try:
        return from_dict(Experiment, json.loads(text))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{config} cannot be read: {error}") from None


def _new_folder(experiment: Experiment) -> epath.Path:
    folder = as_path(experiment.run_dir or _unused_folder(experiment.name))
    with as_config_error(f"the run folder {folder} cannot be written", "give another --run-dir"):
        config = folder / "config.json"
        if config.exists():
            raise ConfigError(
                f"{folder} already holds a run: resume it with `vlm train --resume {folder}`, or "
                "give another --run-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(config, json.dumps(to_dict(experiment), indent=2))
    return folder


def _unused_folder(name: str) -> str:
    """Return an unused folder name under runs/."""
    start = f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder, number = start, 2
    while os.path.exists(folder):
        folder, number = f"{start}-{number}", number + 1
    return folder
