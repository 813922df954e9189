"""What a run is measured on beside its own held-out split."""

from dataclasses import dataclass
from typing import Literal

from vlm.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: a task, and a split of some data set with random access.

    zero-shot: images into the classes of `label`, each described by `templates`: `top1`, `top5`.
    retrieval: images and all of their captions, both ways, as COCO is measured: recall at 1, 5, 10.
    """

    name: str = "eval"  # in the log, as eval/NAME/top1, and in the report
    task: Literal["zero-shot", "retrieval"] = "zero-shot"
    source: str = "tfds:imagenet2012"  # whatever `DataConfig.source` takes
    split: str = "validation"
    image: str = "image"
    captions: tuple[str, ...] = ("captions/text",)  # of retrieval: all of them are an image's own
    label: str = "label"  # of zero-shot
    # Where labels are no words: a text file with a line for each, in their order, or with lines
    # LABEL<tab>NAME.
    class_names: str | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)  # of zero-shot: sentences around a name
    data_dir: str | None = None  # where prepared data lives; None: TFDS's own folder
    examples: int | None = None  # the first ones of the split; None: all

    def __post_init__(self):
        where = f"evals {self.name!r}"
        if not self.name or "/" in self.name:
            raise ConfigError(f"{where}: a name is a word of the log, without a slash: choose one")
        if self.examples is not None and self.examples < 1:
            raise ConfigError(f"{where}: examples is {self.examples}: make it at least 1")
        if self.task == "zero-shot" and not (
            self.templates and all("{}" in template for template in self.templates)
        ):
            raise ConfigError(f"{where}: each of templates {self.templates} needs a {{}}: give it")
        if self.task == "retrieval" and not self.captions:
            raise ConfigError(f"{where}: captions is empty: name the feature that has the texts")
