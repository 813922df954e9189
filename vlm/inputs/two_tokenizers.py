"""A text in the tokens of two models side by side: of a student, and of its teacher."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from vlm.config import TokenizerConfig
from vlm.inputs.tokenizer import Tokenizer


class TwoTokenizers:
    """The rows of a student's tokenizer, and behind them those of its teacher's."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer):
        self._student, self._teacher = student, teacher

    @property
    def config(self) -> TokenizerConfig:
        """The student's rules, at the length of both rows."""
        rules, other = self._student.config, self._teacher.config
        length = rules.context_length + other.context_length
        return dataclasses.replace(rules, context_length=length)

    def __call__(self, texts: str | Sequence[str]) -> Int32[np.ndarray, "n l"]:
        return self.rows(texts)[0]

    def rows(
        self, texts: str | Sequence[str]
    ) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, " n"]]:
        """The rows of both, and which texts were too long for the student's."""
        tokens, cut = self._student.rows(texts)
        return np.concatenate([tokens, self._teacher(texts)], axis=1), cut

    def split(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the tokens of each in a place of their own."""
        length = self._student.config.context_length
        ours, theirs = np.split(batch["tokens"], [length], axis=1)
        return batch | {"tokens": np.ascontiguousarray(ours), "teacher_tokens": theirs}


AnyTokenizer = Tokenizer | TwoTokenizers  # what makes the rows of a training batch
