"""The run folder: what a run is called, where its files lie, and how one is opened again.

config.json  checkpoints/  tokenizer/  log.jsonl  tensorboard/  profile/  bundle/  results.json
report.html
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator

import jax
from etils import epath

from vlm.cluster.processes import broadcast_text
from vlm.config import Experiment, from_dict, to_dict
from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path


class Run:
    """A run's folder. Its files are written by the first process alone."""

    def __init__(self, folder: epath.Path, experiment: Experiment):
        self.folder = folder
        self.experiment = experiment
        self._found: set[str] | None = None  # what lay in a new run's folder before it

    @classmethod
    def create(cls, experiment: Experiment) -> "Run":
        """A new folder for `experiment`, at its `run_dir` or under runs/ by name and date.

        Raises:
            ConfigError: the folder holds a run already, or cannot be made.
        """
        folder, said = "", ""
        if jax.process_index() == 0:
            try:
                folder = os.fspath(_new_folder(experiment))
            except ConfigError as error:
                said = str(error)
        folder, said = json.loads(broadcast_text(json.dumps([folder, said])))
        if said:
            raise ConfigError(said)
        run = cls(as_path(folder), experiment)
        if jax.process_index() == 0:
            run._found = {path.name for path in run.folder.iterdir()} - {"config.json"}
        return run

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Run":
        """The run that lies in `folder`.

        Raises:
            CheckpointError: no run there, or a config that this version cannot read.
        """
        folder = as_path(folder)
        config = folder / "config.json"
        if not config.exists():
            raise CheckpointError(
                f"{folder} is no run folder (it has no config.json): give a folder that "
                "`vlm train` made"
            )
        try:
            return cls(folder, from_dict(Experiment, json.loads(config.read_text())))
        except (ValueError, ConfigError) as error:
            raise CheckpointError(f"{config} cannot be read: {error}") from None

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """While a run prepares: if that fails, a new run leaves nothing of its own behind."""
        try:
            yield
        except BaseException:
            if self._found is not None:
                for path in self.folder.iterdir():
                    if path.name not in self._found:
                        path.rmtree() if path.is_dir() else path.unlink()
                if not self._found:
                    self.folder.rmdir()
            raise

    @property
    def checkpoints(self) -> epath.Path:
        return self.folder / "checkpoints"

    @property
    def tokenizer(self) -> epath.Path:
        return self.folder / "tokenizer"

    @property
    def log(self) -> epath.Path:
        return self.folder / "log.jsonl"

    @property
    def tensorboard(self) -> epath.Path:
        return self.folder / "tensorboard"

    @property
    def bundle(self) -> epath.Path:
        return self.folder / "bundle"

    @property
    def results(self) -> epath.Path:
        return self.folder / "results.json"


def _new_folder(experiment: Experiment) -> epath.Path:
    folder = as_path(experiment.run_dir or _fresh(experiment.name))
    config = folder / "config.json"
    if config.exists():
        raise ConfigError(
            f"{folder} already holds a run: go on with `vlm train --resume {folder}`, or give "
            "another --run-dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(to_dict(experiment), indent=2))
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written ({error.strerror or error}): give "
            "another --run-dir"
        ) from None
    return folder


def _fresh(name: str) -> str:
    """A name under runs/ that no other run has taken."""
    start = f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder, number = start, 2
    while os.path.exists(folder):
        folder, number = f"{start}-{number}", number + 1
    return folder
