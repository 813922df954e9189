"""`/v1/classify`: zero-shot classification with the labels of the request."""

from concurrent.futures import Future
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from vlm.heads.zero_shot import Classification, ZeroShotClassifier
from vlm.serving.limits import RequestError
from vlm.serving.protocol import Classified, ClassifyAnswer, ClassifyRequest, Score
from vlm.serving.service import Service, outcomes

MAX_PROMPTS = 4096  # labels times templates


def routes(service: Service, templates: tuple[str, ...]) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["classify"])

    @router.post("/classify")
    async def classify(body: ClassifyRequest) -> ClassifyAnswer:
        """Return the scored labels of each image, best first."""
        service.check_model(body.model)
        service.check_towers("image", "text")
        service.check_count(len(body.images), "images")
        prompts = body.templates or templates
        if len(body.labels) * len(prompts) > MAX_PROMPTS:
            raise RequestError(
                f"{len(body.labels)} labels x {len(prompts)} templates exceed the limit of "
                f"{MAX_PROMPTS:,} prompts: send fewer",
                413,
                "too_many_labels",
            )
        for text in (*body.labels, *prompts, *([body.other_label] if body.other_label else [])):
            service.checked_text(text, "a label or template")

        async def work() -> tuple[ZeroShotClassifier, list[Any]]:
            answers = [
                _embedding(service, image, f"item {i}") for i, image in enumerate(body.images)
            ]
            classifier = await run_in_threadpool(
                ZeroShotClassifier,
                service.model,
                body.labels,
                prompts,
                body.other_label or None,
                body.multi_label,
            )
            return classifier, await outcomes(answers)

        classifier, results = await service.admit(len(body.images) + 1, work)

        def classified(rows: dict[int, np.ndarray]) -> list[Classified]:
            logits = classifier.logits(np.stack(list(rows.values())))
            scored = Classification(classifier.labels, logits, classifier.rule)
            tops = scored.top(body.top or len(scored.labels))
            scores = ([Score(label=label, score=score) for label, score in top] for top in tops)
            return [Classified(index=i, labels=s) for i, s in zip(rows, scores, strict=True)]

        data = service.answers(results, classified)
        return ClassifyAnswer(model=service.name, rule=classifier.rule, data=data)

    return router


def _embedding(service: Service, image: str | int, name: str) -> Future | RequestError:
    """Return the future embedding of a data URL or of an item of the index."""
    try:
        if isinstance(image, str):
            return service.image(image, name)
        gallery, answer = service.gallery_of(name), Future()
        answer.set_result(gallery.index.embeddings([gallery.id(image)])[0])
        return answer
    except RequestError as error:
        return error
