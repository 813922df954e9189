"""Checks before the first step: equal configs in all processes, and a shared writable folder.

Without them a pod fails at its first checkpoint after an hour, or hangs without a message.
"""

import json
import os
import platform
import socket
import time
import uuid

import jax
from etils import epath

from vlm._version import __version__
from vlm.cluster.processes import broadcast_text, exchange_texts, process_name
from vlm.config import Experiment
from vlm.errors import ConfigError
from vlm.paths import as_config_error, is_remote, on_disk
from vlm.training.changes import flat_fields

CHECKPOINTS_TO = "gs://"  # the only kind of bucket that Orbax writes to
SHARED_AFTER = 10.0  # seconds until a shared disk must list a file of another host


def check_same_everywhere(experiment: Experiment, resumed: bool) -> None:
    """Raise a ConfigError unless all processes run the same experiment with the same versions."""
    ours = {
        "vlm": __version__,
        "jax": jax.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "--resume": resumed,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        **{"--" + k: v for k, v in flat_fields(experiment).items()},
    }
    first = json.loads(broadcast_text(json.dumps(ours)))
    differ = [
        f"{name} is {ours.get(name)!r} here and {first.get(name)!r} there"
        for name in sorted(first.keys() | ours.keys())
        if json.dumps(first.get(name)) != json.dumps(ours.get(name))
    ]
    own = f"{process_name()} on {socket.gethostname()}: {'; '.join(differ)}" if differ else ""
    if differences := "; ".join(filter(None, exchange_texts(own))):
        raise ConfigError(
            f"the processes of a run must be the same, and differ from {process_name(0)} "
            f"({differences}): start the same command in the same environment on every host"
        )


def check_folder(folder: epath.Path) -> None:
    """Raise a ConfigError unless every process can read and write the run folder.

    In a bucket this tests both clients of a run: that of the logs and TensorStore, which writes
    the checkpoints with credentials of its own.
    """
    if is_remote(folder) and not os.fspath(folder).startswith(CHECKPOINTS_TO):
        raise ConfigError(
            f"checkpoints cannot be written to {folder}, since Orbax writes only to disks "
            f"and {CHECKPOINTS_TO}: give another --run-dir, or the path where the bucket is "
            "mounted"
        )
    probe = folder / f".seen-{broadcast_text(uuid.uuid4().hex)}"
    failure = _first_failure(lambda: _write(probe) if jax.process_index() == 0 else None)
    if not failure:
        failure = _first_failure(lambda: _look_for(probe))
        if jax.process_index() == 0:
            failure = _failure_of(probe.unlink) or failure
        failure = broadcast_text(failure)
    if failure:
        raise ConfigError(failure)


def _first_failure(action) -> str:
    """Run `action` in all processes; return the first message of `_failure_of`."""
    return next(filter(None, exchange_texts(_failure_of(action))), "")


def _failure_of(action) -> str:
    """Return the message of a ConfigError raised by `action`, or an empty string."""
    try:
        action()
    except ConfigError as error:
        return str(error)
    return ""


def _write(file: epath.Path) -> None:
    with as_config_error(
        f"the run folder {file.parent} cannot be written", "give another --run-dir"
    ):
        file.write_text("written to see that all hosts see it")


def _look_for(file: epath.Path) -> None:
    where = f"{process_name()} on {socket.gethostname()}" if jax.process_count() > 1 else "this run"
    end = time.monotonic() + SHARED_AFTER
    with as_config_error(f"{where} cannot read the run folder {file.parent}", "give it access"):
        while not file.exists():
            if time.monotonic() > end:
                raise ConfigError(
                    f"{where} cannot find the run folder {file.parent} that {process_name(0)} "
                    "made: put it where all hosts can read it, in a bucket or on a shared disk"
                )
            time.sleep(0.5)
    with as_config_error(
        f"{where} cannot write checkpoints to {file.parent}",
        "give it access, or give another --run-dir",
    ):
        _write_as_tensorstore(file.parent / f"{file.name}-{jax.process_index()}")


def _write_as_tensorstore(file: epath.Path) -> None:
    """Write and remove a file with TensorStore, as checkpoints do."""
    import tensorstore

    if is_remote(file):
        bucket, _, path = os.fspath(file).removeprefix(CHECKPOINTS_TO).partition("/")
        place = {"driver": "gcs", "bucket": bucket}
    else:
        place, path = {"driver": "file"}, os.fspath(on_disk(file))
    store = tensorstore.KvStore.open(place).result()
    store.write(path, b"written to see that checkpoints can be").result()
    store.delete_range(tensorstore.KvStore.KeyRange(path, path + "\0")).result()
