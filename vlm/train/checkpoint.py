"""Checkpoints of a run: state and data position together, written while training goes on."""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import args
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSeconds,
    LatestN,
    PreservationPolicy,
)
from orbax.checkpoint.type_handlers import ArrayHandler, create_type_handler_registry

from vlm.cluster.processes import broadcast_text, exchange_texts, process_name
from vlm.errors import CheckpointError
from vlm.paths import as_config_error, on_disk, storage_error_reason
from vlm.sharding import path_names

# Seconds before a checkpoint that cannot be read is tried again: buckets and shared disks have
# bad minutes. What says that it is torn is asked twice.
RETRY_AFTER = (1, 4, 15)
# How TensorStore begins when it has read a file and that is not what was written.
_PROOFS = ("NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT")

# Bytes from which the devices that hold the same array write a part of it each. Orbax would cut
# every array so, and compile a program for each shape that it cuts, while the step waits.
_SHARED_FROM = 2**20


class Checkpoints:
    """The checkpoints of one run, newest last; as a context, leaving it waits for the writer.

    Example:
        >>> from etils import epath
        >>> with vlm.train.Checkpoints(epath.Path(folder / "checkpoints"), keep=2) as kept:
        ...     print(kept.newest)
        None
    """

    def __init__(self, folder: epath.Path, keep: int, keep_hours: float | None = None):
        kept: list[PreservationPolicy] = [LatestN(keep)]
        if keep_hours is not None:
            kept.append(EveryNSeconds(round(keep_hours * 3600)))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote one
        )
        # Named here so that a resumed run can look into a checkpoint before it restores one.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        arrays = ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_FROM)
        state = ocp.PyTreeCheckpointHandler(
            type_handler_registry=create_type_handler_registry((jax.Array, arrays))
        )
        for kind in (args.PyTreeSave, args.PyTreeRestore):
            handlers.add("state", kind, state)
        for kind in (args.JsonSave, args.JsonRestore):
            handlers.add("data", kind)
        with as_config_error(f"the checkpoints in {folder} cannot be listed", "resume the run"):
            self._manager = ocp.CheckpointManager(
                on_disk(folder), options=options, handler_registry=handlers
            )
        self.folder = folder
        self.seconds: float | None = None  # that the last one took until it was whole
        self._writing: dict[str, Any] | None = None  # the row of the one on its way
        self._rows: list[dict[str, Any]] = []  # of those that are whole, for the log
        self._torn: list[int] = []  # passed over by `restore`

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:
            if error[0] is None:  # never hide the error that is already on its way
                raise
        finally:
            self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return max(self._manager.all_steps(), default=None)

    @property
    def writing(self) -> bool:
        """Whether one is on its way: another would have to wait for it."""
        return self._manager.is_saving_in_progress()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Begin to write a checkpoint. It counts only once it is whole.

        The step waits while the state is copied to the host, and for a checkpoint before this one
        that is not whole yet. `data_state` is any JSON value.

        Raises:
            CheckpointError: this or the previous write failed, say because the disk is full.
        """
        while self._torn:  # nothing is written behind a newer checkpoint, even a torn one
            self._manager.delete(self._torn.pop())
        if step in self._manager.all_steps():
            return
        arguments = args.Composite(state=args.PyTreeSave(state), data=args.JsonSave(data_state))
        began = time.monotonic()
        self.wait()
        with self._explained():
            self._manager.save(step, args=arguments)
        self._writing = {
            "step": step,
            "checkpoint/began": began,
            "checkpoint/stall": time.monotonic() - began,
            "checkpoint/bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        }

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            CheckpointError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._notice()

    def finished(self) -> list[dict[str, Any]]:
        """Rows for the log, one for each checkpoint that has become whole since the last call.

        Raises:
            CheckpointError: one could not be written.
        """
        if not self.writing:
            with self._explained():
                self._manager.check_for_errors()
            self._notice()
        rows, self._rows = self._rows, []
        return rows

    def _notice(self) -> None:
        if self._writing is not None:
            row, self._writing = self._writing, None
            self.seconds = time.monotonic() - row.pop("checkpoint/began")
            self._rows.append(row | {"checkpoint/seconds": self.seconds})

    def restore(self, abstract: Any, report=print) -> tuple[Any, Any] | None:
        """The newest whole checkpoint as (state, data_state); None if there is none at all.

        `abstract` gives shapes, dtypes and shardings: a checkpoint of one mesh restores onto
        another. A torn checkpoint is passed over for the one before it, and `report` tells so. All
        processes go on from the same one: what one of them cannot read, none takes.

        Raises:
            CheckpointError: there are checkpoints and none can be read, or the newest cannot be
                read and is not proven to be torn, or they hold another architecture; the message
                names what differs.
        """
        listed = broadcast_text(json.dumps(sorted(self._manager.all_steps(), reverse=True)))
        steps: list[int] = json.loads(listed)
        last_error = ""
        for step in steps:
            restored, trouble = self._read(step, abstract)
            troubles = [json.loads(t) for t in exchange_texts(json.dumps(trouble))]
            if not any(troubles):
                return restored
            for where, said, torn in filter(None, troubles):
                if not torn:
                    raise CheckpointError(
                        f"checkpoint {step} of {self.folder} could not be read{where} ({said}), "
                        "which does not prove it torn: nothing was changed; resume the run when "
                        "it can be read again"
                    )
                last_error = said
            report(f"checkpoint {step} of {self.folder} is torn and is passed over")
            self._torn.append(step)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder} can be read ({last_error}): "
                "start a new run"
            )
        return None

    def _read(self, step: int, abstract: Any) -> tuple[Any, tuple[str, str, bool] | None]:
        """(what a checkpoint holds, None), or (None, (where, what went wrong, it is torn))."""
        wanted = args.Composite(
            state=args.PyTreeRestore(
                abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
            ),
            data=args.JsonRestore(),
        )
        tries = 0
        while True:
            try:
                self._check_architecture(step, abstract)
                restored = self._manager.restore(step, args=wanted)
                return (restored["state"], restored["data"]), None
            except CheckpointError:
                raise
            except Exception as error:  # whatever a reader says
                _hush_late_reads()
                torn = _proves_torn(error)
                if tries == (1 if torn else len(RETRY_AFTER)):
                    where = f" by {process_name()}" if jax.process_count() > 1 else ""
                    said = str(error) if torn else storage_error_reason(error) or str(error)
                    return None, (where, " ".join(said.split())[:300], torn)
                time.sleep(RETRY_AFTER[tries])
                tries += 1

    def _check_architecture(self, step: int, abstract: Any) -> None:
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        ours = _shapes(abstract)
        lines = [
            f"{name}: {saved.get(name, 'absent')} saved, {ours.get(name, 'absent')} wanted"
            for name in sorted(saved.keys() | ours.keys())
            if saved.get(name) != ours.get(name)
        ]
        if lines:
            more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} is of another architecture:\n  "
                + "\n  ".join(lines[:20])
                + more
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What a writer says, in one sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the step whose state this is, as when a host died
            raise
        except Exception as error:
            kept = "there is no earlier one"
            if self.newest is not None:
                kept = f"checkpoint {self.newest} is whole and kept"
            said = storage_error_reason(error) or " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder} ({said}); {kept}: make room "
                "and resume the run"
            ) from error


def _proves_torn(error: Exception) -> bool:
    """Whether an error says that a file was read and is not whole, rather than not read."""
    return isinstance(error, FileNotFoundError | json.JSONDecodeError) or (
        isinstance(error, ValueError) and str(error).startswith(_PROOFS)
    )


@functools.cache
def _hush_late_reads() -> None:
    """Silence the reads that were on their way when one of them found a torn file.

    Each would end in a traceback, because the event loop that waited for it is gone.
    """
    before = sys.unraisablehook

    def hook(late: Any) -> None:
        if str(late.exc_value) != "Event loop is closed":
            before(late)

    sys.unraisablehook = hook


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(path_names(path)): tuple(x.shape) for path, x in leaves}
