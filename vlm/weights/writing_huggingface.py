"""Export to transformers: `CLIPModel`, `SiglipModel`, and the classes of other modules."""

from typing import Any

from etils import epath

from vlm.config import (
    EfficientNetConfig,
    GroupViTConfig,
    ModelConfig,
    NoTextConfig,
    PreprocessConfig,
    VideoPrismConfig,
    ViTConfig,
    XCLIPConfig,
)
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import groupvit, huggingface, videoprism, xclip
from vlm.weights import writing_parts as parts
from vlm.weights.files import write_safetensors
from vlm.weights.rules import flat_arrays, write
from vlm.weights.writing_aimv2 import aimv2_config, aimv2_tensors, is_aimv2
from vlm.weights.writing_align import align_config, align_preprocess, align_tensors
from vlm.weights.writing_bert_clip import bert_clip_config, bert_clip_tensors, is_bert_clip
from vlm.weights.writing_one_tower import (
    is_one_tower,
    one_tower_config,
    one_tower_processor,
    one_tower_tensors,
)
from vlm.weights.writing_tipsv2 import (
    is_tipsv2,
    tipsv2_config,
    tipsv2_preprocess,
    tipsv2_tensors,
)
from vlm.weights.writing_tokenizer import tokenizer_files
from vlm.weights.writing_vision_text import (
    is_vision_text,
    vision_text_config,
    vision_text_tensors,
)


