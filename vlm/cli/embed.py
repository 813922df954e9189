"""`vlm embed`: images to embeddings in a file that any program reads."""

import json
import os
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError

SUFFIXES = (".npz", ".safetensors")


def main(args: list[str]) -> None:
    parse.call(embed, "vlm embed", args)


def embed(
    model: Annotated[str, arg(metavar="MODEL")],
    images_and_out: Annotated[tuple[str, ...], arg(metavar="IMAGES... OUT")],
    /,
    batch_size: int | None = None,
) -> None:
    """Write the embeddings of images to a file: float32 rows of unit norm, and an id for each.

    The id is the image's path. An image that cannot be read is named and left out, and the command
    fails at its end. An .npz holds the arrays "embeddings" and "ids"; a .safetensors
    holds "embeddings", and the ids as a JSON list in its metadata.

    Examples:
      vlm embed runs/openmoji photos/ photos.npz
      vlm embed runs/openmoji a.png "more/*.jpg" out.safetensors

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        images_and_out: files, folders (searched whole) and globs; and last a file that ends in .npz
            or .safetensors, which is written whole or not at all.
        batch_size: images encoded at once; None leaves it to the model.
    """
    *images, out = images_and_out or ("",)
    if not images:
        raise UsageError("vlm embed needs images and a file to write: vlm embed MODEL IMAGES OUT")
    if not out.endswith(SUFFIXES):
        raise UsageError(
            f"the last argument, {out!r}, is where embeddings go: let it end in "
            f"{' or '.join(SUFFIXES)}"
        )
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import print_status, progress

    paths = find_images(images)
    bundle = load(model)
    unreadable = Unreadable(len(paths))
    shown = progress(paths, "encoding", len(paths))
    z_image = bundle.encode_image(shown, batch_size, on_error=unreadable.among(paths))
    if len(z_image):
        write(out, z_image, [str(path) for path in unreadable.others(paths)])
        print_status(f"{len(z_image):,} embeddings of {bundle.embed_dim} dimensions in {out}")
    unreadable.finish()


def write(out: str, z: np.ndarray, ids: Sequence[str]) -> None:
    """Embeddings and ids as a file; a reader never sees half of it."""
    partial = f"{out}.partial"
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    try:
        if out.endswith(".npz"):
            with open(partial, "wb") as file:
                np.savez(file, embeddings=z, ids=np.array(ids))
        else:
            from safetensors.numpy import save_file

            save_file({"embeddings": z}, partial, {"ids": json.dumps(list(ids))})
        os.replace(partial, out)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
