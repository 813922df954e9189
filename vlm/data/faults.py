"""Bad samples: what is wrong with them, how many a run bears, and where they are written down.

Beside them are counted the texts that lost their tail, which are not bad.
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
from vlm.paths import as_path, is_remote

FILE = "bad-samples.jsonl"

logger = logging.getLogger(__name__)

_AT_LEAST = 100  # bad samples, before their share means anything
_FLUSH_SECONDS = 60.0  # between writes to a bucket, where a file is always written whole


class BadSample(DataError):
    """A sample that cannot be trained on: its `kind` in a few words, where it is, and why.

    What cannot be read of a shard is one of them that stands for `samples`, known or estimated.
    """

    def __init__(self, kind: str, where: str, why: str, samples: int = 1):
        super().__init__(why)
        self.kind, self.where, self.samples = kind, where, samples

    def __reduce__(self):
        return BadSample, (self.kind, self.where, str(self), self.samples)

    def record(self) -> dict[str, Any]:
        """As a row of the run's file."""
        samples = {"samples": self.samples} if self.samples > 1 else {}
        return {"kind": self.kind, "where": self.where, "why": str(self), **samples}


def from_record(record: dict[str, Any]) -> BadSample:
    """A bad sample from its row."""
    return BadSample(record["kind"], record["where"], record["why"], record.get("samples", 1))


class TooManyBad(DataError):
    """More bad samples than the config allows."""

    @classmethod
    def in_a_row(cls, count: int, last: BadSample) -> "TooManyBad":
        return cls(
            f"{count} bad samples came one after another, the last of them in {last.where} "
            f"({last}): check the data, or raise data.max_bad_in_a_row"
        )


class BadSamples:
    """Counts the bad samples of a run by kind and writes each to a file; counts the texts cut.

    The counts are part of a checkpoint, so that a resumed run stops where the whole one would. The
    file is of one process; rows of steps that a resumed run repeats are written again.

    Args:
        max_share: of bad samples; more of them end the run.
        folder: of the file; None writes none.
        process_index: of this process.
        examples: how many samples this process has in an epoch, lost shards included. Shards count
            against them, since many are opened before the first of their samples is seen.
        spare: samples that shards may lose in any case, where a process has but a few of them.
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
        self._file_is_ours = False  # or of a run that was killed before its first checkpoint
        self._written_at = time.monotonic()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()  # more samples, of shards
        self.seen = 0  # good and bad; a shard that is lost is one
        self.texts_cut = 0  # of good samples: too long for the context

    def take(self, step: int, rows: int, bad: list[dict[str, Any]], texts_cut: int = 0) -> None:
        """Count a batch of `rows` good samples and the bad ones that were met on the way to it.

        The texts of `texts_cut` of the good ones lost their tail. Of a shard that is lost, in whole
        or in part, all its samples count, and it is logged at once.

        Raises:
            TooManyBad: their share has passed the limit.
        """
        self.seen += rows + len(bad)
        self.texts_cut += texts_cut
        if not bad:
            return
        for record in bad:
            self.kinds[record["kind"]] += 1
            if (samples := record.get("samples", 1)) > 1:
                self.lost[record["kind"]] += samples - 1
                if rows:  # else the source has logged it when it was opened
                    logger.warning("%s: about %s samples are lost", record["why"], f"{samples:,}")
        if self._path is not None:
            self._rows += [json.dumps({"step": step, **record}) + "\n" for record in bad]
            # What is known before the first batch waits, for a resumed run has it in its file.
            rarely = is_remote(self._path)
            if rows and (not rarely or time.monotonic() - self._written_at > _FLUSH_SECONDS):
                self.flush()
        count = self.kinds.total()
        if self._loses_too_much():
            total, seen = self._totals()
            seen = max(seen, self._examples or 0)
        elif count > _AT_LEAST and count > self._max_share * self.seen:
            total, seen = count, self.seen
        else:
            return
        self.flush()
        last = bad[-1]
        raise TooManyBad(
            f"{total:,} of {seen:,} samples are bad ({self.summary()}), more than the "
            f"{self._max_share:.1%} of data.max_bad_share, the last of them in "
            f"{last['where']} ({last['why']}): check the data, or raise the limit"
        )

    def _loses_too_much(self) -> bool:
        """Whether the shards lost so far are more than their share of all epochs begun."""
        if not self.lost:
            return False
        total, seen = self._totals()
        if self._examples:
            # A quarter more, for their number may be an estimate and an epoch begin early.
            seen = self._examples * math.ceil(seen / self._examples + 0.25)
        return total > self._max_share * seen + self._spare

    def _totals(self) -> tuple[int, int]:
        """(bad, all) samples so far, those of lost shards included."""
        more = sum(self.lost.values())
        return self.kinds.total() + more, self.seen + more

    def summary(self) -> str:
        """Such as `3 broken image, 2 missing shard (of 20,000 samples)`."""
        return ", ".join(
            f"{count:,} {kind}"
            + (f" (of {count + self.lost[kind]:,} samples)" if self.lost[kind] else "")
            for kind, count in self.kinds.most_common()
        )

    @property
    def good(self) -> int:
        """How many samples were good so far."""
        return self.seen - self.kinds.total()

    def report(self) -> str:
        """Lines for the end of a run; empty if all was well."""
        said = []
        if self.kinds:
            where = "" if self._path is None else f", named in {self._path}"
            total, seen = self._totals()
            count = f"{total:,} of {seen:,} samples"
            said.append(f"{count} were bad ({self.summary()}){where}")
        if self.texts_cut:
            share = self.texts_cut / self.good
            said.append(
                f"{self.texts_cut:,} of {self.good:,} texts ({share:.1%}) were too long for "
                "tokenizer.context_length and lost their tail"
            )
        return "\n".join(said)

    def flush(self) -> None:
        """Write what is not yet written."""
        if not self._rows or self._path is None:
            return
        rows, self._rows = "".join(self._rows), []
        self._written_at = time.monotonic()
        more, self._file_is_ours = self._file_is_ours, True
        if is_remote(self._path):
            before = self._path.read_text() if more and self._path.exists() else ""
            self._path.write_text(before + rows)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.fspath(self._path), "a" if more else "w", encoding="utf-8") as f:
            f.write(rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kinds, lost = dict(self.kinds), dict(self.lost)
        return {"seen": self.seen, "kinds": kinds, "lost": lost, "texts_cut": self.texts_cut}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state`, of each process by its number, before batch number `step`."""
        mine = state.get(str(self.process_index), {"seen": 0, "kinds": {}})
        self.seen, self.kinds = int(mine["seen"]), collections.Counter(mine["kinds"])
        # Older runs did not count these.
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
    except (ValueError, KeyError, TypeError):  # torn when the run was killed
        return float("inf")
