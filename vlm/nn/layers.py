"""Activations, linear layers, normalisation, dropout and MLPs."""

import functools
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vlm.config import Activation, Code, ImportPath, MlpKind, NormKind
from vlm.errors import check_choice
from vlm.nn import float8
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


def activation(name: Activation | ImportPath) -> Callable[[Array], Array]:
    """Return the activation function of that name; "relu" is that of NLLB's encoder."""
    if isinstance(name, Code):
        return name.load("activation")
    functions = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}
    return (functions | {"relu": jax.nn.relu})[name]


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

    A `fixed_bias` gets no gradient. The kernel may be quantized, and the layer may have a
    LoRA adapter (`vlm.nn.lora`). A layer with a true `float8` has `vlm.nn.float8.product`.

    Attention heads are not a separate axis: a head of 64 dimensions would fill only half of a TPU's
    registers and tiles.
    """
    x = x.astype(layer.dtype)
    kernel = layer.kernel[...].reshape(x.shape[-1], -1)
    product = float8.product if getattr(layer, "float8", False) else _product
    y = product(x, kernel.astype(layer.dtype))
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
    bias = layer.bias[...].reshape(-1)
    bias = lax.stop_gradient(bias) if fixed_bias else bias
    # The gradient of a bias is a sum over all rows, which bfloat16 would round at each addition.
    return (y.astype(bias.dtype) + bias).astype(layer.dtype)


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
        return _narrowing(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

    return lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


@jax.custom_jvp
def _narrowing(x: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x @ kernel, whose kernel gradient is computed with the narrower factor on the left."""
    return x @ kernel


@functools.partial(_narrowing.defjvp, symbolic_zeros=True)
def _narrowing_jvp(primals, tangents):
    # Eigen's packing of the transposed left factor limits the gradient x^T g of a wide x: g^T x is
    # up to a third faster. The barrier keeps XLA from turning the product around again.
    (x, kernel), (dx, dkernel) = primals, tangents
    y = x @ kernel
    dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else dx @ kernel
    if not isinstance(dkernel, SymbolicZero):
        if kernel.shape[1] < kernel.shape[0]:
            dkernel = lax.optimization_barrier(dkernel.T).T
        dy = dy + x @ dkernel
    return y, dy


def by_rows(function: Callable, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """Apply `function` along the last axis; on CPUs with a single row axis.

    XLA then fuses a product with its activation, which it does not with several row axes.
    """

    def flat(x):
        return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return lax.platform_dependent(x, cpu=flat, default=function)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 for any input dtype.

    The variance of 16-bit inputs is E[x^2] - E[x]^2, which takes one pass over them instead of two.
    In float32 it loses less to cancellation than their rounding has lost already.

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
        mean = wide.mean(-1, keepdims=True)
        if x.dtype.itemsize == 2:
            variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
            variance = jnp.maximum(variance, 0)
        else:
            variance = jnp.square(wide - mean).mean(-1, keepdims=True)
        inverse = lax.rsqrt(variance + self.eps)
        return ((wide - mean) * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, in float32 (arXiv:1910.07467).

    Example:
        >>> from flax import nnx
        >>> norm = vlm.nn.RMSNorm(4, 1e-6, rngs=nnx.Rngs(0))
        >>> norm(jnp.full((1, 4), 3.0)).round(3).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...]).astype(x.dtype)


NORMS: dict[NormKind, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}


class Mlp(nnx.Module):
    """Two linear layers with an activation between them, or with a gate (arXiv:2002.05202).

    Kinds: "plain"; "swiglu", a SiLU gate and a normalised hidden layer (EVA-02, arXiv:2303.11331);
    "swiglu_plain", without that norm; "geglu", a GELU gate and a normalised input (ViTamin,
    arXiv:2404.02132); "geglu_plain", without that norm. `act` is of the plain kind, `norm_eps` of
    the norms.

    Example:
        >>> from flax import nnx
        >>> mlp = vlm.nn.Mlp(4, 8, "gelu", dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 4))).shape
        (2, 4)
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        act: Activation | ImportPath,
        *,
        kind: MlpKind = "plain",
        norm_eps: float = 1e-6,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_choice("mlp", kind, get_args(MlpKind))
        options = {"kernel_init": nnx.initializers.xavier_uniform(), "dtype": dtype, "rngs": rngs}
        self.gate = None if kind == "plain" else nnx.Linear(width, mlp_dim, **options)
        self.up = nnx.Linear(width, mlp_dim, **options)
        self.down = nnx.Linear(mlp_dim, width, **options)
        normed = {"geglu": width, "swiglu": mlp_dim}.get(kind)
        self.norm = None if normed is None else LayerNorm(normed, norm_eps, rngs=rngs)
        self.act: Activation | ImportPath = act
        self.kind: MlpKind = kind

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        if self.norm is not None and self.kind == "geglu":
            x = self.norm(x)
        if self.gate is None:
            hidden = checkpoint_name(linear(self.up, x), MLP_HIDDEN)
            return linear(self.down, activation(self.act)(hidden))
        gate = checkpoint_name(linear(self.gate, x), MLP_HIDDEN)
        hidden = checkpoint_name(linear(self.up, x), MLP_HIDDEN)
        hidden = (gelu if self.kind.startswith("geglu") else jax.nn.silu)(gate) * hidden
        if self.norm is not None and self.kind == "swiglu":
            hidden = self.norm(hidden)
        return linear(self.down, hidden)
