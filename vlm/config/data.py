"""Where training pairs come from, and how an image is changed at random."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image."""

    # Share of the image's area that a crop keeps. None: no crop, but the model's own resizing.
    crop: tuple[float, float] | None = (0.9, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # of the crop
    jitter: float = 0.0  # brightness, contrast, saturation: factors in 1 +- jitter
    hue: float = 0.0  # in turns of the colour circle, at most 0.5
    flip: bool = False
    randaugment: tuple[int, int] | None = None  # operations (at most 4), magnitude (0 to 30)
    grey: float = 0.0  # share of the images that lose their colour
    blur: float = 0.0  # share of the images that are blurred, by 0.1 to 2 pixels
    solarise: float = 0.0  # share of the images whose bright half is inverted
    # JPEG files are decoded at 1/2, 1/4 or 1/8 where the crop still has all the pixels it needs.
    draft: bool = True


@dataclass(frozen=True)
class FieldFilter:
    """Which examples are kept, by one of their features. An example without the feature is not."""

    feature: str = ""
    at_least: float | None = None  # of a number, such as an aesthetic score
    at_most: float | None = None
    one_of: tuple[str, ...] = ()  # of a text, such as a language


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture. What is None is as in the `DataConfig` that holds it."""

    source: str = "openmoji"
    weight: float | None = None  # share of the samples, relative to the other parts
    epochs: float | None = None  # instead: passes over it, relative to those over the other parts
    examples: int | None = None  # how many it has, where `epochs` needs that and it cannot tell
    train_split: str | None = None
    image: str | None = None
    captions: tuple[str, ...] | None = None
    caption_weights: tuple[float, ...] | None = None
    label: str | None = None
    templates: tuple[str, ...] | None = None
    keep: tuple[FieldFilter, ...] | None = None
    access: Literal["auto", "random", "stream"] | None = None
    data_dir: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from. A caption is drawn at random from all `captions` of an image."""

    source: str = "openmoji"  # "openmoji", "tfds:NAME", or a path that says what it is
    train_split: str = "train"
    # Of small data: its images are looked up among all captions of both splits. Large data has
    # None here, and names what to measure on in `evals`.
    eval_split: str | None = "test"
    image: str = "image"  # the feature that holds it
    captions: tuple[str, ...] = ("caption",)  # features; one inside another is called a/b
    caption_weights: tuple[float, ...] = ()  # one for each of `captions`; (): all texts alike
    label: str | None = None  # a class-label feature instead of captions, put into `templates`
    templates: tuple[str, ...] = ("{}",)
    keep: tuple[FieldFilter, ...] = ()  # train on the examples that pass all of these
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cache: bool = False  # keep decoded images in memory
    workers: int = 0  # reader processes; 0 reads in threads of this process
    prefetch: int = 2  # batches made ahead of the step
    data_dir: str | None = None  # where prepared data lives; None: the cache folder
    # stream: read shards front to back; random: by an index; auto: stream what is remote.
    access: Literal["auto", "random", "stream"] = "auto"
    # Of streams: shards that are read side by side. It divides the global batch, and processes
    # divide it. None: the largest divisor of the batch up to 256 and the number of shards.
    lanes: int | None = None
    shuffle: int = 8192  # of streams: samples that are shuffled at a time, over all lanes
    mixture: tuple[MixturePart, ...] = ()  # several sources instead of `source`, for training
    # A run stops when more of its samples than this are bad, or so many one after another.
    max_bad_share: float = 0.05
    max_bad_in_a_row: int = 256
