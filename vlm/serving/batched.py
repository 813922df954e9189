"""Thread-safe bundle with dynamic batching across its callers."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32
from PIL import Image

from vlm.bundle import Bundle
from vlm.display import webp
from vlm.errors import DataError
from vlm.heads.encoder import Rule
from vlm.inputs.naflex import STEP
from vlm.inputs.opening import MAX_PIXELS, ImageLike, OnError, one_or_many, read_image
from vlm.inputs.preprocess import Preprocess
from vlm.models.text import shortened
from vlm.serving.batching import Batcher, Observe, arrival
from vlm.serving.decoding import Decoders, Work, decoder_count
from vlm.serving.ordered_threads import OrderedThreads
from vlm.weights.instantiate import check_images, check_tower

TEXT_CACHE_SIZE = 4096  # cached text embeddings, for labels and repeated queries
TOKENIZERS = 2  # threads; the library itself uses all cores for a long list
# Padded lengths of texts. A CPU computes padding at its full price; elsewhere, texts of few
# lengths make large batches. A query of some words has 8 to 12 tokens.
CPU_TEXT_LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TEXT_LENGTHS = (16, 32, 64, 128, 256)
LONG = 256  # tokens; longer texts are rare: their lengths double, and their batches are smaller
NOT_FINITE = "its embedding is not finite; the model's weights may be corrupt"
DECODED_BYTES = 8  # of memory, for each of the pixels that an image may have
PROCESSES = os.name == "posix"  # elsewhere, threads decode


class Kind(NamedTuple):
    """Key of a batch: the tower and the sequence length of its items."""

    tower: Literal["image", "text"]
    length: int  # tokens of a text, or patches of a NaFlex image, else 0


class Batched:
    """`Bundle` for servers: encoders for many threads, with dynamic batching.

    Worker processes decode image files, within limits of memory and time: a file that exceeds them
    is an error of its item. Threads of their own tokenize texts, and one thread owns the device.
    Heads accept it in place of a bundle.

    Args:
        bundle: a model from `vlm.load`, with one tower or both.
        max_batch: maximum items per batch, rounded down to a power of two; by default 32 on a CPU,
            else 256.
        decoders: number of decoding processes; by default one for each core, and as many as half of
            the machine's memory holds.
        max_pixels: maximum size of an image before resizing. Decoding takes at most 8 bytes of
            memory for each of these pixels, and 96 MiB.
        seconds: timeout of the blocking calls.
        observe: callback for every batch: its `Kind`, number of items, and seconds.

    Example:
        >>> from vlm.serving import Batched
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
        if bundle.model.vision is not None:
            check_images(bundle.model, bundle.name)
        self.bundle, self.seconds = bundle, seconds
        self.name = bundle.name
        self.loss: Rule = bundle.loss
        self.logit_scale, self.logit_bias = bundle.logit_scale, bundle.logit_bias
        if max_batch is None:
            max_batch = 32 if jax.default_backend() == "cpu" else 256
        self.max_batch = 1 << (max(1, max_batch).bit_length() - 1)
        max_pixels = max_pixels or MAX_PIXELS
        self.preprocess = Preprocess(
            bundle.preprocess.config,
            max_pixels=max_pixels,
            max_bytes=DECODED_BYTES * max_pixels,
        )
        count = decoders or decoder_count(self.preprocess)
        self.processes = Decoders(self.preprocess, count, seconds) if PROCESSES else None
        self.decoders = OrderedThreads(count, "vlm-decode")
        self.tokenizers = ThreadPoolExecutor(TOKENIZERS, "vlm-tokenize")
        sizes = [1 << i for i in range(self.max_batch.bit_length())]
        self.batcher = Batcher(self._compute, sizes, observe)
        self._lengths = self._text_lengths()
        self._kinds = self.kinds()
        self._text_cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._text_lock = threading.Lock()

    # ---------------------------------------------------------------- interface of `Bundle`

    caches_prompts = False  # each request has its own, which would fill the disk
    config = property(lambda self: self.bundle.config)
    tokenizer = property(lambda self: self.bundle.tokenizer)
    embed_dim = property(lambda self: self.bundle.embed_dim)
    fingerprint = property(lambda self: self.bundle.fingerprint)

    def encode_image(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int | None = None,
        *,
        on_error: OnError | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """See `Bundle.encode_image`; `batch_size` is ignored, since the batcher chooses it."""
        futures = [self.image(x, f"image {i}", rank=i) for i, x in enumerate(one_or_many(images))]
        rows = [np.zeros((0, self.embed_dim), np.float32)]
        for number, future in enumerate(futures):
            try:
                rows.append(future.result(self.seconds)[None])
            except DataError as error:
                if on_error is None:
                    raise
                on_error(number, error)
        return np.concatenate(rows)

    def encode_text(
        self, texts: str | Iterable[str], batch_size: int | None = None
    ) -> Float32[np.ndarray, "n d"]:
        """See `Bundle.encode_text`; embeddings of recent texts are cached."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        with self._text_lock:
            embeddings = {
                text: self._text_cache[text] for text in texts if text in self._text_cache
            }
        missing = [text for text in dict.fromkeys(texts) if text not in embeddings]
        # At most one batch at a time, so that a caller with many labels does not block others.
        for start in range(0, len(missing), self.max_batch):
            part = missing[start : start + self.max_batch]
            for text, future in zip(part, self.texts(part), strict=True):
                embeddings[text] = future.result(self.seconds)
        with self._text_lock:
            for text in texts:
                self._text_cache[text] = embeddings[text]
                self._text_cache.move_to_end(text)
            while len(self._text_cache) > TEXT_CACHE_SIZE:
                self._text_cache.popitem(last=False)
        rows = [embeddings[text][None] for text in texts]
        return np.concatenate([np.zeros((0, self.embed_dim), np.float32), *rows])

    @property
    def towers(self) -> list[Literal["image", "text"]]:
        """Towers that the model was loaded with."""
        model = self.bundle.model
        present: dict[Literal["image", "text"], Any] = {"image": model.vision, "text": model.text}
        return [name for name, tower in present.items() if tower is not None]

    # ------------------------------------------------------------------- asynchronous calls

    def image(
        self,
        image: ImageLike | Callable[[], ImageLike],
        name: str = "the image",
        *,
        rank: int = 0,
        first: bool = False,
    ) -> Future:
        """Return the future embedding of an image, or of the result of a function.

        The function runs on a decoding thread. `rank` is the place of the image in its request.
        `first` puts the image ahead of the queue, and does not wait for a decoding thread.
        """
        check_images(self.bundle.model, self.bundle.name)
        future: Future = Future()
        since = 0.0 if first else arrival(rank, self.seconds_per_item("image"))

        def prepare() -> None:
            if future.cancelled():
                return
            try:
                opened = image() if callable(image) else image
                pixels = self._decoded("pixels", opened, name)
                if pixels is None:
                    pixels = self.preprocess.pixels(opened, name)
                self.batcher.submit(self._image_kind(pixels), pixels, future, since)
            except Exception as error:
                set_error(future, error)

        if first:
            self.tokenizers.submit(prepare)
        else:
            self.decoders.submit(since, prepare)
        return future

    def texts(
        self, texts: Sequence[str], prompt: str | None = None, *, first: bool = False
    ) -> list[Future]:
        """Return the future embeddings of texts; `first` puts them ahead of the queue.

        `prompt` names one of the model's prompts, as in `Bundle.encode_text`.
        """
        check_tower(self.bundle.model, "text", self.bundle.name)
        futures = [Future() for _ in texts]
        seconds = self.seconds_per_item("text")
        since = [0.0 if first else arrival(rank, seconds) for rank in range(len(texts))]

        def prepare() -> None:
            try:
                tokens = self.tokenizer(list(texts), prompt)
                for row, future, at in zip(tokens, futures, since, strict=True):
                    needed = shortened(row[None], self.config.text, step=1).shape[1]
                    length = next(length for length in self._lengths if length >= needed)
                    kind = Kind("text", length)
                    self.batcher.submit(kind, row[:length], future, at)
            except Exception as error:
                for future in futures:
                    set_error(future, error)

        self.tokenizers.submit(prepare)
        return futures

    def picture(self, image: ImageLike, name: str, size: int) -> Image.Image:
        """Open an image in RGB, at most `size` pixels on a side; files in a decoding process.

        Raises:
            DataError: see `vlm.inputs.open_image`.
        """
        if (pixels := self._decoded("picture", image, name, size)) is not None:
            return Image.fromarray(pixels)
        picture = self.preprocess.open(image, name).copy()
        picture.thumbnail((size, size))
        return picture

    def thumbnail(self, image: ImageLike, name: str, size: int) -> bytes:
        """Encode an image as WebP, at most `size` pixels on a side; files in a decoding process.

        Raises:
            DataError: see `vlm.inputs.open_image`.
        """
        if (data := self._decoded("thumbnail", image, name, size)) is not None:
            return data.tobytes()
        return webp(image, size, self.preprocess.max_pixels, self.preprocess.max_bytes)

    def warm_up(self, progress: Callable[[str], None] = lambda message: None) -> None:
        """Compile all batch shapes, so that no request waits for compilation."""
        if self.processes is not None and self.bundle.model.vision is not None:
            self.processes.start()
        for kind in self.kinds():
            progress(f"{kind.tower}s{f' of {kind.length}' if kind.length else ''}")
            most = self.max_batch * LONG // kind.length if _is_long(kind) else self.max_batch
            self.batcher.warm_up(kind, self._example(kind), max(1, most))

    def kinds(self) -> list[Kind]:
        """Return all possible batch keys."""
        lengths = {"image": self._patch_lengths(), "text": self._lengths}
        return [Kind(tower, length) for tower in self.towers for length in lengths[tower]]

    def seconds_per_item(self, tower: Literal["image", "text"] | None = None) -> float:
        """Return the recent time of an item of the longest kind, of a tower or of both.

        Texts of more than 256 tokens do not count, unless the tower pads all texts to them. It is 0
        before `warm_up`.
        """
        kinds = [kind for kind in self._kinds if tower in (None, kind.tower)]
        usual = [kind for kind in kinds if not _is_long(kind)]
        return max(map(self.batcher.seconds_per_item, usual or kinds))

    def close(self) -> None:
        """Finish pending work and stop the threads."""
        self.decoders.close()
        self.tokenizers.shutdown(wait=True)
        if self.processes is not None:
            self.processes.close()
        self.batcher.close()

    # ---------------------------------------------------------------------------- batches

    def _compute(self, kind: Kind, items: list[np.ndarray]) -> list[np.ndarray | DataError]:
        if kind.tower == "image":
            rows = self.bundle.encode_pixels(self.preprocess.collate(items))
        else:
            rows = self.bundle.encode_tokens(np.stack(items))
        return [row if np.isfinite(row).all() else DataError(NOT_FINITE) for row in rows]

    def _decoded(self, kind: Work, image: ImageLike, name: str, size: int = 0) -> np.ndarray | None:
        """Run `Decoders.run` on an image file; None for a PIL image, an array, or on Windows."""
        if self.processes is None:
            return None
        if isinstance(image, str | os.PathLike):
            image, name = read_image(image), os.fspath(image)
        return self.processes.run(kind, image, name, size) if isinstance(image, bytes) else None

    def _image_kind(self, pixels: np.ndarray) -> Kind:
        lengths = self._patch_lengths()
        if lengths == [0]:
            return Kind("image", 0)
        patch = self.preprocess.config.patch_size
        patches = (pixels.shape[0] // patch) * (pixels.shape[1] // patch)
        return Kind("image", next(length for length in lengths if length >= patches))

    def _patch_lengths(self) -> list[int]:
        config = self.preprocess.config
        if config.resize != "naflex":
            return [0]
        assert config.max_patches is not None  # of NaFlex
        last = -(-config.max_patches // STEP) * STEP
        return list(range(STEP, last + 1, STEP))

    def _text_lengths(self) -> list[int]:
        """Return the padded text lengths, of which the last is the context length."""
        longest = self.tokenizer.config.context_length
        # A tower that attends to all positions cannot be given shorter rows.
        if not getattr(self.config.text, "ignores_padding", False):
            return [longest]
        lengths = CPU_TEXT_LENGTHS if jax.default_backend() == "cpu" else TEXT_LENGTHS
        doubled = (LONG << i for i in range(1, longest.bit_length()))
        return [*(n for n in (*lengths, *doubled) if n <= longest / 1.5), longest]

    def _example(self, kind: Kind) -> np.ndarray:
        """Return a dummy item of a kind, for compilation."""
        if kind.tower == "text":
            return np.zeros(kind.length, np.int32)
        config = self.preprocess.config
        if not kind.length:
            return np.zeros((config.image_size, config.image_size, 3), np.uint8)
        assert config.patch_size is not None  # of NaFlex
        return np.zeros((config.patch_size, kind.length * config.patch_size, 3), np.uint8)


def _is_long(kind: Kind) -> bool:
    return kind.tower == "text" and kind.length > LONG


def set_error(future: Future, error: Exception) -> None:
    """Set an error on a pending future, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
