"""Evaluation configs of benchmarks that papers report."""

from vlm.config import EvalConfig
from vlm.data.clip_benchmark import PREFIX
from vlm.data.known_classes import known_classes
from vlm.heads.prompts import TEMPLATES


def imagenet(
    source: str = "tfds:imagenet2012",
    *,
    class_names: str | None = None,
    templates: str = "imagenet",
    data_dir: str | None = None,
) -> EvalConfig:
    """Configure zero-shot classification of ImageNet's 50,000 validation images (arXiv:1409.0575).

    Args:
        source: the prepared TFDS data set, a folder with `validation/n01440764/*.JPEG`, or
            `wds:FOLDER` as `vlm data prepare --format clip_benchmark` writes it.
        class_names: a text file with a line `n01440764<tab>tench` for each class, instead of
            CLIP_benchmark's names.
        templates: "imagenet", the 80 of CLIP (arXiv:2103.00020), or the name of a list in
            `vlm.heads.prompts.TEMPLATES`.
        data_dir: of prepared TFDS data.
    """
    known = known_classes("imagenet1k")
    return EvalConfig(
        name="imagenet",
        source=source,
        split=_split(source, "validation"),
        class_names=class_names,
        templates=known.templates if known and templates == "imagenet" else TEMPLATES[templates],
        data_dir=data_dir,
    )


def coco(source: str = "tfds:coco_captions", *, data_dir: str | None = None) -> EvalConfig:
    """Configure retrieval among COCO's 5,000 test images and their captions (arXiv:1504.00325).

    The split is that of Karpathy and Fei-Fei (arXiv:1412.2306), as in TFDS.

    Args:
        source: the prepared TFDS data set, Karpathy's `dataset_coco.json`, or `wds:FOLDER` as
            `vlm data prepare --format clip_benchmark` writes it.
        data_dir: of prepared TFDS data, or of the images.
    """
    return EvalConfig(
        name="coco",
        task="retrieval",
        source=source,
        split=_split(source, "test"),
        captions=("captions/text",) if source.startswith("tfds:") else ("caption",),
        data_dir=data_dir,
    )


def _split(source: str, name: str) -> str | None:
    """Return the split to use; None: the test or validation split that the folder has."""
    return None if source.startswith(PREFIX) else name