def write_huggingface(
    folder: epath.Path, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    """Write the files of a folder that transformers opens.

    Raises:
        CheckpointError: transformers does not support something.
    """
    parts.warn_of_crop("transformers", preprocess.config, "floor")
    config = model.config
    # AlignModel and Tipsv2Model take a mask.
    settings: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    if tokenizer.config.zeroed_id is not None:
        parts.refuse("transformers", [f"tokenizer.zeroed_id {tokenizer.config.zeroed_id}"])
    if isinstance(config.vision, EfficientNetConfig):
        values, tensors = align_config(config, tokenizer), align_tensors(model)
        processor = align_preprocess(preprocess.config)
    elif isinstance(config.vision, VideoPrismConfig):
        values, tensors = videoprism.values_of(config), videoprism.tensors_of(model)
        processor = videoprism.processor_of(preprocess.config, config.vision.frames)
    elif isinstance(config.vision, XCLIPConfig):
        values, tensors = xclip.values_of(config, tokenizer), write(model, xclip.rules())
        processor = _preprocess(preprocess.config, "xclip", "VideoMAEImageProcessor")
        settings = {}
    elif isinstance(config.vision, GroupViTConfig):
        values, tensors = groupvit.values_of(config, tokenizer), groupvit.tensors_of(model)
        processor = _preprocess(preprocess.config, "clip")
        settings = {}
    elif is_aimv2(config):
        values, tensors = aimv2_config(model, tokenizer), aimv2_tensors(model)
        processor = _preprocess(preprocess.config, "clip")
    elif is_one_tower(config):
        values = one_tower_config(config)
        kind = values["model_type"]
        tensors = one_tower_tensors(model, kind)
        name = one_tower_processor(preprocess.config, kind)
        processor = _preprocess(preprocess.config, kind.removesuffix("_vision_model"), name)
    elif is_vision_text(config):
        values = vision_text_config(config, tokenizer)
        kind = values["vision_config"]["model_type"]
        tensors, settings = vision_text_tensors(model, kind), {}
        name = one_tower_processor(preprocess.config, kind)
        processor = _preprocess(preprocess.config, kind.removesuffix("_vision_model"), name)
    elif is_tipsv2(config):
        values, tensors = tipsv2_config(config, tokenizer), tipsv2_tensors(model)
        processor = tipsv2_preprocess(preprocess.config)
    else:
        settings = {}
        if is_bert_clip(config):
            values, tensors = bert_clip_config(config), bert_clip_tensors(model)
        else:
            values = huggingface_config(config, tokenizer)
            tensors = write(model, huggingface.RULES[values["model_type"]])
        processor = _preprocess(preprocess.config, values["model_type"])
    largest = max((array for _, array in flat_arrays(model)), key=lambda array: array.size)
    parts.dump(folder / "config.json", values | {"dtype": str(largest.dtype)})
    video = isinstance(config.vision, VideoPrismConfig)
    name = "video_preprocessor_config.json" if video else "preprocessor_config.json"
    parts.dump(folder / name, processor)
    if not isinstance(config.text, NoTextConfig):
        tokenizer_files(folder, tokenizer, **settings)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def huggingface_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists all fields that CLIPModel or SiglipModel does not support.
    """
    vision, text, rules = config.vision, config.text_transformer, tokenizer.config
    if not isinstance(vision, ViTConfig):
        parts.refuse("transformers", [f"a vision tower of the kind {vision.kind!r} ('vit')"])
    clip = vision.pool == "class"
    naflex = not clip and vision.max_patches is not None
    common: dict[str, Any] = {"stem": "linear", "rotary": None, "mlp": "plain"}
    if not naflex:
        common["max_patches"] = None
    common |= {"norm_pooled": False, "layer_scale": False, "pool_heads": None, "pool_mlp_dim": None}
    common_text = {"layer_scale": False, "pad_id": None, "norm": "pre", "scale_embedding": False}
    common_text["softcap"] = None
    if clip:
        wanted = (
            common | {"pre_norm": True, "patch_bias": False, "projection": "linear"},
            {"causal": True, "projection": "linear", **common_text},
        )
    else:
        wanted = (
            common
            | {"pool": "map", "pre_norm": False, "patch_bias": True, "projection": "none"}
            | {"class_token": False},
            {"causal": False, "pool": "last", "projection": "linear_bias", **common_text},
        )
    bias = config.init_bias is not None
    faults = {
        f"text.pool {text.pool!r} (end or argmax)": clip and text.pool not in ("end", "argmax"),
        "no logit_bias (SiglipModel has one)": not clip and not bias,
        "a logit_bias (CLIPModel has none)": clip and bias,
    }
    parts.check("transformers", config, *wanted, faults)
    ends = {"bos_token_id": rules.bos_id, "eos_token_id": rules.eos_id}
    if not clip:
        family, architecture = ("siglip2", "Siglip2Model") if naflex else ("siglip", "SiglipModel")
        more = {"projection_size": config.embed_dim}
    else:
        family, architecture = "clip", "CLIPModel"
        if text.pool == "end" and text.end_id == 2:  # CLIPModel treats 2 as an old mistake
            family, architecture = "metaclip_2", "MetaClip2Model"
        ends["eos_token_id"] = 2 if text.pool == "argmax" else text.end_id
        more = {"projection_dim": config.embed_dim}
    vision_config = parts.vision_values(vision, family)
    if naflex:
        del vision_config["image_size"]
        vision_config["num_patches"] = (vision.image_size // vision.patch_size) ** 2
    values = parts.model_values(
        family,
        architecture,
        text_config=parts.text_values(text, family, pad_token_id=rules.pad_id, **ends, **more),
        vision_config=vision_config,
        **(more if clip else {}),
    )
    made = huggingface.model_config(values, "config.json")
    # NaFlex's processor has the number of patches.
    free = ["vision.max_patches"] if naflex else []
    parts.refuse_differences("transformers", config, made, free)
    return values


def _preprocess(c: PreprocessConfig, family: str, name: str | None = None) -> dict[str, Any]:
    """Return the `preprocessor_config.json`."""
    siglip = family == "siglip"
    cropped = c.resize == "squash" and c.short_side not in (None, c.image_size)
    faults = {
        "TensorFlow's resizing of images (pillow or tensor)": c.backend == "tensorflow",
        "preprocessing that pads to the square": c.resize == "pad" and c.backend != "scipy",
        "centre crops of squashed images (EfficientNet's processor)": cropped,
        "centre crops with SiglipModel, whose processor squashes": siglip and c.resize == "crop",
    }
    parts.refuse_if("transformers", faults)
    if c.backend == "scipy":
        return parts.processor_values(c, "Owlv2ImageProcessor", do_pad=True)
    names = {"siglip": "SiglipImageProcessor", "siglip2": "Siglip2ImageProcessor"}
    name = names.get(family, name or "CLIPImageProcessor")
    values = parts.processor_values(
        c, name + ("Fast" if c.backend == "tensor" else ""), do_center_crop=c.resize == "crop"
    )
    if c.resize == "naflex":
        del values["size"]
        values |= {"patch_size": c.patch_size, "max_num_patches": c.max_patches}
    if c.resize == "crop":
        values["crop_size"] = values["size"]
        values["size"] = {"shortest_edge": c.short_side or c.image_size}
    return values
