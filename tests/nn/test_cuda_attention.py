"""Attention for NVIDIA GPUs: what runs there, and its masks against attention written out."""

import functools

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from vlm.nn import Transformer, cuda_attention
from vlm.nn.attention import attend
from vlm.nn.transformer import Execution

LENGTHS = np.array([7, 1, 4])


def attention_and_gradients(query, key, value, gradient, allowed):
    """The result and the gradients of its three inputs, in float64."""
    query, key, value, gradient = (np.moveaxis(x, 1, 2) for x in (query, key, value, gradient))
    scale = query.shape[-1] ** -0.5
    logits = np.where(allowed, query @ key.swapaxes(2, 3) * scale, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = gradient @ value.swapaxes(2, 3)
    of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) * scale
    found = (
        weights @ value,
        of_logits @ key,
        of_logits.swapaxes(2, 3) @ query,
        weights.swapaxes(2, 3) @ gradient,
    )
    return [np.moveaxis(x, 2, 1) for x in found]


def masks(n: int) -> dict:
    """Masks of three examples of n tokens, and which keys each query may see."""
    first = np.arange(n) < LENGTHS[:, None]
    anywhere = np.random.default_rng(1).random((3, n)) < 0.5
    anywhere[:, 0] = True
    every = np.ones((3, 1, 1, n), bool)
    return {
        "none": (None, False, every),
        "causal": (None, True, every & np.tril(np.ones((n, n), bool))),
        "lengths": (LENGTHS, False, first[:, None, None]),
        "padding at the end": (first[:, None, None], False, first[:, None, None]),
        "padding anywhere": (anywhere[:, None, None], False, anywhere[:, None, None]),
    }


@pytest.mark.parametrize("form", ["cuDNN's arguments", "written out"])
@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("kind", masks(8))
def test_masks_mean_the_same_in_both_forms(kind, n, form):
    """Every row agrees, of padded queries too: nothing downstream sees NaN."""
    rng = np.random.default_rng(0)
    query, key, value, gradient = rng.standard_normal((4, 3, n, 2, 8))
    mask, causal, allowed = masks(n)[kind]
    run = functools.partial(cuda_attention.attend, implementation="xla", causal=causal)
    if form == "written out":
        run = functools.partial(attend, causal=causal)
    mask = None if mask is None else jnp.asarray(mask)
    with jax.enable_x64(True):
        result, pull_back = jax.vjp(lambda *x: run(*x, mask=mask), query, key, value)
        found = (result, *pull_back(jnp.asarray(gradient)))
    # The softmax is float32.
    for got, want in zip(
        found, attention_and_gradients(query, key, value, gradient, allowed), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("n", [5, 6])
def test_an_example_of_padding_alone_has_equal_weights(n):
    x, gradient = np.random.default_rng(0).standard_normal((2, 2, n, 2, 8)).astype(np.float32)
    for mask in (jnp.array([0, 3]), jnp.arange(n) < jnp.array([0, 3])[:, None, None, None]):
        found = []
        for run in (functools.partial(cuda_attention.attend, implementation="xla"), attend):
            result, pull_back = jax.vjp(functools.partial(run, mask=mask), x, x, x)
            found.append((result, *pull_back(jnp.asarray(gradient))))
        for got, want in zip(*found, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-6)
        np.testing.assert_allclose(
            found[0][0][0], np.broadcast_to(x[0].mean(0), x[0].shape), atol=2e-6
        )


BF16, LONG = "bfloat16", (2, 16, 2, 64)
CASES = {
    "no mask": (LONG, BF16, None, False, "NO_MASK"),
    "float16": (LONG, "float16", None, False, "NO_MASK"),
    "causal": (LONG, BF16, None, True, "CAUSAL"),
    "lengths": (LONG, BF16, (2,), False, "PADDING"),
    "a mask of keys": (LONG, BF16, (2, 1, 1, 16), False, "PADDING"),
    "an odd length": ((2, 77, 2, 64), BF16, None, False, "PADDING"),
    "an odd length, causal": ((2, 77, 2, 64), BF16, None, True, "CAUSAL"),
    "heads of 72": ((2, 16, 2, 72), BF16, None, False, "NO_MASK"),
    "heads of 128": ((2, 16, 2, 128), BF16, (2,), False, "PADDING"),
    "float32": (LONG, "float32", None, False, None),
    "heads of 136": ((2, 16, 2, 136), BF16, None, False, None),
    "heads of 20": ((2, 16, 2, 20), BF16, None, False, None),
    "one token": ((2, 1, 2, 64), BF16, None, False, None),
    "a mask of queries and keys": (LONG, BF16, (2, 1, 16, 16), False, None),
    "a mask for all examples": (LONG, BF16, (1, 1, 1, 16), False, None),
    "causal and a mask of keys": (LONG, BF16, (2, 1, 1, 16), True, None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_runs_on_a_gpu(case, monkeypatch):
    """cuDNN's attention with the right mask, forward and backward, or XLA's products."""
    cuda.as_on_a_gpu(monkeypatch)
    shape, dtype, mask, causal, kind = CASES[case]
    x = jax.ShapeDtypeStruct(shape, dtype)
    if mask is not None:
        mask = jax.ShapeDtypeStruct(mask, jnp.int32 if len(mask) == 1 else bool)

    def gradients(query, key, value, mask):
        run = functools.partial(attend, causal=causal)
        total = lambda *x: run(*x, mask=mask).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    program = cuda.lowered(gradients, x, x, x, mask)
    names = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    assert cuda.attention_calls(program) == ([] if kind is None else [(n, kind) for n in names])
    assert "stablehlo.dot_general" not in program or kind is None
    assert cuda_attention.fits(x, x, mask, causal=causal) == (kind is not None)


def test_one_query_for_many_keys_runs_without_cudnn(monkeypatch):
    cuda.as_on_a_gpu(monkeypatch)
    one, many = (jax.ShapeDtypeStruct((2, n, 2, 64), jnp.bfloat16) for n in (1, 16))
    assert not cuda.attention_calls(cuda.lowered(attend, one, many, many))


def test_without_a_gpu_cudnn_is_not_traced():
    x = jax.ShapeDtypeStruct(LONG, jnp.bfloat16)
    assert cuda_attention.compute_capability() == 0
    assert not cuda.attention_calls(cuda.lowered(attend, x, x, x))


def test_a_stack_masks_by_lengths_as_by_a_mask():
    options = {"act": "gelu", "norm_eps": 1e-6, "rngs": nnx.Rngs(0), "execution": Execution()}
    stack = Transformer(16, 2, 2, 32, **options)
    x = jax.random.normal(jax.random.key(0), (3, 8, 16))
    mask = jnp.asarray(masks(8)["lengths"][2])
    np.testing.assert_array_equal(stack(x, jnp.asarray(LENGTHS)), stack(x, mask))
    assert np.abs(stack(x) - stack(x, mask)).max() > 1e-3
    with pytest.raises(TypeCheckError):
        stack(x, jnp.asarray(LENGTHS, jnp.float32))
