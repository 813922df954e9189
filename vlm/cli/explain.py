"""`vlm explain`: which places of an image speak for a text, as a picture."""

import sys
from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.paths import as_path


def main(args: list[str]) -> None:
    parse.call(explain, "vlm explain", args)


def explain(
    model: Annotated[str, arg(metavar="MODEL")],
    image: Annotated[str, arg(metavar="IMAGE")],
    text: Annotated[str, arg(metavar="TEXT")],
    /,
    out: Annotated[str, arg(metavar="FILE")] = "explanation.png",
    method: Literal["path", "attention", "similarity", "gradcam"] = "path",
) -> None:
    """Show what in an image speaks for a text, and which tokens of the text it hangs on.

    Examples:
      vlm explain runs/openmoji park.jpg "a dog" --out dog.png
      vlm explain runs/openmoji park.jpg "a dog" --method similarity

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        image: a file.
        text: what is looked for.
        out: the PNG to write: the image under its heat map.
        method: how the heat is found. path: what a place adds on the way from a blank image to
            this one; attention: what more attention to it would add; similarity: how alike the
            text it is by itself; gradcam: Grad-CAM.
    """
    if not out.lower().endswith(".png"):
        raise UsageError(f"--out {out!r} is no PNG: give a name that ends in .png")
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status
    from vlm.display import bar, inline_image
    from vlm.explanation.heat_map import explain

    found = explain(load(model), as_path(image), text, method=method)
    print(f"cosine {found.cosine:.4f}")
    most = max((abs(fall) for _, fall in found.tokens), default=0.0) or 1.0
    for token, fall in found.tokens:
        print(f"  {fall:+.4f}  {bar(fall / most):<20}  {token}")
    found.save(out)
    drawn = inline_image(found.picture()) if sys.stdout.isatty() else None
    if drawn:
        print(drawn)
    print_status(f"heat map by {found.method} in {out}")
