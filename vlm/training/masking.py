"""Text masking: drop random tokens so that steps are cheaper (FLIP, CLIPA)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from vlm.config import TokenizerConfig, kept_tokens
from vlm.nn.patches import random_scores


def mask_tokens(
    tokens: Int[Array, "b n"], rate: float, keys: Key[Array, " b"], rules: TokenizerConfig
) -> Int[Array, "b m"]:
    """Keep a fraction `1 - rate` of each row's tokens, in their order.

    Padding is dropped first, then random words; the begin and end tokens always stay.

    Source: arXiv:2212.00794, section 3 and arXiv:2305.07017, "random" masking.
    """
    n = tokens.shape[1]
    specials = sum(token is not None for token in (rules.bos_id, rules.eos_id))
    kept = kept_tokens(n, rate, specials)
    if kept == n:
        return tokens
    place = jnp.arange(n)
    special, padding = jnp.zeros(tokens.shape, bool), tokens == rules.pad_id
    if rules.bos_id is not None:
        special |= place == jnp.argmax(tokens == rules.bos_id, axis=1)[:, None]
    if rules.eos_id is not None:
        # The first one: some vocabularies pad with the end token.
        end = jnp.argmax(tokens == rules.eos_id, axis=1)[:, None]
        special |= (place == end) & (tokens == rules.eos_id)
        if rules.pad_side == "right":
            padding = place > jnp.where((tokens == rules.eos_id).any(1, keepdims=True), end, n)
    scores = jnp.where(special, 2.0, jnp.where(padding, -1.0, random_scores(keys, n)))
    chosen = jnp.sort(lax.top_k(scores, kept)[1], axis=1)
    return jnp.take_along_axis(tokens, chosen, axis=1)
