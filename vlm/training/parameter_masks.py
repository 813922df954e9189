"""Selection of parameters by regular expressions of their names, such as "vision/.*/kernel"."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from vlm.errors import ConfigError
from vlm.sharding import path_names

# Factors by regular expressions of whole names; the first that matches applies.
Factors = Sequence[tuple[str, float]]


def name_of(path: tuple[Any, ...]) -> str:
    """Return the name of the parameter at a path of a tree."""
    return "/".join(path_names(path))


def first_match(factors: Factors, name: str, default: float) -> float:
    """Return the factor of the first pattern that matches the whole name."""
    return next((factor for pattern, factor in factors if re.fullmatch(pattern, name)), default)


def parameter_mask(*patterns: str) -> Callable[[Any], Any]:
    """Make a mask for optax: whether one of the regular expressions matches a parameter's name.

    Args:
        patterns: matched against whole names such as "vision/blocks/mlp/up/kernel".

    Returns:
        a function of a tree of parameters, for `mask` of `optax.adamw` or for `optax.masked`.

    Raises:
        ConfigError: (from the function) a pattern matches no parameter.

    Example:
        >>> import optax
        >>> kernels = vlm.training.parameter_mask(".*/kernel")
        >>> optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=kernels)
        >>> kernels({"vision": {"kernel": 0, "bias": 0}})
        {'vision': {'bias': False, 'kernel': True}}
    """

    def mask(params: Any) -> Any:
        check_patterns({"parameter_mask": patterns}, params)
        factors = [(pattern, True) for pattern in patterns]
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(first_match(factors, name_of(path), False)), params
        )

    return mask


def check_patterns(patterns: Mapping[str, Iterable[str]], params: Any) -> None:
    """Raise a ConfigError for a pattern that matches the name of no parameter.

    Args:
        patterns: regular expressions by the field that has them.
        params: tree of all parameters.
    """
    names = [name_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for field, own in patterns.items():
        for pattern in own:
            if not any(re.fullmatch(pattern, name) for name in names):
                near = difflib.get_close_matches(pattern, names, 3, 0) or names[:3]
                raise ConfigError(
                    f"{field} has {pattern!r}, which matches no parameter: names are such as "
                    f"{', '.join(near)}"
                )
