"""`vlm export`: a model for programs that have no vlm."""

from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.classify import labels_of, prompts_of
from vlm.cli.parse import UsageError
from vlm.cli.runs import classifier_of


def main(args: list[str]) -> None:
    parse.call(export, "vlm export", args)


def export(
    model: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[str, arg(metavar="OUT")],
    /,
    format: Literal["stablehlo", "onnx", "savedmodel"] = "stablehlo",
    dtype: Literal["float32", "bfloat16", "int8"] = "float32",
    tower: Literal["both", "vision", "text"] | None = None,
    labels: Annotated[str | None, arg(metavar="A,B,...")] = None,
    labels_file: Annotated[str | None, arg(metavar="FILE")] = None,
    templates: Annotated[tuple[str, ...], arg(metavar="TEMPLATES...")] = (),
    class_names: Annotated[str | None, arg(metavar="FILE")] = None,
    classifier: Annotated[str | None, arg(metavar="FILE")] = None,
    batches: Annotated[tuple[int, ...], arg(metavar="SIZES...")] = (),
) -> None:
    """Write a model as programs that run without vlm: its towers, or a classifier.

    Beside them stand the preprocessing (export.json), tokenizer.json, and a README.md with the code
    to call them. Each program is compared with the model before the folder appears.

    Examples:
      vlm export runs/openmoji exported --format onnx
      vlm export ViT-B-32/ small --format onnx --dtype int8 --tower vision
      vlm export runs/openmoji pets --labels "dog,cat"

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        out: output folder (must not exist).
        format: stablehlo is opened by JAX; onnx (extra onnx) by onnxruntime and others.
            savedmodel is refused as long as no TensorFlow reads what JAX writes.
        dtype: what parameters are kept as. int8 makes the files a quarter as large.
        tower: what is exported; by default both towers, or with labels the classifier alone.
        labels: export a classifier of these names, separated by commas.
        labels_file: the same from a file or data set, as of vlm classify.
        templates: sentences in which {} stands for the label, as of vlm classify.
        class_names: a file with what sentences call the labels, as of vlm classify.
        classifier: export the classifier in this file, in place of labels. By default the one that
            a run or vlm adapt has left, beside both towers.
        batches: sizes of batches to compare with the model in; by default all from 1 to 33, and
            some of them in the formats that compile each.
    """
    asked = labels is not None or labels_file is not None
    if asked and classifier is not None:
        raise UsageError("a saved classifier has its own labels: leave out --labels")
    found = labels_of(labels, labels_file) if asked else None
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status
    from vlm.exporting import export as write
    from vlm.heads.saved import load_classifier
    from vlm.heads.zero_shot import ZeroShotClassifier

    bundle = load(model)
    if not asked and classifier is None and tower is None:
        classifier = classifier_of(model)  # that a run has left
        tower = "both" if classifier is not None else None
    head, note = None, ""
    if classifier is not None:
        head = load_classifier(classifier, bundle)
    elif asked:
        prompts, note = prompts_of(found, class_names, templates, bundle)
        head = ZeroShotClassifier(bundle, prompts)
    found = write(
        bundle,
        out,
        format,
        dtype=dtype,
        tower=tower,
        classifier=head,
        batches=batches or None,
    )
    print_status(f"{model} as {format} in {out}")
    if note:
        print_status(f"  {note}")
    for name, difference in found.differences.items():
        print_status(f"  {name}: within {difference:.1e} of the original")
