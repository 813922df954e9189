"""FastAPI application: routes, error handlers, middleware, and the web page."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from vlm._version import __version__
from vlm.bundle import Bundle
from vlm.errors import VlmError
from vlm.heads.templates import choose_templates
from vlm.serving import classify, embeddings, explain, search, status
from vlm.serving.batched import Batched
from vlm.serving.limits import Limits, RequestError
from vlm.serving.metrics import Metrics
from vlm.serving.middleware import ServerMiddleware, error_response, problem
from vlm.serving.protocol import ERRORS
from vlm.serving.request_errors import validation_error
from vlm.serving.served_index import ServedIndex
from vlm.serving.service import Service, as_request_error

PAGE = Path(__file__).parent / "page"


def create_app(
    bundle: Bundle,
    *,
    index: Any = None,
    name: str | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    local: bool = False,
    max_batch: int | None = None,
    moved: Mapping[str, str] | None = None,
) -> FastAPI:
    """Create an ASGI application that serves a bundle, and optionally a search index.

    Args:
        bundle: a model from `vlm.load`, with one tower or both.
        index: folder of an index that the same model built. It is read again when another process
            saves it.
        name: model name in the API; by default that of the bundle.
        limits: request limits.
        keys: API keys, of which each request must send one; empty: no key needed.
        templates: prompt templates for requests without any; by default those of the model, else
            "a photo of a {}.".
        local: accept only loopback names in the Host header.
        max_batch: maximum number of items that the device computes at once.
        moved: old and new folders of images that moved since the index was built.

    Raises:
        CheckpointError: there is no index in the folder, or another model built it.

    Example:
        >>> app = vlm.serving.create_app(model)
        >>> type(app).__name__
        'FastAPI'
    """
    limits, metrics = limits or Limits(), Metrics()
    model = Batched(
        bundle,
        max_batch=max_batch,
        max_pixels=limits.pixels,
        seconds=limits.seconds,
        observe=metrics.batch,
    )
    gallery, source = None, None
    if index is not None:
        source = ServedIndex(index, model, moved)
        try:
            gallery = source.open()
        except BaseException:
            model.close()
            raise
    service = Service(model, name or bundle.name, limits, metrics, gallery)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        follower = source and asyncio.create_task(source.follow(service))
        yield
        if follower:
            follower.cancel()
        service.fetcher.close()
        model.close()

    app = FastAPI(
        title="vlm",
        version=__version__,
        description="Contrastive vision-language models: embeddings, classification and search.",
        docs_url=None,  # its page would load scripts from other hosts
        redoc_url=None,
        openapi_url=None,  # see _add_page
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.state.service = service
    app.include_router(embeddings.routes(service))
    app.include_router(classify.routes(service, choose_templates(templates, bundle)))
    app.include_router(search.routes(service))
    app.include_router(explain.routes(service))
    app.include_router(status.routes(service))
    _add_error_handlers(app, metrics)
    _add_page(app)
    app.add_middleware(ServerMiddleware, limits=limits, metrics=metrics, keys=keys, local=local)
    return app


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Return every error as one sentence, in the format of the OpenAI API."""

    def response(request: Request, error: RequestError) -> JSONResponse:
        metrics.refused.labels(error.code).inc()
        request.scope["vlm.error"] = error.code  # for the log of requests
        return error_response(error)

    async def vlm_error(request: Request, error: Exception) -> JSONResponse:
        return response(request, as_request_error(error))

    async def invalid_request(request: Request, error: Any) -> JSONResponse:
        return response(request, validation_error(error.errors(), error.body))

    async def http_error(request: Request, error: Any) -> JSONResponse:
        messages = {
            404: f"there is no route {request.url.path[:200]!r}",
            405: f"the method {request.method} is not allowed for this route",
        }
        message = messages.get(error.status_code, str(error.detail))
        content = problem(message, f"http_{error.status_code}", error.status_code)
        return JSONResponse({"error": content}, error.status_code, error.headers)

    async def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        message = "internal server error: see the server's log"
        return response(request, RequestError(message, 500, "internal_error"))

    app.add_exception_handler(Exception, unexpected_error)
    app.add_exception_handler(VlmError, vlm_error)
    app.add_exception_handler(RequestValidationError, invalid_request)
    app.add_exception_handler(HTTPException, http_error)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @functools.cache
    def description() -> bytes:
        return json.dumps(app.openapi()).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:  # FastAPI's own would write the JSON for each request
        return Response(description(), media_type="application/json")

    app.mount("/static", StaticFiles(directory=PAGE), name="static")
