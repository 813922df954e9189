"""Experiment trackers: Weights & Biases and MLflow.

A resumed run continues the run of its tracker. It repeats the steps after its checkpoint exactly,
so rows that the tracker has already are not sent again.
"""

import dataclasses
import importlib
import json
import os
import platform
import re
import time
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from vlm._version import __version__
from vlm.callbacks.base import Callback, Divergence, RunInfo
from vlm.callbacks.wandb_files import offline_rows
from vlm.errors import ConfigError
from vlm.paths import replace_text

# Changes of these fields in a resumed run change its metrics.
_DECIDE_METRICS = ("optimizer", "steps", "epochs", "examples", "seconds", "evals", "code")

Key = tuple[str, int]  # kind and step of a row


class SentRows:
    """The id of a run in a tracker, and the rows that were sent to it.

    They are in `trackers/NAME.jsonl` of the run folder. A resumed run with, for instance, another
    learning rate has other metrics, so its rows after the checkpoint count as new.
    """

    def __init__(self, run: RunInfo, tracker: str, target: str):
        name = f"trackers/{tracker}-{zlib.crc32(target.encode()):08x}.jsonl"
        stored, self._file = run.folder / name, epath.Path(run.local) / name
        text = stored.read_text() if run.resumed and stored.exists() else ""
        decisive = {field: run.config.get(field) for field in _DECIDE_METRICS}
        self._version = zlib.crc32(json.dumps(decisive, sort_keys=True, default=str).encode())
        self._first = run.step
        self.id: str | None = None
        self.rows: list[dict[str, float]] = []  # of earlier processes, in the order of sending
        version = None
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the process was killed while it wrote the line
                continue
            if "id" in entry:
                self.id, version = entry["id"], entry["version"]
            elif "rolled_back_to" in entry:
                for row in self.rows:
                    if row["step"] > entry["rolled_back_to"]:
                        row["undone"] = True
            else:
                self.rows.append(entry)
        self._repeats = version == self._version
        self._sent: set[Key] = set()

    def start(self, id: str, stored: set[Key] | None = None) -> list[dict[str, float]]:
        """Record the id of the tracker's run, and return the rows to send again.

        `stored` are the rows that the tracker has, if it may have lost some. Rows after the
        checkpoint need not be sent again: the run repeats them.
        """
        kept = [row for row in self.rows if stored is None or key_of(row) in stored]
        lost = [row for row in self.rows if row not in kept and row["step"] <= self._first]
        lost = [row for row in lost if "undone" not in row]
        valid = [row for row in kept if "undone" not in row]
        self._sent = {key_of(row) for row in valid if self._repeats or row["step"] <= self._first}
        self.id = id
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"id": id, "version": self._version}, *kept]
        replace_text(self._file, "\n".join(map(json.dumps, lines)))
        return lost

    def __contains__(self, row: Mapping[str, float]) -> bool:
        """Whether an earlier process sent this kind of row of this step."""
        return key_of(row) in self._sent

    def roll_back(self, step: int) -> None:
        """Record that the steps after `step` are trained again, with other metrics."""
        self._sent = {key for key in self._sent if key[1] <= step}
        self.add({"rolled_back_to": step})

    def add(self, row: Mapping[str, float]) -> None:
        """Record a row that was sent."""
        with self._file.open("a") as file:
            file.write(f"\n{json.dumps(row)}")


