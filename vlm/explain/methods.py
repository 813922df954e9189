"""How much each place of an image speaks for a text, by several methods, as one jitted function.

All explain the cosine between an image and a text, and give a number for each place that the tower
pools, row by row.
"""

import functools
import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlm.config import ResNetConfig, VisionTowerConfig
from vlm.errors import check_choice
from vlm.models.dual_encoder import DualEncoder, unit_norm
from vlm.nn.intermediates import Intermediates
from vlm.nn.naflex import Patches

Method = Literal["path", "attention", "similarity", "gradcam"]
METHODS: tuple[Method, ...] = get_args(Method)
STEPS = 8  # between the blank image and the image, of "path"

Images = Float[Array | np.ndarray, "b h w 3"] | Patches
Found = dict[str, Array]


def place_maps(
    model: DualEncoder, images: Images, z_text: Float[Array | np.ndarray, "b e"], method: Method
) -> tuple[Float[Array, "b n"], Float[Array, " b"]]:
    """The relevance of each place of normalised images, and the cosines that it explains.

    path: what a place adds to the cosine on the way from a blank image, of the image's mean
        colour, to the image: integrated gradients (arXiv:1703.01365) of the first tokens, or of
        the first stage of convolutions. Over all places it sums up to the whole difference.
    attention: what more attention to a place would add, in all layers (LeGrad, arXiv:2404.03214).
    similarity: the cosine of the place's own embedding (MaskCLIP, arXiv:2112.01071).
    gradcam: Grad-CAM at the last layer that has places (arXiv:1610.02391).

    Args:
        z_text: the unit-norm embedding of the text that each image is explained for.
    """
    graph, state = nnx.split(model)
    return _place_maps(graph, state, images, z_text, method)


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def _place_maps(graph, state, images, z_text, method: Method):
    check_choice("method", method, get_args(Method))
    model = nnx.merge(graph, state)
    images = jax.tree.map(jnp.asarray, images)
    if method == "path":
        return _path(model, images, z_text)
    found, cosine = run(model, images, z_text, {})
    if method == "similarity":
        return jnp.einsum("bne,be->bn", unit_norm(model.vision.dense(images)), z_text), cosine
    form = _attention if method == "attention" else _gradcam
    return form(model, images, z_text, found), cosine


def dense_embeddings(model: DualEncoder, images: Images) -> Float[Array, "b n e"]:
    """The unit-norm embedding of each place on its own: see the towers' `dense`."""
    graph, state = nnx.split(model)
    return _dense(graph, state, images)


@functools.partial(jax.jit, static_argnames="graph")
def _dense(graph, state, images):
    return unit_norm(nnx.merge(graph, state).vision.dense(jax.tree.map(jnp.asarray, images)))


def run(
    model: DualEncoder, images: Images, z_text: Float[Array, "b e"], changes: Found
) -> tuple[Found, Float[Array, " b"]]:
    """The image tower's intermediates after `changes`, and the cosines with the texts."""
    intermediates = Intermediates(changes)
    rows = images if isinstance(images, Patches) else jnp.asarray(images)
    z_image = model.encode_image(rows, intermediates=intermediates)
    return intermediates.found, (z_image * z_text).sum(-1)


def gradients(model, images, z_text, changes: Found) -> Found:
    """The gradient of the cosines by the intermediates that `changes` names, after them."""
    return jax.grad(lambda changes: run(model, images, z_text, changes)[1].sum())(changes)


