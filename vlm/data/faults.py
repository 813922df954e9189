"""Bad samples: what is wrong with them, how many a run bears, and where they are written down.

Beside them are counted the texts that lost their tail, which are not bad.
"""

import collections
import json
import os
import time
from typing import Any

from etils import epath

from vlm.errors import DataError
from vlm.paths import as_path, is_remote

FILE = "bad-samples.jsonl"

_AT_LEAST = 100  # bad samples, before their share means anything
_FLUSH_SECONDS = 60.0  # between writes to a bucket, where a file is always written whole


class BadSample(DataError):
    """A sample that cannot be trained on: its `kind` in a few words, where it is, and why."""

    def __init__(self, kind: str, where: str, why: str):
        super().__init__(why)
        self.kind, self.where = kind, where

    def __reduce__(self):
        return BadSample, (self.kind, self.where, str(self))

    def record(self) -> dict[str, str]:
        """As a row of the run's file."""
        return {"kind": self.kind, "where": self.where, "why": str(self)}


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
    file is of one process; rows of steps that a resumed run repeats are written anew.
    """

    def __init__(self, max_share: float, folder: epath.PathLike | None, process_index: int = 0):
        self._max_share, self.process_index = max_share, process_index
        self._path = None
        if folder is not None:
            name = FILE if process_index == 0 else f"bad-samples-{process_index}.jsonl"
            self._path = as_path(folder) / name
        self._rows: list[str] = []  # not yet written
        self._file_is_ours = False  # or of a run that was killed before its first checkpoint
        self._written_at = time.monotonic()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.seen = 0  # good and bad
        self.texts_cut = 0  # of good samples: too long for the context

    def take(self, step: int, rows: int, bad: list[dict[str, str]], texts_cut: int = 0) -> None:
        """Count a batch of `rows` good samples and the bad ones that were met on the way to it.

        The texts of `texts_cut` of the good ones lost their tail.

        Raises:
            TooManyBad: their share has passed the limit.
        """
        self.seen += rows + len(bad)
        self.texts_cut += texts_cut
        if not bad:
            return
        self.kinds.update(record["kind"] for record in bad)
        if self._path is not None:
            self._rows += [json.dumps({"step": step, **record}) + "\n" for record in bad]
            # What is known before the first batch waits, for a resumed run has it in its file.
            rarely = is_remote(self._path)
            if rows and (not rarely or time.monotonic() - self._written_at > _FLUSH_SECONDS):
                self.flush()
        total = self.kinds.total()
        if total > _AT_LEAST and total > self._max_share * self.seen:
            self.flush()
            last = bad[-1]
            raise TooManyBad(
                f"{total:,} of {self.seen:,} samples are bad ({self.summary()}), more than the "
                f"{self._max_share:.1%} of data.max_bad_share, the last of them in "
                f"{last['where']} ({last['why']}): check the data, or raise the limit"
            )

    def summary(self) -> str:
        """Such as `3 broken image, 1 no caption`."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())

    @property
    def good(self) -> int:
        """How many samples were good so far."""
        return self.seen - self.kinds.total()

    def report(self) -> str:
        """Lines for the end of a run; empty if all was well."""
        said = []
        if self.kinds:
            where = "" if self._path is None else f", named in {self._path}"
            count = f"{self.kinds.total():,} of {self.seen:,} samples"
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
        return {"seen": self.seen, "kinds": dict(self.kinds), "texts_cut": self.texts_cut}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state`, of each process by its number, before batch number `step`."""
        mine = state.get(str(self.process_index), {"seen": 0, "kinds": {}})
        self.seen, self.kinds = int(mine["seen"]), collections.Counter(mine["kinds"])
        self.texts_cut = int(mine.get("texts_cut", 0))  # older runs did not count them
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
