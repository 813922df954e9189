"""Towers that are a user's own `flax.nnx.Module`: construction, checks, calls and FLOPs.

The interface of a tower:

    tower = MyTower(embed_dim, rngs=rngs, **options)
    tower(images)  # normalised images (b, h, w, 3) in float32 to embeddings (b, embed_dim)
    tower(tokens)  # for texts: token ids (b, n) in int32 to embeddings (b, embed_dim)

Embeddings are floating-point numbers of any length: vlm normalises them in float32. These
parameters are optional, and passed if the signature has them:

* constructor `execution`, a `vlm.nn.Execution`: dtype of computation, rematerialisation, and
  whether stacked layers are scanned.
* call `keys` (b,), a PRNG key for each example, for dropout. None: inference.
* call `intermediates`, a `vlm.nn.Intermediates` to fill with `vlm.nn.capture`. None: no capture.

State: each `nnx.Param` is trained; other variables, such as a subclass of `nnx.Variable`, are
constants that are saved with the model. Both hold floating-point numbers. A training step is a pure
function of parameters and batch, so batch statistics, caches and generators of random numbers are
refused. Parameters below the name `blocks`, outside of a list, are stacks with one leading axis of
layers, as `vlm.nn.stack_blocks` makes them.
"""

import functools
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import core
from jax.extend import core as jex
from jaxtyping import Array, Float, Key

from vlm.config import TextModuleConfig, VisionModuleConfig
from vlm.errors import ConfigError, brief, first_line
from vlm.nn.intermediates import Intermediates
from vlm.nn.lora import AdapterParam
from vlm.nn.transformer import Execution
from vlm.sharding import by_rows, is_stacked

ModuleConfig = VisionModuleConfig | TextModuleConfig

_MUTABLE = {
    nnx.BatchStat: "batch statistics: use nnx.GroupNorm or nnx.LayerNorm",
    nnx.RngState: "a generator of random numbers: make layers without one, as nnx.Dropout(rate) or "
    "nnx.RNN(cell, rngs=False), and give them nnx.Rngs in __call__, from `keys` for dropout",
    nnx.Cache: "a cache: compute it in __call__",
    nnx.Intermediate: "intermediate values: capture them with `intermediates` of __call__",
}


def module_tower(
    config: ModuleConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
) -> nnx.Module:
    """Make the tower of `config`, an object of the user's class.

    Raises:
        ConfigError: the class cannot be imported, is no `nnx.Module`, refuses its options, has
            variables that cannot be trained or saved, or `partition` does not fit its parameters.
    """
    path, where = config.module, f"{type(config).__name__}.module"
    cls: Any = path.load(where)
    if not is_module_class(cls):
        raise ConfigError(
            f"{where} is {str(path)!r}, which is no subclass of flax.nnx.Module but "
            f"{brief(cls)}: give the class of a tower"
        )
    arguments: dict[str, Any] = {"rngs": rngs, **dict(config.options)}
    if _accepts(cls.__init__, "execution"):
        arguments["execution"] = execution
    try:
        inspect.signature(cls.__init__).bind(None, embed_dim, **arguments)
    except TypeError as error:
        options = ", ".join(name for name, _ in config.options) or "none"
        raise ConfigError(
            f"the constructor of {path} does not take (embed_dim, rngs=rngs, **options) with the "
            f"options {options} ({error}): change options, or the class"
        ) from None
    tower = _guarded(path, "its constructor", lambda: cls(embed_dim, **arguments))
    check_state(tower, config)
    return tower


def is_module_class(value: Any) -> bool:
    """Return True for a subclass of `nnx.Module`."""
    return isinstance(value, type) and issubclass(value, nnx.Module)


def check_state(tower: nnx.Module, config: ModuleConfig) -> None:
    """Raise a ConfigError if a variable or a rule of `partition` does not fit."""
    path, shapes = config.module, {}
    for names, variable in nnx.to_flat_state(nnx.state(tower)):
        names = tuple(map(str, names))
        name = "/".join(names)
        for kind, what in _MUTABLE.items():
            if isinstance(variable, kind):
                raise ConfigError(
                    f"{path} has {name}, a {type(variable).__name__}, which a training step does "
                    f"not update: it is of {what}"
                )
        value = variable.get_value()
        if not jnp.issubdtype(getattr(value, "dtype", object), jnp.floating):
            raise ConfigError(
                f"{path} has {name} of {getattr(value, 'dtype', type(value).__name__)}, and a "
                "model file holds floating-point numbers: make it a float, or a plain attribute"
            )
        shapes[names] = value.shape
    for names, shape in shapes.items():
        same = {s[:1] for n, s in shapes.items() if "blocks" in n and n[0] == names[0]}
        if is_stacked(names) and len(same) > 1:
            raise ConfigError(
                f"{path} has {'/'.join(names)} of {shape}, and parameters under the name `blocks` "
                "are stacks with one leading axis of layers: give it another name, or make a "
                "nnx.List of the layers"
            )
    for pattern, axes in config.partition:
        found = {"/".join(n): s for n, s in shapes.items() if re.fullmatch(pattern, "/".join(n))}
        if not found:
            raise ConfigError(
                f"partition {pattern!r} matches no parameter of {path}: it has "
                f"{', '.join('/'.join(n) for n in shapes)}"
            )
        for name, shape in found.items():
            if len(shape) != len(axes):
                raise ConfigError(
                    f"partition {pattern!r} has {len(axes)} mesh axes, and {name} of {path} has "
                    f"the shape {shape}: give an axis or None for each dimension"
                )


