"""`vlm convert`: a model in the format of another library."""

from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.paths import as_path

TEXTS = 10_000  # whose token ids are compared


def main(args: list[str]) -> None:
    parse.call(convert, "vlm convert", args)


def convert(
    model: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[str, arg(metavar="OUT")],
    /,
    format: Literal["vlm", "huggingface", "open_clip"] = "vlm",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a model as a folder: weights, image preprocessing and tokenizer together.

    A model that the format cannot describe in full is refused, with what it has no place for:
    transformers holds CLIP's and SigLIP's ViTs, open_clip also ResNets, and vlm everything. The
    token ids of 10,000 texts are compared, and how many differ is printed with examples.

    Examples:
      vlm convert runs/openmoji my-bundle
      vlm convert ViT-B-32/ vit-b-32-hf --format huggingface

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        out: output folder (must not exist).
        format: output format.
        dtype: of the weights.
    """
    folder = as_path(out)
    if folder.exists():
        raise UsageError(f"{out!r} is there already: name a folder that is not")
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status

    found = load(model, dtype=dtype).save(folder, format, compare_texts=TEXTS)
    print_status(f"{model} as {format} in {out}")
    if found is not None and not found.differ:  # else it has been logged
        print_status(str(found))
