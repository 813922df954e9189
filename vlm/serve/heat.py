"""`/v1/explain`: which parts of an image speak for a text, as a map to lay over it."""

import asyncio

import numpy as np
from fastapi import APIRouter

from vlm.errors import DataError
from vlm.heads.zero_shot import to_scores
from vlm.serve.limits import Refused
from vlm.serve.pictures import image_bytes
from vlm.serve.protocol import ExplainAnswer, ExplainRequest
from vlm.serve.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["explain"])

    @router.post("/explain")
    async def explain(asked: ExplainRequest) -> ExplainAnswer:
        """A map over the whole image of how much each part speaks for the text."""
        service.check_model(asked.model)
        if service.explain is None:
            raise Refused(f"{service.name} has no maps of what it sees", 404, "no_heat")
        text = service.checked_text(asked.text, "the text")
        explained = service.explain

        async def work() -> tuple[float, np.ndarray]:
            image = await service.in_thread(lambda: _opened(service, asked.image))
            answer = service.model.batcher.call(
                lambda: explained(service.model.bundle, image, text)
            )
            return await asyncio.wrap_future(answer)

        score, heat = await service.inside(1, work)
        probability = None
        if service.model.loss == "sigmoid":
            logit = service.model.logit_scale * score + service.model.logit_bias
            probability = float(to_scores(np.array([logit]), "sigmoid")[0])
        rows = np.round(heat.astype(np.float64), 4).tolist()
        return ExplainAnswer(model=service.name, score=score, probability=probability, heat=rows)

    return router


def _opened(service: Service, image: str | int):
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
