"""Image preprocessing of public checkpoints, from their config files.

"CLIPImageProcessor" and "SiglipImageProcessor" used Pillow when these models were published, and
use torchvision's tensors since transformers 5. Their files do not say which. vlm uses Pillow like
the authors, and tensors for names that end in "Fast" and for "Tipsv2ImageProcessor". DINOv3's
processor resizes in floating point, and OWLv2's too; vlm rounds to 8 bits, by at most one grey
level. Of OWLv2's two forms, which blur differently, vlm has the older, of scipy.
"""

import math
from typing import Any, Literal

from vlm.config import CLIP_MEAN, CLIP_STD, PreprocessConfig
from vlm.errors import CheckpointError, brief
from vlm.weights.fields import MAX_PIXELS, boolean, choice, integer, number, string

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Names of open_clip.
RESIZE_MODES: dict[str, Literal["crop", "pad", "squash"]] = {
    "shortest": "crop",
    "longest": "pad",
    "squash": "squash",
}
_READ = {
    "image_processor_type", "feature_extractor_type", "do_resize", "size", "resample",
    "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std",
}  # fmt: skip
# Other settings of a preprocessor_config.json that change no pixels: with any value, or if false.
_IGNORED = {
    "processor_class", "_processor_class", "tokenizer_class", "auto_map", "data_format",
    "return_tensors", "device", "disable_grouping", "_valid_processor_keys", "backend",
    "transformers_version", "default_to_square", "do_convert_rgb", "image_seq_length",
    "num_image_tokens", "is_local", "name_or_path", "input_data_format", "use_fast",
}  # fmt: skip
_OFF = {
    "do_pad", "do_reduce_labels", "do_flip_channel_order", "do_grayscale", "do_thumbnail",
    "do_align_long_axis", "crop_to_patches",
}  # fmt: skip
_READ_OF = {
    "Siglip2": {"patch_size", "max_num_patches"},
    "Fgclip2": {"patch_size", "max_num_patches", "dynamic_max_patches"},
    "EfficientNet": {"rescale_offset", "include_top"},
    # Of masks and of the codebook, which have no part in an embedding.
    "Owlv2": {"do_pad"},
    "GotOcr2": {"min_patches", "max_patches"},  # of crop_to_patches
    "Flava": {
        "return_image_mask", "input_size_patches", "total_mask_patches", "mask_group_min_patches",
        "mask_group_max_patches", "mask_group_min_aspect_ratio", "mask_group_max_aspect_ratio",
        "return_codebook_pixels", "codebook_do_resize", "codebook_size", "codebook_resample",
        "codebook_do_center_crop", "codebook_crop_size", "codebook_do_rescale",
        "codebook_rescale_factor", "codebook_do_map_pixels", "codebook_do_normalize",
        "codebook_image_mean", "codebook_image_std",
    },
}  # fmt: skip
# Processors of transformers, without ending; feature extractors are in old folders.
_PROCESSORS = (
    "CLIPImageProcessor", "CLIPFeatureExtractor", "ChineseCLIPImageProcessor",
    "ChineseCLIPFeatureExtractor", "SiglipImageProcessor", "Siglip2ImageProcessor",
    "Fgclip2ImageProcessor", "EfficientNetImageProcessor", "Tipsv2ImageProcessor",
    "ViTImageProcessor", "ViTFeatureExtractor", "BitImageProcessor", "DINOv3ViTImageProcessor",
    "BlipImageProcessor", "OwlViTImageProcessor", "OwlViTFeatureExtractor", "FlavaImageProcessor",
    "FlavaFeatureExtractor", "Owlv2ImageProcessor", "GotOcr2ImageProcessor",
    "VideoMAEImageProcessor", "VideoMAEFeatureExtractor",
)  # fmt: skip
PIL_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


