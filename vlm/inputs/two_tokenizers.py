"""Tokenization of a text for two models: a student and its teacher."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from vlm.config import TokenizerConfig
from vlm.inputs.tokenizer import Tokenizer


class TwoTokenizers:
    """Pair of tokenizers: a row is the student's tokens followed by the teacher's."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer):
        self._student, self._teacher = student, teacher

    @property
    def config(self) -> TokenizerConfig:
        """Rules of the student, with the total length of both rows."""
        rules, other = self._student.config, self._teacher.config
        length = rules.context_length + other.context_length
        return dataclasses.replace(rules, context_length=length)

    def __call__(self, texts: str | Sequence[str]) -> Int32[np.ndarray, "n l"]:
        return self.rows(texts)[0]

    def rows(
        self, texts: str | Sequence[str]
    ) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, " n"]]:
        """Encode texts for both; also return which texts were truncated for the student."""
        tokens, cut = self._student.rows(texts)
        return np.concatenate([tokens, self._teacher(texts)], axis=1), cut

    def split(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Split the tokens of a batch into `tokens` and `teacher_tokens`."""
        length = self._student.config.context_length
        ours, theirs = np.split(batch["tokens"], [length], axis=1)
        return batch | {"tokens": np.ascontiguousarray(ours), "teacher_tokens": theirs}


AnyTokenizer = Tokenizer | TwoTokenizers  # tokenizers of a training batch
