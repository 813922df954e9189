"""`vlm convert`: convert a model to the format of another library."""

from typing import Literal

from vlm.cli import options, runtime

TEXTS = 10_000  # number of texts whose token ids are compared


def convert(
    model: options.Model,
    out: options.NewFolder,
    /,
    format: Literal["vlm", "huggingface", "open_clip"] = "vlm",
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = "float32",
    quantize: Literal["int8", "float8"] | None = None,
    architecture: str | None = None,
    text: str | None = None,
    dimensions: int | None = None,
) -> None:
    """Write a model as a folder: weights, image preprocessing and tokenizer together.

    A model that the format cannot describe in full is refused; the error lists the unsupported
    features. The token ids of 10,000 texts are compared, and differences are printed with examples.
    With --text, the towers of two checkpoints that were trained in one space become one model.

    Examples:
      vlm convert runs/openmoji my-bundle
      vlm convert ViT-B-32 vit-b-32-hf --format huggingface
      vlm convert logs/run/checkpoints/epoch_32.pt my-clip --architecture ViT-B-32
      vlm convert VISION-FOLDER joined --text TEXT-FOLDER

    Args:
        format: output format.
        dtype: type of the weights; stored: that of MODEL's file.
        quantize: eight bits for large parameters of a vlm bundle, with a scale for each channel.
        architecture: Name of the architecture, if MODEL is a file of weights alone: open_clip's,
            such as ViT-B-32, timm's of a plain ViT, or a recipe's such as clip-B/16.
        text: Model whose text tower is joined to the vision tower of MODEL.
        dimensions: Truncate embeddings to this many dimensions, for models that were trained for it
            (Matryoshka).
    """
    folder = options.new_folder(out)
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status

    bundle = load(model, dtype=dtype, architecture=architecture)
    bundle = bundle if text is None else bundle.with_text(load(text, dtype=dtype))
    bundle = bundle if dimensions is None else bundle.with_dimensions(dimensions)
    check = bundle.save(folder, format, compare_texts=TEXTS, quantize=quantize)
    print_status(f"{model} as {format} in {out}")
    if check is not None and check.texts and not check.differ:  # else it has been logged
        print_status(str(check))
