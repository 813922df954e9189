"""`vlm explain`: a heat map of the image regions that match a text."""

from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.model import leading_model, load_model
from vlm.cli.parse import UsageError
from vlm.paths import as_path


def explain(
    image_and_text: Annotated[tuple[str, ...], arg(metavar="IMAGE TEXT")],
    /,
    model: options.ModelOption = None,
    out: Annotated[str, arg(metavar="FILE")] = "explanation.png",
    method: Literal["path", "attention", "similarity", "gradcam"] = "path",
) -> None:
    """Draw a heat map of the regions that match a text, and print the importance of its tokens.

    Examples:
      vlm explain park.jpg "a dog" --out dog.png
      vlm explain park.jpg "a dog" --model ViT-B-32 --method similarity

    Args:
        image_and_text: an image file, and the text to explain.
        out: the PNG to write: the image under its heat map.
        method: attribution method. path: integrated gradients along a path from a blank image;
            attention: gradients with respect to attention; similarity: similarity of each
            position's embedding to the text; gradcam: Grad-CAM.
    """
    if not out.lower().endswith(".png"):
        raise UsageError(f"--out {out!r} is not a PNG: give a name that ends in .png")
    model, places = leading_model("vlm explain", model, image_and_text, 2, most=2)
    if len(places) != 2:
        raise UsageError("vlm explain needs an image and a text: vlm explain IMAGE TEXT")
    image, text = places
    runtime.prepare_inference()
    from vlm.cli.inline_images import inline_image
    from vlm.cli.terminal import print_status
    from vlm.display import bar
    from vlm.explanation.heat_map import explain

    explanation = explain(load_model(model), as_path(image), text, method=method)
    print(f"cosine {explanation.cosine:.4f}")
    most = max((abs(fall) for _, fall in explanation.tokens), default=0.0) or 1.0
    for token, fall in explanation.tokens:
        print(f"  {fall:+.4f}  {bar(fall / most):<20}  {token}")
    explanation.save(out)
    if drawn := inline_image(explanation.picture()):
        print(drawn)
    print_status(f"heat map by {explanation.method} in {out}")
