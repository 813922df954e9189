"""LoRA adapters of a model: attach, detach, merge and sum.

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
from vlm.nn.layers import Mlp
from vlm.nn.lora import KernelScale, LowRank, column_lengths, product, quantize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """Adapter of one layer, or of a stack of layers with a leading axis."""

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
    """Sizes of a linear layer; `layers` is None unless it is stacked."""

    inputs: int
    outputs: int
    layers: int | None

    @property
    def stack(self) -> tuple[int, ...]:
        return () if self.layers is None else (self.layers,)


def linear_layers(model: nnx.Module) -> dict[str, nnx.Linear | nnx.LinearGeneral]:
    """Return all linear layers of vlm's modules by dotted name, sorted.

    Those of other modules, in towers of the user's own, compute without an adapter.
    """
    modules = dict(nnx.iter_modules(model))
    layers = {
        ".".join(map(str, path)): module
        for path, module in modules.items()
        if isinstance(module, nnx.Linear | nnx.LinearGeneral)
        and any(_is_ours(m) for m in (module, modules.get(path[:-1], model)))
    }
    return dict(sorted(layers.items()))


def _is_ours(module: nnx.Module) -> bool:
    return type(module).__module__.startswith("vlm.")


def size_of(layer: nnx.Linear | nnx.LinearGeneral) -> LayerSize:
    """Sizes of a linear layer, with heads flattened."""
    inputs, outputs = _features(layer.in_features), _features(layer.out_features)
    shape = layer.kernel.shape
    stacked = len(shape) > len(inputs) + len(outputs)
    return LayerSize(math.prod(inputs), math.prod(outputs), shape[0] if stacked else None)


def matrix(layer: nnx.Linear | nnx.LinearGeneral) -> Float[Array, "*l i o"]:
    """Kernel of a linear layer in float32, with heads flattened."""
    size = size_of(layer)
    kernel = layer.kernel[...].reshape(*size.stack, size.inputs, size.outputs).astype(jnp.float32)
    scale = getattr(layer, "kernel_scale", None)
    return kernel if scale is None else kernel * scale[...][..., None, :]


# ------------------------------------------------------------------------------- new adapters


def targeted(model: nnx.Module, patterns: Sequence[str]) -> list[str]:
    """Return names of linear layers that match any of `patterns`; without any, all projections.

    Raises:
        ConfigError: a pattern matches no linear layer; the message lists those that exist.
    """
    layers = linear_layers(model)
    if not patterns:
        chosen = sorted(_projections(model) & layers.keys())
        if not chosen:
            raise ConfigError(
                "an adapter needs linear layers of vlm.nn, and the towers of this model have none: "
                "train the model itself"
            )
        return chosen
    chosen = set()
    for pattern in patterns:
        matched = fnmatch.filter(layers, pattern)
        if not matched:
            raise ConfigError(
                f"adapter.targets {pattern!r} matches no linear layer"
                f"{_module_hint(model, pattern)}: the model has {', '.join(layers)}"
            )
        chosen.update(matched)
    return sorted(chosen)


def fresh(model: nnx.Module, config: AdapterConfig, key: Key[Array, ""]) -> dict[str, Factors]:
    """Initialise an adapter with random `a` and zero `b`, so that it has no effect.

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
        adapter[name] = Factors(a, b, jnp.full(size.stack, config.scale, jnp.float32), magnitude)
    return adapter


def prepared(model: Model, config: AdapterConfig, seed: int) -> Model:
    """Quantize `model` as the config asks, and attach a newly initialised adapter."""
    if config.quantize == "int8":
        model = quantized(model)
    return attach(model, fresh(model, config, jax.random.key(seed)))


# ------------------------------------------------------------------------- attach and detach


