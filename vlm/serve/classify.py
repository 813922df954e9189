"""`/v1/classify`: images over labels that the client names."""

from concurrent.futures import Future
from typing import Any

import numpy as np
from fastapi import APIRouter

from vlm.heads.zero_shot import Classification, ZeroShotClassifier
from vlm.serve.limits import Refused
from vlm.serve.protocol import Classified, ClassifyAnswer, ClassifyRequest, Score
from vlm.serve.service import Service, as_refused, outcomes

MOST_SENTENCES = 4096  # labels times templates


def routes(service: Service, templates: tuple[str, ...]) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["classify"])

    @router.post("/classify")
    async def classify(asked: ClassifyRequest) -> ClassifyAnswer:
        """The labels of each image with their scores, best first."""
        service.check_model(asked.model)
        for tower in ("image", "text"):
            service.check_tower(tower)
        service.check_count(len(asked.images), "images")
        sentences = asked.templates or templates
        if len(asked.labels) * len(sentences) > MOST_SENTENCES:
            raise Refused(
                f"{len(asked.labels)} labels in {len(sentences)} templates are over "
                f"{MOST_SENTENCES:,} sentences: name fewer",
                413,
                "too_many_labels",
            )
        for text in (*asked.labels, *sentences, *([asked.none] if asked.none else [])):
            service.checked_text(text, "a label or template")

        async def work() -> tuple[ZeroShotClassifier, list[Any]]:
            answers = [_answer(service, image, f"item {i}") for i, image in enumerate(asked.images)]
            classifier = await service.in_thread(
                lambda: ZeroShotClassifier(
                    service.model, asked.labels, sentences, asked.none or None, asked.multi_label
                )
            )
            return classifier, await outcomes(answers)

        classifier, found = await service.inside(len(asked.images) + 1, work)
        if all(isinstance(row, Exception) for row in found):
            raise as_refused(found[0], "item 0")
        rows = [row for row in found if not isinstance(row, Exception)]
        said = Classification(classifier.labels, classifier.logits(np.stack(rows)), classifier.rule)
        tops = iter(said.top(asked.top or len(said.labels)))
        data = []
        for i, row in enumerate(found):
            if isinstance(row, Exception):
                data.append(service.failed(i, row))
            else:
                scores = [Score(label=label, score=score) for label, score in next(tops)]
                data.append(Classified(index=i, labels=scores))
        return ClassifyAnswer(model=service.name, rule=classifier.rule, data=data)

    return router


def _answer(service: Service, image: str | int, name: str) -> Future | Refused:
    """The future embedding of a data URL, or that of an item of the index."""
    try:
        if isinstance(image, str):
            return service.image(image, name)
        if service.gallery is None:
            raise Refused(f"{name} is a number, and there is no index here", 400, "no_index")
        answer: Future = Future()
        answer.set_result(service.gallery.index.embeddings([service.gallery.id(image)])[0])
        return answer
    except Refused as refused:
        return refused
