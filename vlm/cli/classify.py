"""`vlm classify`: classify images with labels of your choice."""

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.model import leading_model, model_name
from vlm.cli.parse import UsageError
from vlm.cli.runs import classifier_of
from vlm.errors import DataError
from vlm.paths import decode_text, lines_of


def classify(
    images: options.Images,
    /,
    model: options.ModelOption = None,
    labels: options.Labels = None,
    labels_file: options.LabelsFile = None,
    templates: options.Templates = (),
    top: int = 5,
    other_label: str | None = None,
    multi_label: bool = False,
    threshold: float = 0.0,
    prompt: str | None = None,
    classifier: Annotated[str | None, arg(metavar="FILE")] = None,
    class_names: options.ClassNames = None,
    json: bool = False,
    video: options.Video = None,
) -> None:
    """Classify images: print the best labels of each image, with calibrated scores.

    Unreadable images are reported and skipped; the exit code is then 1.

    Examples:
      vlm classify photo.jpg --labels "dog,cat,pizza"
      vlm classify photos/ --labels-file names.txt --top 1 --json
      vlm classify photos/ --labels "dog,cat" --other-label "a photo."
      vlm classify photos/ --model ViT-L-14 --classifier prompt.safetensors
      vlm classify clips/ --video 8 --labels "dog,cat"

    Args:
        top: how many labels to show of each.
        other_label: a prompt for images that show none of the labels; adds the label "none of
            these".
        multi_label: score labels independently; an image may have several.
        threshold: the lowest score to show.
        prompt: name of the model's prompt to put before all texts. Default: the model's own.
        classifier: a saved classifier, in place of labels. Default: the classifier of the run, if
            it was trained with objective classification.
        json: print one JSON object for each image.
    """
    model, images = leading_model("vlm classify", model, images)
    if labels is None and labels_file is None and classifier is None:
        classifier = classifier_of(model_name(model))
    own = labels, labels_file, templates, other_label, multi_label, class_names, prompt is not None
    if classifier is not None and any(own):
        raise UsageError(
            "a saved classifier has its own labels and prompts: leave out --labels and the like"
        )
    found = None if classifier is not None else labels_of(labels, labels_file)
    if not images:
        raise UsageError("vlm classify needs images: give files, folders or globs")
    if top < 1:
        raise UsageError(f"--top {top} shows nothing: give at least 1")
    runtime.prepare_inference()
    from vlm.cli.images import Unreadable, find_inputs
    from vlm.cli.terminal import chunks, print_status, progress
    from vlm.display import bar
    from vlm.heads.saved import load_classifier
    from vlm.heads.zero_shot import ZeroShotClassifier

    note = ""
    paths, bundle = find_inputs(images, model, video)
    if prompt is not None:
        bundle = bundle.with_prompt(prompt)
    if classifier is not None:
        classify_images = load_classifier(classifier, bundle)
    else:
        prompts, note = prompts_of(found, class_names, templates, bundle)
        classify_images = ZeroShotClassifier(bundle, prompts, None, other_label, multi_label)
    unreadable = Unreadable(len(paths))
    for chunk in chunks(progress(paths, "classifying", len(paths))):
        rows = classify_images(chunk, on_error=unreadable.handler(chunk)).top(top)
        for path, best in zip(unreadable.readable(chunk), rows, strict=True):
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
    """Read the labels of `--labels` or `--labels-file`; for a data set, its `DataSetClasses`.

    Raises:
        UsageError: neither or both, or no labels in them.
    """
    from vlm.heads.labels import data_set_of, read_labels
    from vlm.heads.templates import is_place

    if labels is not None and file is None:
        names, where = labels.split(","), "--labels"
    elif labels is not None or file is None:
        raise UsageError(
            'the labels are missing: give either --labels "dog,cat" or --labels-file FILE'
        )
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
    """Return the prompts of the labels from `labels_of`, and a description of the choices made.

    Templates are filled with the class names of a data set, and with typed labels as they are.

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
