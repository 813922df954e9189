"""Relevance of each image position to a text, by several methods, as one jitted function.

All methods explain the cosine between an image and a text. They return a number for each position
that the tower pools, in row-major order.
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
from vlm.models.dual_encoder import DualEncoder
from vlm.nn.intermediates import Intermediates
from vlm.nn.naflex import Patches

Method = Literal["path", "attention", "similarity", "gradcam"]
METHODS: tuple[Method, ...] = get_args(Method)
STEPS = 8  # quadrature nodes of "path" between the blank image and the image

Images = Float[Array | np.ndarray, "b h w 3"] | Patches
Activations = dict[str, Array]


def relevance_maps(
    model: DualEncoder, images: Images, z_text: Float[Array | np.ndarray, "b e"], method: Method
) -> tuple[Float[Array, "b n"], Float[Array, " b"]]:
    """Compute the relevance of each position of normalised images, and the explained cosines.

    path: integrated gradients (arXiv:1703.01365) of the stem's tokens, or of the first stage of
        convolutions, on the path from a blank image of the mean colour to the image. The sum over
        all positions is the difference of the two cosines.
    attention: gradient of the cosine by the attention weights of all layers (LeGrad,
        arXiv:2404.03214).
    similarity: cosine of each position's own embedding (MaskCLIP, arXiv:2112.01071).
    gradcam: Grad-CAM at the last layer with positions (arXiv:1610.02391).

    Args:
        z_text: unit-norm embedding of the text of each image.
    """
    graph, state = nnx.split(model)
    return _relevance_maps(graph, state, images, z_text, method)


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def _relevance_maps(graph, state, images, z_text, method: Method):
    check_choice("method", method, get_args(Method))
    model = nnx.merge(graph, state)
    images = jax.tree.map(jnp.asarray, images)
    if method == "path":
        return _path(model, images, z_text)
    activations, cosine = run(model, images, z_text, {})
    if method == "similarity":
        return jnp.einsum("bne,be->bn", model.dense("vision", images), z_text), cosine
    relevance = _attention if method == "attention" else _gradcam
    return relevance(model, images, z_text, activations), cosine


def dense_embeddings(model: DualEncoder, images: Images) -> Float[Array, "b n e"]:
    """Return the unit-norm embedding of each position: see the towers' `dense`."""
    graph, state = nnx.split(model)
    return _dense(graph, state, images)


@functools.partial(jax.jit, static_argnames="graph")
def _dense(graph, state, images):
    return nnx.merge(graph, state).dense("vision", jax.tree.map(jnp.asarray, images))


def run(
    model: DualEncoder, images: Images, z_text: Float[Array, "b e"], changes: Activations
) -> tuple[Activations, Float[Array, " b"]]:
    """Return the vision tower's intermediates after adding `changes`, and the cosines."""
    intermediates = Intermediates(changes)
    rows = images if isinstance(images, Patches) else jnp.asarray(images)
    z_image = model.encode_image(rows, intermediates=intermediates)
    return intermediates.found, (z_image * z_text).sum(-1)


def gradients(model, images, z_text, changes: Activations) -> Activations:
    """Return the gradient of the cosines by the intermediates named in `changes`."""
    return jax.grad(lambda changes: run(model, images, z_text, changes)[1].sum())(changes)


def _path(model, images, z_text) -> tuple[Float[Array, "b n"], Float[Array, " b"]]:
    pair = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), images, _blank(images))
    activations, cosines = run(model, pair, jnp.concatenate([z_text, z_text]), {})
    name = "stem" if "stem" in activations else "stages/0"
    of_image, of_blank = jnp.split(activations[name], 2)
    difference = of_image - of_blank

    def step(total, node):
        position, weight = node
        return total + weight * gradients(
            model, images, z_text, {name: (position - 1) * difference}
        )[name], None

    # Gauss-Legendre quadrature needs far fewer steps than equal ones for the same error.
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    total, _ = jax.lax.scan(
        step, jnp.zeros_like(difference), (jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2))
    )
    contribution = (total * difference).sum(-1)
    if contribution.ndim == 2:
        values = _drop_prefix(model.config.vision, contribution)
    else:
        sides = [activations[f"stages/{i}"].shape[1] for i in range(_stages(activations))]
        values = _sum_to_last_stage(contribution, sides)
    return values, jnp.split(cosines, 2)[0]


