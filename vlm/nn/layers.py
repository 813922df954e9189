"""Activations, linear layers, normalisation, dropout and MLPs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vlm.config import Activation
from vlm.nn.remat import MLP_HIDDEN


def gelu(x: Array) -> Array:
    """The exact GELU, x * Phi(x) (Hendrycks and Gimpel, arXiv:1606.08415).

    Written with `erf`: XLA evaluates the `erfc` of `jax.nn.gelu` several times slower on a CPU.
    """
    return 0.5 * x * (1 + lax.erf(x * (0.5**0.5)))


def gelu_tanh(x: Array) -> Array:
    """Tanh approximation of GELU, as in SigLIP."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def relu(x: Array) -> Array:
    """max(x, 0), as in NLLB's encoder."""
    return jax.nn.relu(x)


def activation(name: Activation):
    """Return the activation function of that name."""
    return {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "relu": relu}[name]


def dropout(
    x: Float[Array, "b ..."], rate: float, keys: Key[Array, " b"] | None
) -> Float[Array, "b ..."]:
    """Zero a fraction `rate` of `x` and scale the rest; without keys (inference) return `x`.

    Each example has its own key, so its mask is the same for any micro-batch size and sharding.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def split_keys(keys: Key[Array, " b"] | None) -> tuple[Key[Array, " b"] | None, ...]:
    """Split each example's key in two; None for None."""
    if keys is None:
        return None, None
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def linear(
    layer: nnx.Linear | nnx.LinearGeneral, x: Float[Array, "*b i"], *, fixed_bias: bool = False
) -> Float[Array, "*b o"]:
    """Apply a linear layer with its kernel flattened to a matrix.

    A `fixed_bias` gets no gradient. The kernel may be quantized (`vlm.nn.int8`), and the layer may
    have a LoRA adapter (`vlm.nn.lora`).

    Attention heads are not a separate axis: a head of 64 dimensions would fill only half of a TPU's
    registers and tiles.
    """
    x = x.astype(layer.dtype)
    kernel = layer.kernel[...].reshape(x.shape[-1], -1)
    y = _product(x, kernel.astype(layer.dtype))
    outputs = getattr(layer, "kernel_scale", None)
    if outputs is not None:
        y = y * outputs[...].astype(layer.dtype)
    lora = getattr(layer, "lora", None)
    if lora is not None and lora.a.shape[-1]:  # a rank of zero adds nothing
        scale = lora.scale[...].astype(layer.dtype)
        low = _product(x, lora.a[...].astype(layer.dtype)) * scale
        y = y + _product(low, lora.b[...].astype(layer.dtype))
        factors = lora.column_factors(kernel if outputs is None else kernel * outputs[...])
        y = y if factors is None else y * factors.astype(layer.dtype)
    if layer.bias is None:
        return y
    bias = layer.bias[...].reshape(-1).astype(layer.dtype)
    return y + (lax.stop_gradient(bias) if fixed_bias else bias)


class Linear(nnx.Linear):
    """Linear layer that is computed by `linear`."""

    # The base class also has an output sharding argument.
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(self, x)


def _product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """Matrix product; on CPUs with a single row axis.

    The kernel's gradient sums over all rows. With two row axes XLA would transpose both factors
    first.
    """

    def flat(x, kernel):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])

    return lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


def by_rows(function: Callable, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """Apply `function` along the last axis; on CPUs with a single row axis.

    XLA then fuses a product with its activation, which it does not with several row axes.
    """

    def flat(x):
        return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return lax.platform_dependent(x, cpu=flat, default=function)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 for any input dtype.

    Example:
        >>> from flax import nnx
        >>> norm = vlm.nn.LayerNorm(4, 1e-6, rngs=nnx.Rngs(0))
        >>> abs(float(norm(jnp.arange(4.0)[None]).mean())) < 1e-6
        True
    """

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them.

    Example:
        >>> from flax import nnx
        >>> mlp = vlm.nn.Mlp(4, 8, "gelu", dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 4))).shape
        (2, 4)
    """

    def __init__(
        self, width: int, mlp_dim: int, act: Activation, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        init = nnx.initializers.xavier_uniform()
        self.up = nnx.Linear(width, mlp_dim, kernel_init=init, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, width, kernel_init=init, dtype=dtype, rngs=rngs)
        self.act: Activation = act

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        hidden = checkpoint_name(linear(self.up, x), MLP_HIDDEN)
        return linear(self.down, activation(self.act)(hidden))


class SwiGlu(nnx.Module):
    """MLP with a SiLU-gated hidden layer (arXiv:2002.05202).

    With `norm_eps`, the hidden layer is normalised, as in EVA-02 (arXiv:2303.11331).
    """

    def __init__(self, width: int, mlp_dim: int, norm_eps: float | None, *, dtype, rngs: nnx.Rngs):
        options = {"kernel_init": nnx.initializers.xavier_uniform(), "dtype": dtype, "rngs": rngs}
        self.gate = nnx.Linear(width, mlp_dim, **options)
        self.up = nnx.Linear(width, mlp_dim, **options)
        self.norm = None if norm_eps is None else LayerNorm(mlp_dim, norm_eps, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, width, **options)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        gate = checkpoint_name(linear(self.gate, x), MLP_HIDDEN)
        hidden = checkpoint_name(linear(self.up, x), MLP_HIDDEN)
        hidden = jax.nn.silu(gate) * hidden
        return linear(self.down, hidden if self.norm is None else self.norm(hidden))


class GeGlu(nnx.Module):
    """ViTamin's MLP: normalised input and a GELU gate (arXiv:2404.02132)."""

    def __init__(self, width: int, mlp_dim: int, norm_eps: float, *, dtype, rngs: nnx.Rngs):
        options = {"kernel_init": nnx.initializers.xavier_uniform(), "dtype": dtype, "rngs": rngs}
        self.norm = LayerNorm(width, norm_eps, rngs=rngs)
        self.gate = nnx.Linear(width, mlp_dim, **options)
        self.up = nnx.Linear(width, mlp_dim, **options)
        self.down = nnx.Linear(mlp_dim, width, **options)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x = self.norm(x)
        gate = checkpoint_name(linear(self.gate, x), MLP_HIDDEN)
        hidden = checkpoint_name(linear(self.up, x), MLP_HIDDEN)
        return linear(self.down, gelu(gate) * hidden)
