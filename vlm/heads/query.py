"""Composed queries: weighted sums and differences of texts, images and embeddings."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm.errors import ConfigError
from vlm.heads.encoder import Encoder
from vlm.heads.inputs import Item, Kind, kind
from vlm.heads.prompts import normalise
from vlm.inputs.opening import OnError


class Query:
    """Search query that is a weighted sum of texts, images and embeddings.

    Each part is embedded with unit norm, multiplied by its weight and added; the sum is scaled to
    unit norm again (word arithmetic in a shared space: Kiros et al., 2014, arXiv:1411.2539).

        2 * Query("golden retriever") + Query(Path("this.jpg")) - Query("fruit")

    Args:
        item: a text, an image (`pathlib.Path`, PIL image or array of pixels) or an embedding.
        weight: of the item in the sum.

    Raises:
        ConfigError: a weight that is zero or not finite.
        DataError: an item of an unsupported type.

    Example:
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, ids=["red", "green", "blue"])
        >>> query = 2 * vlm.Query("a square") + vlm.Query(pictures[0]) - vlm.Query("a stripe")
        >>> len(index.search(query, k=2))
        2
    """

    def __init__(self, item: Item, weight: float = 1.0):
        kind(item, "a query")
        self.terms: tuple[tuple[float, Item], ...] = ((_weight(weight), item),)

    def __add__(self, other: "Query") -> "Query":
        return _of((*self.terms, *_query(other).terms))

    def __sub__(self, other: "Query") -> "Query":
        return self + -1.0 * _query(other)

    def __mul__(self, factor: float) -> "Query":
        factor = _weight(factor)
        return _of(tuple((weight * factor, item) for weight, item in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> "Query":
        return self * -1.0

    def __repr__(self) -> str:
        terms = [f"{weight:+g} x {item!r}" for weight, item in self.terms]
        return f"Query({' '.join(terms)})"


def embed_queries(model: Encoder, queries: Iterable[Query]) -> Float[np.ndarray, "q d"]:
    """Compute the unit-norm embedding of each query; all texts, and all images, are one batch.

    Raises:
        DataError: terms that cancel, or an embedding that is not finite.
        ConfigError: embeddings of another width than the model's.
    """
    terms = [(q, w, item) for q, query in enumerate(queries) for w, item in query.terms]
    count = 1 + max((q for q, *_ in terms), default=-1)
    kinds = [kind(item, "a query") for *_, item in terms]
    parts: dict[int, np.ndarray] = {}
    encoders: dict[str, Callable] = {"text": model.encode_text, "image": model.encode_image}
    for what, encode in encoders.items():
        at = [i for i, item_kind in enumerate(kinds) if item_kind == what]
        if at:
            z = np.asarray(encode([terms[i][2] for i in at]), np.float32)
            parts |= dict(zip(at, z, strict=True))
    for i, item_kind in enumerate(kinds):
        if item_kind == "embedding":
            parts[i] = np.asarray(terms[i][2], np.float32)
    widths = {len(z) for z in parts.values()}
    if len(widths) > 1:
        raise ConfigError(
            f"the parts of a query have {' and '.join(map(str, sorted(widths)))} dimensions: "
            f"encode its embeddings with {model.name}"
        )
    total = np.zeros((count, widths.pop() if widths else 1), np.float32)
    for i, (q, weight, _) in enumerate(terms):
        total[q] += weight * normalise(parts[i][None], "the embedding of a part of a query")[0]
    # Equal parts that cancel leave only rounding errors.
    total[np.linalg.norm(total, axis=1) < 1e-4] = 0
    return normalise(total, "the sum of a query's parts")


def queries_in(query: Any) -> Iterator[Query] | None:
    """Return an iterator over a `Query` or a list of them; None for other queries."""
    if isinstance(query, Query):
        return iter([query])
    if isinstance(query, list | tuple) and query and all(isinstance(q, Query) for q in query):
        return iter(query)
    return None


def _of(terms: tuple[tuple[float, Item], ...]) -> Query:
    query = Query.__new__(Query)
    query.terms = terms
    return query


def _query(other: object) -> Query:
    if not isinstance(other, Query):
        raise ConfigError(
            f"a query and a {type(other).__name__} cannot be added: "
            f"wrap it, such as Query({other!r})"
        )
    return other


def _weight(weight: Any) -> float:
    number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
    if not number or not np.isfinite(weight) or weight == 0:
        raise ConfigError(f"the weight {weight!r} of a part of a query must be a number and not 0")
    return float(weight)


def least_score(model: Encoder, score: float | None, probability: float | None) -> float:
    """Return the minimum cosine of a result, from a score or a probability; -inf without either.

    Raises:
        ConfigError: both, a probability outside (0, 1), or one for a model of the softmax loss.
    """
    if probability is None:
        return -np.inf if score is None else score
    if model.loss != "sigmoid":
        raise ConfigError(
            f"{model.name} was trained with the {model.loss} loss, which defines no probability of "
            "a single pair: give min_score, a cosine"
        )
    if score is not None or not 0 < probability < 1:
        raise ConfigError(
            f"min_probability is {probability}: give one between 0 and 1, and no min_score"
        )
    logit = np.log(probability / (1 - probability))
    return float((logit - model.logit_bias) / model.logit_scale)


def encode_items(
    model: Encoder,
    items: Iterable[Any],
    what: Kind | None,
    batch_size: int | None = None,
    on_error: OnError | None = None,
) -> Float[np.ndarray, "n d"]:
    """Return unit-norm embeddings of items of one kind.

    Raises:
        ConfigError: embeddings of several widths.
        DataError: an unreadable image without `on_error`, or an embedding without a direction.
    """
    if what == "text":
        z = model.encode_text(list(items))
    elif what == "image":
        options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        if on_error is not None:
            options["on_error"] = on_error
        z = model.encode_image(items, **options)
    else:
        rows = [np.asarray(item, np.float32) for item in items]
        if len({row.shape for row in rows}) > 1:
            raise ConfigError("the embeddings have several widths: encode all with one model")
        z = np.stack(rows)
    return normalise(z, f"the embedding of an item ({what})")
