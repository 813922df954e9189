"""`vlm classify`: which label fits an image best."""

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
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
    other_label: str | None = None,
    multi_label: bool = False,
    threshold: float = 0.0,
    classifier: Annotated[str | None, arg(metavar="FILE")] = None,
    class_names: Annotated[str | None, arg(metavar="FILE")] = None,
    json: bool = False,
) -> None:
    """Name what images show: the labels that fit each one best, with calibrated scores.

    An image that cannot be read is named and left out, and the command fails at its end.

    Examples:
      vlm classify runs/openmoji photo.jpg --labels "dog,cat,pizza"
      vlm classify runs/openmoji photos/ --labels-file names.txt --top 1 --json
      vlm classify runs/openmoji photos/ --labels "dog,cat" --other-label "a photo." --threshold 0.5
      vlm classify runs/openmoji photos/ --classifier prompt.safetensors

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        images: files, folders (searched whole) and globs.
        labels: the names to choose from, separated by commas.
        labels_file: the names to choose from: one on each line of a text file; a JSON list;
            FILE.json:KEY, an entry of CLIP_benchmark's files; imagenet; open_clip:imagenet; or the
            classes of a data set, tfds:NAME, folder:PATH or wds:FOLDER.
        templates: sentences in which {} stands for the label, or the name of a set: plain, photo,
            clip_best, siglip; or the same files as of labels-file. By default the model's own, as
            of a run, else those of the data set, else "a photo of a {}.".
        top: how many labels to show for each image.
        other_label: a sentence for images that show none of the labels; it makes one more label.
        multi_label: each label is a question of its own, and an image may have several.
        threshold: the least score to show.
        classifier: a file that a classifier was saved to, in place of labels. By default the one
            that a run with objective classification has left.
        class_names: a file with what sentences call the labels: a line for each in their order,
            lines LABEL<tab>NAME, or JSON. By default the labels of a data set are made readable,
            and others are as they are written.
        json: one JSON object for each image.
    """
    if labels is None and labels_file is None and classifier is None:
        classifier = classifier_of(model)
    others = labels, labels_file, templates, other_label, multi_label, class_names
    if classifier is not None and any(others):
        raise UsageError("a saved classifier has its own labels and sentences: leave out others")
    found = None if classifier is not None else labels_of(labels, labels_file)
    if not images:
        raise UsageError("vlm classify needs images: give files, folders or globs after the model")
    if top < 1:
        raise UsageError(f"--top {top} shows nothing: ask for at least 1")
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import chunks, print_status, progress
    from vlm.display import bar
    from vlm.heads.saved import load_classifier
    from vlm.heads.zero_shot import ZeroShotClassifier

    paths, note = find_images(images), ""
    if classifier is not None:
        classify_images = load_classifier(classifier, load(model))
    else:
        bundle = load(model)
        prompts, note = prompts_of(found, class_names, templates, bundle)
        classify_images = ZeroShotClassifier(bundle, prompts, None, other_label, multi_label)
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
    if note:
        print_status(note)
    unreadable.finish()


def labels_of(labels: str | None, file: str | None) -> Any:
    """The labels of `--labels` or of `--labels-file`, as they are written there.

    Of a data set, its classes as `data_set_of` gives them.

    Raises:
        UsageError: neither or both, or no names in them.
    """
    from vlm.heads.labels import data_set_of, read_labels
    from vlm.heads.templates import is_place

    if labels is not None and file is None:
        names, where = labels.split(","), "--labels"
    elif labels is not None or file is None:
        raise UsageError('say what to choose from: either --labels "dog,cat" or --labels-file FILE')
    elif (data_set := data_set_of(file)) is not None:
        return data_set
    elif is_place(file):
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


def prompts_of(
    found: Any, class_names: str | None, templates: tuple[str, ...], model: Any
) -> tuple[Mapping[str, Sequence[str]], str]:
    """The sentences of what `labels_of` found, and what was chosen for them in words.

    Labels of a data set go into the templates by their names, and typed ones as they are.

    Raises:
        DataError: a file of class names that does not fit the labels.
    """
    from vlm.data.class_names import described, names_of, read_class_names
    from vlm.heads.labels import DataSetClasses
    from vlm.heads.prompts import class_prompts, label_prompts
    from vlm.heads.templates import choose_templates, describe_templates

    if isinstance(found, Mapping):
        return class_prompts(found, ()), "sentences of each label"
    labels, names, source = found, found, None
    if isinstance(found, DataSetClasses):
        labels, names, source = found.labels, found.names, found
    if class_names is not None:
        names = names_of(labels, read_class_names(class_names, labels, "the labels"))
    chosen = choose_templates(templates or None, model, source)
    notes = [f"templates: {describe_templates(chosen)}", described(labels, names)]
    return label_prompts(labels, names, chosen), "; ".join(filter(None, notes))
