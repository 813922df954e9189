"""Classification by learned prompts (CoOp, CoCoOp): context vectors before each label.

CoOp (arXiv:2109.01134) has one context for all images, so class embeddings are computed once.
CoCoOp (arXiv:2203.05557) shifts the context by the output of a small net for each image.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.heads.classifier_file import reading_classifier, write_classifier
from vlm.heads.prompts import class_prompts
from vlm.heads.zero_shot import Embeddings, ImageClassifier
from vlm.inputs.tokenizer import Tokenizer

KEY = "vlm prompted classifier"  # metadata key in a saved file
PROMPTS = 256  # batch size of the text tower
NET = ("inner", "inner_bias", "outer", "outer_bias")


class PromptRows(NamedTuple):
    """Token sequences of the prompts of m labels.

    Attributes:
        tokens: (m, l). positions: (m, k), those of the context in each row.
        words: the k tokens that the context replaces; empty if it replaces no words.
    """

    tokens: Int[np.ndarray, "m l"]
    positions: Int[np.ndarray, "m k"]
    words: tuple[int, ...]


class PromptedClassifier(ImageClassifier):
    """Classifier by prompts with learned context; made by `vlm.adaptation.learn_prompt`.

    Args:
        model: a model from `vlm.load`, with its text tower.
        labels: the m class names.
        rows: tokens of their prompts, with positions for the context.
        context: (k, w) vectors in the space of token embeddings.
        net: CoCoOp's net, from an image embedding to the shift of the vectors, as two layers
            (`inner`, `inner_bias`, `outer`, `outer_bias`) with a ReLU between them.
        z_labels: (m, d) embeddings of the classes, if computed already.

    Example:
        >>> labels = ["red", "green", "blue"]
        >>> classify = vlm.adaptation.learn_prompt(model, pictures, labels, n_ctx=2, steps=2)
        >>> len(classify(pictures))
        3
    """

    def __init__(
        self,
        model: Bundle,
        labels: Sequence[str],
        rows: PromptRows,
        context: Float[np.ndarray, "k w"],
        net: Mapping[str, np.ndarray] | None = None,
        z_labels: Float[np.ndarray, "m d"] | None = None,
    ):
        self.model, self.labels, self.rows = model, tuple(labels), rows
        self.context, self.net = context, None if net is None else dict(net)
        self._encode = prompt_encoder(model)
        self.z_labels = self._embed(context[None])[0] if z_labels is None else z_labels

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _encode=prompt_encoder(state["model"]))

    def logits(self, z_image: Float[Embeddings, "n d"]) -> Float[Embeddings, "n m"]:
        """Compute the logits of embeddings over the labels.

        With a net, the text tower runs for each image; without one, it works inside `jit`.
        """
        scale, bias = self.model.logit_scale, self.model.logit_bias
        if self.net is None:
            return (scale * (z_image @ self.z_labels.T) + bias).astype(np.float32)
        parts = [np.zeros((0, len(self.labels)), np.float32)]
        block = max(1, PROMPTS // len(self.labels))
        for start in range(0, len(z_image), block):
            z = z_image[start : start + block]
            moved = self.context + np.asarray(shift(self.net, z))[:, None]
            parts.append(scale * np.einsum("nd,nmd->nm", z, self._embed(moved)) + bias)
        return np.concatenate(parts).astype(np.float32)

    def _embed(self, contexts: np.ndarray) -> np.ndarray:
        """Compute (n, m, d) embeddings of all labels in each of n contexts (n, k, w)."""
        n, m = len(contexts), len(self.labels)
        owner = np.repeat(np.arange(n), m)
        row = np.tile(np.arange(m), n)
        count = min(PROMPTS, 1 << (len(owner) - 1).bit_length())
        parts = []
        for start in range(0, len(owner), count):
            # Padded with the last one, so that few shapes are compiled.
            at = np.minimum(np.arange(start, start + count), len(owner) - 1)
            tokens, positions = self.rows.tokens[row[at]], self.rows.positions[row[at]]
            parts.append(np.asarray(self._encode(tokens, contexts[owner[at]], positions)))
        return np.concatenate(parts)[: len(owner)].reshape(n, m, -1)

    def save(self, file: str | os.PathLike) -> None:
        """Write the classifier to a `.safetensors` file: contexts, class embeddings, and the net.

        It works with image embeddings of any model that has the same text tower.
        """
        tensors = {
            "tokens": self.rows.tokens,
            "places": self.rows.positions,
            "context": self.context,
            "z_labels": self.z_labels,
            **(self.net or {}),
        }
        about = {"labels": self.labels, "words": self.rows.words}
        write_classifier(file, KEY, self.model, about, tensors)

    @classmethod
    def load(cls, file: str | os.PathLike, model: Bundle) -> "PromptedClassifier":
        """Load a classifier that `save` wrote.

        Raises:
            CheckpointError: no such file, another file, or one of another model.
        """
        with reading_classifier(file, KEY, model) as (about, tensors):
            rows = PromptRows(tensors["tokens"], tensors["places"], tuple(about["words"]))
            net = {name: tensors[name] for name in NET} if NET[0] in tensors else None
            if not len(about["labels"]) == len(rows.tokens) == len(tensors["z_labels"]):
                raise ValueError("the numbers of embeddings and labels differ")
            classifier = cls(
                model, about["labels"], rows, tensors["context"], net, tensors["z_labels"]
            )
        return classifier

    def _encoders(self) -> str:
        how = "" if self.net is None else " conditioned on the image"
        return f"{self.model.name}, {len(self.context)} vectors{how}"


def prompt_encoder(model: Bundle) -> Any:
    """Compile a function of tokens (n, l), contexts (n, k, w) and positions to embeddings (n, d).

    Raises:
        ConfigError: a model without a text tower.
    """
    if getattr(getattr(model, "model", None), "text", None) is None:
        raise ConfigError(
            f"{getattr(model, 'name', model)} has no text tower that takes learned vectors: give "
            "a model that vlm.load opened with both towers"
        )
    assert model.config.text_transformer  # raises for other kinds, which take no vectors
    graph, state = nnx.split(model.model)

    @jax.jit
    def encode(state, tokens, contexts, positions):
        return nnx.merge(graph, state).encode_text_with_context(tokens, contexts, positions)

    return functools.partial(encode, state)


def shift(net: Mapping[str, Any], z_image: Any) -> Any:
    """Compute CoCoOp's shift of the context vectors for each image: (n, w)."""
    hidden = z_image @ net["inner"] + net["inner_bias"]
    hidden = hidden * (hidden > 0)
    return hidden @ net["outer"] + net["outer_bias"]


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
    text, config = model.config.text_transformer, model.tokenizer.config
    causal = text.causal and text.pool in ("end", "argmax")
    masked = text.pad_id is not None and text.pool in ("mean", "max", "map", "first")
    if config.pad_side == "left" or not (causal or masked):
        return tokens
    specials = sum(i is not None for i in (config.bos_id, config.eos_id))
    return tokens[:, : max(map(len, contents.values())) + specials]
