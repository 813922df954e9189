"""What a run is measured on beside its own held-out split."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig(Config):
    """One evaluation: a task, and a split of some data set with random access.

    zero-shot: images into the classes of `label`, each described by `templates`: `top1`, `top5`.
    retrieval: images and all of their captions, both ways, as COCO is measured: recall at 1, 5, 10.

    Args:
        name: What the evaluation is called in the log, as eval/NAME/top1, and in the report.
        task: zero-shot: images into the classes of `label`, each described by `templates`;
            top-1 and top-5 accuracy. retrieval: images and all of their captions, both ways, as
            COCO is measured; recall at 1, 5 and 10.
        source: Where examples come from: whatever `DataConfig.source` takes. Required.
        split: Name of the split to measure on. None: test, else validation; of a source without
            splits, all of it.
        image: Name of the feature that holds the image.
        captions: Of retrieval: names of the features that hold captions; all of them belong to
            their image.
        label: Of zero-shot: name of the feature that holds the class.
        class_names: Of zero-shot: a file with the names of the labels, see
            `DataConfig.class_names`.
        templates: Of zero-shot: sentences around the name of a class; their embeddings are
            averaged. Empty: those of the run's own data, else of the data set, else
            'a photo of a {}.'.
        data_dir: Folder where prepared data lies. None: the folder of TFDS itself.
        examples: Measure on this many examples, the first of the split. None: all.

    Example:
        >>> from vlm.config import EvalConfig
        >>> EvalConfig("pets", source="pets/", label="label").name
        'pets'
    """

    name: str = "eval"
    task: Literal["zero-shot", "retrieval"] = "zero-shot"
    source: str = ""
    split: str | None = "validation"
    image: str = "image"
    captions: tuple[str, ...] = ("captions/text",)
    label: str = "label"
    class_names: str | None = None
    templates: tuple[str, ...] = ()
    data_dir: str | None = None
    examples: int | None = None

    def check(self):
        where = f"evals {self.name!r}"
        if not self.name or "/" in self.name:
            raise ConfigError(f"{where}: a name is a word of the log, without a slash: choose one")
        if not self.source:
            raise ConfigError(
                f"{where} has no source: name the data to measure on, such as "
                '"tfds:imagenet2012" or a folder'
            )
        if self.task == "zero-shot" and not all("{}" in template for template in self.templates):
            raise ConfigError(f"{where}: each of templates {self.templates} needs a {{}}: give it")
        if self.task == "retrieval" and not self.captions:
            raise ConfigError(f"{where}: captions is empty: name the feature that has the texts")
        if self.task == "retrieval":
            unused = ("label", "class_names", "templates")
            self.refuse_unused('set task to "zero-shot", which has classes', *unused)
        else:
            self.refuse_unused('set task to "retrieval", which has captions', "captions")
