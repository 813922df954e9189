"""`/v1/classify`: zero-shot classification with the labels of the request."""

import math
from concurrent.futures import Future
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from vlm.heads.zero_shot import Classification, ZeroShotClassifier
from vlm.serving.limits import RequestError
from vlm.serving.protocol import Classified, ClassifyAnswer, ClassifyRequest, Score
from vlm.serving.service import Downloads, Service, outcomes

MAX_PROMPTS = 4096  # labels times templates


def routes(service: Service, templates: tuple[str, ...]) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["classify"])

    @router.post("/classify")
    async def classify(body: ClassifyRequest) -> ClassifyAnswer:
        """Return the scored labels of each image, best first."""
        service.check_model(body.model)
        service.check_towers("image", "text")
        service.check_count(len(body.images), "images", "images")
        prompts = tuple(body.templates or templates)
        if len(body.labels) * len(prompts) > MAX_PROMPTS:
            raise RequestError(
                f"{len(body.labels)} labels x {len(prompts)} templates exceed the limit of "
                f"{MAX_PROMPTS:,} prompts: send fewer",
                413,
                "too_many_labels",
                param="labels",
            )
        _check_prompts(service, body, prompts)
        images = {f"item {i}": image for i, image in enumerate(body.images)}
        downloads = await service.download(images)

        async def work() -> tuple[ZeroShotClassifier, list[Any]]:
            answers = [
                _embedding(service, image, name, downloads, rank)
                for rank, (name, image) in enumerate(images.items())
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

        batches = math.ceil(len(body.labels) * len(prompts) / service.model.max_batch)
        classifier, results = await service.admit(len(body.images) + batches, work)

        def classified(rows: dict[int, np.ndarray]) -> list[Classified]:
            logits = classifier.logits(np.stack(list(rows.values())))
            scored = Classification(classifier.labels, logits, classifier.rule)
            tops = scored.top(body.top or len(scored.labels))
            scores = ([Score(label=label, score=score) for label, score in top] for top in tops)
            return [Classified(index=i, labels=s) for i, s in zip(rows, scores, strict=True)]

        data = service.answers(
            results, classified, [f"images[{i}]" for i in range(len(body.images))]
        )
        return ClassifyAnswer(model=service.name, rule=classifier.rule, data=data)

    return router


def _check_prompts(service: Service, body: ClassifyRequest, templates: tuple[str, ...]) -> None:
    """Bound the lengths of labels, templates, and of all prompts together, before making any.

    Raises:
        RequestError: a text is empty or too long, or the prompts are.
    """
    for i, label in enumerate(body.labels):
        service.checked_text(label, f"label {i}", f"labels[{i}]")
    if body.other_label:
        service.checked_text(body.other_label, "the other label", "other_label")
    longest, total = max(map(len, body.labels)), sum(map(len, body.labels))
    characters = 0
    for i, template in enumerate(templates):
        service.checked_text(template, f"template {i}", f"templates[{i}]")
        places = template.count("{}")
        rest = len(template) - 2 * places
        if rest + places * longest > service.limits.characters:
            raise RequestError(
                f"template {i} makes a prompt of {rest + places * longest:,} characters, over the "
                f"limit of {service.limits.characters:,}: shorten it, or the labels",
                413,
                "text_too_long",
                param=f"templates[{i}]",
            )
        characters += rest * len(body.labels) + places * total
    service.check_characters(characters, "templates")


def _embedding(
    service: Service, image: str | int, name: str, downloads: Downloads, rank: int
) -> Future | RequestError:
    """Return the future embedding of an image of the request or of an item of the index."""
    try:
        if isinstance(image, str):
            return service.image(image, name, downloads, rank=rank)
        gallery, answer = service.gallery_of(name), Future()
        answer.set_result(gallery.index.embeddings([gallery.id(image)])[0])
        return answer
    except RequestError as error:
        return error