def constants(model: nnx.Module) -> set[tuple[str, ...]]:
    """Return the paths of variables that are no parameters, which no step trains.

    The factors of adapters are variables of a type of their own, and trained.
    """
    flat = nnx.to_flat_state(nnx.state(model))
    trained = nnx.Param, AdapterParam
    return {tuple(map(str, path)) for path, v in flat if not isinstance(v, trained)}


def call_module(
    tower: nnx.Module,
    config: ModuleConfig,
    embed_dim: int,
    inputs: Array,
    *,
    keys: Key[Array, " b"] | None = None,
    intermediates: Intermediates | None = None,
) -> Float[Array, "b e"]:
    """Embed images or texts with a module tower.

    Raises:
        ConfigError: the module fails while it is traced, or its output has another shape or type.
    """
    path, given = config.module, {"keys": keys, "intermediates": intermediates}
    call: Any = tower
    accepted = {name: x for name, x in given.items() if _accepts(type(tower).__call__, name)}
    if intermediates is not None and "intermediates" not in accepted:
        raise ConfigError(
            f"{path} captures no intermediate activations: give its __call__ the parameter "
            "`intermediates`, or use a tower of vlm"
        )
    if isinstance(inputs, core.Tracer):
        what = f"inputs of {inputs.shape} in {inputs.dtype}"
        z = _guarded(path, what, lambda: call(inputs, **accepted))
    else:
        z = call(inputs, **accepted)
    wanted = (inputs.shape[0], embed_dim)
    got = f"{z.shape} in {z.dtype}" if isinstance(z, jax.Array) else brief(z)
    if not isinstance(z, jax.Array) or z.shape != wanted:
        raise ConfigError(
            f"{path} maps {inputs.shape} to {got}, and a tower returns embeddings of {wanted}, "
            "(batch, embed_dim): change its last layer"
        )
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise ConfigError(
            f"{path} returns {got}, and embeddings are floating-point numbers: convert them"
        )
    return by_rows(z)


@functools.lru_cache(maxsize=32)
def module_flops(config: ModuleConfig, embed_dim: int) -> dict[str, float]:
    """Forward FLOPs of one example, counted in the traced program: {"module": FLOPs}.

    As in `vlm.models.flops`, matrix products and convolutions count, in a scan once for each step.
    A loop of unknown length counts as one step.
    """
    if isinstance(config, TextModuleConfig):
        example = jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)
    else:
        shape = (1, config.image_size, config.image_size, 3)
        example = jax.ShapeDtypeStruct(shape, jnp.float32)

    def forward(inputs):
        tower = module_tower(config, embed_dim, execution=Execution(), rngs=nnx.Rngs(0))
        return call_module(tower, config, embed_dim, inputs)

    return {"module": count_flops(jax.make_jaxpr(forward)(example).jaxpr)}


def count_flops(jaxpr: jex.Jaxpr) -> float:
    """Count the FLOPs of matrix products and convolutions of a traced program.

    Example:
        >>> from vlm.models.modules import count_flops
        >>> count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr)
        48.0
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        out = math.prod(_shape(equation.outvars[0])) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = _shape(equation.invars[0])
            total += 2.0 * out * math.prod(shape[d] for d in contracted)
        elif name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * out * math.prod(kernel) / outputs
        else:
            inner = [count_flops(j) for j in _inner(parameters)]
            if inner:
                once = max(inner) if name == "cond" else sum(inner)
                total += parameters["length"] * once if name == "scan" else once
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())


def _inner(parameters: dict[str, Any]) -> list[jex.Jaxpr]:
    """Return the programs among the parameters of an equation."""
    values = [x for v in parameters.values() for x in (v if isinstance(v, tuple | list) else (v,))]
    found = [getattr(x, "jaxpr", x) for x in values]
    return [x for x in found if isinstance(x, jex.Jaxpr)]


def _accepts(function: Any, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # it is not written in Python
        return False


def _guarded(path: str, what: str, function: Any) -> Any:
    """Call a user's code; report its failure in one sentence."""
    try:
        return function()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{path} failed on {what} with {type(error).__name__}: {first_line(error)}"
        ) from error
