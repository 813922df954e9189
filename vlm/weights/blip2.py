"""transformers' `Blip2ForImageTextRetrieval`: the contrastive half of BLIP-2 (arXiv:2301.12597).

A Q-Former makes several vectors of an image; the same attention reads texts alone. The score is the
largest cosine of these vectors with the text. The class has no temperature, and its matching head
is left out.
"""

import json
from typing import Any

import tokenizers
from etils import epath

from vlm.config import ModelConfig, QFormerConfig, TextConfig, ViTConfig
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import blip, huggingface
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import choice, with_defaults
from vlm.weights.layers import BERT, block, linear, norm
from vlm.weights.one_tower import SCALE, with_scale
from vlm.weights.rules import Rule, leading
from vlm.weights.vocabularies import huggingface_tokenizer

MODEL_TYPES = ("blip-2",)
# Defaults of transformers' configuration classes.
_VISION = {
    "num_hidden_layers": 39, "num_attention_heads": 16, "hidden_size": 1408,
    "intermediate_size": 6144, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
_QFORMER = huggingface.BERT | {"cross_attention_frequency": 2, "use_qformer_text_input": False}
_MODEL = {"num_query_tokens": 32, "image_text_hidden_size": 256}
_CLASS = "Blip2ForImageTextRetrieval"
_IMAGE_TOKEN = "<image>"
# Names of a Q-Former's block: of what queries and texts share, of texts alone, of queries alone.
_SHARED = {
    name: theirs.replace("attention.self", "attention.attention")
    for name, theirs in BERT.items()
    if name.startswith("attention")
}
_TEXT = _SHARED | {name: theirs for name, theirs in BERT.items() if name.startswith("mlp")}
_CROSS = {
    name.replace("attention", "cross_attention").replace("cross_attention_norm", "cross_norm"): (
        theirs.replace("attention", "crossattention", 1)
    )
    for name, theirs in _SHARED.items()
}
_QUERY = _SHARED | {
    "mlp.up": "intermediate_query.dense", "mlp.down": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
}  # fmt: skip


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of the dual encoder.

    Raises:
        CheckpointError: another class of BLIP-2, which has no contrastive half, or an option that
            vlm does not support.
    """
    purpose = "to embed images and texts, such as Salesforce/blip2-itm-vit-g"
    values = huggingface.without_class(values, [_CLASS], "BLIP-2", where, purpose)
    vision, image = huggingface.read_tower(values, "vision", _VISION, where)
    c, text = huggingface.read_tower(values, "qformer", _QFORMER, where)
    choice(vision["qkv_bias"], (True,), f"{where}: vision_config.qkv_bias")
    choice(c["use_qformer_text_input"], (True,), f"{where}: qformer_config.use_qformer_text_input")
    choice(c["hidden_act"], (QFormerConfig.activation,), f"{where}: qformer_config.hidden_act")
    model = with_defaults(values, _MODEL, where)
    blocks = {name: text[name] for name in _BLOCKS}
    return ModelConfig(
        ViTConfig(
            **image,
            pool="qformer",
            class_token=True,
            qformer=QFormerConfig(
                queries=model["num_query_tokens"],
                cross_every=c["cross_attention_frequency"],
                **blocks,
            ),
            projection="linear_bias",
        ),
        TextConfig(
            **text,
            norm="post",
            pool="first",
            pad_id=c["pad_token_id"],
            projection="linear_bias",
        ),
        embed_dim=model["image_text_hidden_size"],
        init_scale=1.0,
    )


_BLOCKS = ("width", "depth", "heads", "mlp_dim", "norm_eps")


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    blip.log_uncalibrated(folder.name)
    return huggingface.assemble(
        folder,
        config,
        rules(config),
        tensors=with_scale(weights(folder, *huggingface.WEIGHTS), config),
        tokenizer=_tokenizer(folder, config),
        ignored=lambda name: name.startswith("itm_head.") or name.endswith(".position_ids"),
    )


def _tokenizer(folder: epath.Path, config: ModelConfig) -> Tokenizer:
    """Read the tokenizer, without a token of images that the table of embeddings does not have."""
    found = huggingface_tokenizer(folder, config)
    if found.vocab_size <= config.text.vocab_size:
        return found
    about = json.loads(found.vocabulary.to_str())
    added = about["added_tokens"]
    about["added_tokens"] = [token for token in added if token["content"] != _IMAGE_TOKEN]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(about)), found.config)


def rules(config: ModelConfig) -> list[Rule]:
    """Rules of a model."""
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    assert vision.qformer is not None
    blocks = "qformer.encoder.layer"
    table = [
        SCALE,
        *blip.vision_rules(),
        Rule("query_tokens", "vision.pool.queries", leading(1)),
        *norm("qformer.layernorm", "vision.pool.norm"),
        *linear("vision_projection", "vision.projection"),
        Rule("embeddings.word_embeddings.weight", "text.embedding"),
        Rule("embeddings.position_embeddings.weight", "text.position"),
        *norm("qformer.layernorm", "text.embedding_norm"),
        *block(f"{blocks}.{{}}", "text.transformer.blocks", _TEXT),
        *linear("text_projection", "text.projection"),
    ]
    for layer in range(vision.qformer.depth):
        cross = {} if layer % vision.qformer.cross_every else _CROSS
        table += block(f"{blocks}.{layer}", f"vision.pool.blocks.{layer}", _QUERY | cross)
    return table
