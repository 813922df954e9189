"""Adapters over a whole model: attached by the names of its layers, detached, merged, summed.

An adapter is a mapping from the dotted name of a linear layer to the `Factors` of that layer.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import AdapterConfig
from vlm.errors import ConfigError
from vlm.nn.attention import Attention
from vlm.nn.int8 import KernelScale, quantize
from vlm.nn.layers import GeGlu, Mlp, SwiGlu
from vlm.nn.lora import LowRank, column_lengths, product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """The adapter of one layer, or with a leading axis those of a stack of them."""

    a: Any  # Float[Array, "*l i r"]
    b: Any  # Float[Array, "*l r o"]
    scale: Any  # Float[Array, "*l"]
    magnitude: Any = None  # Float[Array, "*l o"], of DoRA

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


Adapter = Mapping[str, Factors]
Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class LayerSize:
    """The sizes of a linear layer; `layers` is None for one that is no stack."""

    inputs: int
    outputs: int
    layers: int | None

    @property
    def stack(self) -> tuple[int, ...]:
        return () if self.layers is None else (self.layers,)


def linear_layers(model: nnx.Module) -> dict[str, nnx.Linear | nnx.LinearGeneral]:
    """Every linear layer of a model by its dotted name, sorted."""
    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear | nnx.LinearGeneral)
    }
    return dict(sorted(found.items()))


def size_of(layer: nnx.Linear | nnx.LinearGeneral) -> LayerSize:
    """The sizes of a linear layer, its heads side by side."""
    inputs, outputs = _features(layer.in_features), _features(layer.out_features)
    shape = layer.kernel.shape
    stacked = len(shape) > len(inputs) + len(outputs)
    return LayerSize(math.prod(inputs), math.prod(outputs), shape[0] if stacked else None)


def matrix(layer: nnx.Linear | nnx.LinearGeneral) -> Float[Array, "*l i o"]:
    """The kernel of a linear layer in float32, its heads side by side."""
    size = size_of(layer)
    kernel = layer.kernel[...].reshape(*size.stack, size.inputs, size.outputs).astype(jnp.float32)
    scale = getattr(layer, "kernel_scale", None)
    return kernel if scale is None else kernel * scale[...][..., None, :]


# ------------------------------------------------------------------------------- new adapters


def targeted(model: nnx.Module, patterns: Sequence[str]) -> list[str]:
    """The names of the linear layers that any of `patterns` matches; all projections without one.

    Raises:
        ConfigError: a pattern matches no linear layer; the message lists those that exist.
    """
    layers = linear_layers(model)
    if not patterns:
        return sorted(_projections(model) & layers.keys())
    chosen = set()
    for pattern in patterns:
        matched = fnmatch.filter(layers, pattern)
        if not matched:
            raise ConfigError(
                f"adapter.targets {pattern!r} matches no linear layer{_instead(model, pattern)}: "
                f"the model has {', '.join(layers)}"
            )
        chosen.update(matched)
    return sorted(chosen)


def fresh(model: nnx.Module, config: AdapterConfig, key: Key[Array, ""]) -> dict[str, Factors]:
    """An adapter that changes nothing yet: `a` is random, and `b` zero.

    Raises:
        ConfigError: a pattern matches nothing, or the rank is larger than a matrix.
    """
    layers, adapter = linear_layers(model), {}
    for number, name in enumerate(targeted(model, config.targets)):
        size = size_of(layers[name])
        if config.rank > min(size.inputs, size.outputs):
            raise ConfigError(
                f"adapter.rank {config.rank} is larger than {name}, a matrix of {size.inputs} x "
                f"{size.outputs}: choose at most {min(size.inputs, size.outputs)}, or targets "
                "without it"
            )
        bound = size.inputs**-0.5  # as peft draws it: He's uniform with a slope of sqrt(5)
        a = jax.random.uniform(
            jax.random.fold_in(key, number),
            (*size.stack, size.inputs, config.rank),
            minval=-bound,
            maxval=bound,
        )
        b = jnp.zeros((*size.stack, config.rank, size.outputs))
        magnitude = column_lengths(matrix(layers[name])) if config.dora else None
        adapter[name] = Factors(a, b, jnp.full(size.stack, config.scale), magnitude)
    return adapter


def prepared(model: Model, config: AdapterConfig, seed: int) -> Model:
    """`model` with its kernels as the config keeps them, and a fresh adapter."""
    if config.quantize == "int8":
        model = quantized(model)
    return attach(model, fresh(model, config, jax.random.key(seed)))


# ------------------------------------------------------------------------------ on and off


def attach(model: Model, adapter: Adapter) -> Model:
    """`model` with an adapter in place of any that it has; the arrays are shared.

    What is for a tower that the model was loaded without is left out.

    Raises:
        ConfigError: a layer that the model does not have, or one of another size.
    """
    model = detach(model)
    layers = linear_layers(model)
    for name, factors in adapter.items():
        if getattr(model, name.split(".")[0], "") is None:
            continue
        if name not in layers:
            raise ConfigError(
                f"the adapter is for {name}, which the model does not have: give it the model "
                "that it was trained on"
            )
        size = size_of(layers[name])
        wanted = {
            "a": (*size.stack, size.inputs, factors.rank),
            "b": (*size.stack, factors.rank, size.outputs),
            "scale": size.stack,
            "magnitude": (*size.stack, size.outputs),
        }
        for part, shape in wanted.items():
            array = getattr(factors, part)
            if array is not None and array.shape != shape:
                raise ConfigError(
                    f"the adapter of {name} has {part} of {array.shape}, and the layer takes "
                    f"{shape}: give it the model that it was trained on"
                )
        a, b, scale = (jnp.asarray(x) for x in (factors.a, factors.b, factors.scale))
        magnitude = None if factors.magnitude is None else jnp.asarray(factors.magnitude)
        layer: Any = layers[name]  # nnx lets it have more than its class names
        layer.lora = LowRank(a, b, scale, magnitude)
    return model


def detach(model: Model) -> Model:
    """`model` without its adapter; the arrays are shared."""
    model = nnx.merge(*nnx.split(model))
    for layer in linear_layers(model).values():
        if hasattr(layer, "lora"):
            del layer.lora
    return model


def is_trained(path: Sequence[str]) -> bool:
    """Whether a path in a model's parameters leads to what an adapter trains."""
    return path[-2:-1] == ("lora",) and path[-1] != "scale"


