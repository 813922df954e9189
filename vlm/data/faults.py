"""Bad samples: their kinds, the limit of a run, and the file that lists them.

Truncated texts are counted here too; they are not bad samples.
"""

import collections
import json
import logging
import math
import os
import time
from typing import Any

from etils import epath

from vlm.errors import DataError
from vlm.paths import as_path, caused_by_outage, is_remote

FILE = "bad-samples.jsonl"

logger = logging.getLogger(__name__)

_MIN_BAD = 100  # bad samples, before the limit on their fraction applies
_FLUSH_SECONDS = 60.0  # between writes to a bucket, which rewrite the whole file


class BadSample(DataError):
    """Error for a sample that cannot be used: its `kind`, location and reason.

    The unreadable part of a shard is one `BadSample` for `samples` samples, known or estimated.
    With `outage`, the storage failed, and may be read later.
    """

    def __init__(self, kind: str, where: str, why: str, samples: int = 1, outage: bool = False):
        super().__init__(why)
        self.kind, self.where, self.samples, self.retriable = kind, where, samples, outage

    @classmethod
    def failed_read(cls, where: str, why: str, error: Exception, samples: int = 1) -> "BadSample":
        """Make the fault of a sample whose read failed with `error`."""
        return cls("failed read", where, why, samples, caused_by_outage(error))

    def __reduce__(self):
        return BadSample, (self.kind, self.where, str(self), self.samples, self.retriable)

    def record(self) -> dict[str, Any]:
        """Return the arguments, as a row of the run's file."""
        more: dict[str, Any] = {"samples": self.samples} if self.samples > 1 else {}
        more |= {"outage": True} if self.retriable else {}
        return {"kind": self.kind, "where": self.where, "why": str(self), **more}


class TooManyBad(DataError):
    """Error for more bad samples than the config allows.

    After an outage of the storage it is retriable.
    """

    @classmethod
    def of(cls, why: str, limit: str, outage: bool) -> "TooManyBad":
        """Make the error for more than `limit`; `outage`: for lack of the storage."""
        fix = f"check the data, or raise {limit}"
        error = cls(f"{why}: {'resume when the storage responds' if outage else fix}")
        error.retriable = outage
        return error

    @classmethod
    def in_a_row(cls, count: int, last: BadSample) -> "TooManyBad":
        why = f"{count} bad samples in a row, the last in {last.where} ({last})"
        return cls.of(why, "data.max_bad_in_a_row", last.retriable)


