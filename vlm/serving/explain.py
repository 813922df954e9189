"""`/v1/explain`: heat map of the image regions that match a text."""

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image
from starlette.concurrency import run_in_threadpool

from vlm.bundle import Bundle
from vlm.config import VisionModuleConfig
from vlm.errors import VlmError
from vlm.heads.zero_shot import to_scores
from vlm.serving.image_input import image_bytes
from vlm.serving.limits import Admission, RequestError
from vlm.serving.protocol import ExplainAnswer, ExplainRequest, Token
from vlm.serving.service import Downloads, Service, as_request_error

IMAGE_SIDE = 1024  # pixels; larger images are downscaled first
WAITING = 8  # heat maps in flight, so that they do not fill the queue of items
MAP_SIDE = 64  # maximum side of the heat map in the answer


def explain_image(bundle: Bundle, image: Image.Image, text: str) -> ExplainAnswer:
    """Run `vlm.explain` on one image and one text, and return the answer's body."""
    from vlm.explanation.heat_map import explain

    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    explanation = explain(bundle, image, text)
    heat = Image.fromarray(explanation.heat.astype(np.float32))
    heat.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX, reducing_gap=None)
    probability = None
    if bundle.loss == "sigmoid":
        probability = float(to_scores(np.array([explanation.logit]), "sigmoid")[0])
    return ExplainAnswer(
        model=bundle.name,
        score=explanation.cosine,
        probability=probability,
        heat=np.round(np.asarray(heat, np.float64), 4).tolist(),
        tokens=[Token(token=token, weight=float(weight)) for token, weight in explanation.tokens],
    )


def warm_up(bundle: Bundle) -> None:
    """Compile the heat-map computation, since compilation may exceed the request timeout."""
    has_positions = not isinstance(bundle.config.vision, VisionModuleConfig)
    if has_positions and bundle.model.vision is not None and bundle.model.text is not None:
        side = bundle.config.vision.image_size
        explain_image(bundle, Image.new("RGB", (side, side)), "a cat")


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["explain"])
    one_at_a_time = asyncio.Lock()  # a heat map takes as long as many embeddings
    waiting = Admission(WAITING, "heat maps")

    @router.post("/explain")
    async def explain(body: ExplainRequest) -> ExplainAnswer:
        """Return a heat map of the image regions that match the text."""
        service.check_model(body.model)
        service.check_towers("image", "text")
        text = service.checked_text(body.text, "the text", "text")
        downloads = await service.download({"the image": body.image})

        async def work() -> ExplainAnswer:
            try:
                image = await run_in_threadpool(_open_image, service, body.image, downloads)
            except VlmError as error:
                raise as_request_error(error, "the image", "image") from None
            async with one_at_a_time:
                return await run_in_threadpool(explain_image, service.model.bundle, image, text)

        with waiting.admit(1):
            answer = await service.admit(1, work)
        return answer.model_copy(update={"model": service.name})

    return router


def _open_image(service: Service, image: str | int, downloads: Downloads) -> Any:
    """Return a PIL image of the request or of an item of the index."""
    if isinstance(image, str):
        given = downloads.get("the image", image)
        if isinstance(given, RequestError):
            raise given
        data = image_bytes(given, "the image")
        return service.model.picture(data, "the image", IMAGE_SIDE)
    return service.gallery_of("image").opened(
        image, lambda file: service.model.picture(file, str(file), IMAGE_SIDE)
    )
