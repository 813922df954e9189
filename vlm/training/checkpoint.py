"""Checkpoints of a run: state and data position, written asynchronously during training."""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
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
from vlm.errors import CheckpointError, VlmError
from vlm.paths import as_config_error, is_outage, on_disk, storage_error_reason
from vlm.sharding import path_names
from vlm.training.console import log
from vlm.training.local_checkpoint import LocalCheckpoints

# Seconds before each retry of an unreadable checkpoint: buckets and shared disks have outages of
# some minutes. An error that indicates a corrupt file is retried once.
RETRY_AFTER = (1, 4, 15)
# TensorStore error codes that indicate a corrupt file.
_CORRUPT = ("NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT")

# Bytes from which each device of a replicated array writes a part of it. Orbax would split every
# array like this, and compile a program for each shape, while the step waits.
_SHARED_FROM = 2**20


class _Manager(ocp.CheckpointManager):
    """Manager that does not ask JAX for a preemption.

    It would make the training loop miss one: JAX answers at one number, which all processes have
    still to ask for, and this manager asks with the numbers of its steps.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Checkpoints of one run; as a context manager, waits for the writer on exit.

    Example:
        >>> from etils import epath
        >>> path = epath.Path(folder / "checkpoints")
        >>> with vlm.training.Checkpoints(path, keep=2) as checkpoints:
        ...     print(checkpoints.newest)
        None
    """

    def __init__(
        self,
        folder: epath.Path,
        keep: int,
        keep_hours: float | None = None,
        local: LocalCheckpoints | None = None,
    ):
        policies: list[PreservationPolicy] = [LatestN(keep)]
        if keep_hours is not None:
            policies.append(EveryNSeconds(round(keep_hours * 3600)))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # of a run that was killed during a write
        )
        # Registered here so that a resumed run can inspect a checkpoint before restoring it.
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
            self._manager = _Manager(on_disk(folder), options=options, handler_registry=handlers)
        self.folder, self._local = folder, local
        self.seconds: float | None = None  # duration of the last write
        self._writing: dict[str, Any] | None = None  # log row of the write in progress
        self._rows: list[dict[str, Any]] = []  # log rows of complete checkpoints
        self._corrupt: list[int] = []  # skipped by `restore`

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:
            if error[0] is None:  # never hide an earlier error
                raise
        finally:
            self._manager.close()

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint that is known to be complete."""
        writing = self._writing and self._writing["step"]
        return max((s for s in self._manager.all_steps() if s != writing), default=None)

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints; all processes must call it."""
        return json.loads(broadcast_text(json.dumps(sorted(self._manager.all_steps()))))

    def delete(self, steps: list[int]) -> None:
        """Delete the checkpoints of these steps, where they exist; all processes must call it.

        Raises:
            CheckpointError: the processes do not see the same checkpoints.
        """
        self.wait()
        self._manager.reload()  # each process has judged by its own clock what is kept by the hour
        found = sorted(set(steps) & set(self._manager.all_steps()))
        lists = exchange_texts(json.dumps(found))
        for process, other in enumerate(lists):
            if other != lists[0]:  # each would wait for the others to delete the same ones
                raise CheckpointError(
                    f"the checkpoints {lists[0]} of {self.folder} are to be deleted, and "
                    f"{process_name(process)} sees {other}: check that all hosts share the run "
                    "folder, and resume the run"
                )
        for step in found:
            self._manager.delete(step)
        self._corrupt = [step for step in self._corrupt if step not in steps]

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written: another would have to wait for it."""
        return self._manager.is_saving_in_progress()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Start to write a checkpoint, which is listed only once it is complete.

        Returns after the state is copied to the host and the previous write is complete.
        `data_state` is any JSON value.

        A failure of the previous write is logged, since this one may succeed.

        Raises:
            CheckpointError: it could not be written, for example on a full disk.
        """
        if self._corrupt:  # Orbax refuses to write before a newer step, even a corrupt one
            self.delete(self._corrupt)
        if step in self._manager.all_steps():
            return
        arguments = args.Composite(state=args.PyTreeSave(state), data=args.JsonSave(data_state))
        began = time.monotonic()
        try:
            self.wait()
        except CheckpointError as error:
            log.warning("%s; step %s is saved now", error, step)
        with self._storage_errors():
            self._manager.save(step, args=arguments)
        self._writing = {
            "step": step,
            "checkpoint/began": began,
            "checkpoint/stall": time.monotonic() - began,
            "checkpoint/bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        }

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        row, self._writing = self._writing, None
        with self._storage_errors():
            self._manager.wait_until_finished()
        if row is not None:
            self.seconds = time.monotonic() - row.pop("checkpoint/began")
            self._rows.append(row | {"checkpoint/seconds": self.seconds})

    def finished(self) -> list[dict[str, Any]]:
        """Return a log row for each checkpoint completed since the last call.

        Raises:
            CheckpointError: one could not be written.
        """
        if self._writing is not None and not self.writing:
            self.wait()
        rows, self._rows = self._rows, []
        return rows

    def restore(
        self, abstract: Any, older: Any = None, accepts: Callable[[Any], bool] = lambda _: True
    ) -> tuple[Any, Any] | None:
        """Restore the newest readable checkpoint as (state, data_state); None if there is none.

        If `accepts` is false for its data_state, as of a state of another layout, the state is not
        read, and None in its place.

        `abstract` gives shapes, dtypes and shardings: a checkpoint of one mesh restores onto
        another. `older` is the same in the layout of an older version, which is restored as it
        is. A corrupt checkpoint is skipped for the one before it, which is logged.
        All processes restore the same one: it must be readable by each of them. A newer local
        checkpoint takes precedence.

        Raises:
            CheckpointError: no checkpoint can be read; or the newest cannot be read and is not
                known to be corrupt; or they hold another architecture, whose differences the
                message lists.
        """
        listed = broadcast_text(json.dumps(sorted(self._manager.all_steps(), reverse=True)))
        steps = [step for step in json.loads(listed) if step not in self._corrupt]
        last_error = ""
        for step in [*steps, -1]:
            if self._local and (restored := self._local.restore(abstract, accepts, after=step)):
                return restored
            if step < 0:
                break
            restored, problem = self._read(step, abstract, older, accepts)
            problems = [json.loads(p) for p in exchange_texts(json.dumps(problem))]
            if not any(problems):
                return restored
            for where, reason, corrupt in filter(None, problems):
                if not corrupt:
                    failure = CheckpointError(
                        f"checkpoint {step} of {self.folder} could not be read{where} ({reason}), "
                        "but may not be corrupt: nothing was changed; resume the run when it can "
                        "be read again"
                    )
                    failure.retriable = True
                    raise failure
                last_error = reason
            log.warning("checkpoint %s of %s is corrupt and is skipped", step, self.folder)
            self._corrupt.append(step)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder} can be read ({last_error}): "
                "start a new run"
            )
        return None

    def _read(
        self, step: int, abstract: Any, older: Any, accepts: Callable[[Any], bool]
    ) -> tuple[Any, tuple[str, str, bool] | None]:
        """Return (content, None), or (None, (process, reason, whether corrupt)) on failure."""
        tries = 0
        while True:
            try:
                wanted = args.Composite(data=args.JsonRestore())
                data = self._manager.restore(step, args=wanted)["data"]
                if not accepts(data):
                    return (None, data), None
                tree = self._check_architecture(step, abstract, older)
                arrays = args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
                restored = self._manager.restore(step, args=args.Composite(state=arrays))
                return (restored["state"], data), None
            except VlmError:
                raise
            except Exception as error:  # readers raise many types
                _silence_pending_reads()
                corrupt = _indicates_corruption(error)
                if tries == (1 if corrupt else len(RETRY_AFTER)):
                    where = f" by {process_name()}" if jax.process_count() > 1 else ""
                    reason = str(error) if corrupt else storage_error_reason(error) or str(error)
                    return None, (where, " ".join(reason.split())[:300], corrupt)
                time.sleep(RETRY_AFTER[tries])
                tries += 1

    def _check_architecture(self, step: int, abstract: Any, older: Any) -> Any:
        """Return the tree that has the shapes of the checkpoint: `abstract` or `older`."""
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        if older is not None and saved == _shapes(older):
            return older
        ours = _shapes(abstract)
        lines = [
            f"{name}: {saved.get(name, 'absent')} saved, {ours.get(name, 'absent')} expected"
            for name in sorted(saved.keys() | ours.keys())
            if saved.get(name) != ours.get(name)
        ]
        if lines:
            more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} has another architecture than the run:\n  "
                + "\n  ".join(lines[:20])
                + more
            )
        return abstract

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turn errors of the writer into a CheckpointError of one sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the computation of the state, as when a host died
            raise
        except Exception as error:
            fallback = "there is no earlier one"
            if self.newest is not None:
                fallback = f"checkpoint {self.newest} is complete and kept"
            reason = storage_error_reason(error) or " ".join(str(error).split())[:300]
            failure = CheckpointError(
                f"a checkpoint could not be written to {self.folder} ({reason}); {fallback}: free "
                "disk space and resume the run"
            )
            failure.retriable = is_outage(error)
            raise failure from error


def _indicates_corruption(error: Exception) -> bool:
    """Whether an error means that a file was read but is incomplete or corrupt."""
    return isinstance(error, FileNotFoundError | json.JSONDecodeError) or (
        isinstance(error, ValueError) and str(error).startswith(_CORRUPT)
    )


@functools.cache
def _silence_pending_reads() -> None:
    """Silence reads that were in flight when one of them found a corrupt file.

    Each would end in a traceback, because its event loop is closed.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(path_names(path)): tuple(x.shape) for path, x in leaves}
