"""Prompts learned from a few labelled images with both towers frozen (CoOp, CoCoOp).

The images are embedded once. Trained are the context vectors around each label, and in CoCoOp a
small network that shifts them by the image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vlm.adaptation.labelled import embed_labelled
from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.heads.inputs import Images
from vlm.heads.prompted import NET, PromptedClassifier, PromptRows, prompt_rows, shift
from vlm.heads.prompts import class_embeddings, label_prompts
from vlm.heads.templates import choose_templates

StepPlan = Callable[[Callable[[], Any], int], int]  # see `steps` of `learn_prompt`

STEPS = 60
BATCH, IMAGE_BATCH = 64, 4  # images per step of CoOp, and of CoCoOp, which embeds labels for each
HOLD = 1.0  # less than the 8 of KgCoOp (arXiv:2303.13283), whose context starts as words
INIT = 0.02  # standard deviation of random context vectors, as published
# Adam steps have the size of the rate. Relative to the entries of the embedding table, it suits
# every model.
RATE = 0.2
NARROWING = 16  # factor of the hidden layer of the network, as published


def learn_prompt(
    model: Bundle,
    images: Images,
    labels: Sequence[str],
    classes: Sequence[str] | None = None,
    template: str | None = None,
    n_ctx: int | None = None,
    per_image: bool = False,
    hold: float = HOLD,
    steps: int | StepPlan = STEPS,
    rate: float = RATE,
    seed: int = 0,
    batch_size: int | None = None,
    texts: Sequence[str] = (),
) -> PromptedClassifier:
    """Learn a context for prompts from labelled images; deterministic for a seed.

    Args:
        model: a model from `vlm.load`.
        images: PIL images, paths or arrays of pixels, any iterable; or their embeddings, (n, d).
        labels: class of each image.
        classes: all class names; by default those of `labels`, sorted.
        template: a sentence with `{}` for the label; the context replaces its words before the
            label, and starts from them. By default the model's own, else "a photo of a {}.".
        n_ctx: number of random context vectors in their place (CoOp has 16).
        per_image: CoCoOp (arXiv:2203.05557), in which a network shifts the context by each image;
            classification then embeds all labels for every image. Otherwise CoOp
            (arXiv:2109.01134).
        hold: weight of the squared distance of class embeddings from those of the sentences, which
            limits forgetting (KgCoOp, arXiv:2303.13283); 0 for CoOp as published.
        steps: of Adam, with a cosine decay of the rate to zero; or a function that chooses their
            number, given a function that computes a step, to measure it, and the batch size.
        rate: initial learning rate, relative to the size of the entries of the embedding table.
        seed: of the vectors and the order of the images.
        batch_size: for encoding; None: the model's default.
        texts: class names in sentences, in the order of `classes`; by default `classes`.

    Raises:
        ConfigError: labels that are no classes or not one per image, a model without a text tower,
            a label or template without space for the context (see `prompt_rows`).

    Example:
        >>> labels = ["red", "green", "blue"]
        >>> classify = vlm.adaptation.learn_prompt(model, pictures, labels, n_ctx=2, steps=2)
        >>> classify(pictures).labels
        ('blue', 'green', 'red')
    """
    if (isinstance(steps, int) and steps < 1) or not rate > 0 or not hold >= 0:
        raise ConfigError(
            f"steps {steps}, rate {rate}, hold {hold}: give at least 1 step, a rate above 0 and a "
            "hold of 0 or more"
        )
    z_image, names, target = embed_labelled(model, images, list(labels), classes, batch_size)
    called = label_prompts(names, texts or names, ["{}"])
    texts = [text for (text,) in called.values()]
    template = choose_templates([template] if template else None, model)[0]
    rows = prompt_rows(model, texts, template, n_ctx)
    tower = getattr(getattr(model, "model", None), "text", None)
    if tower is None:
        raise ConfigError(f"{model.name} has no text tower: load it with tower='both'")
    assert model.config.text_transformer  # raises for other kinds, which take no vectors
    graph, state = nnx.split(model.model)
    table = np.asarray(tower.embedding[...], np.float32)
    scale = rate * float(np.sqrt(np.mean(table**2)))
    key = jax.random.key(seed)
    params = {"context": _start(table, rows, key)}
    if per_image:
        params |= _net(z_image.shape[1], table.shape[1], key)
    held = jnp.asarray(class_embeddings(model, texts, [template]))
    tokens, positions = jnp.asarray(rows.tokens), jnp.asarray(rows.positions)
    m = len(names)

    def embed(state, contexts):
        """Embed all labels in each of n contexts (n, k, w) as (n, m, d)."""
        n = len(contexts)
        z = nnx.merge(graph, state).encode_text_with_context(
            jnp.tile(tokens, (n, 1)),
            jnp.repeat(contexts, m, axis=0),
            jnp.tile(positions, (n, 1)),
        )
        return z.reshape(n, m, -1)

    def loss(params, state, z, own):
        contexts = params["context"][None]
        if per_image:
            contexts = contexts + shift(params, z)[:, None]
        z_labels = embed(state, contexts)
        logits = model.logit_scale * (z[:, None] * z_labels).sum(-1)
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()
        return fit + hold * jnp.mean(jnp.sum((z_labels - held) ** 2, axis=-1))

    batch = min(len(z_image), IMAGE_BATCH if per_image else BATCH)
    solver = optax.scale_by_adam()

    @jax.jit
    def step(params, moments, state, z, own, done):
        updates, moments = solver.update(jax.grad(loss)(params, state, z, own), moments)
        rate = scale * 0.5 * (1 + jnp.cos(jnp.pi * done))  # a cosine decay
        return jax.tree.map(lambda x, u: x - rate * u, params, updates), moments

    moments = solver.init(params)
    if not isinstance(steps, int):
        (at,) = _order(len(z_image), batch, 1, seed)
        steps = steps(lambda: step(params, moments, state, z_image[at], target[at], 0.0), batch)
    for number, at in enumerate(_order(len(z_image), batch, steps, seed)):
        done = number / steps
        params, moments = step(params, moments, state, z_image[at], target[at], done)
    found = {name: np.asarray(value) for name, value in params.items()}
    net = {name: found[name] for name in NET} if per_image else None
    return PromptedClassifier(model, names, rows, found["context"], net)


def _start(table: np.ndarray, rows: PromptRows, key: jax.Array) -> jax.Array:
    if rows.words:
        return jnp.asarray(table[list(rows.words)])
    return INIT * jax.random.normal(key, (rows.positions.shape[1], table.shape[1]))


def _net(embed_dim: int, width: int, key: jax.Array) -> dict[str, jax.Array]:
    """Initialise CoCoOp's network; the last layer is zero, so the context starts as CoOp's."""
    hidden = max(1, embed_dim // NARROWING)
    inner = jax.random.normal(jax.random.fold_in(key, 1), (embed_dim, hidden))
    return {
        "inner": inner,  # values are about 1, as embeddings have unit norm
        "inner_bias": jnp.zeros(hidden),
        "outer": jnp.zeros((hidden, width)),
        "outer_bias": jnp.zeros(width),
    }


def _order(n: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Return the images of each step: repeated passes in random order."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // n)
    drawn = np.concatenate([rng.permutation(n) for _ in range(passes)])
    return [drawn[i * batch : (i + 1) * batch] for i in range(steps)]


def trained_parameters(classifier: PromptedClassifier) -> int:
    """Count the learned parameters."""
    arrays = [classifier.context, *(classifier.net or {}).values()]
    return sum(array.size for array in arrays)
