"""`/v1/search` and what a page shows of an index: its columns, its items and their pictures."""

import time
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi import Query as Parameter
from fastapi.responses import Response

from vlm.heads.filters import Condition
from vlm.heads.query import Query
from vlm.serve.gallery import SIZES, Gallery
from vlm.serve.limits import Refused
from vlm.serve.protocol import Found, IndexAnswer, SearchAnswer, SearchRequest, Term
from vlm.serve.service import Service, as_refused, outcomes

Number = Annotated[int, Path(ge=0, le=1 << 40, description="The number of an item.")]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["search"])

    @router.post("/search")
    async def search(asked: SearchRequest) -> SearchAnswer:
        """The items nearest to a text, an image, an item, or a weighted sum of them."""
        gallery = _gallery(service)
        service.check_model(asked.model)
        start = time.perf_counter()
        given = [Term(text=asked.query)] if isinstance(asked.query, str) else asked.query
        service.check_count(len(given), "terms")
        without = [term.item for term in given if term.item is not None and term.weight > 0]

        async def work() -> list[Found]:
            query = await _query(service, gallery, given)
            conditions = [Condition(c.column, c.comparison, c.value) for c in asked.where]
            return await service.in_thread(
                lambda: [
                    gallery.found(*hit)
                    for hit in gallery.search(query, asked.k, conditions, asked.min_score, without)
                ]
            )

        found = await service.inside(len(given), work)
        seconds = round(time.perf_counter() - start, 6)
        return SearchAnswer(model=service.name, seconds=seconds, data=found[: asked.k])

    @router.get("/index")
    async def index() -> IndexAnswer:
        """What the index holds, by which columns it can be filtered, and a few of its items."""
        return _gallery(service).about

    @router.get("/items/{item}")
    async def item(item: Number) -> Found:
        """One item of the index."""
        gallery = _gallery(service)
        return gallery.found(gallery.id(item), 0.0)

    @router.get(
        "/items/{item}/picture",
        response_class=Response,
        responses={200: {"content": {"image/webp": {"schema": {"type": "string"}}}}},
    )
    async def picture(
        item: Number, size: Annotated[int, Parameter(ge=1, le=SIZES[-1])] = 256
    ) -> Response:
        """The picture of an item, at most `size` pixels on a side, rounded up to a power of two."""
        gallery = _gallery(service)
        gallery.id(item)
        data = await service.in_thread(lambda: gallery.picture(item, size))
        return Response(data, 200, {"Cache-Control": "private, max-age=3600"}, "image/webp")

    return router


async def _query(service: Service, gallery: Gallery, given: list[Term]) -> Query:
    """The terms as one query of embeddings.

    Raises:
        Refused: a term that is none, or has no embedding.
    """
    asked, parts = [], []
    for i, term in enumerate(given):
        name = f"term {i}" if len(given) > 1 else "the query"
        if sum(value is not None for value in (term.text, term.image, term.item)) != 1:
            raise Refused(f"{name} must be one of text, image and item", 400, "invalid_term")
        if term.weight == 0:
            raise Refused(f"{name} weighs 0: leave it out", 400, "invalid_term")
        if term.item is not None:
            parts.append(gallery.term(term.item, term.weight))
        elif term.image is not None:
            service.check_tower("image")
            asked.append((name, term.weight, service.image(term.image, name)))
        else:
            service.check_tower("text")
            text = service.checked_text(term.text, name)
            asked.append((name, term.weight, service.model.texts([text])[0]))
    for (name, weight, _), row in zip(
        asked, await outcomes([answer for *_, answer in asked]), strict=True
    ):
        if isinstance(row, Exception):
            raise as_refused(row, name)
        parts.append(Query(row, weight))
    return sum(parts[1:], start=parts[0])


def _gallery(service: Service) -> Gallery:
    if service.gallery is None:
        raise Refused(
            "there is no index here, only a model: start vlm serve with an index", 404, "no_index"
        )
    return service.gallery
