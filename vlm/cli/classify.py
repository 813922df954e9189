"""`vlm classify`: which label fits an image best."""

import json as jsonlib
import sys
from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.cli.runs import classifier_of
from vlm.errors import DataError
from vlm.paths import decode_text, lines_of


def main(args: list[str]) -> None:
    parse.call(classify, "vlm classify", args)


def classify(
    model: Annotated[str, arg(metavar="MODEL")],
    images: Annotated[tuple[str, ...], arg(metavar="IMAGES...")],
    /,
    labels: Annotated[str | None, arg(metavar="A,B,...")] = None,
    labels_file: Annotated[str | None, arg(metavar="FILE")] = None,
    templates: Annotated[tuple[str, ...], arg(metavar="TEMPLATES...")] = (),
    top: int = 5,
    none: str | None = None,
    multi_label: bool = False,
    threshold: float = 0.0,
    classifier: Annotated[str | None, arg(metavar="FILE")] = None,
    json: bool = False,
) -> None:
    """Name what images show: the labels that fit each one best, with calibrated scores.

    An image that cannot be read is named and left out, and the command fails at its end.

    Examples:
      vlm classify runs/openmoji photo.jpg --labels "dog,cat,pizza"
      vlm classify runs/openmoji photos/ --labels-file names.txt --top 1 --json
      vlm classify runs/openmoji photos/ --labels "dog,cat" --none "a photo." --threshold 0.5
      vlm classify runs/openmoji photos/ --classifier prompt.safetensors

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        images: files, folders (searched whole) and globs.
        labels: the names to choose from, separated by commas.
        labels_file: the names to choose from: one on each line of a text file; a JSON list;
            FILE.json:KEY, an entry of CLIP_benchmark's files; tfds:NAME; or open_clip:imagenet.
        templates: sentences in which {} stands for the label, or the name of a set: plain, photo,
            clip_best, siglip; or the same places as of labels-file. By default a run's own captions
            ("{}"), else "a photo of a {}.".
        top: how many labels to show for each image.
        none: a sentence for images that show none of the labels; it makes one more label.
        multi_label: each label is a question of its own, and an image may have several.
        threshold: the least score to show.
        classifier: a file that a classifier was saved to, in place of labels. By default the one
            that a run with objective classification has left.
        json: one JSON object for each image.
    """
    if labels is None and labels_file is None and classifier is None:
        classifier = classifier_of(model)
    if classifier is not None and (labels or labels_file or templates or none or multi_label):
        raise UsageError("a saved classifier has its own labels and sentences: leave out others")
    names = None if classifier is not None else labels_of(labels, labels_file)
    if not images:
        raise UsageError("vlm classify needs images: give files, folders or globs after the model")
    if top < 1:
        raise UsageError(f"--top {top} shows nothing: ask for at least 1")
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import chunks, progress
    from vlm.display import bar
    from vlm.heads.saved import load_classifier
    from vlm.heads.zero_shot import ZeroShotClassifier

    paths = find_images(images)
    if classifier is not None:
        classify_images = load_classifier(classifier, load(model))
    else:
        assert names is not None
        sentences = sentences_of(templates, model)
        classify_images = ZeroShotClassifier(load(model), names, sentences, none, multi_label)
    unreadable = Unreadable(len(paths))
    for chunk in chunks(progress(paths, "classifying", len(paths))):
        rows = classify_images(chunk, on_error=unreadable.among(chunk)).top(top)
        for path, best in zip(unreadable.others(chunk), rows, strict=True):
            best = [pair for pair in best if pair[1] >= threshold]
            if json:
                row = [{"label": label, "score": round(score, 6)} for label, score in best]
                print(jsonlib.dumps({"image": str(path), "labels": row}, ensure_ascii=False))
            else:
                print(path)
                for label, score in best:
                    print(f"  {score:6.1%}  {bar(score):<20}  {label}")
        sys.stdout.flush()
    unreadable.finish()


def labels_of(labels: str | None, file: str | None) -> Any:
    """The names of `--labels` or of `--labels-file`.

    Raises:
        UsageError: neither or both, or no names in them.
    """
    if labels is not None and file is None:
        names, where = labels.split(","), "--labels"
    elif labels is not None or file is None:
        raise UsageError('say what to choose from: either --labels "dog,cat" or --labels-file FILE')
    elif _is_place(file):
        from vlm.heads.labels import read_labels

        return read_labels(file)
    else:
        try:
            with open(file, "rb") as lines:
                names, where = lines_of(decode_text(lines.read(), file)), file
        except DataError as error:
            raise UsageError(str(error)) from None
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UsageError(f"{where} holds no labels: give at least one, such as dog,cat,pizza")
    return names


def _is_place(text: str) -> bool:
    """Whether a text names a JSON file or data set of labels or templates."""
    return text.startswith(("tfds:", "open_clip:")) or ".json" in text


def sentences_of(templates: tuple[str, ...], model: str) -> tuple[str, ...]:
    """The templates of an option, or by default those of a run, or the usual one."""
    from vlm.cli.runs import experiment_of
    from vlm.heads.prompts import TEMPLATES

    if len(templates) == 1 and templates[0] in TEMPLATES:
        return TEMPLATES[templates[0]]
    if len(templates) == 1 and _is_place(templates[0]):
        from vlm.heads.labels import read_templates

        return tuple(read_templates(templates[0]))
    if templates:
        return templates
    run = experiment_of(model)
    return TEMPLATES["photo"] if run is None else run.data.templates
