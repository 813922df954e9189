"""A bundle as a folder of transformers: `CLIPModel`, `SiglipModel`, and others elsewhere."""

from typing import Any

from etils import epath

from vlm.config import EfficientNetConfig, ModelConfig, PreprocessConfig, ViTConfig
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import huggingface
from vlm.weights.rules import write
from vlm.weights.writing_align import write_align
from vlm.weights.writing_bert_clip import bert_clip_config, bert_clip_tensors, is_bert_clip
from vlm.weights.writing_parts import KERNELS, check, refuse, transformers_folder
from vlm.weights.writing_tipsv2 import is_tipsv2, write_tipsv2


def write_huggingface(
    folder: epath.Path, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    """Write the files of a folder that transformers opens.

    Raises:
        CheckpointError: transformers has no place for something.
    """
    if tokenizer.config.zeroed_id is not None:
        refuse("transformers", [f"tokenizer.zeroed_id {tokenizer.config.zeroed_id}"])
    if isinstance(model.config.vision, EfficientNetConfig):
        return write_align(folder, model, preprocess, tokenizer)
    if is_tipsv2(model.config):
        return write_tipsv2(folder, model, preprocess, tokenizer)
    if is_bert_clip(model.config):
        values, tensors = bert_clip_config(model.config), bert_clip_tensors(model)
    else:
        values = huggingface_config(model.config, tokenizer)
        tensors = write(model, huggingface.RULES[values["model_type"]])
    pixels = _huggingface_preprocess(preprocess.config, values["model_type"])
    transformers_folder(folder, values, pixels, tokenizer, tensors)


def huggingface_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
        CheckpointError: lists all that transformers' CLIPModel and SiglipModel do not have.
    """
    vision, text = config.vision, config.text
    if not isinstance(vision, ViTConfig):
        refuse("transformers", [f"a vision tower of the kind {vision.kind!r} ('vit')"])
    clip = vision.pool == "class"
    naflex = not clip and vision.max_patches == (vision.image_size // vision.patch_size) ** 2
    common: dict[str, Any] = {"stem": "linear", "rotary": None, "mlp": "plain"}
    if not naflex:
        common["max_patches"] = None
    common |= {"norm_pooled": False, "layer_scale": False, "pool_heads": None, "pool_mlp_dim": None}
    if clip:
        wanted = (
            common | {"pre_norm": True, "patch_bias": False, "projection": "linear"},
            {"causal": True, "projection": "linear", "layer_scale": False, "pad_id": None}
            | {"norm": "pre", "scale_embedding": False},
        )
    else:
        wanted = (
            common
            | {"pool": "map", "pre_norm": False, "patch_bias": True, "projection": "none"}
            | {"class_token": False},
            {"causal": False, "pool": "last", "projection": "linear_bias", "layer_scale": False}
            | {"pad_id": None, "norm": "pre", "scale_embedding": False},
        )
    check("transformers", config, *wanted)
    if clip and text.pool not in ("end", "argmax"):
        refuse("transformers", [f"text.pool {text.pool!r} (end or argmax)"])
    if not clip and config.init_bias is None:
        refuse("transformers", ["no logit_bias (SiglipModel has one)"])
    if clip and config.init_bias is not None:
        refuse("transformers", ["a logit_bias (CLIPModel has none)"])
    rules = tokenizer.config
    ends = {"bos_token_id": rules.bos_id, "eos_token_id": rules.eos_id}
    text_values = huggingface.tower_values(text) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "pad_token_id": rules.pad_id,
        **ends,
    }
    if clip:
        text_values["eos_token_id"] = 2 if text.pool == "argmax" else text.end_id
        text_values["projection_dim"] = config.embed_dim
    else:
        text_values["projection_size"] = config.embed_dim
    vision_values = huggingface.tower_values(vision) | {"patch_size": vision.patch_size}
    if naflex:
        vision_values["num_patches"] = vision.max_patches
    else:
        vision_values["image_size"] = vision.image_size
    family, architecture = ("clip", "CLIPModel") if clip else ("siglip", "SiglipModel")
    if naflex:
        family, architecture = "siglip2", "Siglip2Model"
    if clip and text.pool == "end" and text.end_id == 2:  # which CLIPModel takes for an old mistake
        family, architecture = "metaclip_2", "MetaClip2Model"
    values = {
        "architectures": [architecture],
        "model_type": family,
        "dtype": "float32",
        "text_config": text_values | {"model_type": f"{family}_text_model"},
        "vision_config": vision_values | {"model_type": f"{family}_vision_model"},
    }
    if clip:
        values["projection_dim"] = config.embed_dim
    return values


def _huggingface_preprocess(c: PreprocessConfig, family: str) -> dict[str, Any]:
    if c.backend == "tensorflow":
        refuse("transformers", ["TensorFlow's resizing of images (pillow or tensor)"])
    if c.resize == "pad":
        refuse("transformers", ["preprocessing that pads to the square"])
    names = {"siglip": "SiglipImageProcessor", "siglip2": "Siglip2ImageProcessor"}
    name = names.get(family, "CLIPImageProcessor")
    if c.resize == "squash" and c.short_side not in (None, c.image_size):
        refuse("transformers", ["centre crops of squashed images (EfficientNet's processor)"])
    square = {"height": c.image_size, "width": c.image_size}
    values = {
        "image_processor_type": name + ("Fast" if c.backend == "tensor" else ""),
        "do_resize": True,
        "resample": KERNELS[c.kernel],
        "size": square,
        "do_center_crop": c.resize == "crop",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
        "do_convert_rgb": True,
    }
    if c.resize == "naflex":
        del values["size"]
        values |= {"patch_size": c.patch_size, "max_num_patches": c.max_patches}
    if c.resize == "crop":
        if family == "siglip":
            refuse("transformers", ["centre crops with SiglipModel, whose processor squashes"])
        values |= {"size": {"shortest_edge": c.short_side or c.image_size}, "crop_size": square}
    return values
