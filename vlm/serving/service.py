"""State and helpers shared by the routes: model, index, limits, and encoding of items."""

import asyncio
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm.config import absence
from vlm.errors import ConfigError, DataError, VlmError
from vlm.inputs.decoding_limits import TooLargeError
from vlm.serving.batched import Batched
from vlm.serving.gallery import Gallery
from vlm.serving.image_input import image_bytes, is_url
from vlm.serving.limits import Admission, Limits, RequestError, busy
from vlm.serving.metrics import Metrics
from vlm.serving.middleware import problem
from vlm.serving.protocol import FailedItem, Input, Item, Problem
from vlm.serving.url_fetch import Fetcher

MOST_OF_TIMEOUT = 0.7  # that the items in flight may take; the rest is for the request itself
Downloads = Mapping[str, bytes | RequestError]  # images that were given as URLs, by their names


@dataclass
class Service:
    """State of one server.

    Attributes:
        name: model name in the API.
        gallery: items of the index, or None if only a model is served.
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

    @functools.cached_property
    def fetcher(self) -> Fetcher:
        return Fetcher(self.limits)

    def check_model(self, name: str | None) -> None:
        """Raise a RequestError if a request names a different model."""
        if name is not None and name != self.name:
            raise RequestError(
                f"there is no model {name[:80]!r}: use {self.name!r}, or omit the field model",
                404,
                "model_not_found",
                param="model",
            )

    def check_prompt(self, name: str | None) -> None:
        """Raise a RequestError if the model has no prompt of this name."""
        try:
            self.model.tokenizer.config.prompt(name)
        except ConfigError as error:
            raise RequestError(str(error), 400, "invalid_prompt", param="prompt") from None

    def check_count(self, count: int, noun: str, param: str) -> None:
        """Raise a RequestError if a request has too many items."""
        if count > self.limits.items:
            raise RequestError(
                f"{count:,} {noun} exceed the limit of {self.limits.items:,}: split the request",
                413,
                "too_many_items",
                param=param,
            )

    def check_characters(self, count: int, param: str) -> None:
        """Raise a RequestError if the texts of a request are too long together."""
        if count > self.limits.request_characters:
            raise RequestError(
                f"the texts have {count:,} characters together, over the limit of "
                f"{self.limits.request_characters:,}: split the request",
                413,
                "text_too_long",
                param=param,
            )

    async def admit(self, count: int, work: Callable[[], Any]) -> Any:
        """Run `work` within the limits on items in flight and on time, and return its result.

        Raises:
            RequestError: too many items in flight, or too slow ones (429), or a timeout (503).
        """
        wait = self._seconds_to_wait()
        if wait > self.limits.seconds * MOST_OF_TIMEOUT:  # or it would compute what times out
            items = f"the {self.admission.in_flight:,} items in flight take about {wait:g} s"
            raise busy(items, wait)
        with self.admission.admit(count, wait):
            self.metrics.waiting.set(self.admission.in_flight)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    return await work()
            except TimeoutError:
                raise RequestError(
                    f"there was no answer within {self.limits.seconds:g} s: retry later",
                    503,
                    "timeout",
                    self._seconds_to_wait(),
                ) from None
            finally:
                self.metrics.waiting.set(self.admission.in_flight - count)

    # ----------------------------------------------------------------------------- items

    async def download(self, images: Mapping[str, Any]) -> Downloads:
        """Download the images that are http(s) URLs, if the server may.

        Args:
            images: by their names in error messages.

        Raises:
            RequestError: too many requests with downloads (429).
        """
        urls = {name: image for name, image in images.items() if is_url(image)}
        return await self.fetcher.fetch_all(urls) if urls and self.limits.urls else {}

    def submit(
        self,
        items: Sequence[tuple[str | None, str | None] | RequestError],
        downloads: Downloads,
        prompt: str | None = None,
    ) -> list[Future | RequestError]:
        """Submit texts and images, and return the future embedding of each, or its error.

        `prompt` names one of the model's prompts for the texts.
        """
        answers: list[Any] = [None] * len(items)
        texts: dict[int, str] = {}
        for i, item in enumerate(items):
            if isinstance(item, RequestError):
                answers[i] = item
                continue
            try:
                text, image = item
                self.check_towers("text" if image is None else "image")
                if image is not None:
                    answers[i] = self.image(image, f"item {i}", downloads, rank=i)
                else:
                    texts[i] = self.checked_text(text, f"item {i}")
            except RequestError as error:
                answers[i] = error
        if texts:
            futures = self.model.texts(list(texts.values()), prompt)
            for i, answer in zip(texts, futures, strict=True):
                answers[i] = answer
        return answers

    def image(self, image: str, name: str, downloads: Downloads, *, rank: int = 0) -> Future:
        """Return the future embedding of an image from a data URL or from the downloads.

        Args:
            rank: of the image in the request.

        Raises:
            RequestError: the image was not downloaded.
        """
        given = downloads.get(name, image)
        if isinstance(given, RequestError):
            raise given
        return self.model.image(lambda: image_bytes(given, name), name, rank=rank)

    def checked_text(self, text: str | None, name: str, param: str | None = None) -> str:
        """Return a text that is within the limits.

        Raises:
            RequestError: the text is empty or too long.
        """
        if not text:
            raise RequestError(
                f"{name} is empty: send a non-empty text", 400, "empty_text", param=param
            )
        if len(text) > self.limits.characters:
            raise RequestError(
                f"{name} has {len(text):,} characters, over the limit of "
                f"{self.limits.characters:,}: shorten it",
                413,
                "text_too_long",
                param=param,
            )
        return text

    def answers(
        self,
        results: Sequence[np.ndarray | Exception],
        make: Callable[[dict[int, np.ndarray]], list[Any]],
        params: Sequence[str],
    ) -> list[Any]:
        """Return the answers that `make` returns for the rows by index, and errors for the rest.

        Args:
            params: the field of each item in the request.

        Raises:
            RequestError: all items failed.
        """
        rows = {i: row for i, row in enumerate(results) if isinstance(row, np.ndarray)}
        errors = {
            i: as_request_error(row, f"item {i}", params[i])
            for i, row in enumerate(results)
            if isinstance(row, Exception)
        }
        if not rows:
            raise errors[0]
        answers = make(rows)
        for i, error in errors.items():
            self.metrics.refused.labels(error.code).inc()
            content = problem(str(error), error.code, error.status, error.param)
            answers.append(FailedItem(index=i, error=Problem(**content)))
        return sorted(answers, key=lambda answer: answer.index)

    def gallery_of(self, name: str) -> Gallery:
        """Return the index of an item number in the field `name`.

        Raises:
            RequestError: the server has no index (400).
        """
        if self.gallery is None:
            raise RequestError(
                f"{name} is an item number, but the server has no index: send an image",
                400,
                "no_index",
            )
        return self.gallery

    def check_towers(self, *towers: str) -> None:
        """Raise a RequestError if the model was loaded without one of the towers."""
        for tower in towers:
            if tower not in self.model.towers:
                key = "vision" if tower == "image" else "text"
                config = getattr(self.model.bundle.config, key)
                fix = "start the server with --tower both"
                raise RequestError(absence(key, config, self.name, fix), 400, "no_tower")

    def _seconds_to_wait(self) -> float:
        """Estimate the time for the items in flight in seconds, for Retry-After."""
        return math.ceil(self.admission.in_flight * self.model.seconds_per_item())


def parts_of(item: Input, name: str) -> tuple[str | None, str | None]:
    """Return the text and the image of an item, one of which is None.

    A string that is a data URL is an image.

    Raises:
        RequestError: the item has neither, or both.
    """
    if isinstance(item, str):
        return (None, item) if item.startswith("data:") else (item, None)
    assert isinstance(item, Item)
    image = item.image if item.image_url is None else item.image_url.url
    if (item.text is None) == (image is None) or (item.image and item.image_url):
        raise RequestError(f"{name} must have either a text or an image", 400, "invalid_item")
    return item.text, image


async def outcomes(answers: Sequence[Future | Exception]) -> list[np.ndarray | Exception]:
    """Await futures, and return a row or an error for each; cancellation removes queued items."""
    futures = [
        asyncio.wrap_future(answer) for answer in answers if not isinstance(answer, Exception)
    ]
    done = iter(await asyncio.gather(*futures, return_exceptions=True))
    results: list[Any] = [a if isinstance(a, Exception) else next(done) for a in answers]
    for outcome in results:
        if isinstance(outcome, BaseException) and not isinstance(outcome, VlmError):
            raise outcome  # an internal error, not one of the item
    return results


def as_request_error(error: Exception, name: str = "", param: str | None = None) -> RequestError:
    """Convert an error of an item to a RequestError, whose message starts with `name`."""
    if isinstance(error, RequestError):
        error.param = error.param or param
        return error
    code, status = ("invalid_image" if isinstance(error, DataError) else "invalid_item"), 400
    message = str(error)
    if isinstance(error, TooLargeError):
        code, status = "image_too_large", 413
    if not message.startswith(name):
        message = f"{name}: {message}"
    return RequestError(message, status, code, param=param)
