"""Where training pairs come from, and how an image is changed at random."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image."""

    crop: tuple[float, float] = (0.9, 1.0)  # share of the image's area that a crop keeps
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.0  # brightness, contrast, saturation: factors in 1 +- jitter
    hue: float = 0.0  # in turns of the colour circle, at most 0.5
    flip: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from. A caption is drawn at random from all `captions` of an image."""

    source: str = "openmoji"  # "openmoji", "tfds:NAME", or a path that says what it is
    train_split: str = "train"
    eval_split: str | None = "test"
    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    label: str | None = None  # a class-label feature instead of captions, put into `templates`
    templates: tuple[str, ...] = ("{}",)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cache: bool = False  # keep decoded images in memory
    workers: int = 0  # reader processes; 0 reads in threads of this process
    prefetch: int = 2  # batches made ahead of the step
    data_dir: str | None = None  # where prepared data lives; None: the cache folder