def _attention(model, images, z_text, activations: Activations) -> Float[Array, "b n"]:
    weights = {name: w for name, w in activations.items() if name.endswith("attention")}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    total = 0.0
    for gradient in gradients(model, images, z_text, zeros).values():
        layer = jax.nn.relu(gradient).mean((-3, -2))  # over heads and queries
        layer = layer.sum(0) if gradient.ndim == 5 else layer  # the blocks are stacked
        total += layer / jnp.maximum(layer.max(-1, keepdims=True), 1e-30)
    return _drop_prefix(model.config.vision, jnp.asarray(total))


def _gradcam(model, images, z_text, activations: Activations) -> Float[Array, "b n"]:
    if "stem" not in activations:
        name = _last_stage(activations)
        x, gradient = (
            activations[name],
            gradients(model, images, z_text, {name: activations[name] * 0})[name],
        )
        x, gradient = (y.reshape(y.shape[0], -1, y.shape[-1]) for y in (x, gradient))
    else:
        # With a class token, the patch tokens of the last block do not affect the embedding.
        by_class = getattr(model.config.vision, "pool", None) == "class"
        layers = jnp.concatenate([activations["stem"][None], activations["blocks/output"]])
        zeros = {"stem": activations["stem"] * 0, "blocks/output": activations["blocks/output"] * 0}
        by_layer = gradients(model, images, z_text, zeros)
        by_layer = jnp.concatenate([by_layer["stem"][None], by_layer["blocks/output"]])
        x, gradient = (y[-2 if by_class else -1] for y in (layers, by_layer))
        prefix = _prefix_length(model.config.vision)
        x, gradient = x[:, prefix:], gradient[:, prefix:]
    return jax.nn.relu((x * gradient.mean(1, keepdims=True)).sum(-1))


def _blank(images: Images) -> Images:
    """Return blank images of the same shapes, in the mean colour of each image."""
    if not isinstance(images, Patches):
        return jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)
    real = images.mask[..., None, None]
    mean = (images.pixels.mean(2, keepdims=True) * real).sum(1, keepdims=True)
    mean = mean / images.mask.sum(1)[:, None, None, None]
    return images._replace(pixels=jnp.broadcast_to(mean, images.pixels.shape) * real)


def _stages(activations: Activations) -> int:
    return sum(name.startswith("stages/") for name in activations)


def _last_stage(activations: Activations) -> str:
    """Return the name of the output of the last stage of convolutions."""
    return f"stages/{_stages(activations) - 1}"


def _sum_to_last_stage(values: Float[Array, "b h w"], sides: list[int]) -> Float[Array, "b n"]:
    """Sum values of the first stage over the area that each position of the last one covers.

    Args:
        values: values of the first stage.
        sides: side length of each stage. Remainders of odd sides go to the last position.
    """
    size = 2 ** sum(a != b for a, b in itertools.pairwise(sides))
    cell = np.minimum(np.arange(sides[0]) // size, sides[-1] - 1)
    member = jnp.asarray(cell[:, None] == np.arange(sides[-1]), values.dtype)
    return jnp.einsum("bhw,hi,wj->bij", values, member, member).reshape(len(values), -1)


def _prefix_length(tower: VisionTowerConfig) -> int:
    """Return the number of tokens before the patch tokens: class token, or a ResNet's mean."""
    return 1 if isinstance(tower, ResNetConfig) else getattr(tower, "prefix_tokens", 0)


def _drop_prefix(tower: VisionTowerConfig, values: Float[Array, "b m"]) -> Float[Array, "b n"]:
    return values[:, _prefix_length(tower) :]
