"""`/v1/explain`: which parts of an image speak for a text, as a map to lay over it."""

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image

from vlm.bundle import Bundle
from vlm.errors import DataError
from vlm.heads.zero_shot import to_scores
from vlm.serve.limits import Refused
from vlm.serve.pictures import image_bytes
from vlm.serve.protocol import ExplainAnswer, ExplainRequest, Token
from vlm.serve.service import Service

SIDE = 1024  # pixels: larger images are explained as small as this
MAP_SIDE = 64  # of the map that is sent, at most


def explained(bundle: Bundle, image: Image.Image, text: str) -> ExplainAnswer:
    """What `vlm.explain` says of one image and one text, as an answer."""
    from vlm.explain.explanation import explain

    image.thumbnail((SIDE, SIDE))
    found = explain(bundle, image, text)
    heat = Image.fromarray(found.heat.astype(np.float32))
    heat.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX, reducing_gap=None)
    probability = None
    if bundle.loss == "sigmoid":
        probability = float(to_scores(np.array([found.logit]), "sigmoid")[0])
    return ExplainAnswer(
        model=bundle.name,
        score=found.cosine,
        probability=probability,
        heat=np.round(np.asarray(heat, np.float64), 4).tolist(),
        tokens=[Token(token=token, weight=float(weight)) for token, weight in found.tokens],
    )


def warm_up(bundle: Bundle) -> None:
    """Compile what a map needs, which takes longer than a request may."""
    if bundle.model.vision is not None and bundle.model.text is not None:
        side = bundle.config.vision.image_size
        explained(bundle, Image.new("RGB", (side, side)), "a cat")


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["explain"])
    turn = asyncio.Lock()  # one at a time: it takes as long as many embeddings

    @router.post("/explain")
    async def explain(asked: ExplainRequest) -> ExplainAnswer:
        """A map over the whole image of how much each part speaks for the text."""
        service.check_model(asked.model)
        for tower in ("image", "text"):
            service.check_tower(tower)
        text = service.checked_text(asked.text, "the text")

        async def work() -> ExplainAnswer:
            image = await service.in_thread(lambda: _opened(service, asked.image))
            async with turn:
                bundle = service.model.bundle
                return await service.in_thread(lambda: explained(bundle, image, text))

        answer = await service.inside(1, work)
        return answer.model_copy(update={"model": service.name})

    return router


def _opened(service: Service, image: str | int) -> Any:
    """The image of a data URL, or of an item of the index, as a PIL image."""
    if isinstance(image, str):
        data = image_bytes(image, service.limits, "the image")
        return service.model.preprocess.open(data, "the image")
    if service.gallery is None:
        raise Refused("the image is a number, and there is no index here", 400, "no_index")
    file = service.gallery.file(image)
    try:
        if file is None:
            raise DataError(f"item {image:,} is not a picture on this disk")
        return service.model.preprocess.open(file)
    except DataError as error:
        raise Refused(str(error), 404, "no_picture") from None