def key_of(row: Mapping[str, float]) -> Key:
    """Return the kind of a row, by its names, and its step."""
    heads = {name.partition("/")[0] for name in row}
    kind = next((kind for kind in ("eval", "checkpoint", "start") if kind in heads), "step")
    return kind, int(row["step"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Tracker(Callback):
    """A callback that sends each row once."""

    # The client's objects during a run.
    _run: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def _send(self, row: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _send_once(self, row: Mapping[str, float]) -> None:
        sent: SentRows = self._run["sent"]
        if row not in sent:
            self._send(row)
            sent.add(row)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send_once({"step": step, **metrics})

    on_eval = on_checkpoint = on_step

    def on_divergence(self, divergence: Divergence) -> None:
        if divergence.to_step is not None:
            self._run["sent"].roll_back(divergence.to_step)
        self._alert(divergence)

    def _alert(self, divergence: Divergence) -> None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class WandB(_Tracker):
    """Log a run to Weights & Biases (extra `wandb`), with its config and its final metrics.

    Charts have the run's own step as x axis: W&B counts logged rows, which differ from steps. The
    files of W&B are in `wandb/` of the run folder. `wandb.run` is set, so that other callbacks can
    log pictures.

    Args:
        project: Project in W&B.
        name: Name of the run; the name of the run folder by default.
        entity: User or team; W&B's default if None.
        mode: "online", "offline" (upload it later with `wandb sync`), or "disabled"; if None,
            $WANDB_MODE, else "online".
        options: Further arguments of `wandb.init`, such as {"tags": ["baseline"]}.

    Example:
        >>> vlm.callbacks.WandB(project="birds", mode="offline")
        WandB(project='birds', name=None, entity=None, mode='offline', options={})
    """

    project: str = "vlm"
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline", "disabled", "shared"] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def on_start(self, run: RunInfo) -> None:
        wandb = import_client("wandb", "WandB")
        sent = SentRows(run, "wandb", f"{self.entity}/{self.project}")
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "name": self.name or run.folder.name,
            "mode": self.mode,
            "dir": os.fspath(run.local),
            "config": {**run.config, "host": host_facts()},
            "allow_val_change": True,  # fields that a resumed run changes
        }
        if sent.id is not None:
            arguments |= {"id": sent.id, "resume": "allow"}
        client = wandb.init(**arguments | self.options)
        client.define_metric("*", step_metric="step")
        # W&B writes and uploads in the background, so a run that was killed may have lost rows.
        offline = [row for row in offline_rows(run.folder / "wandb", client.id) if "step" in row]
        stored = {key_of(row) for row in sent.rows[: client.step] + offline}
        # W&B counts the rows, from 0 again in offline mode, and keeps one of each count.
        self._run.update(client=client, sent=sent, count=max(client.step, len(stored)))
        for row in sent.start(client.id, stored):
            self._send_once(row)

    def _send(self, row: Mapping[str, float]) -> None:
        client, count = self._run["client"], self._run["count"]
        behind = client.step < count
        client.log(dict(row), **({"step": count, "commit": True} if behind else {}))

    def _alert(self, divergence: Divergence) -> None:
        title = f"Divergence: {divergence.action.replace('_', ' ')}"
        self._run["client"].alert(title, divergence.message)

    def on_end(self, run: RunInfo, results: Mapping[str, float], finished: bool) -> None:
        if client := self._run.pop("client", None):
            client.summary.update({f"final/{name}": value for name, value in results.items()})
            client.finish(exit_code=0 if finished else 1)


@dataclasses.dataclass(frozen=True, eq=False)
class MLflow(_Tracker):
    """Log a run to MLflow (extra `mlflow`): config as parameters, host as tags, and metrics.

    An MLflow run cannot change its parameters. If a resumed run changes a field, the tag
    `changed.FIELD` has the new value. Characters that MLflow refuses in names become "_":
    `eval/image_to_text_R_1`.

    Args:
        experiment: Name of the experiment in MLflow; it is made if it does not exist.
        tracking_uri: Server or database, such as "http://localhost:5000" or
            "sqlite:///mlflow.db"; if None, $MLFLOW_TRACKING_URI, else MLflow's default.
        name: Name of the run; the name of the run folder by default.
        tags: Tags of the run.

    Example:
        >>> vlm.callbacks.MLflow("birds", tracking_uri="http://localhost:5000")
        MLflow(experiment='birds', tracking_uri='http://localhost:5000', name=None, tags={})
    """

    experiment: str = "vlm"
    tracking_uri: str | None = None
    name: str | None = None
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    def on_start(self, run: RunInfo) -> None:
        mlflow = import_client("mlflow", "MLflow")
        client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        sent = SentRows(run, "mlflow", f"{client.tracking_uri} {self.experiment}")
        if sent.id is None:
            known = client.get_experiment_by_name(self.experiment)
            number = known.experiment_id if known else client.create_experiment(self.experiment)
            name = self.name or run.folder.name
            id = client.create_run(number, run_name=name, tags=self.tags).info.run_id
        else:
            id = sent.id
            client.update_run(id, status="RUNNING")
        sent.start(id)
        self._run.update(client=client, entities=mlflow.entities, sent=sent)
        self._describe(id, run.config)

    def _describe(self, id: str, config: dict[str, Any]) -> None:
        """Set the parameters that are new, and tags for what differs from them."""
        from flax.traverse_util import flatten_dict

        client, entities = self._run["client"], self._run["entities"]
        stored = client.get_run(id).data.params
        values = {name: str(value)[:6000] for name, value in flatten_dict(config, sep=".").items()}
        new = [entities.Param(name, value) for name, value in values.items() if name not in stored]
        for i in range(0, len(new), 100):  # the most that a server takes
            client.log_batch(id, params=new[i : i + 100])
        tags = {f"host.{name}": str(value) for name, value in host_facts().items()} | {
            f"changed.{name}": value
            for name, value in values.items()
            if stored.get(name, value) != value
        }
        client.log_batch(id, tags=[entities.RunTag(name, value) for name, value in tags.items()])

    def _send(self, row: Mapping[str, float]) -> None:
        now, step = int(1000 * time.time()), int(row["step"])
        rows = [
            self._run["entities"].Metric(re.sub(r"[^/\w.\- :]", "_", name), value, now, step)
            for name, value in row.items()
            if name != "step"
        ]
        self._run["client"].log_batch(self._run["sent"].id, metrics=rows)

    def _alert(self, divergence: Divergence) -> None:
        name = f"divergence.{divergence.step}"
        self._run["client"].set_tag(self._run["sent"].id, name, divergence.message)

    def on_end(self, run: RunInfo, results: Mapping[str, float], finished: bool) -> None:
        if "client" in self._run:
            final = {f"final/{name}": value for name, value in results.items()}
            self._send({"step": run.total_steps, **final})
            client, status = self._run.pop("client"), "FINISHED" if finished else "KILLED"
            client.set_terminated(self._run["sent"].id, status=status)


def import_client(module: str, callback: str) -> Any:
    """Import the client library of a callback; the extra of vlm has the same name.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(
            f"vlm.callbacks.{callback} needs {module}, which is not installed: run "
            f"pip install 'vlm-jax[{module}]'"
        ) from None


def host_facts() -> dict[str, Any]:
    """Return facts of this machine and its devices, for the page of a run."""
    import jax

    return {
        "name": platform.node(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "vlm": __version__,
        "jax": jax.__version__,
    }
