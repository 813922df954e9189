"""`vlm export`: export a model as programs that run without vlm."""

from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.classify import labels_of, prompts_of
from vlm.cli.parse import UsageError
from vlm.cli.runs import classifier_of


def export(
    model: options.Model,
    out: options.NewFolder,
    /,
    format: Literal["stablehlo", "onnx", "immich", "savedmodel"] = "stablehlo",
    dtype: Literal["float32", "bfloat16", "int8"] = "float32",
    tower: Literal["both", "vision", "text"] | None = None,
    labels: options.Labels = None,
    labels_file: options.LabelsFile = None,
    templates: options.Templates = (),
    class_names: options.ClassNames = None,
    classifier: Annotated[str | None, arg(metavar="FILE")] = None,
    batches: Annotated[tuple[int, ...], arg(metavar="SIZES...")] = (),
) -> None:
    """Export a model as programs that run without vlm: its towers, or a classifier.

    The folder also has the preprocessing (export.json), tokenizer.json, and a README.md with
    example code. Each program is compared with the model before the folder is created.

    Examples:
      vlm export runs/openmoji exported --format onnx
      vlm export ViT-B-32 small --format onnx --dtype int8 --tower vision
      vlm export runs/openmoji pets --labels "dog,cat"
      vlm export ViT-B-32 immich/ViT-B-32__openai --format immich

    Args:
        format: format of the programs. stablehlo: for JAX; onnx: for onnxruntime and others (extra
            onnx); immich: ONNX in the layout of Immich, for both towers (extra onnx); savedmodel:
            refused as long as no TensorFlow reads the output of JAX.
        dtype: type of the stored parameters. int8 makes the files a quarter as large.
        tower: the towers to export. Default: both; with labels the classifier alone.
        classifier: a saved classifier to export, in place of labels. Default: the classifier of the
            run or of vlm adapt, beside both towers.
        batches: batch sizes to compare with the model. Default: all from 1 to 33; for formats that
            compile each size, a few of them.
    """
    has_labels = labels is not None or labels_file is not None
    if has_labels and classifier is not None:
        raise UsageError("a saved classifier has its own labels: leave out --labels")
    found = labels_of(labels, labels_file) if has_labels else None
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status
    from vlm.exporting import export as write
    from vlm.heads.saved import load_classifier
    from vlm.heads.zero_shot import ZeroShotClassifier

    bundle = load(model)
    if not has_labels and classifier is None and tower is None and format != "immich":
        classifier = classifier_of(model)
        tower = "both" if classifier is not None else None
    head, note = None, ""
    if classifier is not None:
        head = load_classifier(classifier, bundle)
    elif has_labels:
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
