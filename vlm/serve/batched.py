"""A bundle that many threads use at once: what they ask for is computed in joint batches."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from vlm.bundle import Bundle
from vlm.errors import DataError
from vlm.inputs.opening import ImageLike, OnError, one_or_many
from vlm.inputs.preprocess import Preprocess
from vlm.models.text import LENGTH_STEP, shortened
from vlm.serve.batching import Batcher, Observe

KEPT_TEXTS = 4096  # whose embeddings are kept, for labels and for queries typed again


class Kind(NamedTuple):
    """What items of one batch have in common: the tower, and how long their sequences are."""

    tower: Literal["image", "text"]
    length: int  # tokens of a text, patches of a NaFlex image, else 0


class Batched:
    """`Bundle` for servers: the same encoders, for many threads at once, in joint batches.

    Images are decoded and texts tokenized on a pool of threads; one thread owns the device. Heads
    take it as they take a bundle.

    Args:
        bundle: what `vlm.load` gives, with one tower or both.
        max_batch: items computed at once, a power of two; 32 on a CPU, else 256.
        decoders: threads that decode; by default one for each core.
        max_pixels: of an image before it is resized.
        seconds: that the blocking calls wait for their answer.
        observe: told of every batch: its `Kind`, its items, its seconds.

    Example:
        >>> from vlm.serve import Batched
        >>> Batched.__name__
        'Batched'
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch: int | None = None,
        decoders: int | None = None,
        max_pixels: int | None = None,
        seconds: float = 30.0,
        observe: Observe | None = None,
    ):
        self.bundle, self.seconds = bundle, seconds
        if max_batch is None:
            max_batch = 32 if jax.default_backend() == "cpu" else 256
        self.max_batch = 1 << (max(1, max_batch).bit_length() - 1)
        config = bundle.preprocess.config
        bound = {} if max_pixels is None else {"max_pixels": max_pixels}
        self.preprocess = Preprocess(config, **bound)
        self.decoders = ThreadPoolExecutor(decoders or os.cpu_count() or 1, "vlm-decode")
        sizes = [1 << i for i in range(self.max_batch.bit_length())]
        self.batcher = Batcher(self._compute, sizes, observe)
        self._lengths = self._text_lengths()
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._kept_lock = threading.Lock()

    # ------------------------------------------------------------------ what heads ask for

    name = property(lambda self: self.bundle.name)
    loss = property(lambda self: self.bundle.loss)
    config = property(lambda self: self.bundle.config)
    tokenizer = property(lambda self: self.bundle.tokenizer)
    embed_dim = property(lambda self: self.bundle.embed_dim)
    logit_scale = property(lambda self: self.bundle.logit_scale)
    logit_bias = property(lambda self: self.bundle.logit_bias)
    fingerprint = property(lambda self: self.bundle.fingerprint)

    def encode_image(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int | None = None,
        *,
        on_error: OnError | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """See `Bundle.encode_image`; `batch_size` is the batcher's to choose."""
        answers = [self.image(x, f"image {i}") for i, x in enumerate(one_or_many(images))]
        rows = [np.zeros((0, self.embed_dim), np.float32)]
        for number, answer in enumerate(answers):
            try:
                rows.append(answer.result(self.seconds)[None])
            except DataError as error:
                if on_error is None:
                    raise
                on_error(number, error)
        return np.concatenate(rows)

    def encode_text(
        self, texts: str | Iterable[str], batch_size: int | None = None
    ) -> Float32[np.ndarray, "n d"]:
        """See `Bundle.encode_text`; texts that were asked for before are not computed again."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        with self._kept_lock:
            known = {text: self._kept[text] for text in texts if text in self._kept}
        fresh = [text for text in dict.fromkeys(texts) if text not in known]
        # No more than a batch at once: whoever has a thousand labels leaves room for others.
        for start in range(0, len(fresh), self.max_batch):
            part = fresh[start : start + self.max_batch]
            for text, answer in zip(part, self.texts(part), strict=True):
                known[text] = answer.result(self.seconds)
        with self._kept_lock:
            for text in texts:
                self._kept[text] = known[text]
                self._kept.move_to_end(text)
            while len(self._kept) > KEPT_TEXTS:
                self._kept.popitem(last=False)
        rows = [known[text][None] for text in texts]
        return np.concatenate([np.zeros((0, self.embed_dim), np.float32), *rows])

    # ---------------------------------------------------------------------- for the server

    def image(
        self,
        image: ImageLike | Callable[[], ImageLike],
        name: str = "the image",
        *,
        first: bool = False,
    ) -> Future:
        """The future embedding of an image, or of what a function gives on a decoder's thread."""
        self.bundle._check_tower(self.bundle.model.vision, "image")
        answer: Future = Future()

        def prepare() -> None:
            if answer.cancelled():
                return
            try:
                pixels = self.preprocess.pixels(image() if callable(image) else image, name)
                self.batcher.submit(self._image_kind(pixels), pixels, answer, first=first)
            except Exception as error:
                fail(answer, error)

        self.decoders.submit(prepare)
        return answer

    def texts(self, texts: Sequence[str], *, first: bool = False) -> list[Future]:
        """The future embeddings of texts."""
        self.bundle._check_tower(self.bundle.model.text, "text")
        answers = [Future() for _ in texts]

        def prepare() -> None:
            try:
                tokens = self.tokenizer(list(texts))
                for row, answer in zip(tokens, answers, strict=True):
                    needed = shortened(row[None], self.config.text).shape[1]
                    length = next(length for length in self._lengths if length >= needed)
                    kind = Kind("text", length)
                    self.batcher.submit(kind, row[:length], answer, first=first)
            except Exception as error:
                for answer in answers:
                    fail(answer, error)

        self.decoders.submit(prepare)
        return answers

    def warm_up(self, progress: Callable[[str], None] = lambda said: None) -> None:
        """Compile everything that requests will need, so that none of them waits for it."""
        for kind in self.kinds():
            progress(f"{kind.tower}s{f' of {kind.length}' if kind.length else ''}")
            self.batcher.warm_up(kind, self._example(kind))

    def kinds(self) -> list[Kind]:
        """All kinds of batches that there can be."""
        kinds = []
        if self.bundle.model.vision is not None:
            kinds += [Kind("image", length) for length in self._patch_lengths()]
        if self.bundle.model.text is not None:
            kinds += [Kind("text", length) for length in self._lengths]
        return kinds

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        self.decoders.shutdown(wait=True)
        self.batcher.close()

    # ---------------------------------------------------------------------------- batches

    def _compute(self, kind: Kind, items: list[np.ndarray]) -> np.ndarray:
        if kind.tower == "image":
            return self.bundle.encode_pixels(self.preprocess.collate(items))
        return self.bundle.encode_tokens(np.stack(items))

    def _image_kind(self, pixels: np.ndarray) -> Kind:
        lengths = self._patch_lengths()
        if lengths == [0]:
            return Kind("image", 0)
        patch = self.preprocess.config.patch_size
        patches = (pixels.shape[0] // patch) * (pixels.shape[1] // patch)
        return Kind("image", next(length for length in lengths if length >= patches))

    def _patch_lengths(self) -> list[int]:
        from vlm.inputs.naflex import STEP

        config = self.preprocess.config
        if config.resize != "naflex":
            return [0]
        assert config.max_patches is not None  # of NaFlex
        last = -(-config.max_patches // STEP) * STEP
        return list(range(STEP, last + 1, STEP))

    def _text_lengths(self) -> list[int]:
        """Few enough to compile them all: the shortest, its doubles, and the longest."""
        longest = self.tokenizer.config.context_length
        text = self.config.text
        # A tower that sees all positions takes rows as they are.
        probe = np.full((1, longest), text.end_id if text.end_id is not None else 0, np.int32)
        if shortened(probe, text).shape[1] == longest:
            return [longest]
        lengths = []
        while LENGTH_STEP << len(lengths) <= longest / 1.5:
            lengths.append(LENGTH_STEP << len(lengths))
        return [*lengths, longest]

    def _example(self, kind: Kind) -> np.ndarray:
        """An item of a kind, to compile with."""
        if kind.tower == "text":
            return np.zeros(kind.length, np.int32)
        config = self.preprocess.config
        if not kind.length:
            return np.zeros((config.image_size, config.image_size, 3), np.uint8)
        assert config.patch_size is not None  # of NaFlex
        return np.zeros((config.patch_size, kind.length * config.patch_size, 3), np.uint8)


def fail(answer: Future, error: Exception) -> None:
    """Let a future that nothing has run for yet end with an error, unless nobody waits for it."""
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)
