"""`/v1/models`, `/healthz` and `/metrics`: model card, health check, Prometheus metrics."""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from vlm.serving.limits import RequestError
from vlm.serving.protocol import Health, ModelCard, ModelsAnswer
from vlm.serving.service import Service

HEALTH_SECONDS = 10.0
CACHE_SECONDS = 1.0  # lifetime of a cached health check


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["status"])
    bundle = service.model.bundle
    checking = asyncio.Lock()
    last: list[tuple[float, Health]] = []

    def card() -> ModelCard:
        return ModelCard(
            id=service.name,
            created=int(service.started),
            embed_dim=bundle.embed_dim,
            modalities=service.model.towers,
            image_size=bundle.config.vision.image_size,
            context_length=bundle.tokenizer.config.context_length,
            loss=bundle.loss,
            index=service.gallery is not None,
        )

    @router.get("/v1/models")
    async def models() -> ModelsAnswer:
        """List the served model."""
        return ModelsAnswer(data=[card()])

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """Return the model of that name."""
        service.check_model(model)
        return card()

    @router.get("/healthz")
    async def healthz() -> Health:
        """Encode a small image and a word ahead of the queue, and return the times."""
        async with checking:
            if last and time.monotonic() - last[0][0] < CACHE_SECONDS:
                return last[0][1]
            seconds = {}
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    for tower in service.model.towers:
                        start = time.perf_counter()
                        if tower == "image":
                            image = np.zeros((8, 8, 3), np.uint8)
                            future = service.model.image(image, first=True)
                        else:
                            future = service.model.texts(["health"], first=True)[0]
                        await asyncio.wrap_future(future)
                        seconds[tower] = round(time.perf_counter() - start, 6)
            except Exception as error:
                raise RequestError(
                    f"the health check failed ({type(error).__name__})",
                    503,
                    "unhealthy",
                ) from error
            last[:] = [(time.monotonic(), Health(model=service.name, seconds=seconds))]
            return last[0][1]

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Return counters and timings in the Prometheus text format."""
        depths: dict[Any, int] = service.model.batcher.depths()
        for kind, depth in depths.items():
            service.metrics.depth.labels(kind.tower, str(kind.length)).set(depth)
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router
