"""What the routes share: the model, the index, the limits, and how items become embeddings."""

import asyncio
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from starlette.concurrency import run_in_threadpool

from vlm.errors import DataError, VlmError
from vlm.serve.batched import Batched
from vlm.serve.gallery import Gallery
from vlm.serve.guard import problem
from vlm.serve.limits import Admission, Limits, Refused
from vlm.serve.metrics import Metrics
from vlm.serve.pictures import image_bytes
from vlm.serve.protocol import FailedItem, Input, Item, Problem

T = TypeVar("T")


@dataclass
class Service:
    """Everything behind one server.

    Attributes:
        name: of the model, as clients name it.
        gallery: of an index, or None where only a model is served.
    """

    model: Batched
    name: str
    limits: Limits
    metrics: Metrics
    gallery: Gallery | None = None
    started: float = field(default_factory=time.time)

    @functools.cached_property
    def admission(self) -> Admission:
        return Admission(self.limits.waiting, "items")

    def check_model(self, name: str | None) -> None:
        """Raise a Refused if a client asks for another model than the one here."""
        if name is not None and name != self.name:
            raise Refused(
                f"there is no model {_short(name)!r} here: it is {self.name!r}, or leave it out",
                404,
                "model_not_found",
            )

    def check_count(self, count: int, what: str = "items") -> None:
        """Raise a Refused if a request has more items than one may."""
        if count > self.limits.items:
            raise Refused(
                f"{count:,} {what} are over the limit of {self.limits.items:,}: send them in "
                "several requests",
                413,
                "too_many_items",
            )

    async def inside(self, count: int, work: Callable[[], Any]) -> Any:
        """What `work` gives, once there is room for its items, and within the time there is.

        Raises:
            Refused: no room (429), or no answer in time (503).
        """
        with self.admission.room_for(count, self._seconds_to_wait()):
            self.metrics.waiting.set(self.admission.inside)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    return await work()
            except TimeoutError:
                raise Refused(
                    f"there was no answer within {self.limits.seconds:g} s: ask again later",
                    503,
                    "timeout",
                    self._seconds_to_wait(),
                ) from None
            finally:
                self.metrics.waiting.set(self.admission.inside - count)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What blocking `work` gives, called on a thread."""
        return await run_in_threadpool(work)

    # ----------------------------------------------------------------------------- items

    def submit(self, items: Sequence[Input]) -> list[Future | Refused]:
        """The future embedding of each item, or why it has none."""
        answers: list[Any] = [None] * len(items)
        texts: dict[int, str] = {}
        for i, item in enumerate(items):
            try:
                text, image = parts_of(item, f"item {i}")
                self.check_tower("text" if image is None else "image")
                if image is not None:
                    answers[i] = self.image(image, f"item {i}")
                else:
                    texts[i] = self.checked_text(text, f"item {i}")
            except Refused as refused:
                answers[i] = refused
        if texts:
            futures = self.model.texts(list(texts.values()))
            for i, answer in zip(texts, futures, strict=True):
                answers[i] = answer
        return answers

    def image(self, image: str, name: str) -> Future:
        """The future embedding of an image that came as a data URL."""
        return self.model.image(lambda: image_bytes(image, self.limits, name), name)

    def checked_text(self, text: str | None, name: str) -> str:
        """A text within the limits.

        Raises:
            Refused: it is empty, or too long.
        """
        if not text:
            raise Refused(f"{name} is empty: send a text", 400, "empty_text")
        if len(text) > self.limits.characters:
            raise Refused(
                f"{name} has {len(text):,} characters, over the limit of "
                f"{self.limits.characters:,}: send its first part",
                413,
                "text_too_long",
            )
        return text

    def failed(self, index: int, error: Exception) -> FailedItem:
        """An item that has no answer, as others beside it see it."""
        refused = as_refused(error, f"item {index}")
        self.metrics.refused.labels(refused.code).inc()
        about = problem(str(refused), refused.code, refused.status)
        return FailedItem(index=index, error=Problem(**about))

    def check_tower(self, tower: str) -> None:
        """Raise a Refused if the model was loaded without a tower."""
        towers = {"image": self.model.bundle.model.vision, "text": self.model.bundle.model.text}
        if towers[tower] is None:
            raise Refused(
                f"{self.name} was loaded without its {tower} tower: it takes no {tower}s",
                400,
                "no_tower",
            )

    def _seconds_to_wait(self) -> float:
        """How long what waits may take, for clients that shall come again."""
        each = max(self.model.batcher.seconds_per_item(kind) for kind in self.model.kinds())
        return math.ceil(self.admission.inside * each)


def parts_of(item: Input, name: str) -> tuple[str | None, str | None]:
    """The text or else the image of an item; a bare text that is a data URL is an image.

    Raises:
        Refused: it has neither, or both.
    """
    if isinstance(item, str):
        return (None, item) if item.startswith("data:") else (item, None)
    assert isinstance(item, Item)
    image = item.image if item.image_url is None else item.image_url.url
    if (item.text is None) == (image is None) or (item.image and item.image_url):
        raise Refused(f"{name} must have a text or an image, and not both", 400, "invalid_item")
    return item.text, image


async def outcomes(answers: Sequence[Future | Exception]) -> list[np.ndarray | Exception]:
    """What became of each item, in order; if this is given up, its items leave the queue."""
    waited = [
        asyncio.wrap_future(answer) for answer in answers if not isinstance(answer, Exception)
    ]
    done = iter(await asyncio.gather(*waited, return_exceptions=True))
    found: list[Any] = [a if isinstance(a, Exception) else next(done) for a in answers]
    for outcome in found:
        if isinstance(outcome, BaseException) and not isinstance(outcome, VlmError):
            raise outcome  # a fault of ours, not of the item
    return found


def as_refused(error: Exception, name: str = "the image") -> Refused:
    """An error of an item, with a status."""
    if isinstance(error, Refused):
        return error
    code = "invalid_image" if isinstance(error, DataError) else "invalid_item"
    said = str(error)
    return Refused(said if said.startswith(name) else f"{name}: {said}", 400, code)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
