"""Custom losses: their weighted sum, and checks before the first step."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vlm.config import Code, Loss, loss_name
from vlm.errors import ConfigError, VlmError, first_line
from vlm.losses import LossInputs
from vlm.sharding import batch_sharding, batch_ways, placed, replicated

Scalars = dict[str, Float[Array, ""]]


def weighted_sum(
    losses: Iterable[tuple[str, float]],
    built_in: Callable[[Loss], Float[Array, ""]],
    inputs: LossInputs,
) -> tuple[Float[Array, ""], Scalars]:
    """Add the losses by their weights; return the sum, and each of them for the log.

    Raises:
        ConfigError: a loss of the user failed, or did not return a scalar.
    """
    total, metrics = jnp.float32(0), {}
    for loss, weight in losses:
        if isinstance(loss, Code):
            value, more = call(loss, inputs)
            metrics |= {f"loss/{loss.name}/{name}": x for name, x in more.items()}
        else:
            value = built_in(loss)  # pyright: ignore[reportArgumentType] (a Literal)
        metrics[f"loss/{loss_name(loss)}"] = value
        total += weight * value
    return total, metrics


def call(loss: Code, inputs: LossInputs) -> tuple[Float[Array, ""], Scalars]:
    """Compute a loss of the user and the scalars that it logs.

    Raises:
        ConfigError: it failed, or it returned something else than scalars.
    """
    function = loss.load("losses")
    try:
        value = function(inputs)
    except VlmError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the loss {loss} failed with {type(error).__name__}: {first_line(error)} (embeddings "
            f"are {inputs.z_image.shape}; a loss is traced by jax.jit): fix it"
        ) from error
    more: Any = {}
    if isinstance(value, tuple) and len(value) == 2:
        value, more = value
    if not _is_scalar(value):
        raise ConfigError(f"the loss {loss} returned {_described(value)}: return a float scalar")
    if not isinstance(more, dict) or not all(map(_is_scalar, more.values())):
        raise ConfigError(
            f"the loss {loss} returned {_described(more)} beside its value: return a dict of float "
            "scalars to log"
        )
    return jnp.asarray(value), more


def _is_scalar(x: Any) -> bool:
    if isinstance(x, bool | str) or (not hasattr(x, "dtype") and not isinstance(x, int | float)):
        return False
    return jnp.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _described(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"an array {value.shape} of {value.dtype}"
    return f"a {type(value).__name__}"


def check_losses(losses: Iterable[tuple[str, float]], inputs: LossInputs) -> None:
    """Trace each loss of the user, and check that it is pure and that devices share its work.

    Args:
        losses: with their weights.
        inputs: arrays of a whole batch, of which only shapes are used, with the mesh of the run.

    Raises:
        ConfigError: a loss fails, returns no scalar, keeps a traced value, differs between two
            traces, calls the host, ignores its inputs, or does all of its work on every device.
    """
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    for loss, _ in losses:
        if isinstance(loss, Code):
            _check_pure(loss, inputs)
            if isinstance(inputs.mesh, Mesh) and batch_ways(inputs.mesh) > 1:
                _check_sharded(loss, inputs)


def _check_pure(loss: Code, inputs: LossInputs) -> None:
    def traced() -> Any:
        return jax.make_jaxpr(lambda x: call(loss, x))(inputs)

    try:
        with jax.checking_leaks():
            first, second = traced(), traced()
    except Exception as error:
        if "Leaked" not in f"{error} {error.__cause__}":
            raise
        raise ConfigError(
            f"the loss {loss} is not pure: it keeps a traced value outside of itself; return what "
            "you want to see beside the loss, as (loss, dict of scalars)"
        ) from error
    if _program(first) != _program(second):
        raise ConfigError(
            f"the loss {loss} is not pure: it differs between two calls with equal inputs, as with "
            "numpy's random numbers or a counter; draw random numbers from inputs.key"
        )
    if any("debug" not in str(effect).lower() for effect in first.effects):
        raise ConfigError(
            f"the loss {loss} is not pure: it calls the host by io_callback; return what you want "
            "to see beside the loss, as (loss, dict of scalars)"
        )
    if not _depends_on_inputs(first.jaxpr):
        raise ConfigError(
            f"the loss {loss} is constant: compute it from z_image, z_text or other fields of "
            "vlm.losses.LossInputs"
        )


def _depends_on_inputs(jaxpr: Any) -> bool:
    """Whether the first output of a traced program depends on any of its inputs."""
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(x, "val") and x in reached for x in equation.invars):
            reached.update(equation.outvars)
    value = jaxpr.outvars[0]
    return not hasattr(value, "val") and value in reached  # a literal has its value


def _program(jaxpr: Any) -> tuple[str, list[Any]]:
    """Return a traced program and its constants in a form that can be compared."""
    return str(jaxpr.jaxpr), [np.asarray(x).tobytes() for x in jaxpr.consts]


# A loss is not shared if each device has more than this multiple of an even share of its FLOPs.
_MOST = 2.0
_SMALLEST = 1e6  # FLOPs below which it does not matter


def _check_sharded(loss: Code, inputs: LossInputs) -> None:
    """Raise a ConfigError if every device computes much more than its share of a loss."""
    mesh = inputs.mesh
    assert isinstance(mesh, Mesh)
    sharded, whole = batch_sharding(mesh), replicated(mesh)
    rows = inputs.z_image.shape[0]

    def place(x: Any) -> Any:
        return placed(x, sharded if x.ndim and x.shape[0] == rows else whole)

    def gradient(inputs: LossInputs) -> Any:
        def of(z_image, z_text):
            return call(loss, dataclasses.replace(inputs, z_image=z_image, z_text=z_text))[0]

        return jax.value_and_grad(of, argnums=(0, 1))(inputs.z_image, inputs.z_text)

    lowered = jax.jit(gradient).lower(jax.tree.map(place, inputs))
    total, each = (_flops(x) for x in (lowered, lowered.compile()))
    share = total / batch_ways(mesh)
    if each > _SMALLEST and each > _MOST * share:
        raise ConfigError(
            f"the loss {loss} is not sharded: each of {batch_ways(mesh)} devices computes "
            f"{each:.2g} of {total:.2g} FLOPs; write it with vlm.losses.all_pairs or "
            "jax.shard_map, or without what gathers the batch on every device"
        )


def _flops(program: Any) -> float:
    costs = program.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return float((costs or {}).get("flops", 0.0))
