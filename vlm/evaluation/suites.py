"""Tasks and suites by name, as in `--tasks`.

    tfds:cifar10            classify the test split of a prepared TFDS data set
    folder:photos           classify images in class folders
    wds:wds_cifar10         a folder in CLIP_benchmark's layout, with class names and templates:
                            classification with one or several labels, or retrieval
    wds:shards-{0..9}.tar   classify WebDataset shards with images and class numbers (cls)
    retrieval:coco_captions retrieval in a prepared TFDS data set, or in any source of images and
                            captions that vlm reads
    winoground              caption selection, see `vlm.evaluation.selection_files`
    sugarcrepe:add_att      caption selection in one of SugarCrepe's categories
    imagenet, imagenetv2, imagenet_sketch, imagenet-a, imagenet-r, vtab, datacomp38, flickr30k,
    coco, sugarcrepe        suites: one or several of these

Nothing is downloaded: data sets that are not on this machine are reported and skipped.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vlm.config import DataConfig
from vlm.data.clip_benchmark import dataset_type, is_clip_benchmark, list_splits, open_split
from vlm.data.examples import Source, captions_of
from vlm.data.image_folder import IMAGE, metadata_table
from vlm.data.sources import Classes, classes_of, kind_of, open_to_measure, targets_of
from vlm.data.splits import default_split
from vlm.errors import ConfigError, DataError, VlmError
from vlm.evaluation import selection_files
from vlm.evaluation.tasks import DataInfo, MultilabelTask, RetrievalTask, Task, ZeroShotTask
from vlm.heads.encoder import Encoder
from vlm.heads.templates import choose_templates

# Data sets of the suites, by their names in TFDS, or in CLIP_benchmark if TFDS has none:
# VTAB's 19 (arXiv:1910.04867) and DataComp's 38 (arXiv:2304.14108).
VTAB = (
    "caltech101", "cifar100", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn_cropped",
    "sun397", "patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy_detection",
    "clevr_count_all", "clevr_closest_object_distance", "dmlab", "dsprites_label_x_position",
    "dsprites_label_orientation", "kitti_closest_vehicle_distance", "smallnorb_label_azimuth",
    "smallnorb_label_elevation",
)  # fmt: skip
DATACOMP = (
    "imagenet2012", "imagenet_sketch", "imagenet_v2", "imagenet_a", "imagenet_o", "imagenet_r",
    "objectnet", "caltech101", "cifar10", "cifar100", "clevr_count_all",
    "clevr_closest_object_distance", "country211", "dtd", "eurosat", "fgvc_aircraft", "food101",
    "gtsrb", "kitti_closest_vehicle_distance", "mnist", "oxford_flowers102", "oxford_iiit_pet",
    "pascal_voc_2007", "patch_camelyon", "rendered_sst2", "resisc45", "cars196", "stl10",
    "sun397", "svhn_cropped", "iwildcam", "camelyon17", "fmow", "dollar_street", "geode",
    "flickr30k", "coco_captions", "winogavil",
)  # fmt: skip
OF_CAPTIONS = ("flickr30k", "coco_captions", "winogavil")
SUITES: dict[str, tuple[str, ...]] = {
    "vtab": tuple(f"tfds:{name}" for name in VTAB),
    "datacomp38": tuple(
        f"retrieval:{name}" if name in OF_CAPTIONS else f"tfds:{name}" for name in DATACOMP
    ),
    "flickr30k": ("retrieval:flickr30k",),
    "coco": ("retrieval:coco_captions",),
    "imagenet": ("tfds:imagenet2012",),
    "imagenetv2": ("tfds:imagenet_v2",),
    "imagenet_sketch": ("tfds:imagenet_sketch",),
    "imagenet-a": ("tfds:imagenet_a",),
    "imagenet-r": ("tfds:imagenet_r",),
    "sugarcrepe": tuple(f"sugarcrepe:{category}" for category in selection_files.SUGARCREPE),
}
KINDS = ("tfds", "folder", "wds", "retrieval", "sugarcrepe")
SPLITS = {"imagenet2012": "validation"}  # its test split has no labels
CAPTIONS = ("captions/text", "captions", "caption", "text")


@dataclass(frozen=True)
class Missing:
    """A task that cannot be measured, with the reason."""

    task: str
    why: str


def expand(names: tuple[str, ...]) -> list[str]:
    """Expand tasks and suites, also comma-separated, to a list of distinct tasks.

    Raises:
        ConfigError: an unknown kind of task.
    """
    found: dict[str, None] = {}
    for name in (part.strip() for names_ in names for part in names_.split(",")):
        for task in SUITES.get(name, (name,)):
            kind, _, what = task.partition(":")
            if task != "winoground" and (kind not in KINDS or not what):
                raise ConfigError(
                    f"there is no task or suite {task!r}: name a suite ({', '.join(SUITES)}), or "
                    "winoground, tfds:NAME, folder:PATH, wds:FOLDER or retrieval:NAME"
                )
            found[task] = None
    return list(found)


def open_task(
    name: str,
    data_dir: str | None = None,
    split: str | None = None,
    *,
    model: Encoder | None = None,
    templates: Sequence[str] = (),
    class_names: str | None = None,
) -> Task | Missing:
    """Open a task by name, or return why it cannot be measured.

    Args:
        name: see the module.
        data_dir: of prepared data.
        split: by default test, else validation, else all data.
        model: its own templates are used, if it has any.
        templates: instead of those of the model and the data set, see `choose_templates`.
        class_names: a file with the names of the labels, see `DataConfig.class_names`.
    """
    try:
        kind, _, what = name.partition(":")
        if kind in ("winoground", "sugarcrepe"):
            return _selection(name, kind, what, data_dir)
        if kind == "wds" and is_clip_benchmark(name):
            kind, what = dataset_type(name), name
        if kind == "retrieval":
            return _retrieval(name, what, data_dir, split)
        if kind == "multilabel":
            return _multilabel(name, split, class_names, templates, model)
        opened = open_labelled(name, data_dir, split, class_names)
        return _classification(
            name, opened, choose_templates(templates or None, model, opened.source)
        )
    except VlmError as error:
        return Missing(name, str(error))


class LabelledSplit(NamedTuple):
    """An open split of a labelled data set.

    Attributes:
        source, config: examples, and the field of their images.
        data: origin.
        classes: of all splits.
        target: class index of each example.
    """

    source: Source
    config: DataConfig
    data: DataInfo
    classes: Classes
    target: Int[np.ndarray, " n"]

    def image(self, i: int) -> Any:
        """Return the image of an example."""
        return self.source[i][self.config.image]


def open_labelled(
    name: str, data_dir: str | None, split: str | None, class_names: str | None
) -> LabelledSplit:
    """Open the labelled images of `tfds:NAME`, `folder:PATH` or `wds:SHARDS`.

    Raises:
        DataError: no such data or split, or an example without a class.
    """
    kind, _, what = name.partition(":")
    table = metadata_table(what) if kind == "folder" else None
    config = DataConfig(
        source=table or (name if kind == "tfds" else what),
        image=IMAGE if table else "image",
        label="cls" if kind == "wds" else "label",
        captions=(),
        class_names=class_names,
        data_dir=data_dir,
    )
    source, split = open_to_measure(config, split or SPLITS.get(what))
    config = dataclasses.replace(config, eval_split=split)
    classes = classes_of(config, source)
    target = targets_of(source, config, classes.labels)
    return LabelledSplit(source, config, DataInfo(config.source, split=split), classes, target)


def _classification(name: str, opened: LabelledSplit, templates: Sequence[str]) -> Task:
    labels, names = opened.classes
    return ZeroShotTask(
        (opened.image(i) for i in range(len(opened.target))),
        labels,
        opened.target,
        opened.data,
        templates,
        ks=(1, 5) if len(labels) >= 5 else (1,),
        name=name,
        classes=True,
        image_at=opened.image,
        names=names,
    )


def _multilabel(
    name: str,
    split: str | None,
    class_names: str | None,
    templates: Sequence[str],
    model: Any,
) -> Task:
    config = DataConfig(source=name, label="label", captions=(), class_names=class_names)
    split = split or default_split(list_splits(config), name)
    opened = open_split(config, split)
    labels, names = classes_of(dataclasses.replace(config, eval_split=split), opened)
    shown = [set(opened[i]["label"]) for i in range(len(opened))]
    return MultilabelTask(
        (opened[i][config.image] for i in range(len(opened))),
        labels,
        np.array([[label in own for label in labels] for own in shown]),
        DataInfo(name, split=split),
        choose_templates(templates or None, model, opened),
        name=name,
        names=names,
    )


def _retrieval(name: str, what: str, data_dir, split) -> Task:
    source = what if kind_of(what) else f"tfds:{what}"
    problem: VlmError | None = None
    for feature in CAPTIONS:
        config = DataConfig(source=source, captions=(feature,), data_dir=data_dir)
        try:
            opened, split_name = open_to_measure(config, split)
            texts = [captions_of(opened[i], config) for i in range(len(opened))]
            break
        except VlmError as error:
            problem = problem or error
    else:
        raise problem or DataError(f"{source} has no captions")
    owners = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    return RetrievalTask(
        (opened[i][config.image] for i in range(len(opened))),
        [text for own in texts for text in own],
        DataInfo(source, split=split_name),
        [(int(owner), text) for text, owner in enumerate(owners)],
        name=name,
        image_at=lambda i: opened[i][config.image],
    )


def _selection(name: str, kind: str, what: str, data_dir: str | None) -> Task:
    from vlm.data.prepared import data_folder  # TFDS takes a while to import

    folder = data_folder(data_dir)
    if kind == "winoground":
        return selection_files.winoground(folder, name)
    return selection_files.sugarcrepe(folder, what, name)
