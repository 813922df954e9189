"""What is checked before the first step: the same run everywhere, in a folder that all can write.

A pod that finds this out at its first checkpoint has lost an hour, or hangs without a word.
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
from vlm.config import Experiment, to_dict
from vlm.errors import ConfigError
from vlm.paths import as_config_error, is_remote, on_disk
from vlm.train.changes import flat_fields

CHECKPOINTS_TO = "gs://"  # the one kind of bucket that Orbax writes to
SHARED_AFTER = 10.0  # seconds that a shared disk may take to show a file of another host


def check_same_everywhere(experiment: Experiment, resumed: bool) -> None:
    """Raise a ConfigError unless all processes run the same experiment with the same versions."""
    ours = {
        "vlm": __version__,
        "jax": jax.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "--resume": resumed,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        **{"--" + k: v for k, v in flat_fields(to_dict(experiment)).items()},
    }
    first = json.loads(broadcast_text(json.dumps(ours)))
    differ = [
        f"{name} is {ours.get(name)!r} here and {first.get(name)!r} there"
        for name in sorted(first.keys() | ours.keys())
        if json.dumps(first.get(name)) != json.dumps(ours.get(name))
    ]
    said = f"{process_name()} on {socket.gethostname()}: {'; '.join(differ)}" if differ else ""
    if said := "; ".join(filter(None, exchange_texts(said))):
        raise ConfigError(
            f"the processes of a run must be the same, and are not what {process_name(0)} is "
            f"({said}): start the same command in the same environment on every host"
        )


def check_folder(folder: epath.Path) -> None:
    """Raise a ConfigError unless every process can write to a run folder, and sees it.

    In a bucket this goes both ways that a run takes: that of its logs and that of TensorStore,
    which writes the checkpoints and has credentials of its own.
    """
    if is_remote(folder) and not os.fspath(folder).startswith(CHECKPOINTS_TO):
        raise ConfigError(
            f"checkpoints cannot be written to {folder}, since Orbax writes to disks and to "
            f"{CHECKPOINTS_TO} alone: give another --run-dir, or the path where the bucket is "
            "mounted"
        )
    seen = folder / f".seen-{broadcast_text(uuid.uuid4().hex)}"
    said = _said(lambda: _write(seen) if jax.process_index() == 0 else None)
    said = next(filter(None, exchange_texts(said)), "")
    if not said:
        said = _said(lambda: _look_for(seen))
        said = next(filter(None, exchange_texts(said)), "")
        if jax.process_index() == 0:
            said = _said(seen.unlink) or said
        said = broadcast_text(said)
    if said:
        raise ConfigError(said)


def _said(act) -> str:
    """What went wrong in `act`, or nothing."""
    try:
        act()
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
    with as_config_error(f"{where} cannot read the run folder {file.parent}", "let it"):
        while not file.exists():
            if time.monotonic() > end:
                raise ConfigError(
                    f"{where} does not see the run folder {file.parent} that {process_name(0)} "
                    "made: put it where all hosts see it, in a bucket or on a shared disk"
                )
            time.sleep(0.5)
    with as_config_error(
        f"{where} cannot write checkpoints to {file.parent}", "let it, or give another --run-dir"
    ):
        _write_as_tensorstore(file.parent / f"{file.name}-{jax.process_index()}")


def _write_as_tensorstore(file: epath.Path) -> None:
    """Write and remove a file as checkpoints are written."""
    import tensorstore

    if is_remote(file):
        bucket, _, path = os.fspath(file).removeprefix(CHECKPOINTS_TO).partition("/")
        place = {"driver": "gcs", "bucket": bucket}
    else:
        place, path = {"driver": "file"}, os.fspath(on_disk(file))
    store = tensorstore.KvStore.open(place).result()
    store.write(path, b"written to see that checkpoints can be").result()
    store.delete_range(tensorstore.KvStore.KeyRange(path, path + "\0")).result()
