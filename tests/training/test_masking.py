"""Text masking keeps order, the special tokens and, while it can, the words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.config import TokenizerConfig
from vlm.training.masking import mask_tokens

RULES = TokenizerConfig(context_length=10, pad_id=0, bos_id=1, eos_id=2)
KEYS = jax.random.split(jax.random.key(0), 64)


def row(words: int, pad: int = 0) -> list[int]:
    return [1, *range(10, 10 + words), 2] + [pad] * (8 - words)


def masked(tokens: list[int], rate: float, rules=RULES) -> np.ndarray:
    return np.asarray(mask_tokens(jnp.array([tokens] * len(KEYS)), rate, KEYS, rules))


def test_padding_goes_first():
    for got in masked(row(4), 0.4):
        assert got.tolist() == [1, 10, 11, 12, 13, 2]


def test_words_are_dropped_at_random_in_order():
    rows = masked(row(8), 0.5)
    assert rows.shape == (64, 5)
    assert (rows[:, 0] == 1).all()
    assert (rows[:, -1] == 2).all()
    assert (np.diff(rows[:, 1:-1], axis=1) > 0).all()
    assert set(rows[:, 1:-1].ravel()) == set(range(10, 18))
    assert len({tuple(r) for r in rows.tolist()}) > 10


@pytest.mark.parametrize("pad", [2, 12])
def test_padding_may_look_like_the_end_or_like_a_word(pad):
    rules = TokenizerConfig(context_length=10, pad_id=pad, bos_id=1, eos_id=2)
    for got in masked(row(5, pad), 0.3, rules):
        assert got.tolist() == [1, 10, 11, 12, 13, 14, 2]


def test_padding_on_the_left_goes_too():
    rules = TokenizerConfig(context_length=10, pad_id=0, bos_id=None, eos_id=2, pad_side="left")
    for got in masked([0, 0, 0, 0, 0, 10, 11, 12, 13, 2], 0.5, rules):
        assert got.tolist() == [10, 11, 12, 13, 2]


def test_a_text_cut_before_its_end_token_has_no_padding():
    rules = TokenizerConfig(context_length=4, pad_id=0, bos_id=None, eos_id=2)
    assert set(masked([10, 11, 12, 13], 0.5, rules).ravel()) == {10, 11, 12, 13}