class BadSamples:
    """Counter and log file of a run's bad samples, by kind; also counts truncated texts.

    The counts are part of a checkpoint, so a resumed run stops at the same limit. Each process has
    its own file. Rows of steps that a resumed run repeats are rewritten.

    Args:
        max_share: maximum fraction of bad samples; more stop the run.
        folder: folder of the file; None writes none.
        process_index: index of this process.
        examples: samples of this process per epoch, including lost shards. Lost shards are compared
            with it, since many are opened before their first samples are used.
        spare: samples that lost shards may have in any case, for processes with few shards.
    """

    def __init__(
        self,
        max_share: float,
        folder: epath.PathLike | None,
        process_index: int = 0,
        *,
        examples: int | None = None,
        spare: int = 0,
    ):
        self._max_share, self.process_index = max_share, process_index
        self._examples, self._spare = examples, spare
        self._path = None
        if folder is not None:
            name = FILE if process_index == 0 else f"bad-samples-{process_index}.jsonl"
            self._path = as_path(folder) / name
        self._rows: list[str] = []  # not yet written
        self._file_is_ours = False  # else it belongs to a run killed before its first checkpoint
        self._written_at = time.monotonic()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()  # further samples of shards
        self.seen = 0  # good and bad; a lost shard counts once
        self.texts_cut = 0  # good samples whose text was truncated
        self._unread = 0  # samples lost to outages of the storage, in this process

    def take(self, step: int, rows: int, bad: list[dict[str, Any]], texts_cut: int = 0) -> None:
        """Count a batch of `rows` good samples and the bad samples found while making it.

        `texts_cut` of the good samples had their text truncated. For a lost shard (or part of one)
        all its samples count, and it is logged immediately. TooManyBad if their fraction exceeds
        the limit.
        """
        self.seen += rows + len(bad)
        self.texts_cut += texts_cut
        if not bad:
            return
        for record in bad:
            self.kinds[record["kind"]] += 1
            self._unread += record.get("samples", 1) if record.get("outage") else 0
            if (samples := record.get("samples", 1)) > 1:
                self.lost[record["kind"]] += samples - 1
                if rows:  # else the source logged it when it was opened
                    logger.warning("%s: about %s samples are lost", record["why"], f"{samples:,}")
        if self._path is not None:
            self._rows += [json.dumps({"step": step, **record}) + "\n" for record in bad]
            # Faults before the first batch are not flushed: a resumed run has them in its file.
            rarely = is_remote(self._path)
            if rows and (not rarely or time.monotonic() - self._written_at > _FLUSH_SECONDS):
                self.flush()
        count = self.kinds.total()
        if self._lost_too_many():
            total, seen = self._totals()
            seen = max(seen, self._examples or 0)
        elif count > _MIN_BAD and count > self._max_share * self.seen:
            total, seen = count, self.seen
        else:
            return
        self.flush()
        why = (
            f"{total:,} of {seen:,} samples are bad ({self.summary()}), more than the "
            f"{self._max_share:.1%} of data.max_bad_share, the last of them in "
            f"{bad[-1]['where']} ({bad[-1]['why']})"
        )
        raise TooManyBad.of(why, "the limit", outage=2 * self._unread > total)

    def _lost_too_many(self) -> bool:
        """Whether lost shards exceed the limit, relative to all started epochs."""
        if not self.lost:
            return False
        total, seen = self._totals()
        if self._examples:
            # A quarter more: the number may be an estimate, and an epoch may start early.
            seen = self._examples * math.ceil(seen / self._examples + 0.25)
        return total > self._max_share * seen + self._spare

    def _totals(self) -> tuple[int, int]:
        """Return (bad, all) samples so far, including lost shards."""
        more = sum(self.lost.values())
        return self.kinds.total() + more, self.seen + more

    def summary(self) -> str:
        """Describe the counts, as `3 broken image, 2 missing shard (of 20,000 samples)`."""
        return ", ".join(
            f"{count:,} {kind}"
            + (f" (of {count + self.lost[kind]:,} samples)" if self.lost[kind] else "")
            for kind, count in self.kinds.most_common()
        )

    @property
    def good(self) -> int:
        """Number of good samples so far."""
        return self.seen - self.kinds.total()

    def report(self) -> str:
        """Describe bad samples and truncated texts at the end of a run; empty without any."""
        lines = []
        if self.kinds:
            where = "" if self._path is None else f", named in {self._path}"
            total, seen = self._totals()
            count = f"{total:,} of {seen:,} samples"
            lines.append(f"{count} were bad ({self.summary()}){where}")
        if self.texts_cut:
            share = self.texts_cut / self.good
            lines.append(
                f"{self.texts_cut:,} of {self.good:,} texts ({share:.1%}) were too long for "
                "tokenizer.context_length and were truncated"
            )
        return "\n".join(lines)

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        if not self._rows or self._path is None:
            return
        rows, self._rows = "".join(self._rows), []
        self._written_at = time.monotonic()
        append, self._file_is_ours = self._file_is_ours, True
        if is_remote(self._path):
            before = self._path.read_text() if append and self._path.exists() else ""
            self._path.write_text(before + rows)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.fspath(self._path), "a" if append else "w", encoding="utf-8") as f:
            f.write(rows)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        kinds, lost = dict(self.kinds), dict(self.lost)
        return {"seen": self.seen, "kinds": kinds, "lost": lost, "texts_cut": self.texts_cut}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue before batch `step` from `state`, a dict by process index."""
        mine = state.get(str(self.process_index), {"seen": 0, "kinds": {}})
        self.seen, self.kinds = int(mine["seen"]), collections.Counter(mine["kinds"])
        # Missing in older checkpoints.
        self.texts_cut = int(mine.get("texts_cut", 0))
        self.lost = collections.Counter(mine.get("lost", {}))
        self._rows, self._file_is_ours = [], True
        if self._path is None or not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step(line) < step]
        if len(kept) < len(lines):
            self._path.write_text("".join(kept))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # truncated when the run was killed
        return float("inf")