def _path(model, images, z_text) -> tuple[Float[Array, "b n"], Float[Array, " b"]]:
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), images, _blank(images))
    found, cosines = run(model, both, jnp.concatenate([z_text, z_text]), {})
    name = "stem" if "stem" in found else "stages/0"
    there, nothing = jnp.split(found[name], 2)
    whole = there - nothing

    def step(total, node):
        share, weight = node
        return total + weight * gradients(model, images, z_text, {name: (share - 1) * whole})[
            name
        ], None

    # Gauss and Legendre's rule, which needs far fewer steps than equal ones for the same error.
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    total, _ = jax.lax.scan(
        step, jnp.zeros_like(whole), (jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2))
    )
    added = (total * whole).sum(-1)
    if added.ndim == 2:
        places = _without_first(model.config.vision, added)
    else:
        sides = [found[f"stages/{i}"].shape[1] for i in range(_stages(found))]
        places = _summed_to(added, sides)
    return places, jnp.split(cosines, 2)[0]


def _attention(model, images, z_text, found: Found) -> Float[Array, "b n"]:
    weights = {name: w for name, w in found.items() if name.endswith("attention")}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    total = 0.0
    for gradient in gradients(model, images, z_text, zeros).values():
        wanted = jax.nn.relu(gradient).mean((-3, -2))  # over heads and queries
        wanted = wanted.sum(0) if gradient.ndim == 5 else wanted  # the blocks are stacked
        total += wanted / jnp.maximum(wanted.max(-1, keepdims=True), 1e-30)
    return _without_first(model.config.vision, jnp.asarray(total))


def _gradcam(model, images, z_text, found: Found) -> Float[Array, "b n"]:
    if "stem" not in found:
        name = _last_stage(found)
        x, gradient = found[name], gradients(model, images, z_text, {name: found[name] * 0})[name]
        x, gradient = (y.reshape(y.shape[0], -1, y.shape[-1]) for y in (x, gradient))
    else:
        # The patches that come out of the last block of a class-token tower count for nothing.
        by_class = getattr(model.config.vision, "pool", None) == "class"
        layers = jnp.concatenate([found["stem"][None], found["blocks/output"]])
        zeros = {"stem": found["stem"] * 0, "blocks/output": found["blocks/output"] * 0}
        given = gradients(model, images, z_text, zeros)
        given = jnp.concatenate([given["stem"][None], given["blocks/output"]])
        x, gradient = (y[-2 if by_class else -1] for y in (layers, given))
        first = _before_places(model.config.vision)
        x, gradient = x[:, first:], gradient[:, first:]
    return jax.nn.relu((x * gradient.mean(1, keepdims=True)).sum(-1))


def _blank(images: Images) -> Images:
    """Images of the same shapes in their mean colours."""
    if not isinstance(images, Patches):
        return jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)
    real = images.mask[..., None, None]
    mean = (images.pixels.mean(2, keepdims=True) * real).sum(1, keepdims=True)
    mean = mean / images.mask.sum(1)[:, None, None, None]
    return images._replace(pixels=jnp.broadcast_to(mean, images.pixels.shape) * real)


def _stages(found: Found) -> int:
    return sum(name.startswith("stages/") for name in found)


def _last_stage(found: Found) -> str:
    """The name of what the last stage of convolutions gave."""
    return f"stages/{_stages(found) - 1}"


def _summed_to(values: Float[Array, "b h w"], sides: list[int]) -> Float[Array, "b n"]:
    """Sums over the places of the first stage that each place of the last one covers.

    Args:
        values: of the first stage.
        sides: of each stage. Where a side is odd, what is left over goes to the last place.
    """
    size = 2 ** sum(a != b for a, b in itertools.pairwise(sides))
    cell = np.minimum(np.arange(sides[0]) // size, sides[-1] - 1)
    member = jnp.asarray(cell[:, None] == np.arange(sides[-1]), values.dtype)
    return jnp.einsum("bhw,hi,wj->bij", values, member, member).reshape(len(values), -1)


def _before_places(tower: VisionTowerConfig) -> int:
    """How many tokens stand before those of places, such as a class token or a ResNet's mean."""
    return 1 if isinstance(tower, ResNetConfig) else getattr(tower, "prefix_tokens", 0)


def _without_first(tower: VisionTowerConfig, values: Float[Array, "b m"]) -> Float[Array, "b n"]:
    return values[:, _before_places(tower) :]
