"""Checks of a vocabulary that may come from anybody, with bounds on what it does with a text."""

import base64
import contextlib
import json
import re
import struct
from collections.abc import Iterator
from typing import Any

import tokenizers

from vlm._json import MAX_VALUES, check_count

MAX_FILE = 200_000_000  # bytes; the largest published tokenizer.json has 35 million
MAX_ADDED = 20_000  # added tokens; published vocabularies have up to 7,000
MAX_GROWTH = 256  # characters that the normalisation may make of one; Unicode's makes up to 18
_MAX_CONTENT = 1024  # characters of a replacement
_MAX_STEPS = 512
_LONGER = {"ByteLevel": 2, "BertNormalizer": 3}  # steps that lengthen a text each time


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Convert errors of the library tokenizers to a ValueError.

    It raises bare Exception, and PanicException, a BaseException, where its Rust code panics, such
    as for a regular expression that takes too long.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, Exception):
            raise
        if type(error) is Exception or panic:
            raise ValueError(str(error)[:200]) from None
        raise


def parse_vocabulary(text: str) -> tokenizers.Tokenizer:
    """Parse a `tokenizer.json`.

    Raises:
        ValueError: it is none, or takes too much memory or time.
    """
    if len(text) > MAX_FILE:
        raise ValueError(f"it has {len(text):,} characters")
    if (added := text.count('"special"')) > MAX_ADDED:
        raise ValueError(f"it has {added:,} added tokens")
    check_count(text, MAX_VALUES)
    with library_errors():
        vocabulary = tokenizers.Tokenizer.from_str(text)
    check_vocabulary(vocabulary)
    return vocabulary


def check_vocabulary(vocabulary: tokenizers.Tokenizer) -> None:
    """Check that ids have few gaps, and that no step makes a text much longer.

    Raises:
        ValueError: the message names the fault.
    """
    ids = vocabulary.get_vocab(with_added_tokens=True).values()
    if max(ids, default=0) > 4 * len(ids) + (1 << 20):  # the library iterates over all up to it
        raise ValueError(f"its ids go up to {max(ids):,}, for {len(ids):,} tokens")
    for name in ("normalizer", "decoder"):
        part = getattr(vocabulary, name)
        if part is not None:
            steps = list(_steps(json.loads(part.__getstate__())))
            if len(steps) > _MAX_STEPS:
                raise ValueError(f"its {name} has {len(steps):,} steps")
            growth = 1
            for step in steps:
                growth *= _growth(step)
            if growth > MAX_GROWTH:
                raise ValueError(f"its {name} could make a text {growth:,} times as long")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part in order; sequences may contain each other."""
    pending = [part]
    while pending:
        step = pending.pop(0)
        if isinstance(step, list):
            pending = step + pending
        elif isinstance(step, dict):
            inner = [step[name] for name in ("normalizers", "decoders") if name in step]
            pending = inner + pending
            yield step


def _growth(step: dict[str, Any]) -> int:
    """Return how many times longer a step may make a text, at most."""
    for name in ("content", "prepend", "replacement"):
        if len(str(step.get(name, ""))) > _MAX_CONTENT:
            raise ValueError(f"its {step.get('type')} has a text of {len(step[name]):,} characters")
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern", {}), len(step.get("content", ""))
        if length := len(pattern.get("String", "")):
            return max(1, -(-content // length))
        return max(1, content) if _takes_characters(pattern) else 1 + content
    if step.get("type") == "Precompiled":
        return _longest(base64.b64decode(step.get("precompiled_charsmap") or ""))
    return _LONGER.get(step.get("type", ""), 1)


# A character or a class of characters that is not optional.
_CHARACTER = re.compile(r"(?:\[(?:\\.|[^\]\\])+\]|[^.^$*+?()\[\]{}|\\])(?![*?{])")


def _takes_characters(pattern: dict[str, Any]) -> bool:
    """Whether each match of a regular expression begins with a character.

    Such a match replaces it, and there is none between each two characters.
    """
    text = str(pattern.get("Regex", ""))
    outside = re.sub(r"\\.|\[(?:\\.|[^\]\\])+\]", "", text)  # without escapes and classes
    while outside != (outside := re.sub(r"\([^()]*\)", "", outside)):
        pass
    return "|" not in outside and _CHARACTER.match(text) is not None


def _longest(charsmap: bytes) -> int:
    """Return the length in characters of the longest replacement of a precompiled map."""
    if len(charsmap) < 4:
        return 1
    (trie,) = struct.unpack_from("<I", charsmap)
    pieces = charsmap[4 + trie :].split(b"\0")
    return max(1, *(len(piece.decode("utf-8", "replace")) for piece in pieces))