def huggingface_preprocess(
    values: dict[str, Any], where: str, grid_size: int | None = None
) -> PreprocessConfig:
    """Return the config for a `preprocessor_config.json`; `grid_size` is NaFlex's image_size.

    Raises:
        CheckpointError: a step that vlm does not support, or that is needed and turned off.
    """
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or ""
    name = string(name, f"{where}: image_processor_type")
    _check_processor(values, name, where)
    for step in ("do_resize", "do_rescale"):
        if not _on(values, step, True, where):
            raise CheckpointError(f"{where} turns {step} off, and a model takes images of one size")
    naflex, tips = name.startswith(("Siglip2", "Fgclip2")), name.startswith("Tipsv2")
    dinov3 = name.startswith("DINOv3")
    if name.startswith("Fgclip2") and _on(values, "dynamic_max_patches", True, where):
        raise CheckpointError(
            f"{where} has dynamic_max_patches, so that an image's patches depend on the largest in "
            "its batch: set it to false there, and max_num_patches to what images should have"
        )
    efficient = name.startswith("EfficientNet")
    factor = number(values.get("rescale_factor", 1 / 255), f"{where}: rescale_factor", above=0.0)
    if abs(factor * 255 - 1) > 1e-6 and not efficient:
        raise CheckpointError(f"{where} has rescale_factor {factor!r}: vlm supports only 1/255")
    bilinear = naflex or tips or name.startswith(("ViT", "DINOv3", "VideoMAE"))
    resample = values.get("resample", 2 if bilinear else 3)
    kernel = PIL_RESAMPLE.get(resample) if type(resample) is int else None
    if kernel is None:
        raise CheckpointError(
            f"{where} has resample {brief(resample)}: vlm supports "
            + ", ".join(f"{number} ({name})" for number, name in PIL_RESAMPLE.items())
        )
    family = "crop" if "CLIP" in name or name.startswith(("Bit", "VideoMAE")) else "squash"
    common = {
        "kernel": kernel,
        "backend": "tensor" if name.endswith("Fast") or tips or dinov3 else "pillow",
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
    }
    if efficient:
        common["mean"], common["std"] = _efficientnet(values, factor, where)
    elif _on(values, "do_normalize", not tips, where):
        fallback = (CLIP_MEAN, CLIP_STD) if family == "crop" else ((0.5,) * 3, (0.5,) * 3)
        fallback = ((0.5,) * 3, (0.5,) * 3) if name.startswith("VideoMAE") else fallback
        fallback = (IMAGENET_MEAN, IMAGENET_STD) if dinov3 else fallback
        clip = name.startswith(("Blip", "OwlViT", "Owlv2", "Flava", "GotOcr2"))
        fallback = (CLIP_MEAN, CLIP_STD) if clip else fallback
        common["mean"] = _three(values.get("image_mean", fallback[0]), f"{where}: image_mean")
        common["std"] = _deviation(values.get("image_std", fallback[1]), f"{where}: image_std")
    if name.startswith("Owlv2"):
        if not _on(values, "do_pad", True, where):
            raise CheckpointError(f"{where} turns do_pad off: vlm pads as OWLv2 does")
        edges = _edges(values.get("size", 960), f"{where}: size", square=True)
        side = integer(edges["height"], f"{where}: size.height", high=MAX_PIXELS)
        common |= {"kernel": "bilinear", "backend": "scipy"}
        return PreprocessConfig(image_size=side, resize="pad", **common)
    if naflex:
        patch_size = integer(values.get("patch_size", 16), f"{where}: patch_size", high=MAX_PIXELS)
        patches = integer(values.get("max_num_patches", 256), f"{where}: max_num_patches")
        return PreprocessConfig(
            image_size=grid_size or math.isqrt(patches) * patch_size,
            resize="naflex",
            patch_size=patch_size,
            max_patches=patches,
            **common,
        )
    default = 448 if tips else 346 if efficient else 224
    default = {"Blip": 384, "OwlV": 768, "GotO": 384}.get(name[:4], default)
    size = values.get("size", default)
    square = values.get("default_to_square")
    if square is None:
        square = family == "squash" and not name.startswith("Siglip")
    size = _edges(size, f"{where}: size", square=boolean(square, f"{where}: default_to_square"))
    crops = family == "crop" or name.startswith("Flava")
    if _on(values, "do_center_crop", crops, where):
        crop = values.get("crop_size", 289 if efficient else 224)
        side = _edges(crop, f"{where}: crop_size", square=True)["height"]
        if side is None:
            raise CheckpointError(f"{where}: crop_size has no height: vlm crops to a square")
        short = size["shortest_edge"] or size["height"]
        assert short is not None  # `_edges` returns one of them
        if short < side:
            raise CheckpointError(
                f"{where} resizes to {short} pixels and crops to {side}, which are more: vlm does "
                "not pad to a crop"
            )
        return PreprocessConfig(
            image_size=side,
            resize="squash" if size["shortest_edge"] is None else "crop",
            short_side=None if short == side else short,
            crop_rounding="floor",
            **common,
        )
    if size["height"] is None:
        raise CheckpointError(
            f"{where} resizes the shortest edge and does not crop, but the model takes images of "
            "one size"
        )
    return PreprocessConfig(image_size=size["height"], resize="squash", **common)


