"""Checkpoints of a run: state and data position together, written while training goes on."""

import functools
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import args

from vlm.errors import CheckpointError
from vlm.sharding import path_names


class Checkpoints:
    """The checkpoints of one run, newest last; as a context, leaving it waits for the writer."""

    def __init__(self, folder: epath.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        # Named here so that a resumed run can look into a checkpoint before it restores one.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for kind in (args.StandardSave, args.StandardRestore):
            handlers.add("state", kind)
        for kind in (args.JsonSave, args.JsonRestore):
            handlers.add("data", kind)
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, handler_registry=handlers
        )
        self.folder = folder
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

    def save(self, step: int, state: Any, data_state: dict[str, int]) -> None:
        """Begin to write a checkpoint. It counts only once it is whole.

        Raises:
            CheckpointError: this or the previous write failed, say because the disk is full.
        """
        while self._torn:  # nothing is written behind a newer checkpoint, even a torn one
            self._manager.delete(self._torn.pop())
        if step in self._manager.all_steps():
            return
        arguments = args.Composite(state=args.StandardSave(state), data=args.JsonSave(data_state))
        try:
            self._manager.save(step, args=arguments)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self, abstract: Any, report=print) -> tuple[Any, dict[str, int]] | None:
        """The newest whole checkpoint as (state, data_state); None if there is none at all.

        `abstract` gives shapes, dtypes and shardings: a checkpoint of one mesh restores onto
        another. A torn checkpoint is passed over for the one before it, and `report` tells so.

        Raises:
            CheckpointError: there are checkpoints and none can be read, or they hold another
                architecture; the message names what differs.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        last_error: Exception | None = None
        for step in steps:
            try:
                self._check_architecture(step, abstract)
                restored = self._manager.restore(
                    step,
                    args=args.Composite(
                        state=args.StandardRestore(abstract), data=args.JsonRestore()
                    ),
                )
            except CheckpointError:
                raise
            except Exception as error:  # whatever a torn file makes the reader say
                report(f"checkpoint {step} of {self.folder} is torn and is passed over")
                last_error = error
                self._torn.append(step)
                _hush_late_reads()
                continue
            return restored["state"], restored["data"]
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder} can be read ({last_error}): "
                "start a new run"
            )
        return None

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

    def _failed(self, error: Exception) -> CheckpointError:
        steps = self._manager.all_steps()
        kept = f"checkpoint {max(steps)} is whole and kept" if steps else "there is no earlier one"
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder} ({error}); {kept}: make room and "
            "resume the run"
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
