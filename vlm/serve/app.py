"""The web application: routes, how errors are said, and the page."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from vlm._version import __version__
from vlm.bundle import Bundle
from vlm.errors import VlmError
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.templates import choose_templates
from vlm.serve import classify, embeddings, heat, search, status
from vlm.serve.batched import Batched
from vlm.serve.gallery import Gallery
from vlm.serve.guard import Guard, extra_headers, problem
from vlm.serve.limits import Limits, Refused
from vlm.serve.metrics import Metrics
from vlm.serve.protocol import ERRORS
from vlm.serve.service import Service, as_refused

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
) -> FastAPI:
    """An ASGI application that serves a bundle, and an index that was built by it.

    Args:
        bundle: what `vlm.load` gives, with one tower or both.
        index: the folder of an index, to search.
        name: of the model, as clients name it.
        limits: of requests.
        keys: API keys, of which requests must bring one; none: all are answered.
        templates: sentences of labels, where a request gives none; by default the model's own, else
            "a photo of a {}.".
        local: answer only under the names of this machine.
        max_batch: items that the device computes at once.

    Raises:
        CheckpointError: no index there, or one of another model.

    Example:
        >>> app = vlm.serve.create_app(model)
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
    gallery = None
    if index is not None:
        try:
            opened = RetrievalIndex.load(index, model)
        except BaseException:
            model.close()
            raise
        gallery = Gallery(opened, Path(index).resolve().name, limits.pixels)
    service = Service(model, name or bundle.name, limits, metrics, gallery)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        model.close()

    app = FastAPI(
        title="vlm",
        version=__version__,
        description="Contrastive vision-language models: embeddings, classification and search.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.state.service = service
    app.include_router(embeddings.routes(service))
    app.include_router(classify.routes(service, choose_templates(templates, bundle)))
    app.include_router(search.routes(service))
    app.include_router(heat.routes(service))
    app.include_router(status.routes(service))
    _say_errors(app, metrics)
    _add_page(app)
    app.add_middleware(Guard, limits=limits, metrics=metrics, keys=keys, local=local)
    return app


def _say_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's form, as one sentence."""

    def answer(refused: Refused, param: str | None = None) -> JSONResponse:
        metrics.refused.labels(refused.code).inc()
        about = problem(str(refused), refused.code, refused.status, param)
        return JSONResponse({"error": about}, refused.status, extra_headers(refused))

    async def of_ours(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, Refused):
            return answer(error)
        return answer(Refused(str(error), 400, as_refused(error).code))

    async def of_fields(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str | int))
        where = where.encode("utf-8", "replace").decode()[:100] or "the body"
        said = first["msg"][0].lower() + first["msg"][1:]
        is_json = first["type"] != "json_invalid"
        status, code = (422, "invalid_field") if is_json else (400, "invalid_json")
        message = f"{where}: {said}" if is_json else f"the body is not JSON ({said})"
        return answer(Refused(message, status, code), where)

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        words = {404: f"there is no {request.url.path[:200]!r} here", 405: "not by this method"}
        message = words.get(error.status_code, str(error.detail))
        about = problem(message, f"http_{error.status_code}", error.status_code)
        return JSONResponse({"error": about}, error.status_code, error.headers)

    async def of_nobody(request: Request, error: Exception) -> JSONResponse:
        said = "something went wrong inside the server, and its log says what"
        return answer(Refused(said, 500, "internal_error"))

    app.add_exception_handler(Exception, of_nobody)
    app.add_exception_handler(VlmError, of_ours)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_http)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static", StaticFiles(directory=PAGE), name="static")