def _check_processor(values: dict[str, Any], name: str, where: str) -> None:
    """Raise an error for a processor or a setting that vlm does not support."""
    kind = name.removesuffix("Pil").removesuffix("Fast")
    choice(kind, _PROCESSORS, f"{where}: image_processor_type")
    own = next((keys for start, keys in _READ_OF.items() if kind.startswith(start)), set())
    for key, value in values.items():
        off = value in (None, "", [], {}) or (key in _OFF and not value)
        if key not in _READ | own | _IGNORED and not off:
            raise CheckpointError(
                f"{where} has {key} {brief(value)}, which vlm does not support for {kind}: remove "
                "it if it changes no pixels"
            )


def _efficientnet(
    values: dict[str, Any], factor: float, where: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and deviation equivalent to all steps of `EfficientNetImageProcessor`.

    A value is multiplied by `rescale_factor`, reduced by 1 with `rescale_offset`, normalised, and
    divided by the deviation a second time with `include_top`.
    """
    less = float(_on(values, "rescale_offset", False, where))
    mean, deviation = (0.0,) * 3, (1.0,) * 3
    given = _deviation(values.get("image_std", IMAGENET_STD), f"{where}: image_std")
    if _on(values, "do_normalize", True, where):
        mean = _three(values.get("image_mean", IMAGENET_MEAN), f"{where}: image_mean")
        deviation = given
    if _on(values, "include_top", True, where):
        deviation = tuple(a * b for a, b in zip(deviation, given, strict=True))
    scale = factor * 255
    if abs(scale - round(scale)) < 1e-9 * scale:  # 1/255 and 1/127.5 are 1 and 2 exactly
        scale = round(scale)
    red, green, blue = ((less + m) / scale for m in mean)
    return (red, green, blue), _deviation([d / scale for d in deviation], f"{where}: image_std")


def open_clip_preprocess(values: dict[str, Any], image_size: int, where: str) -> PreprocessConfig:
    """Return the config for a `preprocess_cfg` of open_clip; absent fields are OpenAI's.

    Raises:
        CheckpointError: a field or a value that vlm does not support.
    """
    for key, value in values.items():
        if key not in _OPEN_CLIP:
            raise CheckpointError(
                f"{where}: preprocess_cfg has {key} {brief(value)}, which vlm does not support: it "
                f"supports {', '.join(_OPEN_CLIP)}"
            )
    choice(values.get("mode"), (None, "RGB"), f"{where}: mode")
    mode = choice(values.get("resize_mode") or "shortest", RESIZE_MODES, f"{where}: resize_mode")
    fill = integer(values.get("fill_color") or 0, f"{where}: fill_color", 0, 255)  # a grey level
    kernel = values.get("interpolation") or "bicubic"
    if kernel == "random":  # for training; open_clip evaluates with bicubic
        kernel = "bicubic"
    choice(kernel, ("bicubic", "bilinear", "nearest"), f"{where}: interpolation")
    return PreprocessConfig(
        image_size=image_size,
        resize=RESIZE_MODES[mode],
        pad_value=(fill, fill, fill),
        kernel=kernel,
        mean=_three(values.get("mean") or CLIP_MEAN, f"{where}: mean"),
        std=_deviation(values.get("std") or CLIP_STD, f"{where}: std"),
    )


# open_clip ignores `size` and uses that of the model.
_OPEN_CLIP = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def _on(values: dict[str, Any], step: str, default: bool, where: str) -> bool:
    """Return True if a step is on; null turns it off, like in transformers."""
    return boolean(values.get(step, default) or False, f"{where}: {step}")


def _edges(size: Any, where: str, *, square: bool) -> dict[str, int | None]:
    """Return shortest_edge and height of a size: a number, {shortest_edge}, or {height, width}."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, dict) or not (size.keys() & {"shortest_edge", "height"}):
        raise CheckpointError(
            f"{where} is {brief(size)}: vlm supports height and width, or shortest_edge"
        )
    if size.get("height") != size.get("width"):
        raise CheckpointError(
            f"{where} is {brief(size)}, not a square: vlm supports only square images"
        )
    if size.get("longest_edge") is not None:
        raise CheckpointError(f"{where} is {brief(size)}: vlm does not resize by the longest edge")
    edges = {name: size.get(name) for name in ("shortest_edge", "height")}
    return {
        name: None if edge is None else integer(edge, f"{where}.{name}", high=MAX_PIXELS)
        for name, edge in edges.items()
    }


def _deviation(values: Any, where: str) -> tuple[float, float, float]:
    return _three(values, where, above=0.0)


def _three(values: Any, where: str, *, above: float = -math.inf) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        values = [values] * 3
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise CheckpointError(
            f"{where} is {brief(values)}, not one number for each of red, green, blue"
        )
    red, green, blue = (number(value, where, above=above) for value in values)
    return red, green, blue
