"""Config of evaluations of a run on other data."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.config.code import DataSource
from vlm.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig(Config):
    """An evaluation: a task, and a split of a data set with random access.

    Args:
        name: Name of the evaluation in the log, as eval/NAME/top1, and in the report.
        task: zero-shot: classification into the classes of `label` by `templates`; top-1 and top-5
            accuracy. retrieval: images and all of their captions in both directions, as for COCO;
            recall at 1, 5 and 10.
        source: Source of the examples, as in `DataConfig.source`. Required.
        split: Name of the split. None: test, else validation; all of a source without splits.
        image: Name of the feature that holds the image.
        captions: For retrieval: names of the features with captions; all of them match the image.
        label: For zero-shot: name of the feature with the class.
        class_names: For zero-shot: a file of class names, see `DataConfig.class_names`.
        templates: For zero-shot: prompt templates; their embeddings are averaged. Empty: those of
            the run's data, else of the data set, else 'a photo of a {}.'.
        data_dir: Folder of prepared data. None: the folder of TFDS.
        examples: Number of examples, from the start of the split. None: all.

    Example:
        >>> from vlm.config import EvalConfig
        >>> EvalConfig("pets", source="pets/", label="label").name
        'pets'
    """

    name: str = "eval"
    task: Literal["zero-shot", "retrieval"] = "zero-shot"
    source: DataSource = ""
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
            raise ConfigError(f"{where}: a name must be a word without a slash: choose one")
        if not self.source:
            raise ConfigError(
                f"{where} has no source: give the data to evaluate on, such as "
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
