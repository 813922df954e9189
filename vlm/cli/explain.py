"""`vlm explain`: a heat map of the image regions that match a text."""

import sys
from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.parse import UsageError
from vlm.paths import as_path


def explain(
    model: options.Model,
    image: Annotated[str, arg(metavar="IMAGE")],
    text: Annotated[str, arg(metavar="TEXT")],
    /,
    out: Annotated[str, arg(metavar="FILE")] = "explanation.png",
    method: Literal["path", "attention", "similarity", "gradcam"] = "path",
) -> None:
    """Draw a heat map of the regions that match a text, and print the importance of its tokens.

    Examples:
      vlm explain runs/openmoji park.jpg "a dog" --out dog.png
      vlm explain runs/openmoji park.jpg "a dog" --method similarity

    Args:
        image: an image file.
        text: the text to explain.
        out: the PNG to write: the image under its heat map.
        method: attribution method. path: integrated gradients along a path from a blank image;
            attention: gradients with respect to attention; similarity: similarity of each
            position's embedding to the text; gradcam: Grad-CAM.
    """
    if not out.lower().endswith(".png"):
        raise UsageError(f"--out {out!r} is not a PNG: give a name that ends in .png")
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status
    from vlm.display import bar, inline_image
    from vlm.explanation.heat_map import explain

    explanation = explain(load(model), as_path(image), text, method=method)
    print(f"cosine {explanation.cosine:.4f}")
    most = max((abs(fall) for _, fall in explanation.tokens), default=0.0) or 1.0
    for token, fall in explanation.tokens:
        print(f"  {fall:+.4f}  {bar(fall / most):<20}  {token}")
    explanation.save(out)
    drawn = inline_image(explanation.picture()) if sys.stdout.isatty() else None
    if drawn:
        print(drawn)
    print_status(f"heat map by {explanation.method} in {out}")
