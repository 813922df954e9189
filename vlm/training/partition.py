"""Split and join parameter trees: trained parameters and the rest."""

from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[Any, Any]  # nested, by name; list items by index


def partition(params: Params, trained: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """Return (leaves whose path is `trained`, all other leaves), without empty branches."""
    leaves = flatten_dict(params)
    yes = {path: x for path, x in leaves.items() if trained(tuple(map(str, path)))}
    no = {path: x for path, x in leaves.items() if path not in yes}
    return unflatten_dict(yes), unflatten_dict(no)


def joined(one: Params, other: Params) -> Params:
    """Return the union of two trees; where both have a leaf, that of `one`."""
    return unflatten_dict(flatten_dict(other) | flatten_dict(one))
