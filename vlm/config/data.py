"""Where training pairs come from, and how an image is changed at random."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.config.base import Config
from vlm.errors import ConfigError

MOST_OPERATIONS = 4  # of RandAugment


@dataclass(frozen=True)
class AugmentConfig(Config):
    """Random changes of a training image.

    Args:
        crop: Smallest and largest share of the image's area that a random crop keeps. None: no
            crop, but the model's own resizing, as in evaluation.
        aspect: Smallest and largest ratio of width to height of a crop; with the resize naflex,
            in multiples of the image's own.
        jitter: Strength of random changes of brightness, contrast and saturation: each factor
            is drawn from 1 - jitter to 1 + jitter.
        hue: Largest random change of hue, in turns of the colour circle: at most 0.5.
        flip: Mirror half of the images, left to right.
        randaugment: RandAugment: how many operations (at most 4), and their magnitude (0 to
            30). None: no operations.
        grey: Share of the images that lose their colour.
        blur: Share of the images that are blurred, by 0.1 to 2 pixels.
        solarise: Share of the images whose bright half is inverted.
        morphology: Probability of a random 3x3 dilation or erosion, which makes dark lines two
            pixels thinner (up to two pixels wide, they vanish) or two pixels thicker.
        draft: Decode JPEG files at 1/2, 1/4 or 1/8 where the crop still has all the pixels it
            needs.

    Example:
        >>> vlm.AugmentConfig(flip=True).flip
        True
    """

    crop: tuple[float, float] | None = (0.9, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.0
    hue: float = 0.0
    flip: bool = False
    randaugment: tuple[int, int] | None = None
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0
    morphology: float = 0.0
    draft: bool = True

    def check(self):
        for name in ("crop", "aspect"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                raise ConfigError(
                    f"AugmentConfig.{name} is {(low, high)}: give the smaller number first"
                )
        if self.crop is None:
            self.refuse_unused("set crop, for it is the shape of a crop", "aspect")
        if self.randaugment is not None and self.randaugment[0] > MOST_OPERATIONS:
            raise ConfigError(
                f"AugmentConfig.randaugment is {self.randaugment}: choose at most "
                f"{MOST_OPERATIONS} operations"
            )


@dataclass(frozen=True)
class FieldFilter(Config):
    """Which examples are kept, by one of their features. An example without the feature is not.

    Args:
        feature: Name of the feature that is looked at.
        at_least: Keep examples whose number is at least this, such as an aesthetic score.
        at_most: Keep examples whose number is at most this.
        one_of: Keep examples whose text is one of these, such as a language.

    Example:
        >>> from vlm.config import FieldFilter
        >>> good = FieldFilter("aesthetic", at_least=5)
        >>> data = vlm.DataConfig(source="pairs.parquet", filters=(good,))
        >>> data.filters[0].feature
        'aesthetic'
    """

    feature: str
    at_least: float | None = None
    at_most: float | None = None
    one_of: tuple[str, ...] = ()

    def check(self):
        if self.at_least is None and self.at_most is None and not self.one_of:
            raise ConfigError(
                f"FieldFilter of feature {self.feature!r} asks for nothing: give at_least, at_most "
                "or one_of"
            )


@dataclass(frozen=True)
class MixturePart(Config):
    """One source of a mixture. What is None is as in the `DataConfig` that holds it.

    Args:
        source: Where this part's examples come from: whatever `DataConfig.source` takes.
        weight: Share of the samples that this part gives, relative to the other parts.
        epochs: In place of a weight: passes over this part, relative to those over the other
            parts.
        examples: How many examples the part has, where `epochs` needs the number and the source
            cannot tell.
        train_split: Name of its training split.
        image: Name of its image feature.
        captions: Names of its caption features.
        caption_weights: Weights of its caption features.
        label: Name of its class-label feature, in place of captions.
        class_names: File with the names of its labels.
        templates: Sentences around its labels.
        filters: Train on the examples of this part that pass all of these filters.
        access: How its examples are read: see `DataConfig.access`.
        data_dir: Where its prepared data lies.

    Example:
        >>> from vlm.config import MixturePart
        >>> parts = MixturePart("a/*.tar", weight=2), MixturePart("b.csv", weight=1)
        >>> vlm.DataConfig(mixture=parts).mixture[0].weight
        2
    """

    source: str
    weight: float | None = None
    epochs: float | None = None
    examples: int | None = None
    train_split: str | None = None
    image: str | None = None
    captions: tuple[str, ...] | None = None
    caption_weights: tuple[float, ...] | None = None
    label: str | None = None
    class_names: str | None = None
    templates: tuple[str, ...] | None = None
    filters: tuple[FieldFilter, ...] | None = None
    access: Literal["auto", "random", "stream"] | None = None
    data_dir: str | None = None

    def check(self):
        _check_texts(self)
        if self.captions is not None:
            self.refuse_unused("set label in place of captions", "templates", "class_names")


@dataclass(frozen=True)
class DataConfig(Config):
    """Where pairs come from. A caption is drawn at random from all `captions` of an image.

    Args:
        source: Where examples come from: "openmoji", "tfds:NAME" for a prepared TFDS data set,
            or the path of shards, of a table or of a folder. Required, unless there is a
            mixture.
        train_split: Name of the split to train on.
        eval_split: Name of the split that is held out: its images are looked up among all
            captions of both splits. None, as large data has it: see `Experiment.evals`.
        image: Name of the feature that holds the image. In shards and folders: one file of several,
            such as mask.png.
        captions: Names of the features that hold captions; a nested one is written as
            captions/text. In shards and folders: an extension (txt) or a field of the JSON;
            caption is the .txt. One caption of an image is drawn at random.
        caption_weights: How often each of `captions` is drawn, relative to the others. Empty:
            all texts of an image alike.
        label: Name of a class-label feature that is used in place of captions: its name is put
            into `templates`.
        class_names: A text file with the names of the labels in sentences, in place of the labels
            made readable: a line for each label in their order, or lines LABEL<tab>NAME; or a JSON
            object from label to name.
        templates: Sentences around a label, such as 'a photo of a {}.'; one is drawn at random.
            Empty: those of the model that training starts from, else of the data set, else
            'a photo of a {}.'; from scratch, the bare name. Of captions: sentences around the
            labels that the model is asked about once it is trained.
        filters: Train on the examples that pass all of these filters.
        augment: Random changes of training images.
        cache: Keep decoded images in memory, for data that fits there.
        workers: Number of reader processes. 0: threads of the training process read.
        prefetch: Number of batches that are made ahead of the training step.
        data_dir: Folder where prepared data lies. None: vlm's cache folder. Of a table: folder of
            its images, where they are not beside it.
        access: How examples are read. random: by an index, in an order that is new for each
            epoch; stream: shards front to back; auto: what is remote is streamed, and what is
            local is indexed.
        interleave: Of streams: number of interleaved readers, one shard each. It must divide the
            global batch, and the number of processes must divide it. None: the largest divisor
            of the batch up to 256 and the number of shards.
        shuffle: Of streams: number of samples that are shuffled at a time, over all readers.
        mixture: Several sources to train on, in place of `source`.
        max_bad_share: The run stops when a larger share of its samples than this is broken.
        max_bad_in_a_row: The run stops when this many samples in a row are broken.

    Example:
        >>> vlm.DataConfig(source="photos/", workers=8).workers
        8
    """

    source: str = ""
    train_split: str = "train"
    eval_split: str | None = "test"
    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    caption_weights: tuple[float, ...] = ()
    label: str | None = None
    class_names: str | None = None
    templates: tuple[str, ...] = ()
    filters: tuple[FieldFilter, ...] = ()
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cache: bool = False
    workers: int = 0
    prefetch: int = 2
    data_dir: str | None = None
    access: Literal["auto", "random", "stream"] = "auto"
    interleave: int | None = None
    shuffle: int = 8192
    mixture: tuple[MixturePart, ...] = ()
    max_bad_share: float = 0.05
    max_bad_in_a_row: int = 256

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("mixture") and values.get("source") == "openmoji":
            return values | {"source": ""}  # it was the default, also of a mixture
        return values

    def check(self):
        _check_texts(self)
        if self.label is None and not self.mixture:
            self.refuse_unused("set label, which it names", "class_names")
        if self.mixture:
            self.refuse_unused("the parts of a mixture have sources of their own", "source")
        if self.access == "random" and not self.mixture:
            self.refuse_unused('set access to "auto" or "stream"', "interleave", "shuffle")
        if self.cache and self.workers:
            raise ConfigError(
                f"DataConfig.cache keeps images in this process, and workers {self.workers} "
                "processes cannot share it: set one of them off"
            )


def _check_texts(config: DataConfig | MixturePart) -> None:
    """Refuse captions beside a label, which replaces them, and weights that choose none of them."""
    name, captions, weights = type(config).__name__, config.captions, config.caption_weights
    for other in config.changed("captions", "caption_weights"):
        if config.label is not None and getattr(config, other):
            raise ConfigError(
                f"{name} has label {config.label!r}, whose names are the texts, and {other} "
                f"{getattr(config, other)}: give one of them"
            )
    if weights and captions is not None and len(weights) != len(captions):
        raise ConfigError(
            f"{name}.caption_weights has {len(weights)} weights for the {len(captions)} features "
            "of captions: give one for each"
        )
    if weights and not sum(weights):
        raise ConfigError(f"{name}.caption_weights {weights} choose no caption: give one above 0")
