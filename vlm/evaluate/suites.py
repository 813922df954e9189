"""Tasks by name: what `--tasks` may say, what each needs, and where it is looked for.

    tfds:cifar10            classify the test split of a prepared TFDS data set
    folder:photos           classify images that are sorted into a folder for each class
    wds:shards-{0..9}.tar   classify WebDataset shards as CLIP_benchmark has them (jpg and cls)
    retrieval:coco_captions find the images of captions and the reverse, in a prepared TFDS data
                            set, or in any source of images and captions that vlm reads
    winoground              choose captions and images, see `vlm.evaluate.selection_files`
    sugarcrepe:add_att      the same, of one of SugarCrepe's categories
    vtab, datacomp38, flickr30k, coco, imagenet, sugarcrepe      suites: several of these

Nothing is downloaded: what is not on this machine is named and left out.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.config import DataConfig
from vlm.data.examples import captions_of
from vlm.data.sources import kind_of, open_source
from vlm.errors import ConfigError, DataError, VlmError
from vlm.evaluate import selection_files
from vlm.evaluate.tasks import DataInfo, RetrievalTask, Task, ZeroShotTask
from vlm.heads.prompts import TEMPLATES

# The data sets of each suite, by their names in TFDS, or in CLIP_benchmark where TFDS has none:
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
    "sugarcrepe": tuple(f"sugarcrepe:{category}" for category in selection_files.SUGARCREPE),
}
KINDS = ("tfds", "folder", "wds", "retrieval", "sugarcrepe")
SPLITS = ("test", "validation", "train")  # in the order in which one is taken
CAPTIONS = ("captions/text", "captions", "caption", "text")


@dataclass(frozen=True)
class Missing:
    """A task that cannot be measured here, and why."""

    task: str
    why: str


def expand(names: tuple[str, ...]) -> list[str]:
    """The tasks that a list of tasks and suites, also comma-separated, stands for; each once.

    Raises:
        ConfigError: a name of no known kind.
    """
    found: dict[str, None] = {}
    for name in (part.strip() for names_ in names for part in names_.split(",")):
        for task in SUITES.get(name, (name,)):
            kind, _, what = task.partition(":")
            if task != "winoground" and (kind not in KINDS or not what):
                raise ConfigError(
                    f"there is no task or suite {task!r}: name a suite ({', '.join(SUITES)}), or "
                    "winoground, tfds:NAME, folder:PATH, wds:SHARDS or retrieval:NAME"
                )
            found[task] = None
    return list(found)


def open_task(name: str, data_dir: str | None = None, split: str | None = None) -> Task | Missing:
    """The task of that name, ready to be measured, or what it lacks."""
    try:
        kind, _, what = name.partition(":")
        if kind == "retrieval":
            return _retrieval(name, what, data_dir, split)
        if kind in ("winoground", "sugarcrepe"):
            return _selection(name, kind, what, data_dir)
        return _classification(name, kind, what, data_dir, split)
    except VlmError as error:
        return Missing(name, str(error))


def _classification(name: str, kind: str, what: str, data_dir, split) -> Task:
    label = "cls" if kind == "wds" else "label"
    source = f"tfds:{what}" if kind == "tfds" else what
    config = DataConfig(source=source, label=label, captions=(), data_dir=data_dir)
    opened, split = _open(config, split)
    labels = [opened[i][label] for i in range(len(opened))]
    names = getattr(opened, "label_names", None) or sorted(set(map(str, labels)))
    at = {label_name: i for i, label_name in enumerate(names)}
    target = np.array([at[str(value)] for value in labels])
    return ZeroShotTask(
        (opened[i][config.image] for i in range(len(opened))),
        names,
        target,
        DataInfo(source, split=split),
        TEMPLATES["photo"],
        ks=(1, 5) if len(names) >= 5 else (1,),
        name=name,
        classes=True,
        image_at=lambda i: opened[i][config.image],
    )


def _retrieval(name: str, what: str, data_dir, split) -> Task:
    source = what if kind_of(what) else f"tfds:{what}"
    problem: VlmError | None = None
    for feature in CAPTIONS:
        config = DataConfig(source=source, captions=(feature,), data_dir=data_dir)
        try:
            opened, found = _open(config, split)
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
        DataInfo(source, split=found),
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


def _open(config: DataConfig, split: str | None) -> tuple[Any, str]:
    """The source and the split that is there, or the first error."""
    problem: VlmError | None = None
    for chosen in (split,) if split else SPLITS:
        try:
            whole = dataclasses.replace(config, train_split=chosen, eval_split=chosen)
            return open_source(whole, chosen), chosen
        except VlmError as error:
            problem = problem or error
    raise problem or DataError(f"{config.source} has no split to measure on")
