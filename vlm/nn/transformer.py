"""Transformer as a scanned stack of blocks with a leading layer axis."""

from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from vlm.config import Activation, MlpKind, RematPolicy
from vlm.errors import check_choice
from vlm.nn.attention import Attention
from vlm.nn.intermediates import Intermediates, capture, changes_below
from vlm.nn.layers import GeGlu, LayerNorm, Mlp, SwiGlu, dropout, split_keys
from vlm.nn.remat import checkpoint_policy
from vlm.nn.rotary import Rotation
from vlm.sharding import by_rows, cut_over_fsdp, gathered


@dataclass(frozen=True)
class Execution:
    """Execution options of a tower, which do not change its function.

    Example:
        >>> vlm.nn.Execution(dtype=jnp.bfloat16, remat="none").scan
        True
    """

    dtype: DTypeLike = jnp.float32  # of activations and products; parameters are float32
    remat: RematPolicy = "dots_no_batch"
    scan: bool = True  # False unrolls the blocks: slower to compile, sometimes faster to run

    def __post_init__(self):
        check_choice("remat", self.remat, get_args(RematPolicy))


LAYER_SCALE = 1e-4  # initial value of layer scale


class Block(nnx.Module):
    """Transformer block of attention and an MLP.

    Norms are before each branch ("pre"), after each residual sum ("post", BERT), or after each
    branch, before the sum ("branch", EVA-02-E).

    Example:
        >>> vlm.nn.Block.__name__, model.model.vision.transformer.blocks.mlp.up.kernel.shape
        ('Block', (1, 16, 16))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        *,
        act: Activation,
        norm_eps: float,
        dropout_rate: float,
        causal: bool,
        layer_scale: bool,
        norm: Literal["pre", "post", "branch"],
        mlp: MlpKind,
        attention_norm: bool,
        key_bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = LayerNorm(width, norm_eps, rngs=rngs)
        self.attention = Attention(
            width,
            heads,
            key_bias=key_bias,
            norm_eps=norm_eps if attention_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = LayerNorm(width, norm_eps, rngs=rngs)
        check_choice("norm", norm, ("pre", "post", "branch"))
        check_choice("mlp", mlp, get_args(MlpKind))
        match mlp:
            case "plain":
                self.mlp = Mlp(width, mlp_dim, act, dtype=dtype, rngs=rngs)
            case "geglu":
                self.mlp = GeGlu(width, mlp_dim, norm_eps, dtype=dtype, rngs=rngs)
            case "swiglu":
                self.mlp = SwiGlu(width, mlp_dim, norm_eps, dtype=dtype, rngs=rngs)
            case "swiglu_plain":
                self.mlp = SwiGlu(width, mlp_dim, None, dtype=dtype, rngs=rngs)
            case _:
                assert_never(mlp)
        small = jnp.full(width, LAYER_SCALE)
        self.attention_scale = nnx.Param(small) if layer_scale else None
        self.mlp_scale = nnx.Param(small) if layer_scale else None
        self.dropout_rate = dropout_rate
        self.causal = causal
        self.norm = norm

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "#b #h #q n"] | None,
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

    It is one `lax.scan`, so compile time does not grow with depth.

    Example:
        >>> from flax import nnx
        >>> options = {"act": "gelu", "norm_eps": 1e-6, "rngs": nnx.Rngs(0)}
        >>> stack = vlm.nn.Transformer(16, 3, 2, 32, execution=vlm.nn.Execution(), **options)
        >>> stack(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
        >>> stack.blocks.mlp.up.kernel.shape  # three layers in one array
        (3, 16, 32)
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        *,
        act: Activation,
        norm_eps: float,
        dropout_rate: float = 0.0,
        causal: bool = False,
        layer_scale: bool = False,
        norm: Literal["pre", "post", "branch"] = "pre",
        mlp: MlpKind = "plain",
        attention_norm: bool = False,
        key_bias: bool = True,
        execution: Execution,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(
                width,
                heads,
                mlp_dim,
                act=act,
                norm_eps=norm_eps,
                dropout_rate=dropout_rate,
                causal=causal,
                layer_scale=layer_scale,
                norm=norm,
                mlp=mlp,
                attention_norm=attention_norm,
                key_bias=key_bias,
                dtype=execution.dtype,
                rngs=rngs,
            )

        self.blocks = stack(rngs)
        self.depth = depth
        self.remat: RematPolicy = execution.remat
        self.scan = execution.scan
        self.dtype = execution.dtype

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "#b #h #q n"] | None = None,
        *,
        keys: Key[Array, " b"] | None = None,
        rotation: Rotation | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b n d"]:
        """Run the blocks; `keys`, one per example, turn dropout on.

        `intermediates` capture "blocks/attention" and "blocks/output" with a leading layer axis.
        """
        block, parameters = nnx.split(self.blocks)
        parameters = nnx.to_pure_dict(parameters)

        def layer(x, numbered):
            number, parameters, changes = numbered
            parameters, x = gathered(parameters, self.depth, self.dtype), by_rows(x)
            layer_keys = keys
            if keys is not None:
                layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            own = None if intermediates is None else Intermediates(changes)
            x = nnx.merge(block, parameters)(x, mask, layer_keys, rotation, own)
            return x, None if own is None else own.found

        if self.remat != "none" or cut_over_fsdp(x):
            layer = jax.checkpoint(
                layer, policy=checkpoint_policy(self.remat), prevent_cse=not self.scan
            )
        layers = (jnp.arange(self.depth), parameters, changes_below(intermediates, "blocks"))
        x, found = lax.scan(layer, x, layers, unroll=1 if self.scan else self.depth)
        if intermediates is not None:
            for name, value in (found or {}).items():
                intermediates.found[f"{intermediates.prefix}blocks/{name}"] = value
        return x

    def last(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply only the last block to `x`."""
        block, parameters = nnx.split(self.blocks)
        parameters = jax.tree.map(lambda p: p[-1], nnx.to_pure_dict(parameters))
        return nnx.merge(block, parameters)(x, None, None)
