"""Preprocessed pixels beside each family's own processor, over photos, drawings and awkward files.

Run with the extra `peers` installed beside vlm: python tests/peers/pixels.py
Transparent images are left out of the comparison: theirs drop the alpha channel and show what lies
hidden under it, ours lay the image on white.
"""

import io
import pathlib
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def drawings(rng) -> list[Image.Image]:
    out = []
    for height, width in (
        (480, 640),
        (641, 427),
        (100, 900),
        (224, 224),
        (33, 31),
        (1, 7),
        (500, 3),
    ):
        y, x = np.mgrid[:height, :width]
        waves = 127 + 127 * np.sin(np.stack([x / 9, y / 7, (x + y) / 13], -1))
        edges = 255.0 * ((x // 17 + y // 11) % 2)[..., None] + np.zeros(3)
        noise = rng.uniform(0, 255, (height, width, 3))
        for picture in (waves, edges, noise, waves * 0.5 + noise * 0.5):
            out.append(Image.fromarray(picture.astype(np.uint8)))
    return out


def awkward(rng) -> list[Image.Image]:
    """Other modes and files: greyscale, palette, one bit, CMYK, JPEG at low quality, WebP, GIF."""
    out = []
    for picture in drawings(rng)[:12:3]:
        out += [picture.convert(mode) for mode in ("L", "P", "1", "CMYK", "YCbCr", "HSV")]
        for form, options in (("JPEG", {"quality": 20}), ("WEBP", {}), ("GIF", {}), ("BMP", {})):
            file = io.BytesIO()
            picture.save(file, form, **options)
            out.append(Image.open(io.BytesIO(file.getvalue())))
    return out


def main() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import (
        CLIPImageProcessor,
        CLIPImageProcessorPil,
        SiglipImageProcessor,
        SiglipImageProcessorPil,
    )

    from vlm.inputs.preprocess import Preprocess
    from vlm.weights.processors import huggingface_preprocess, open_clip_preprocess

    rng = np.random.default_rng(0)
    pictures = drawings(rng) + awkward(rng)
    print(f"{len(pictures)} images")

    def report(name, config, theirs) -> None:
        ours = Preprocess(config)
        worst, same = 0.0, 0
        for picture in pictures:
            a = ours(picture)[0]
            b = np.asarray(theirs(picture.convert("RGB")))
            difference = np.abs(a - b).max() * max(config.std)  # in units of the pixel's range
            worst, same = max(worst, difference), same + bool(np.array_equal(a, b))
        print(f"{name:34} worst {worst * 255:.4f}/255, {same} of {len(pictures)} bit-equal")

    for size in (224, 225):
        for pil, fast in ((CLIPImageProcessorPil, CLIPImageProcessor),
                          (SiglipImageProcessorPil, SiglipImageProcessor)):  # fmt: skip
            clip = pil is CLIPImageProcessorPil
            options = (
                {"size": {"shortest_edge": size}, "crop_size": size}
                if clip
                else {"size": {"height": size, "width": size}}
            )
            for kind, suffix in ((pil, ""), (fast, "Fast")):
                processor = kind(**options)
                values = processor.to_dict()
                values["image_processor_type"] = ("CLIP" if clip else "Siglip") + (
                    "ImageProcessor" + suffix
                )

                def theirs(picture, processor=processor):
                    made = processor(picture, return_tensors="np")["pixel_values"][0]
                    return made.transpose(1, 2, 0)

                name = f"{kind.__name__} {size}"
                report(name, huggingface_preprocess(values, name), theirs)
        for mode in ("shortest", "squash"):
            values = {"resize_mode": mode}
            transform = image_transform_v2(PreprocessCfg(size=size, **values), is_train=False)
            report(
                f"open_clip {mode} {size}",
                open_clip_preprocess(values, size, "here"),
                lambda picture, t=transform: t(picture).permute(1, 2, 0).numpy(),
            )


if __name__ == "__main__":
    main()