def attach(model: Model, adapter: Adapter) -> Model:
    """Return `model` with this adapter, replacing any other; arrays are shared.

    Factors of a tower that the model was loaded without are skipped.

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
        layer: Any = layers[name]  # nnx allows undeclared attributes
        layer.lora = LowRank(a, b, scale, magnitude)
    return model


def detach(model: Model) -> Model:
    """Return `model` without its adapter; arrays are shared."""
    model = nnx.merge(*nnx.split(model))
    for layer in linear_layers(model).values():
        if hasattr(layer, "lora"):
            del layer.lora
    return model


def is_trained(path: Sequence[str]) -> bool:
    """Whether a parameter path is a trainable parameter of an adapter."""
    return path[-2:-1] == ("lora",) and path[-1] != "scale"


def adapter_of(model: nnx.Module) -> dict[str, Factors]:
    """Return the adapter of a model; empty if it has none."""
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
    """Merge the adapter into the kernels of `model`; quantized kernels become `dtype`."""
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
    """Quantize the kernels of the linear layers of `model` to int8."""
    model = nnx.merge(*nnx.split(model))
    layers: dict[str, Any] = {**linear_layers(model)}  # nnx allows undeclared attributes
    for layer in layers.values():
        if hasattr(layer, "kernel_scale"):
            continue
        integers, scale = quantize(matrix(layer))
        layer.kernel = nnx.Param(integers.reshape(layer.kernel.shape))
        layer.kernel_scale = KernelScale(scale)
    return model


# ------------------------------------------------------------------------ several adapters


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """Return one adapter equal to the weighted sum of `adapters`.

    Raises:
        ConfigError: one is a DoRA adapter, whose column lengths cannot be summed.
    """
    total: dict[str, Factors] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, factors in adapter.items():
            if factors.magnitude is not None and len(adapters) > 1:
                raise ConfigError(
                    f"the adapter of {name} is DoRA's, whose lengths of columns have no sum: merge "
                    "it into the model, and stack the others on that"
                )
            scaled = dataclasses.replace(factors, scale=factors.scale * weight)
            total[name] = _concatenated(total[name], scaled) if name in total else scaled
    return total


def padded(adapters: Sequence[Adapter]) -> list[dict[str, Factors]]:
    """Pad adapters to the same layers and ranks, so that one compiled program serves all.

    Raises:
        ConfigError: DoRA and LoRA adapters are mixed.
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
            name: _pad_rank(adapter[name], rank)
            if name in adapter
            else _zero_adapter(like[name], rank)
            for name, rank in ranks.items()
        }
        for adapter in adapters
    ]


def _concatenated(one: Factors, other: Factors) -> Factors:
    """Sum two adapters of a layer by concatenating their scaled factors."""
    a = jnp.concatenate([f.a * f.scale[..., None, None] for f in (one, other)], -1)
    return Factors(a, jnp.concatenate([one.b, other.b], -2), jnp.ones_like(one.scale))


def _pad_rank(f: Factors, rank: int) -> Factors:
    padding = rank - f.rank
    leading = [(0, 0)] * (f.a.ndim - 2)
    return dataclasses.replace(
        f,
        a=jnp.pad(f.a, [*leading, (0, 0), (0, padding)]),
        b=jnp.pad(f.b, [*leading, (0, padding), (0, 0)]),
    )


def _zero_adapter(f: Factors, rank: int) -> Factors:
    """Make an adapter of the same layer that has no effect."""
    f = _pad_rank(f, rank)
    return dataclasses.replace(
        f, a=jnp.zeros_like(f.a), b=jnp.zeros_like(f.b), scale=jnp.zeros_like(f.scale)
    )


def _features(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _projections(model: nnx.Module) -> set[str]:
    """Names of all linear layers of attention and MLPs."""
    return {
        ".".join(map(str, (*path, name)))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Attention | Mlp)
        for name in vars(module)
    }


def _module_hint(model: nnx.Module, pattern: str) -> str:
    """Hint at a module that is no linear layer but matches a pattern."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if name and fnmatch.fnmatchcase(name, pattern):
            return f", but {name}, which is a {type(module).__name__}"
    return ""
