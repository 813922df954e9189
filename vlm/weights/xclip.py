"""transformers' `XCLIPModel` (Ni et al., 2022, arXiv:2208.02816), read and written.

Its text features depend on the video. `encode_video` and `encode_text` are its
`get_video_features` and `get_text_features`; `Bundle.video_logits` are its logits.
"""

import dataclasses
from typing import Any

from etils import epath

from vlm.config import ModelConfig, XCLIPConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import huggingface
from vlm.weights import writing_parts as parts
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.fields import choice, with_defaults
from vlm.weights.layers import TRANSFORMERS, block, linear, norm
from vlm.weights.rules import LINEAR, Rule, leading

MODEL_TYPES = ("xclip",)
_CLIP = huggingface.DEFAULTS["clip"]
# Fields of the vision tower and of the model: theirs, ours and the default.
_VISION = {
    "num_frames": ("frames", 8),
    "mit_num_hidden_layers": ("frame_depth", 1),
    "mit_num_attention_heads": ("frame_heads", 8),
    "mit_intermediate_size": ("frame_mlp_dim", 2048),
}
_MODEL = {"prompt_layers": ("prompt_depth", 2), "prompt_num_attention_heads": ("prompt_heads", 8)}


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: a setting that differs from that of all published models.
    """
    given = _CLIP["vision"] | {name: default for name, (_, default) in _VISION.items()}
    vision, options = huggingface.read_tower(
        values, "vision", given | {"mit_hidden_size": 512}, where
    )
    text = huggingface.tower_fields(values, "text", _CLIP["text"], where)
    defaults = {name: default for name, (_, default) in _MODEL.items()}
    defaults |= {"projection_dim": 512, "prompt_hidden_act": "quick_gelu"}
    model = with_defaults(values, defaults, where)
    embed_dim = model["projection_dim"]
    alike = {
        "vision_config.mit_hidden_size": (vision["mit_hidden_size"], embed_dim, "projection_dim"),
        "prompt_hidden_act": (
            model["prompt_hidden_act"],
            vision["hidden_act"],
            "vision_config.hidden_act",
        ),
        "text_config.layer_norm_eps": (
            text["layer_norm_eps"],
            vision["layer_norm_eps"],
            "vision_config.layer_norm_eps",
        ),
    }
    for name, (value, wanted, like) in alike.items():
        if value != wanted:
            raise CheckpointError(
                f"{where}: {name} is {value!r}, and {like} is {wanted!r}: vlm supports equal ones"
            )
    choice(vision["hidden_act"], (XCLIPConfig.activation,), f"{where}: vision_config.hidden_act")
    del options["activation"]
    options |= {ours: vision[theirs] for theirs, (ours, _) in _VISION.items()}
    options |= {ours: model[theirs] for theirs, (ours, _) in _MODEL.items()}
    tower = huggingface.clip_text(text, "clip", f"{where}: text_config")
    return ModelConfig(
        XCLIPConfig(**options),
        dataclasses.replace(tower, pool="argmax", end_id=None),  # as XCLIPTextModel always does
        embed_dim=embed_dim,
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit, or an option that vlm does not support.
    """
    return huggingface.assemble(folder, config, rules())


def rules() -> list[Rule]:
    """Rules of a model."""
    layers = "vision_model.encoder.layers.{}"
    attention = {name: f"message_attn.{part}" for name, part in (
        ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")
    )}  # fmt: skip
    prompt, ours = "prompts_generator.decoder.{}", "vision.prompts"
    return [
        *[
            dataclasses.replace(rule, theirs=rule.theirs.replace("layrnorm", "layernorm"))
            for rule in huggingface.CLIP_RULES
            if not rule.theirs.startswith("vision_model.encoder")
        ],
        *block(layers, "vision.blocks.block", TRANSFORMERS),
        *linear(f"{layers}.message_fc", "vision.blocks.message"),
        *norm(f"{layers}.message_ln", "vision.blocks.message_norm"),
        *block(layers, "vision.blocks.message_attention", attention),
        Rule("mit.position_embedding", "vision.frame_position", leading(1)),
        *block("mit.encoder.layers.{}", "vision.frame_transformer.blocks", TRANSFORMERS),
        *norm("prompts_visual_layernorm", "vision.patch_norm"),
        Rule("prompts_visual_projection", "vision.patch_projection.kernel"),
        *norm("prompts_generator.layernorm", "vision.context_norm"),
        *[
            Rule(f"{prompt}.cross_attn.{name[0]}_proj.weight", f"{ours}.{name}.kernel", LINEAR)
            for name in ("query", "key", "value")
        ],
        *linear(f"{prompt}.cross_attn.proj", f"{ours}.out"),
        *norm(f"{prompt}.norm1", f"{ours}.attention_norm"),
        *norm(f"{prompt}.norm3", f"{ours}.mlp_norm"),
        *linear(f"{prompt}.mlp.0", f"{ours}.mlp.up"),
        *linear(f"{prompt}.mlp.3", f"{ours}.mlp.down"),
        Rule("prompts_generator.alpha", "vision.prompt_scale"),
    ]


def values_of(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists what `XCLIPModel` does not support.
    """
    vision, text, rule = config.vision, config.text_transformer, tokenizer.config
    assert isinstance(vision, XCLIPConfig)
    image = huggingface.tower_values(vision) | {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "mit_hidden_size": config.embed_dim,
        **{theirs: getattr(vision, ours) for theirs, (ours, _) in _VISION.items()},
    }
    ends = {"bos_token_id": rule.bos_id, "eos_token_id": 2, "pad_token_id": rule.pad_id}
    values = parts.model_values(
        "xclip",
        "XCLIPModel",
        projection_dim=config.embed_dim,
        prompt_hidden_act=image["hidden_act"],
        **{theirs: getattr(vision, ours) for theirs, (ours, _) in _MODEL.items()},
        vision_config=image | {"model_type": "xclip_vision_model"},
        text_config=parts.text_values(text, "xclip") | ends,
    )
    parts.refuse_differences("transformers", config, model_config(values, "config.json"))
    return values
