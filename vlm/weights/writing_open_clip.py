"""Export to open_clip: its own towers, and those of timm and transformers."""

from typing import Any

from etils import epath

from vlm.config import (
    FastViTConfig,
    ModelConfig,
    NoVisionConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from vlm.errors import CheckpointError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import open_clip, text_encoders, timm_towers, writing_text_encoders
from vlm.weights.files import write_safetensors
from vlm.weights.processors import RESIZE_MODES
from vlm.weights.rules import write
from vlm.weights.vocabularies import CLIP_BOS, CLIP_EOS, CLIP_SIZE, OPEN_CLIP_CLEAN
from vlm.weights.writing_parts import (
    check,
    dump,
    refuse,
    refuse_if,
    tower_differences,
    warn_of_crop,
)
from vlm.weights.writing_tokenizer import tokenizer_files


def write_open_clip(
    folder: epath.Path, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    """Write the files of a folder that open_clip opens as "local-dir:FOLDER".

    Raises:
        CheckpointError: open_clip does not support something.
    """
    values = open_clip_config(model.config, tokenizer)
    description = {"model_cfg": values, "preprocess_cfg": _preprocess(preprocess.config)}
    dump(folder / "open_clip_config.json", description)
    if values["text_cfg"].get("hf_tokenizer_name"):
        rules, names = tokenizer.config, {}
        if rules.zeroed_id is not None:
            names["sep_token"] = tokenizer.vocabulary.id_to_token(rules.zeroed_id)
        tokenizer_files(folder, tokenizer, cleaned=rules.clean in CLEAN, **names)
    shapes = {"text.token_embedding.weight": (), "logit_scale": ()}
    table = open_clip.rules(model.config, shapes)
    if text_encoders.owns(model.config.text_transformer):
        tensors = writing_text_encoders.tensors(model, table)
    else:
        tensors = write(model, table)
    write_safetensors(folder / "open_clip_model.safetensors", tensors, {"format": "pt"})


def _preprocess(p: PreprocessConfig) -> dict[str, Any]:
    resizes = p.kernel == "lanczos" or p.short_side is not None
    faults = {
        f"the {p.backend} backend of preprocessing (pillow)": p.backend != "pillow",
        f"preprocessing by {p.kernel} from short side {p.short_side}": resizes,
        f"preprocess.pad_value {p.pad_value} (a grey)": len(set(p.pad_value)) > 1,
    }
    refuse_if("open_clip", faults)
    warn_of_crop("open_clip", p, "round")
    modes = {ours: theirs for theirs, ours in RESIZE_MODES.items()}
    modes["naflex"] = "squash"  # of a tower whose images need no mode
    return {
        "size": p.image_size,
        "mode": "RGB",
        "mean": list(p.mean),
        "std": list(p.std),
        "interpolation": p.kernel,
        "resize_mode": modes[p.resize],
        "fill_color": p.pad_value[0],
    }


def open_clip_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `model_cfg` of a model.

    Raises:
        CheckpointError: lists all fields that open_clip's towers do not support.
    """
    vision, text = config.vision, config.text_transformer
    if isinstance(vision, NoVisionConfig):
        raise CheckpointError(
            "open_clip has no models of texts alone: save the model as a vlm bundle instead"
        )
    encoder = text_encoders.owns(text)  # has its own activation
    quick = encoder and isinstance(vision, ViTConfig) and vision.activation == "quick_gelu"
    quick = quick or text.activation == "quick_gelu"
    if isinstance(vision, ResNetConfig):
        image_tower = _resnet(vision)
    elif isinstance(vision, FastViTConfig):
        refuse("open_clip", ["a FastViT whose branches are fused"])
    elif isinstance(vision, ViTConfig) and vision.pool == "query":
        raise CheckpointError(
            "open_clip opens a CoCa only with its captioning decoder, and this is the contrastive "
            "half, which has none: save the model as a vlm bundle instead"
        )
    elif (family := timm_towers.family_of(vision, {})) is not None:
        image_tower = {
            "image_size": vision.image_size,
            "timm_model_pretrained": False,
            **family.options(vision),
        }
    else:
        assert isinstance(vision, ViTConfig)  # all others have a family
        image_tower = _native(config, vision, quick=quick)
    values: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "custom_text": True,
        "vision_cfg": image_tower,
        "text_cfg": (writing_text_encoders.text_cfg(text) if encoder else _text(text))
        | _tokenizer(tokenizer),
    }
    if quick:
        values["quick_gelu"] = True
    if config.init_bias is not None:
        values["init_logit_bias"] = config.init_bias
    vision_made, text_made = open_clip.native_towers(values, "open_clip_config.json")
    faults = {}
    if vision_made is not None:
        faults |= tower_differences("vision", vision, vision_made)
    if text_made is not None:
        faults |= tower_differences("text", text, text_made)
    refuse_if("open_clip", faults)
    return values


def _native(config: ModelConfig, c: ViTConfig, *, quick: bool) -> dict[str, Any]:
    tokenless = c.pool == "mean" and not c.class_token
    faults = {
        "vision.pool 'mean' without a class token beside the patches": tokenless,
        f"vision.rotary {c.rotary} with vision.pool {c.pool!r}": c.rotary is not None,
        "quick_gelu in only one tower": (c.activation == "quick_gelu") != quick,
    }
    wanted = {"stem": "linear", "patch_bias": False, "projection": "linear"}
    check("open_clip", config, wanted, {}, faults)
    return {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "head_width": c.width // c.heads,
        "no_ln_pre": not c.pre_norm,
        "pool_type": {"class": "tok", "mean": "avg"}[c.pool],
        "final_ln_after_pool": c.norm_pooled,
        **_tower(c, "vision"),
    }


def _resnet(c: ResNetConfig) -> dict[str, Any]:
    return {
        "image_size": c.image_size,
        "layers": list(c.depths),
        "width": c.width,
        "head_width": c.width * 32 // c.heads,
        "patch_size": None,
    }


def _text(c: TextConfig) -> dict[str, Any]:
    pools = {"argmax": "argmax", "end": "eos", "first": "first", "last": "last"}
    faults = {
        f"text.pool {c.pool!r} (end, argmax, first or last)": c.pool not in pools,
        "a mask over padding in the text tower": c.pad_id is not None,
        f"text.norm {c.norm!r} ('pre')": c.norm != "pre",
    }
    refuse_if("open_clip", faults)
    values = {
        "context_length": c.context_length,
        "vocab_size": c.vocab_size,
        "heads": c.heads,
        "no_causal_mask": not c.causal,
        "pool_type": pools[c.pool],
        "proj_bias": c.projection == "linear_bias",
        "proj_type": "none" if c.projection == "none" else "linear",
        **_tower(c, "text"),
    }
    return values | ({"eos_id": c.end_id} if c.pool == "end" else {})


def _tower(c: ViTConfig | TextConfig, name: str) -> dict[str, Any]:
    # open_clip truncates width * ratio: take the shortest ratio that gives mlp_dim.
    middle = c.mlp_dim / c.width + 0.5 / c.width
    ratios = [4.0, *(round(middle, digits) for digits in range(1, 18))]
    fitting = [ratio for ratio in ratios if int(c.width * ratio) == c.mlp_dim]
    if not fitting:
        refuse("open_clip", [f"{name}.mlp_dim {c.mlp_dim}, which no ratio of {c.width} gives"])
    values = {"width": c.width, "layers": c.depth, "mlp_ratio": fitting[0]}
    if c.norm_eps != 1e-5:
        values["norm_kwargs"] = {"eps": c.norm_eps}
    if c.activation == "gelu_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    if c.layer_scale:
        values["ls_init_value"] = 1e-4
    return values


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer fields of `text_cfg`; none are needed for CLIP's vocabulary."""
    rules = tokenizer.config
    clean = CLEAN.get(rules.clean)
    ids = rules.bos_id, rules.eos_id, rules.pad_id, tokenizer.vocab_size
    own = ids == (CLIP_BOS, CLIP_EOS, 0, CLIP_SIZE)
    if own and clean and rules.pad_side == "right" and rules.zeroed_id is None:
        return {} if clean == "lower" else {"tokenizer_kwargs": {"clean": clean}}
    if rules.zeroed_id not in (None, rules.eos_id):
        refuse("open_clip", [f"tokenizer.zeroed_id {rules.zeroed_id} (that of its end token)"])
    # open_clip always cleans; "whitespace" changes least.
    options: dict[str, Any] = {"clean": clean or "whitespace"}
    if rules.zeroed_id is not None:
        options["strip_sep_token"] = True
    # open_clip ignores the name for "local-dir:FOLDER". A model on the Hub needs its id here.
    return {"hf_tokenizer_name": "tokenizer.json of this folder", "tokenizer_kwargs": options}


CLEAN = {ours: theirs for theirs, ours in OPEN_CLIP_CLEAN.items()}
