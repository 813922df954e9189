"""`/v1/search`, `/v1/index` and `/v1/items`: search an index and show its items."""

import asyncio
import hashlib
import time
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi import Query as Parameter
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from vlm.heads.filters import Condition
from vlm.heads.query import Query
from vlm.paths import is_remote
from vlm.serving.gallery import SIZES, Gallery
from vlm.serving.limits import RequestError
from vlm.serving.protocol import Found, IndexAnswer, SearchAnswer, SearchRequest, Term
from vlm.serving.service import Downloads, Service, as_request_error, outcomes

Number = Annotated[int, Path(ge=0, le=1 << 40, description="Item number in the index.")]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["search"])

    @router.post("/search")
    async def search(body: SearchRequest) -> SearchAnswer:
        """Return the nearest items to a text, an image, an item, or a weighted sum of them."""
        gallery = _gallery(service)
        service.check_model(body.model)
        service.check_prompt(body.prompt)
        start = time.perf_counter()
        terms = [Term(text=body.query)] if isinstance(body.query, str) else body.query
        service.check_count(len(terms), "terms", "query")
        service.check_characters(sum(len(term.text or "") for term in terms), "query")
        downloads = await service.download(
            {name: term.image for name, term in _named(terms).items()}
        )
        excluded = {gallery.id(t.item) for t in terms if t.item is not None and t.weight > 0}

        async def work() -> list[Found]:
            query = await _query(service, gallery, terms, downloads, body.prompt)
            conditions = [Condition(c.column, c.comparison, c.value) for c in body.where]
            most = body.k + len(excluded)
            hits = await asyncio.wrap_future(
                gallery.search(query, most, conditions, body.min_score)
            )
            return [gallery.found(*hit) for hit in hits if hit.id not in excluded]

        results = await service.admit(len(terms), work)
        seconds = round(time.perf_counter() - start, 6)
        return SearchAnswer(model=service.name, seconds=seconds, data=results[: body.k])

    @router.get("/index")
    async def index() -> IndexAnswer:
        """Describe the index: its size, its filter columns, and a sample of its items."""
        return _gallery(service).about

    @router.get("/items")
    async def item_by_id(id: Annotated[str, Parameter(max_length=4096)]) -> Found:
        """Return the item with an id, such as the path of an image."""
        gallery = _gallery(service)
        return gallery.found(gallery.id(gallery.number(id)), 0.0)

    @router.get("/items/{item}")
    async def item(item: Number) -> Found:
        """Return one item of the index."""
        gallery = _gallery(service)
        return gallery.found(gallery.id(item), 0.0)

    @router.get(
        "/items/{item}/picture",
        response_class=Response,
        responses={200: {"content": {"image/webp": {"schema": {"type": "string"}}}}},
    )
    async def picture(
        item: Number,
        request: Request,
        size: Annotated[int, Parameter(ge=1, le=SIZES[-1])] = 256,
    ) -> Response:
        """Return a thumbnail of an item; `size`, in pixels, is rounded up to a power of two."""
        gallery = _gallery(service)
        gallery.id(item)
        data = await run_in_threadpool(gallery.picture, item, size)
        tag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'  # a reload may change the picture
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, 200, headers, "image/webp")

    @router.get(
        "/items/{item}/original",
        response_class=Response,
        responses={200: {"content": {"image/*": {"schema": {"type": "string"}}}}},
    )
    async def original(item: Number) -> Response:
        """Return the image file of an item."""
        gallery = _gallery(service)
        gallery.id(item)
        file, media_type = await run_in_threadpool(gallery.original, item)
        headers = {"Cache-Control": "private, no-cache"}
        if is_remote(file):
            return Response(await run_in_threadpool(file.read_bytes), 200, headers, media_type)
        return FileResponse(file, 200, headers, media_type)

    return router


def _named(terms: list[Term]) -> dict[str, Term]:
    """Return the terms by their names in error messages."""
    return {f"term {i}" if len(terms) > 1 else "the query": term for i, term in enumerate(terms)}


async def _query(
    service: Service,
    gallery: Gallery,
    terms: list[Term],
    downloads: Downloads,
    prompt: str | None,
) -> Query:
    """Combine the terms into one query of embeddings.

    Raises:
        RequestError: a term is invalid, or cannot be encoded.
    """
    pending, parts = [], []
    for i, (name, term) in enumerate(_named(terms).items()):
        param = f"query[{i}]"
        if sum(value is not None for value in (term.text, term.image, term.item)) != 1:
            raise RequestError(
                f"{name} must have exactly one of text, image and item",
                400,
                "invalid_term",
                param=param,
            )
        if term.weight == 0:
            raise RequestError(f"{name} has weight 0: remove it", 400, "invalid_term", param=param)
        if term.item is not None:
            parts.append(gallery.term(term.item, term.weight))
        elif term.image is not None:
            service.check_towers("image")
            pending.append((name, param, term.weight, service.image(term.image, name, downloads)))
        else:
            service.check_towers("text")
            text = service.checked_text(term.text, name, param)
            pending.append((name, param, term.weight, service.model.texts([text], prompt)[0]))
    rows = await outcomes([answer for *_, answer in pending])
    for (name, param, weight, _), row in zip(pending, rows, strict=True):
        if isinstance(row, Exception):
            raise as_request_error(row, name, param)
        parts.append(Query(row, weight))
    return sum(parts[1:], start=parts[0])


def _gallery(service: Service) -> Gallery:
    if service.gallery is None:
        raise RequestError(
            "the server has no index, only a model: start vlm serve with an index", 404, "no_index"
        )
    return service.gallery
