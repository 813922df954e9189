"""Prompts learned from a few labelled images, both towers frozen (CoOp, CoCoOp).

The images are embedded once; what is trained is a handful of vectors in the place of the words
around each label, and in CoCoOp a small net that moves them by what an image shows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.heads.inputs import Images
from vlm.heads.prompt_rows import PromptRows, prompt_rows
from vlm.heads.prompted import NET, PromptedClassifier, shift
from vlm.heads.prompts import class_embeddings, indices, label_prompts
from vlm.heads.templates import choose_templates
from vlm.heads.zero_shot import encode_images
from vlm.models.dual_encoder import unit_norm

STEPS = 60
BATCH, IMAGE_BATCH = 64, 4  # images in a step: of CoOp, and of CoCoOp, which embeds labels for each
HOLD = 1.0  # a lighter hand than the 8 of KgCoOp (arXiv:2303.13283), whose context begins as words
INIT = 0.02  # standard deviation of vectors that stand for no words, as published
# Steps of Adam have the size of the rate. Relative to the entries of the embedding table, a rate
# means the same for every model.
RATE = 0.2
NARROWING = 16  # of the net's hidden layer, as published


def learn_prompt(
    model: Bundle,
    images: Images,
    labels: Sequence[str],
    classes: Sequence[str] | None = None,
    template: str | None = None,
    n_ctx: int | None = None,
    per_image: bool = False,
    hold: float = HOLD,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    batch_size: int | None = None,
    texts: Sequence[str] = (),
) -> PromptedClassifier:
    """A classifier with a context learned on labelled images; the same for the same seed.

    Args:
        model: what `vlm.load` gives.
        images: PIL images, paths or arrays of pixels, any iterable; or their embeddings, (n, d).
        labels: the class of each image.
        classes: all names to choose from; those of `labels` by default, sorted.
        template: a sentence with `{}` for the label, whose words before it the context replaces
            and starts from. By default the model's own, else "a photo of a {}.".
        n_ctx: learn so many vectors in their place, from random ones (CoOp has 16).
        per_image: CoCoOp (arXiv:2203.05557): a net moves the context by each image, which makes
            classifying as slow as embedding all labels for every image. Else CoOp
            (arXiv:2109.01134).
        hold: how firmly the embeddings of the classes are held to those of the sentences
            themselves, so that few images do not undo what the model knows (KgCoOp,
            arXiv:2303.13283); 0 for CoOp as published.
        steps: of Adam, with a rate that falls to zero along a cosine.
        rate: at its start, relative to the size of the entries of the embedding table.
        seed: of the vectors and the order of the images.
        batch_size: of encoding; None leaves it to the model.
        texts: what sentences call the classes, in their order; by default the classes themselves.

    Raises:
        ConfigError: labels that are no classes or not one for each image, a model without a text
            tower, a label or template with no room for the context (see `prompt_rows`).

    Example:
        >>> labels = ["red", "green", "blue"]
        >>> classify = vlm.adaptation.learn_prompt(model, pictures, labels, n_ctx=2, steps=2)
        >>> classify(pictures).labels
        ('blue', 'green', 'red')
    """
    if steps < 1 or not rate > 0 or not hold >= 0:
        raise ConfigError(
            f"steps {steps}, rate {rate}, hold {hold}: learn at least 1 step at a rate above 0, "
            "held by 0 or more"
        )
    if isinstance(images, np.ndarray) and images.ndim == 2:
        z_image = images
    else:
        z_image, _ = encode_images(model, images, batch_size)
    labels = list(labels)
    if len(labels) != len(z_image):
        raise ConfigError(f"{len(z_image)} images and {len(labels)} labels: give one label each")
    names = sorted(set(labels)) if classes is None else list(classes)
    target = indices(labels, names)
    called = label_prompts(names, texts or names, ["{}"])
    texts = [text for (text,) in called.values()]
    template = choose_templates([template] if template else None, model)[0]
    rows = prompt_rows(model, texts, template, n_ctx)
    tower = getattr(getattr(model, "model", None), "text", None)
    if tower is None:
        raise ConfigError(f"{model.name} has no text tower: load it with tower='both'")
    graph, state = nnx.split(tower)
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
        """(n, m, d) embeddings of all labels in each of n contexts (n, k, w)."""
        n = len(contexts)
        z = nnx.merge(graph, state)(
            jnp.tile(tokens, (n, 1)),
            context=(jnp.repeat(contexts, m, axis=0), jnp.tile(positions, (n, 1))),
        )
        return unit_norm(z).reshape(n, m, -1)

    def loss(params, state, z, own):
        contexts = params["context"][None]
        if per_image:
            contexts = contexts + shift(params, z)[:, None]
        z_labels = embed(state, contexts)
        logits = model.logit_scale * (z[:, None] * z_labels).sum(-1)
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()
        return fit + hold * jnp.mean(jnp.sum((z_labels - held) ** 2, axis=-1))

    batch = min(len(z_image), IMAGE_BATCH if per_image else BATCH)
    solver = optax.adam(optax.cosine_decay_schedule(scale, steps))

    @jax.jit
    def step(params, moments, state, z, own):
        updates, moments = solver.update(jax.grad(loss)(params, state, z, own), moments)
        return optax.apply_updates(params, updates), moments

    moments = solver.init(params)
    for at in _order(len(z_image), batch, steps, seed):
        params, moments = step(params, moments, state, z_image[at], target[at])
    found = {name: np.asarray(value) for name, value in params.items()}
    net = {name: found[name] for name in NET} if per_image else None
    return PromptedClassifier(model, names, rows, found["context"], net)


def _start(table: np.ndarray, rows: PromptRows, key: jax.Array) -> jax.Array:
    if rows.words:
        return jnp.asarray(table[list(rows.words)])
    return INIT * jax.random.normal(key, (rows.positions.shape[1], table.shape[1]))


def _net(embed_dim: int, width: int, key: jax.Array) -> dict[str, jax.Array]:
    """The layers of CoCoOp's net; the last one is zero, so that the context starts as CoOp's."""
    hidden = max(1, embed_dim // NARROWING)
    inner = jax.random.normal(jax.random.fold_in(key, 1), (embed_dim, hidden))
    return {
        "inner": inner,  # an embedding has unit norm, so that this gives values about one
        "inner_bias": jnp.zeros(hidden),
        "outer": jnp.zeros((hidden, width)),
        "outer_bias": jnp.zeros(width),
    }


def _order(n: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """The images of each step: all of them in a new order, again and again."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // n)
    drawn = np.concatenate([rng.permutation(n) for _ in range(passes)])
    return [drawn[i * batch : (i + 1) * batch] for i in range(steps)]


def trained_parameters(classifier: PromptedClassifier) -> int:
    """How many numbers were learned."""
    arrays = [classifier.context, *(classifier.net or {}).values()]
    return sum(array.size for array in arrays)
