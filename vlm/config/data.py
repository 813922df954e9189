"""Configs of training data, filters, mixtures and image augmentation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.config.base import Config
from vlm.config.code import DataSource
from vlm.errors import ConfigError

MOST_OPERATIONS = 4  # of RandAugment


@dataclass(frozen=True)
class AugmentConfig(Config):
    """Augmentation of training images.

    Args:
        crop: Range of the area of a random crop, as a fraction of the image's. None: no crop; the
            image is resized as in evaluation.
        aspect: Range of the ratio of width to height of a crop; with the resize naflex, relative
            to the image's own ratio.
        jitter: Strength of brightness, contrast and saturation jitter: each factor is drawn from
            1 - jitter to 1 + jitter.
        hue: Maximum change of hue, in turns of the colour circle: at most 0.5.
        flip: Mirror half of the images, left to right.
        randaugment: RandAugment: number of operations (at most 4), and their magnitude (0 to 30).
            None: no operations.
        grey: Probability of conversion to greyscale.
        blur: Probability of a Gaussian blur of 0.1 to 2 pixels.
        solarise: Probability of solarisation: bright values are inverted.
        morphology: Probability of a random 3x3 dilation or erosion, which makes dark lines two
            pixels thinner (up to two pixels wide, they vanish) or two pixels thicker.
        draft: Decode JPEG files at 1/2, 1/4 or 1/8 of their size if the crop keeps enough pixels.

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
    """A filter of examples by one of their features; examples without the feature are rejected.

    Args:
        feature: Name of the feature.
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
                f"FieldFilter of feature {self.feature!r} has no condition: give at_least, at_most "
                "or one_of"
            )


@dataclass(frozen=True)
class MixturePart(Config):
    """A source of a mixture. Fields that are None take the value of the `DataConfig`.

    Args:
        source: Source of the examples, as in `DataConfig.source`.
        weight: Fraction of the samples from this part, relative to the other parts.
        epochs: In place of a weight: passes over this part, relative to the other parts.
        examples: Number of examples, if `epochs` needs it and the source does not know it.
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
        weight_column: Feature with the weight of each of its examples: see
            `DataConfig.weight_column`.
        scores: Folder of CLIP scores of its examples.

    Example:
        >>> from vlm.config import MixturePart
        >>> parts = MixturePart("a/*.tar", weight=2), MixturePart("b.csv", weight=1)
        >>> vlm.DataConfig(mixture=parts).mixture[0].weight
        2
    """

    source: DataSource
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
    weight_column: str | None = None
    scores: str | None = None

    def check(self):
        _check_texts(self)
        if self.captions is not None:
            self.refuse_unused("set label in place of captions", "templates", "class_names")


@dataclass(frozen=True)
class DataConfig(Config):
    """Source of image-text pairs. One of the `captions` of an image is drawn at random.

    Args:
        source: Source of the examples: a folder, a table, shards, tfds:NAME or openmoji. A TFDS
            data set must be prepared. Or a data set of your own: the object, or its import path,
            such as python:my_parts:my_data. Required, unless there is a mixture.
        train_split: Name of the training split.
        eval_split: Name of the eval split. Its images are retrieved among all captions of both
            splits. Use None for large data, and `Experiment.evals`.
        image: Name of the feature that holds the image. In shards and folders: one file of several,
            such as mask.png.
        captions: Features that hold captions. A nested one is written as captions/text. In shards
            and folders: an extension (txt) or a field of the JSON; caption is the .txt.
        caption_weights: Relative sampling weights of `captions`. Empty: all texts of an image are
            equally likely.
        label: Feature with a class label. It replaces the captions: its class name is put into
            `templates`.
        class_names: File with class names for the templates, in place of readable labels. Text: a
            line for each label in their order, or lines LABEL<tab>NAME. JSON: an object from label
            to name.
        templates: Prompt templates for a label, such as 'a photo of a {}.'; one is drawn at
            random. Empty: those of the initial model, else of the data set, else 'a photo of a
            {}.'; from scratch, the bare name. With captions: templates that the trained model uses
            for labels.
        filters: Train on the examples that pass all of these filters.
        augment: Augmentation of training images.
        cache: Keep decoded images in memory.
        workers: Number of reader processes. 0: threads of the training process.
        prefetch: Number of batches prepared ahead of the training step.
        data_dir: Folder of prepared data. None: vlm's cache folder. For a table: folder of its
            images, if they are not beside it.
        access: Order of reading. random: random access by an index, shuffled for each epoch;
            stream: shards front to back; auto: remote data is streamed, local data is indexed.
        interleave: For streams: number of interleaved readers, one part of a shard each. It must
            divide the global batch, and the number of processes must divide it. None: one reader
            for each row of the batch, if there are as many parts and `shuffle` has room for them.
            Tars without an index are not read in parts, and have at most 256 readers.
        shuffle: For streams: size of the shuffle buffers of all readers together, in samples. None:
            one part for each reader, with at most 4 GiB in all processes together, and at least
            8,192 samples.
        mixture: Several sources to train on, in place of `source`.
        max_bad_share: Stop the run if a larger fraction of its samples is broken.
        max_bad_in_a_row: Stop the run if this many samples in a row are broken.
        hold_out: Fraction of the training split to use as the eval split, if the source has no such
            split. It is taken from each class of `label`, and is the same in every run.
        mixture_temperature: Weight of each part of the mixture by its size, in place of weights:
            proportional to examples ** (1 / temperature). 1: in proportion to the sizes; larger
            values give small parts more (arXiv:1907.05019). None: the weights of the parts.
        weight_column: Feature with a number for each training example, such as a score: the
            example is drawn in proportion to it, and never at 0. An epoch keeps its length. It
            needs random access. None: each example once an epoch.
        scores: Folder of CLIP scores of the training split, from `vlm data score`. Filters and
            weight_column may name its feature clip_score.

    Example:
        >>> vlm.DataConfig(source="photos/", workers=8).workers
        8
    """

    source: DataSource = ""
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
    shuffle: int | None = None
    mixture: tuple[MixturePart, ...] = ()
    max_bad_share: float = 0.05
    max_bad_in_a_row: int = 256
    hold_out: float = 0.0
    mixture_temperature: float | None = None
    weight_column: str | None = None
    scores: str | None = None

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("mixture") and values.get("source") == "openmoji":
            return values | {"source": ""}  # an earlier default, also of mixtures
        return values

    def check(self):
        _check_texts(self)
        if self.label is None and not self.mixture:
            self.refuse_unused("set label, which it names", "class_names")
        if self.mixture:
            self.refuse_unused("the parts of a mixture have sources of their own", "source")
        if self.hold_out and (self.mixture or self.eval_split is None or self.access == "stream"):
            raise ConfigError(
                f"DataConfig.hold_out {self.hold_out:g} makes the eval split of a source with "
                "random access: set eval_split to a name, such as validation, and neither mixture "
                'nor access="stream"'
            )
        readers = [self.weight_column, *(f.feature for f in self.filters)]
        if self.scores and not self.mixture and "clip_score" not in readers:
            raise ConfigError(
                f"DataConfig.scores {self.scores!r} has the feature clip_score, and no filter "
                'reads it: add FieldFilter("clip_score", at_least=...) or '
                'weight_column="clip_score", or leave scores out'
            )
        if self.access == "random" and not self.mixture:
            self.refuse_unused('set access to "auto" or "stream"', "interleave", "shuffle")
        if not self.mixture:
            self.refuse_unused("set mixture, whose parts it weights", "mixture_temperature")
        if self.mixture_temperature is not None:
            for part in self.mixture:
                part.refuse_unused(
                    "data.mixture_temperature sets the weights: leave it out", "weight", "epochs"
                )
        if self.cache and self.workers:
            raise ConfigError(
                f"DataConfig.cache keeps images in this process, and workers {self.workers} "
                "processes cannot share it: set one of them off"
            )


def _check_texts(config: DataConfig | MixturePart) -> None:
    """Refuse captions beside a label, and caption weights that do not fit."""
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
