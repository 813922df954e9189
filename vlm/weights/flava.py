"""transformers' `FlavaModel` and `FlavaForPreTraining`: FLAVA's dual encoder (arXiv:2112.04482).

Its contrastive loss projects the first token of each tower. The multimodal encoder, the codebook
and the heads of pretraining are left out.
"""

from typing import Any

from etils import epath

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights, with_clamped_scale
from vlm.weights.fields import fields, with_defaults
from vlm.weights.layers import block, linear, norm
from vlm.weights.rules import SCALAR, Rule
from vlm.weights.text_encoders import bert_positions
from vlm.weights.vision_towers import DEFAULTS, VIT_LAYERS, vision_rules, without_biases

MODEL_TYPES = ("flava",)
_CLASSES = ("FlavaModel", "FlavaForPreTraining")
_VISION = {name: value for name, value in DEFAULTS["vit"].items() if "pooler" not in name}
_TEXT = huggingface.BERT | {"qkv_bias": True}
_MODEL = {"projection_dim": 768}
_TOWERS = ("image_model.", "text_model.", "image_projection.", "text_projection.", "logit_scale")
_LARGEST_SCALE = 4.6052  # of the logarithm, in the loss


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of the dual encoder.

    Raises:
        CheckpointError: another class of FLAVA, or a field of another type or size.
    """
    values = huggingface.without_class(values, _CLASSES, "FLAVA", where)
    _, image = huggingface.read_tower(values, "image", _VISION, where)
    text, options = huggingface.read_tower(values, "text", _TEXT, where)
    return ModelConfig(
        ViTConfig(**image, pool="class", projection="linear_bias"),
        TextConfig(
            **options,
            embedding_norm=True,
            pool="first",
            pad_id=text["pad_token_id"],
            projection="linear_bias",
        ),
        embed_dim=with_defaults(values, _MODEL, where)["projection_dim"],
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit, or an option that vlm does not support.
    """
    tensors = weights(folder, *huggingface.WEIGHTS)
    root = "flava." if "flava.logit_scale" in tensors.shapes else ""
    table = rules(config, root)
    for part in ("image", "text"):
        given = fields(values.get(f"{part}_config"), f"{folder / 'config.json'}: {part}_config")
        own = [rule for rule in table if rule.theirs.startswith(f"{root}{part}_model.")]
        tensors = without_biases(tensors, own, given)
    folded, used = bert_positions(tensors, f"{root}text_model", config.text_transformer, 0)
    tensors = with_clamped_scale(tensors, f"{root}logit_scale", _LARGEST_SCALE)
    towers = tuple(root + start for start in _TOWERS)
    return huggingface.assemble(
        folder,
        config,
        table,
        tensors=ComputedTensors(tensors, folded, used),
        ignored=lambda name: not name.startswith(towers) or name.endswith(_UNUSED),
    )


_UNUSED = (".mask_token", ".position_ids", ".pooler.dense.weight", ".pooler.dense.bias")


def rules(config: ModelConfig, root: str) -> list[Rule]:
    """Rules of the dual encoder, whose names start with `root`."""
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    tables, layers = f"{root}text_model.embeddings", f"{root}text_model.encoder.layer.{{}}"
    return [
        Rule(f"{root}logit_scale", "logit_scale", SCALAR),
        *vision_rules("vit", vision, {}, f"{root}image_model."),
        *linear(f"{root}image_projection", "vision.projection"),
        Rule(f"{tables}.word_embeddings.weight", "text.embedding"),
        Rule(f"{tables}.position_embeddings.weight", "text.position"),
        *norm(f"{tables}.LayerNorm", "text.embedding_norm"),
        *block(layers, "text.transformer.blocks", VIT_LAYERS),
        *norm(f"{root}text_model.layernorm", "text.norm"),
        *linear(f"{root}text_projection", "text.projection"),
    ]
