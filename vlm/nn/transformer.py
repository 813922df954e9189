"""Transformer as a scanned stack of blocks with a leading layer axis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vlm.config import Activation, Code, ImportPath, MlpKind, NormKind, RematPolicy
from vlm.errors import check_choice
from vlm.nn.attention import Attention, Lengths
from vlm.nn.auto_axes import auto_axes
from vlm.nn.cpu_attention import Mask
from vlm.nn.fsdp import Dimensions, gathered, partitioned_over_fsdp
from vlm.nn.intermediates import Intermediates, capture, changes_below
from vlm.nn.layers import NORMS, Mlp, dropout, split_keys
from vlm.nn.positions import Rotation
from vlm.nn.remat import checkpoint_policy
from vlm.sharding import by_rows


@dataclass(frozen=True)
class Execution:
    """Execution options of a tower, which do not change its function.

    Example:
        >>> vlm.nn.Execution(dtype=jnp.bfloat16, remat="none").scan
        True
    """

    dtype: DTypeLike = jnp.float32  # of activations and products; parameters are float32
    remat: RematPolicy | ImportPath = "dots_no_batch"
    scan: bool = True  # False unrolls the blocks: slower to compile, sometimes faster to run

    def __post_init__(self):
        if not isinstance(self.remat, Code):  # a policy of the user
            check_choice("remat", self.remat, get_args(RematPolicy))


LAYER_SCALE = 1e-4  # initial value of layer scale


class Block(nnx.Module):
    """Transformer block of attention and an MLP.

    Norms are before each branch ("pre"), after each residual sum ("post", BERT), or after each
    branch, before the sum ("branch", EVA-02-E).

    Example:
        >>> blocks = model.model.text.transformer.blocks  # stacked: a leading axis of depth
        >>> isinstance(blocks, vlm.nn.Block), blocks.mlp.up.kernel.shape
        (True, (1, 16, 16))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        *,
        act: Activation | ImportPath,
        norm_eps: float,
        dropout_rate: float = 0.0,
        causal: bool = False,
        layer_scale: bool = False,
        norm: Literal["pre", "post", "branch"] = "pre",
        norm_kind: NormKind = "layer",
        mlp: MlpKind = "plain",
        mlp_norm_eps: float | None = None,
        attention_norm: bool = False,
        key_bias: bool = True,
        qk_norm: bool = False,
        softcap: float | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_choice("norm", norm, ("pre", "post", "branch"))
        self.attention_norm = NORMS[norm_kind](width, norm_eps, rngs=rngs)
        self.attention = Attention(
            width,
            heads,
            key_bias=key_bias,
            qk_norm_eps=norm_eps if qk_norm else None,
            norm_eps=norm_eps if attention_norm else None,
            softcap=softcap,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = NORMS[norm_kind](width, norm_eps, rngs=rngs)
        eps = norm_eps if mlp_norm_eps is None else mlp_norm_eps
        self.mlp = Mlp(width, mlp_dim, act, kind=mlp, norm_eps=eps, dtype=dtype, rngs=rngs)
        small = jnp.full(width, LAYER_SCALE)
        self.attention_scale = nnx.Param(small) if layer_scale else None
        self.mlp_scale = nnx.Param(small) if layer_scale else None
        self.dropout_rate = dropout_rate
        self.causal = causal
        self.norm = norm

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Mask | Lengths | None,
        keys: Key[Array, " b"] | None,
        rotation: Rotation | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b n d"]:
        attention_keys, mlp_keys = split_keys(keys)
        y = self.attention_norm(x) if self.norm == "pre" else x
        y = self.attention(
            y, mask=mask, causal=self.causal, rotation=rotation, intermediates=intermediates
        )
        y = y if self.attention_scale is None else y * self.attention_scale[...].astype(y.dtype)
        y = self.attention_norm(y) if self.norm == "branch" else y
        x = x + dropout(y, self.dropout_rate, attention_keys)
        x = self.attention_norm(x) if self.norm == "post" else x
        y = self.mlp(self.mlp_norm(x) if self.norm == "pre" else x)
        y = y if self.mlp_scale is None else y * self.mlp_scale[...].astype(y.dtype)
        y = self.mlp_norm(y) if self.norm == "branch" else y
        x = x + dropout(y, self.dropout_rate, mlp_keys)
        return capture(intermediates, "output", self.mlp_norm(x) if self.norm == "post" else x)


class Transformer(nnx.Module):
    """Stack of `depth` blocks whose parameters have a leading layer axis.

    It is one `lax.scan`, so compile time does not grow with depth. `options` are those of `Block`.

    Example:
        >>> from flax import nnx
        >>> options = {"act": "gelu", "norm_eps": 1e-6, "rngs": nnx.Rngs(0)}
        >>> stack = vlm.nn.Transformer(16, 3, 2, 32, execution=vlm.nn.Execution(), **options)
        >>> stack(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
        >>> stack.blocks.mlp.up.kernel.shape  # three layers in one array
        (3, 16, 32)
    """

    # Dimensions of a layer's parameters that are shards over `fsdp`, by path: see `gather_layers`.
    shards: tuple[tuple[tuple[str, ...], int], ...] = ()

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        *,
        execution: Execution,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        def block(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, mlp_dim, dtype=execution.dtype, rngs=rngs, **options)

        self.blocks = stack_blocks(block, depth, rngs)
        self.depth = depth
        self.execution = execution

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Mask | Lengths | None = None,
        *,
        keys: Key[Array, " b"] | None = None,
        rotation: Rotation | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b n d"]:
        """Run the blocks; `keys`, one per example, turn dropout on.

        `mask` is true where a query may attend, or is the number of real tokens of each example,
        which come first. `intermediates` capture "blocks/attention" and "blocks/output" with a
        leading layer axis.
        """
        block, parameters = nnx.split(self.blocks)
        parameters, shards = nnx.to_pure_dict(parameters), dict(self.shards)

        def layer(x, numbered):
            number, parameters, changes = numbered
            parameters = gathered(parameters, self.depth, self.execution.dtype, shards)
            x = by_rows(x)
            layer_keys = keys
            if keys is not None:
                layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            own = None if intermediates is None else Intermediates(changes)
            x = nnx.merge(block, parameters)(x, mask, layer_keys, rotation, own)
            return x, None if own is None else own.found

        layers = (jnp.arange(self.depth), parameters, changes_below(intermediates, "blocks"))
        gathers = bool(shards) or partitioned_over_fsdp(x)
        x, found = scan_layers(layer, x, layers, self.execution, remat=gathers)
        if intermediates is not None:
            for name, value in (found or {}).items():
                intermediates.found[f"{intermediates.prefix}blocks/{name}"] = value
        return x

    def last(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply only the last block to `x`."""
        block, parameters = nnx.split(self.blocks)
        parameters = jax.tree.map(lambda p: p[-1], nnx.to_pure_dict(parameters))
        parameters = gathered(parameters, self.depth, self.execution.dtype, dict(self.shards))
        return nnx.merge(block, parameters)(x, None, None)


def gather_layers(model: nnx.Module, dimensions: Dimensions) -> set[tuple[str, ...]]:
    """Make transformers gather each layer's parameters where it runs; return their paths.

    For models whose parameters are shards over `fsdp` in a `jax.shard_map`; `dimensions` has the
    dimension that is sharded, by the path of a parameter.
    """
    found = set()
    for path, module in nnx.iter_modules(model):
        # A subclass that runs the blocks in its own way gets them whole.
        if isinstance(module, Transformer) and type(module).__call__ is Transformer.__call__:
            start = (*map(str, path), "blocks")
            own = {p: d for p, d in dimensions.items() if p[: len(start)] == start and d > 0}
            module.shards = tuple((p[len(start) :], d - 1) for p, d in own.items())
            found |= set(own)
    return found


def stack_blocks(make: Callable[[nnx.Rngs], Any], depth: int, rngs: nnx.Rngs) -> Any:
    """Make `depth` blocks as one, whose parameters have a leading layer axis.

    Example:
        >>> from flax import nnx
        >>> make = lambda rngs: nnx.Linear(8, 8, rngs=rngs)
        >>> vlm.nn.stack_blocks(make, 3, nnx.Rngs(0)).kernel.shape
        (3, 8, 8)
    """
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def run_stacked(
    blocks: nnx.Module, x: Float[Array, "*b d"], step: Callable, execution: Execution
) -> Float[Array, "*b d"]:
    """Apply `step(block, x)` for each of the stacked blocks.

    Example:
        >>> from flax import nnx
        >>> make = lambda rngs: nnx.Linear(8, 8, rngs=rngs)
        >>> blocks = vlm.nn.stack_blocks(make, 3, nnx.Rngs(0))
        >>> step = lambda block, x: x + block(x)
        >>> vlm.nn.run_stacked(blocks, jnp.ones((2, 8)), step, vlm.nn.Execution()).shape
        (2, 8)
    """
    block, parameters = nnx.split(blocks)

    def layer(x, parameters):
        return step(nnx.merge(block, parameters), x), None

    return scan_layers(layer, x, nnx.to_pure_dict(parameters), execution)[0]


def scan_layers(
    layer: Callable, x: Array, layers: Any, execution: Execution, *, remat: bool = False
):
    """Scan over layers, compiled once or unrolled; rematerialise if configured, or if `remat`."""
    if remat or execution.remat != "none":
        policy = checkpoint_policy(execution.remat)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not execution.scan)
    depth = len(jax.tree.leaves(layers)[0])
    return lax.scan(layer, x, layers, unroll=1 if execution.scan else depth)


def block_flops(config: Any, tokens: int, *, gated: bool = False) -> dict[str, float]:
    """Forward FLOPs of the blocks; `scores` are the attention products without parameters."""
    width = config.width
    products = 3 if gated else 2  # of the MLP
    return {
        "projections": config.depth * 2 * tokens * 4 * width**2,
        "scores": config.depth * 2 * 2 * tokens**2 * width,
        "mlp": config.depth * 2 * tokens * products * width * config.mlp_dim,
    }
