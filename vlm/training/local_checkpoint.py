"""Local checkpoints: each process writes its part of the state to a disk of its host.

They are quick, and so frequent. A restart takes the newest step of which the processes hold every
part, and sends shards to processes that lack them, such as that of a host that was replaced. The
history of the run decides which parts it may use: those of one start, of the same settings, and
before every later start or rollback.
"""

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm.cluster.processes import broadcast_text, exchange_texts, process_name
from vlm.errors import CheckpointError
from vlm.paths import as_config_error, on_disk, storage_error_reason
from vlm.training.changes import settings_digest
from vlm.training.console import log
from vlm.training.local_parts import Part, Shard, digest, layout, local_shards, write_part
from vlm.training.run import Run
from vlm.training.shard_exchange import Holders, assembled, combined, pieces_of, send

_NAME = re.compile(r"start-\d+-step-(\d+)-process-\d+\.part")

# Of a part: step, number and digest of the rows of the history at its start, digest of the settings
Origin = tuple[int, int, str, str]


class LocalCheckpoints:
    """The local checkpoints of a run. If they are off, none is scheduled and none restored.

    As a context manager, waits for the writer on exit.

    Raises:
        ConfigError: the folder cannot be made on this host, for a new run.
    """

    def __init__(self, run: Run):
        config = run.experiment.local_checkpoints
        self._run, self._every = run, config.every
        self._settings = settings_digest(run.experiment)
        self._start: tuple[int, str] | None = None  # rows of the history, and their digest
        self._complete = 0  # newest step that all processes have written
        self._writer = ThreadPoolExecutor(1, "vlm-local-checkpoint")
        self._writing: Future[float] | None = None
        self._last: tuple[int, int, float] = (0, 0, 0.0)  # step, bytes, seconds of the last copy
        self._corrupt: set[Path] = set()
        self._logged: set[str] = set()
        self._folder: Path | None = None
        if config.local_folder is not None:
            path = str(on_disk(run.folder))
            name = f"{run.folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
            self._folder = Path(config.local_folder, name)
            self._open(self._folder)

    def _open(self, folder: Path) -> None:
        failed = as_config_error(
            f"{process_name()} cannot write local checkpoints to {folder}",
            "give another --local-checkpoints.folder",
        )
        # A disk that fails later does not stop the run: `save` warns of it.
        with contextlib.suppress(OSError) if self._run.resumed else failed:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.unfinished"):  # of a process that was killed
                path.unlink(missing_ok=True)

    def __enter__(self) -> "LocalCheckpoints":
        return self

    def __exit__(self, *error) -> None:
        self._writer.shutdown()

    def is_scheduled(self, step: int) -> bool:
        """Whether to save after `step`."""
        return self._folder is not None and step % self._every == 0

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Copy the shards of this process to the host, and start to write them.

        The last write ends before. If it failed, it is warned of. All processes must call it.
        """
        assert self._folder is not None
        self._finish()
        if self._start is None:
            self._start = self._new_start()
        began = time.monotonic()
        shards = local_shards(state)
        size = sum(array.nbytes for array in shards.values())
        self._last = step, size, time.monotonic() - began
        about = {
            "origin": [step, *self._start, self._settings],
            "data": data_state,
            "layout": layout(state),
            "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        }
        name = f"start-{self._start[0]}-step-{step}-process-{jax.process_index()}.part"
        file, kept = self._folder / name, {step, self._complete}
        self._writing = self._writer.submit(_write, file, kept, about, shards)

    def clear(self) -> None:
        """Delete the local checkpoints of the run, once its folder has a newer one."""
        if self._folder is not None:
            self._finish()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _finish(self) -> None:
        """Wait for the last write of all processes, and log how it went."""
        if self._writing is None:
            return
        problem, seconds = "", 0.0
        try:
            seconds = self._writing.result()
        except Exception as error:  # it must not stop the run
            problem = storage_error_reason(error) or str(error)
        self._writing, (step, size, copied) = None, self._last
        problems = exchange_texts(problem)
        if not any(problems):
            self._complete = step
            self._log_once(
                log.info,
                f"local checkpoints every {self._every} steps in {self._folder}: "
                f"{size / 1e9:.3g} GB, copied in {copied:.2f} s while training waits, then "
                f"written in {seconds:.2f} s",
                key="written",
            )
        for process, why in enumerate(problems):
            if why:
                self._log_once(
                    log.warning,
                    f"{process_name(process)} could not write the local checkpoint of step "
                    f"{step:,} to {self._folder} ({why}): free its disk; the run goes on",
                    key=f"{process} {why}",
                )

    def _log_once(self, write: Callable[[str], None], text: str, key: str | None = None) -> None:
        if (key or text) not in self._logged:
            self._logged.add(key or text)
            write(text)

    def _new_start(self) -> tuple[int, str]:
        """Return number and digest of the rows of the run's history, for the parts to come."""
        rows = self._run.starts() if jax.process_index() == 0 else []
        steps = [row["step"] for row in rows if "phase" not in row]
        text = broadcast_text(json.dumps([len(rows), digest(rows), *steps[-1:]]))
        count, history, self._complete = json.loads(text)
        return count, history

    def restore(
        self, abstract: Any, accepts: Callable[[Any], bool], after: int
    ) -> tuple[Any, Any] | None:
        """Restore the newest complete local checkpoint as (state, data_state).

        None if none is of a step after `after`, the newest of the run folder. `abstract` and
        `accepts` are as in `Checkpoints.restore`. All processes must call it.
        """
        if self._folder is None:
            return None
        self._finish()
        self._start = None
        parts = self._parts(self._folder)
        texts = exchange_texts(json.dumps(sorted({_origin(part) for part in parts})))
        origins = {(*origin,) for text in texts for origin in json.loads(text)}
        for origin in self._usable(origins, after):
            held = {shard: p for p in parts if _origin(p) == origin for shard in p.sizes}
            about, holders = combined(held)
            present = sum(size for size, _ in holders.values()) / about["bytes"]
            if present < 1:
                self._reject(origin, f"the processes hold {present:.1%} of it")
                continue
            if not accepts(about["data"]):
                return None, about["data"]
            if about["layout"] != digest(layout(abstract)):
                self._reject(origin, "it has another architecture than the run")
                continue
            if (read := self._read(abstract, held, holders)) is None:
                return self.restore(abstract, accepts, after)
            state, sent = read
            log.info(
                f"starting from the local checkpoint of step {origin[0]:,}: the run folder has "
                f"{f'that of step {after:,}' if after >= 0 else 'none'}; {sent / 1e9:.3g} GB were "
                "sent to processes that lacked them"
            )
            return state, about["data"]
        if self._run.resumed:
            newest = f"that of step {after:,} of the run folder" if after >= 0 else "step 0"
            self._log_once(log.info, f"no local checkpoint is newer than {newest}")
        return None

    def _parts(self, folder: Path) -> list[Part]:
        """Return the parts on this host that can be opened."""
        parts, files = [], set[Path]()
        with contextlib.suppress(OSError):
            files = set(folder.glob("*.part"))
        for file in sorted(files - self._corrupt):
            try:
                parts.append(Part(file))
            except (OSError, CheckpointError) as error:
                self._log_once(log.warning, str(error))
        return parts

    def _usable(self, origins: Iterable[Origin], after: int) -> list[Origin]:
        """Return the origins that the run may go on from, newest first, as process 0 finds."""
        rows = self._run.starts() if jax.process_index() == 0 else []
        usable = []
        for origin in sorted(origins, reverse=True):
            step, count, history, settings = origin
            back = [row["step"] for row in rows[count:] if "phase" not in row]
            if step <= after:
                continue
            if count > len(rows) or digest(rows[:count]) != history:
                self._reject(origin, "it is of another run")
            elif min(back, default=step) < step:
                self._reject(origin, f"the run has gone back to step {min(back):,} since")
            elif settings != self._settings:
                self._reject(origin, "the settings have changed since")
            else:
                usable.append(origin)
        return [(*origin,) for origin in json.loads(broadcast_text(json.dumps(usable)))]

    def _reject(self, origin: Origin, why: str) -> None:
        self._log_once(log.info, f"the local checkpoint of step {origin[0]:,} is not used: {why}")

    def _read(
        self, abstract: Any, held: Mapping[Shard, Part], holders: Mapping[Shard, Holders]
    ) -> tuple[Any, int] | None:
        """Return the state, and the bytes that were sent; None if a part turns out corrupt."""
        pieces = pieces_of(abstract, holders)
        needed = {shard for sources in pieces.values() for shard in sources}
        texts = exchange_texts(json.dumps(sorted(needed - held.keys())))
        sent = sorted({Shard.of(value) for text in texts for value in json.loads(text)})
        own = {shard for shard in sent if holders[shard].sender == jax.process_index()}
        values: dict[Shard, np.ndarray] = {}
        problem = ""
        for shard in held.keys() & (needed | own):
            try:
                values[shard] = held[shard].read(shard)
            except (OSError, CheckpointError) as error:
                self._corrupt.add(held[shard].file)
                problem = f"{error} ({process_name()})"
        if problems := list(filter(None, exchange_texts(problem))):
            log.warning(problems[0])
            return None
        send(sent, holders, needed, values)
        return assembled(abstract, pieces, values), sum(holders[shard].size for shard in sent)


def _origin(part: Part) -> Origin:
    step, count, history, settings = part.about["origin"]
    return step, count, history, settings


def _write(file: Path, kept: set[int], about: Any, shards: Mapping[Shard, np.ndarray]) -> float:
    """Write a part, and return the seconds; parts of other steps than `kept` are deleted before."""
    began = time.monotonic()
    for path in file.parent.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) not in kept:
            path.unlink(missing_ok=True)
    write_part(file, about, shards)
    return time.monotonic() - began
