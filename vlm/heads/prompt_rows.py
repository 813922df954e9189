"""Token sequences of prompts with context vectors before the label: [bos] context label [eos]."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.heads.prompts import class_prompts
from vlm.inputs.tokenizer import Tokenizer


class PromptRows(NamedTuple):
    """Token sequences of the prompts of m labels.

    Attributes:
        tokens: (m, l). positions: (m, k), those of the context in each row.
        words: the k tokens that the context replaces; empty if it replaces no words.
    """

    tokens: Int[np.ndarray, "m l"]
    positions: Int[np.ndarray, "m k"]
    words: tuple[int, ...]


def prompt_rows(
    model: Bundle, labels: Sequence[str], template: str, n_ctx: int | None = None
) -> PromptRows:
    """Tokenize `template` filled with each label.

    Args:
        model: a model from `vlm.load`.
        labels: the names.
        template: a sentence with `{}` for the label. Without `n_ctx`, the context replaces the
            tokens before the label, and is initialized with their embeddings.
        n_ctx: number of context vectors that replace the words before the label.

    Raises:
        ConfigError: invalid labels or template, no words before the label and no `n_ctx`, or a
            prompt that is too long; the message names the label.
    """
    before, _, after = template.partition("{}")
    own = class_prompts(list(labels), [template])
    words = _content(model, [before.strip()])[0] if before.strip() else []
    if n_ctx is None:
        if not words:
            raise ConfigError(
                f"template {template!r} has no words before the label: give n_ctx, the number of "
                "context vectors"
            )
        texts = [sentence for (sentence,) in own.values()]
    else:
        if n_ctx < 1:
            raise ConfigError(f"n_ctx is {n_ctx}: learn at least one vector")
        texts = [f"{label}{after}" for label in own]
    k = len(words) if n_ctx is None else n_ctx
    filled = zip(own, _content(model, texts), strict=True)
    contents = {}
    for label, ids in filled:
        if n_ctx is not None:
            # Placeholder tokens: never read, but they must be neither padding nor an end.
            ids = ids[:1] * k + ids
        elif ids[:k] != words:
            raise ConfigError(
                f"the tokenizer joins label {label!r} with the words before it in {template!r}: "
                "give n_ctx, whose vectors are independent of the label"
            )
        contents[label] = ids
    tokens, positions = _rows(model.tokenizer, contents, k)
    return PromptRows(_cut(model, tokens, contents), positions, () if n_ctx else tuple(words))


def _content(model: Bundle, texts: list[str]) -> list[list[int]]:
    """Tokenize each text, without begin, end and padding tokens."""
    tokenizer = model.tokenizer
    config = tokenizer.config
    rows, lengths = tokenizer(texts), tokenizer.lengths(texts)
    begin, end = (int(i is not None) for i in (config.bos_id, config.eos_id))
    found = []
    for text, row, length in zip(texts, rows.tolist(), lengths, strict=True):
        if length > len(row):
            raise ConfigError(
                f"{text!r} is {length} tokens long and the model takes {len(row)}: shorten it"
            )
        ids = row[:length] if config.pad_side == "right" else row[len(row) - length :]
        found.append(ids[begin : len(ids) - end])
        if not found[-1]:
            raise ConfigError(f"{text!r} has no tokens: give another name")
    return found


def _rows(
    tokenizer: Tokenizer, contents: dict[str, list[int]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Make the tokenizer's rows from these tokens, and the first k positions of the text."""
    config = tokenizer.config
    head = [] if config.bos_id is None else [config.bos_id]
    tail = [] if config.eos_id is None else [config.eos_id]
    tokens = np.full((len(contents), config.context_length), config.pad_id, np.int32)
    positions = np.zeros((len(contents), k), np.int32)
    for row, at, (label, ids) in zip(tokens, positions, contents.items(), strict=True):
        sequence = head + ids + tail
        if len(sequence) > len(row):
            raise ConfigError(
                f"label {label!r} with {k} context vectors is {len(sequence)} tokens long and the "
                f"model takes {len(row)}: learn fewer vectors, or shorten the label"
            )
        start = 0 if config.pad_side == "right" else len(row) - len(sequence)
        row[start : start + len(sequence)] = sequence
        at[:] = start + len(head) + np.arange(k)
    if config.zeroed_id is not None:
        tokens[tokens == config.zeroed_id] = 0
    return tokens, positions


def _cut(model: Bundle, tokens: np.ndarray, contents: dict[str, list[int]]) -> np.ndarray:
    """Remove the common padding of rows, if the tower ignores padding."""
    text, config = model.config.text, model.tokenizer.config
    causal = text.causal and text.pool in ("end", "argmax")
    masked = text.pad_id is not None and text.pool in ("mean", "map", "first")
    if config.pad_side == "left" or not (causal or masked):
        return tokens
    specials = sum(i is not None for i in (config.bos_id, config.eos_id))
    return tokens[:, : max(map(len, contents.values())) + specials]
