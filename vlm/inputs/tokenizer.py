"""Tokenizer: a `tokenizers` vocabulary with text cleaning, special tokens and padding.

The vocabulary maps text to ids. The rules (`TokenizerConfig`) define how text is cleaned before
and how ids become rows of a fixed length after. Both belong to the trained model.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Bool, Int32
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm._json import parse
from vlm.config import TokenizerConfig, from_dict, to_dict
from vlm.errors import ConfigError, DataError, warn_once
from vlm.inputs.cleaning import CLEANERS
from vlm.inputs.vocabulary_check import MAX_FILE, library_errors, parse_vocabulary
from vlm.paths import as_path, replace_text

VOCABULARY_FILE = "tokenizer.json"
RULES_FILE = "vlm_tokenizer.json"


class Tokenizer:
    """Tokenizer that encodes texts as rows of token ids of one fixed length.

    A row is `[bos] text [eos]`, truncated to `context_length` and padded. With `keep_eos` a
    truncated row still ends with eos. Without `copy`, the settings of `vocabulary` are changed.

    Raises:
        ConfigError: the rules name a token that is not in the vocabulary.

    Example:
        >>> tokens = model.tokenizer(["a red square", "a blue stripe"])
        >>> tokens.shape, str(tokens.dtype)
        ((2, 12), 'int32')
        >>> model.tokenizer.decode(tokens)
        ['a red square', 'a blue stripe']
    """

    def __init__(
        self, vocabulary: tokenizers.Tokenizer, config: TokenizerConfig, *, copy: bool = True
    ):
        specials = [i for i in (config.bos_id, config.eos_id) if i is not None]
        if config.context_length <= len(specials):
            raise ConfigError(
                f"context_length {config.context_length} leaves no position for text after "
                f"{len(specials)} special tokens: make it larger"
            )
        # Truncation, padding and specials are done here; the caller's object stays as it is.
        self._vocabulary = _copied(vocabulary) if copy else vocabulary
        self._vocabulary.no_truncation()
        self._vocabulary.no_padding()
        self._vocabulary.encode_special_tokens = not config.parse_special
        self.config = config
        for name in ("pad_id", "bos_id", "eos_id"):
            token = getattr(config, name)
            if token is not None and self._vocabulary.id_to_token(token) is None:
                raise ConfigError(
                    f"TokenizerConfig.{name} is {token}, which this vocabulary of "
                    f"{self.vocab_size} tokens does not have: give the id of one of its tokens"
                )

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of rows of an embedding table for this vocabulary."""
        return max(self._vocabulary.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def vocabulary(self) -> tokenizers.Tokenizer:
        """Copy of the vocabulary, without the rules."""
        return _copied(self._vocabulary)

    def __call__(
        self, texts: str | Sequence[str], prompt: str | None = None
    ) -> Int32[np.ndarray, "n l"]:
        """Encode texts as token ids; one string counts as a list of one.

        `prompt` names one of `config.prompts`; None is the default one, and "" none.

        Raises:
            ConfigError: an unknown prompt.
            DataError: a text is not a string.
        """
        return self.rows(texts, prompt)[0]

    def rows(
        self, texts: str | Sequence[str], prompt: str | None = None
    ) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, " n"]]:
        """Encode texts as token ids; also return which texts were truncated.

        Raises:
            ConfigError: an unknown prompt.
            DataError: a text is not a string.
        """
        config = self.config
        rows = self._encode(texts, prompt)
        out = np.full((len(rows), config.context_length), config.pad_id, np.int32)
        truncated = np.zeros(len(rows), bool)
        head = [] if config.bos_id is None else [config.bos_id]
        tail = [] if config.eos_id is None else [config.eos_id]
        capacity = config.context_length - len(head)
        for i, (row, ids) in enumerate(zip(out, rows, strict=True)):
            truncated[i] = len(ids) + len(tail) > capacity
            if not truncated[i]:
                ids = head + ids + tail
            elif config.keep_eos:
                kept = capacity - len(tail)
                left = config.truncation_side == "left"
                ids = head + (ids[len(ids) - kept :] if left else ids[:kept]) + tail
            elif config.truncation_side == "left":
                ids = head + (ids + tail)[-capacity:]
            else:
                ids = head + ids[:capacity]
            if config.pad_side == "right":
                row[: len(ids)] = ids
            else:
                row[len(row) - len(ids) :] = ids
        if config.zeroed_id is not None:
            out[out == config.zeroed_id] = 0
        return out, truncated

    def count_truncated(self, texts: str | Sequence[str]) -> int:
        """Count the texts that are too long for `context_length` and are truncated."""
        return int(self.rows(texts)[1].sum())

    def lengths(self, texts: str | Sequence[str], prompt: str | None = None) -> list[int]:
        """Count the tokens of each text, with its prompt, bos and eos, and without truncation."""
        specials = sum(i is not None for i in (self.config.bos_id, self.config.eos_id))
        return [len(ids) + specials for ids in self._encode(texts, prompt)]

    def decode(
        self, tokens: Int32[np.ndarray, "n l"] | Sequence[Int32[np.ndarray, " l"] | Sequence[int]]
    ) -> list[str]:
        """Decode each row up to its eos, without special tokens."""
        config, texts = self.config, []
        for row in np.asarray(tokens).tolist():
            if config.bos_id is not None:
                row = [i for i in row if i != config.bos_id]
            if config.pad_side == "left":  # before searching eos: pad may be the same token
                first = next((k for k, i in enumerate(row) if i != config.pad_id), len(row))
                row = row[first:]
            if config.eos_id in row:
                row = row[: row.index(config.eos_id)]
            row = [i for i in row if i != config.pad_id]
            texts.append(self._vocabulary.decode(row, skip_special_tokens=True).strip())
        return texts

    def save(self, folder: epath.PathLike) -> None:
        """Write `tokenizer.json` (the vocabulary) and `vlm_tokenizer.json` (the rules)."""
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY_FILE).write_text(self._vocabulary.to_str(pretty=True))
        # Last: the folder of a process that was killed meanwhile has no rules.
        replace_text(folder / RULES_FILE, json.dumps(to_dict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Tokenizer":
        """Read a tokenizer that `save` wrote.

        Raises:
            DataError: a file is missing or corrupt; the message names it.
        """
        rules = _read(as_path(folder) / RULES_FILE)
        try:
            config = from_dict(TokenizerConfig, parse(rules))
        except (ValueError, ConfigError) as error:
            raise DataError(f"{as_path(folder) / RULES_FILE} is corrupt: {error}") from None
        return cls.from_file(as_path(folder) / VOCABULARY_FILE, config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary file, without the rules of `config`."""
        return hashlib.sha256(self._vocabulary.to_str().encode()).hexdigest()[:32]

    @classmethod
    def from_file(cls, path: epath.PathLike, config: TokenizerConfig) -> "Tokenizer":
        """Make a tokenizer from any `tokenizer.json`, with rules of this package.

        Raises:
            DataError: the file is missing or is not a `tokenizer.json`.
        """
        return cls(read_vocabulary(path), config, copy=False)

    def with_rules(self, config: TokenizerConfig) -> "Tokenizer":
        """Return a tokenizer with the same vocabulary and other rules."""
        return Tokenizer(self._vocabulary, config)

    def __reduce__(self):  # pickled to reader processes
        return Tokenizer, (self._vocabulary, self.config)

    def _encode(self, texts: str | Sequence[str], prompt: str | None = None) -> list[list[int]]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} is {text!r}, not a string: give strings only")
        clean, before = CLEANERS[self.config.clean], self.config.prompt(prompt)
        if self.config.prompt_required and prompt is None and self.config.default_prompt is None:
            self._warn_without_prompt(texts)
        texts = [clean(before + text) for text in texts]
        if self.config.lowercase:
            texts = [text.lower() for text in texts]
        # A lone surrogate has no UTF-8 form; Python's codecs replace it by "?".
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        try:
            with library_errors():
                encoded = self._vocabulary.encode_batch_fast(texts, add_special_tokens=False)
        except ValueError as error:
            raise DataError(
                f"the vocabulary cannot tokenize these texts ({error}): shorten them, or get the "
                "model again"
            ) from None
        return [encoding.ids for encoding in encoded]

    def _warn_without_prompt(self, texts: list[str]) -> None:
        """Log a warning once, unless all texts begin with a prompt of the model."""
        prompts = dict(self.config.prompts)
        if not all(text.startswith(tuple(prompts.values())) for text in texts):
            warn_once(
                "texts are encoded without a prompt, and the model was trained with one before "
                f"each text: choose one of {', '.join(prompts)} with encode_text(prompt=), "
                'Bundle.with_prompt or --prompt, or "" for none'
            )


class TwoTokenizers:
    """Pair of tokenizers: a row is the student's tokens followed by the teacher's."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer):
        self._student, self._teacher = student, teacher
        # Rules of the student, with the total length of both rows.
        length = student.config.context_length + teacher.config.context_length
        self.config = dataclasses.replace(student.config, context_length=length)

    def __call__(self, texts: str | Sequence[str]) -> Int32[np.ndarray, "n l"]:
        return self.rows(texts)[0]

    def rows(
        self, texts: str | Sequence[str]
    ) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, " n"]]:
        """Encode texts for both; also return which texts were truncated for the student."""
        tokens, truncated = self._student.rows(texts)
        return np.concatenate([tokens, self._teacher(texts)], axis=1), truncated

    def split(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Split the tokens of a batch into `tokens` and `teacher_tokens`."""
        length = self._student.config.context_length
        ours, theirs = np.split(batch["tokens"], [length], axis=1)
        return batch | {"tokens": np.ascontiguousarray(ours), "teacher_tokens": theirs}


AnyTokenizer = Tokenizer | TwoTokenizers  # tokenizers of a training batch


def read_vocabulary(path: epath.PathLike) -> tokenizers.Tokenizer:
    """Read the vocabulary of a `tokenizer.json`; DataError if it is missing or corrupt."""
    text = _read(as_path(path))
    try:
        return parse_vocabulary(text)
    except ValueError as error:
        raise DataError(f"{as_path(path)} is not a tokenizer.json: {str(error)[:200]}") from None


def _copied(vocabulary: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    try:
        with library_errors():
            return tokenizers.Tokenizer.from_str(vocabulary.to_str())
    except ValueError as error:
        raise ConfigError(
            f"this vocabulary is inconsistent ({error}): give the one that the model was trained "
            "with"
        ) from None


def train_bpe(
    texts: Iterable[str], vocab_size: int, context_length: int, *, lowercase: bool = False
) -> Tokenizer:
    """Train a byte-level BPE vocabulary (Sennrich et al., 2016; bytes as in GPT-2) on `texts`.

    Padding is token 0 and end of text is token 1. There is no begin token, since neither pooling at
    the end token nor at the last position needs one. Every string has an encoding, and the order of
    the texts does not matter.

    Raises:
        ConfigError: `vocab_size` cannot hold the 256 bytes and the special tokens.
        DataError: there are no texts.

    Example:
        >>> from vlm.inputs import train_bpe
        >>> tokenizer = train_bpe(["a cat", "a dog"], vocab_size=270, context_length=8)
        >>> tokenizer.decode(tokenizer(["a dog"]))
        ['a dog']
    """
    specials, alphabet = ["<pad>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    smallest = len(specials) + len(alphabet)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size {vocab_size} cannot hold {len(alphabet)} bytes and {len(specials)} "
            f"special tokens: make it at least {smallest}"
        )
    texts = sorted(text.lower() if lowercase else text for text in texts)
    if not texts:
        raise DataError("there are no texts to train a vocabulary on: give at least one caption")
    vocabulary = tokenizers.Tokenizer(models.BPE())
    # With the prefix space a word is the same token at the start of a text and inside it.
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    vocabulary.train_from_iterator(texts, trainer)
    config = TokenizerConfig(context_length=context_length, pad_id=0, eos_id=1, lowercase=lowercase)
    return Tokenizer(vocabulary, config)


def _read(path: epath.Path) -> str:
    try:
        if (length := path.stat().length) > MAX_FILE:
            raise DataError(f"{path} has {length:,} bytes, which no vocabulary has: get it again")
        return path.read_text()
    except FileNotFoundError:
        raise DataError(
            f"there is no {path}: give a folder that a tokenizer was saved in"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