def adapter_of(model: nnx.Module) -> dict[str, Factors]:
    """The adapter that a model has; empty without one."""
    return {
        name: Factors(
            lora.a[...],
            lora.b[...],
            lora.scale[...],
            None if lora.magnitude is None else lora.magnitude[...],
        )
        for name, layer in linear_layers(model).items()
        if (lora := getattr(layer, "lora", None)) is not None
    }


def merged(model: Model, dtype: Any = jnp.float32) -> Model:
    """`model` with its adapter inside its kernels; kernels of whole numbers take `dtype`."""
    model = nnx.merge(*nnx.split(model))
    for layer in linear_layers(model).values():
        lora, kernel = getattr(layer, "lora", None), matrix(layer)
        if lora is not None:
            factors = lora.column_factors(kernel)
            kernel = kernel + product(lora.a[...], lora.b[...], lora.scale[...])
            kernel = kernel if factors is None else kernel * factors[..., None, :]
            del layer.lora
        if lora is not None or hasattr(layer, "kernel_scale"):
            before = layer.kernel[...]
            kind = before.dtype if jnp.issubdtype(before.dtype, jnp.floating) else dtype
            layer.kernel = nnx.Param(kernel.reshape(before.shape).astype(kind))
        if hasattr(layer, "kernel_scale"):
            del layer.kernel_scale
    return model


def quantized(model: Model) -> Model:
    """`model` with the kernels of its linear layers as whole numbers of eight bits."""
    model = nnx.merge(*nnx.split(model))
    layers: dict[str, Any] = {**linear_layers(model)}  # nnx lets them have more than is declared
    for layer in layers.values():
        if hasattr(layer, "kernel_scale"):
            continue
        whole, scale = quantize(matrix(layer))
        layer.kernel = nnx.Param(whole.reshape(layer.kernel.shape))
        layer.kernel_scale = KernelScale(scale)
    return model


# ------------------------------------------------------------------------------- several


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """One adapter that adds what `adapters` add, each times its weight.

    Raises:
        ConfigError: one is DoRA's, whose lengths of columns have no sum.
    """
    total: dict[str, Factors] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, factors in adapter.items():
            if factors.magnitude is not None and len(adapters) > 1:
                raise ConfigError(
                    f"the adapter of {name} is DoRA's, whose lengths of columns have no sum: merge "
                    "it into the model, and stack the others on that"
                )
            here = dataclasses.replace(factors, scale=factors.scale * weight)
            total[name] = _beside(total[name], here) if name in total else here
    return total


def padded(adapters: Sequence[Adapter]) -> list[dict[str, Factors]]:
    """The same adapters with the same layers and ranks, so that one program serves all.

    Raises:
        ConfigError: some are DoRA's and others not.
    """
    ranks: dict[str, int] = {}
    like: dict[str, Factors] = {}
    for adapter in adapters:
        for name, factors in adapter.items():
            ranks[name] = max(ranks.get(name, 0), factors.rank)
            like.setdefault(name, factors)
            if (factors.magnitude is None) != (like[name].magnitude is None):
                raise ConfigError(
                    f"one adapter of {name} is DoRA's and another is not, and one program cannot "
                    "serve both: switch among those of one kind"
                )
    return [
        {
            name: _at_rank(adapter[name], rank) if name in adapter else _off(like[name], rank)
            for name, rank in ranks.items()
        }
        for adapter in adapters
    ]


def _beside(one: Factors, other: Factors) -> Factors:
    """The sum of two adapters of a layer: their factors side by side, the scales inside."""
    a = jnp.concatenate([f.a * f.scale[..., None, None] for f in (one, other)], -1)
    return Factors(a, jnp.concatenate([one.b, other.b], -2), jnp.ones_like(one.scale))


def _at_rank(f: Factors, rank: int) -> Factors:
    more = rank - f.rank
    none = [(0, 0)] * (f.a.ndim - 2)
    return dataclasses.replace(
        f, a=jnp.pad(f.a, [*none, (0, 0), (0, more)]), b=jnp.pad(f.b, [*none, (0, more), (0, 0)])
    )


def _off(f: Factors, rank: int) -> Factors:
    """An adapter of the same layer that changes nothing."""
    f = _at_rank(f, rank)
    return dataclasses.replace(
        f, a=jnp.zeros_like(f.a), b=jnp.zeros_like(f.b), scale=jnp.zeros_like(f.scale)
    )


def _features(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _projections(model: nnx.Module) -> set[str]:
    """The names of all layers of attention and of MLPs."""
    return {
        ".".join(map(str, (*path, name)))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Attention | Mlp | SwiGlu | GeGlu)
        for name in vars(module)
    }


def _instead(model: nnx.Module, pattern: str) -> str:
    """What else a pattern matches, in words."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if name and fnmatch.fnmatchcase(name, pattern):
            return f", but {name}, which is a {type(module).__name__}"
    return ""
