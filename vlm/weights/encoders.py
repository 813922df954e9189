"""ModernBERT and the encoders of (m)T5 as text towers of open_clip folders.

A folder gives the encoder's name and its weights. The `config.json` of the encoder beside them is
checked if it is there; ModernBERTs of another name need it for their number of heads.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vlm.config import EncoderTextConfig
from vlm.errors import CheckpointError, brief
from vlm.weights.checkpoint import ComputedTensors
from vlm.weights.fields import MAX_LAYERS, choice, fields, integer, number, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import linear
from vlm.weights.rules import LINEAR, OUT, Rule, Shapes, count_layers

# Names of the Hub without their owner, and their heads. All of T5's sizes are in the tensors.
_MODERNBERTS = {
    "ModernBERT-base": 12, "ModernBERT-large": 16, "gte-modernbert-base": 12,
    "modernbert-embed-base": 12, "modernbert-embed-large": 16,
}  # fmt: skip
_T5S = tuple(f"mt5-{size}" for size in ("small", "base", "large", "xl", "xxl"))
NAMES = (*_MODERNBERTS, *_T5S)
TYPES = ("modernbert", "mt5", "t5")
_POOLS: dict[str, Any] = {
    "mean_pooler": "mean", "max_pooler": "max", "cls_pooler": "first",
    "cls_last_hidden_state_pooler": "first",
}  # fmt: skip
# Fields of a config.json that vlm reads, with transformers' defaults.
_MODERNBERT = {
    "num_attention_heads": 12, "norm_eps": 1e-5, "local_attention": 128, "pad_token_id": 50283,
    "hidden_activation": "gelu", "attention_bias": False, "norm_bias": False, "mlp_bias": False,
    "num_hidden_layers": 22,
}  # fmt: skip
_T5 = {
    "layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128, "pad_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_ROOT, _OURS = "text.transformer", "text.transformer.blocks"
_LAYER, _BLOCK = f"{_ROOT}.layers.{{}}", f"{_ROOT}.block.{{}}"
_DISTANCE = f"{_ROOT}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def recognises(name: Any, about: Mapping[str, Any]) -> bool:
    """Whether a `hf_model_name`, or the `config.json` of the encoder, is one of these."""
    return str(name).split("/")[-1] in NAMES or about.get("model_type") in TYPES


def text_config(
    c: Mapping[str, Any], shapes: Shapes, where: str, about: Mapping[str, Any]
) -> EncoderTextConfig:
    """Configuration of the tower of a `text_cfg` with `hf_model_name`.

    Raises:
        CheckpointError: another pooler, projection or option, or other weights.
    """
    name = str(c["hf_model_name"]).split("/")[-1]
    options = described(c, where, about)
    try:
        if options["positions"] == "rotary":
            sizes = _modernbert_sizes(shapes, options.pop("heads"))
        else:
            sizes = _t5_sizes(shapes)
    except (KeyError, ValueError, IndexError):
        raise CheckpointError(
            f"{where}: the text tower's weights are not those of {brief(name)}"
        ) from None
    return EncoderTextConfig(**options, **sizes)


def described(c: Mapping[str, Any], where: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a tower that its weights do not show.

    Raises:
        CheckpointError: another pooler, projection or option of the encoder.
    """
    # A null is the default of both architectures.
    pooler = choice(c["hf_pooler_type"] or "mean_pooler", _POOLS, f"{where}: hf_pooler_type")
    kinds = ("mlp", "linear", None)  # null: none
    projection = choice(c["hf_proj_type"], kinds, f"{where}: text_cfg.hf_proj_type") or "none"
    shared = {
        "pool": _POOLS[pooler],
        "projection": projection,
        "context_length": c["context_length"],
    }
    name, place = str(c["hf_model_name"]).split("/")[-1], f"{where}: config.json"
    modern = about.get("model_type") == "modernbert" or name in _MODERNBERTS
    return shared | (_modernbert if modern else _t5)(name, about, place)


def _modernbert(name: str, about: Mapping[str, Any], place: str) -> dict[str, Any]:
    about = {} if about.get("model_type") != "modernbert" else about
    given = with_defaults(about, _MODERNBERT, place)
    for field, wanted in (("hidden_activation", "gelu"), *_OFF):
        choice(given[field], (wanted,), f"{place}: {field}")
    depth = integer(given["num_hidden_layers"], f"{place}: num_hidden_layers", high=MAX_LAYERS)
    every = _every(about, depth, place)
    choice(about.get("rope_scaling"), (None,), f"{place}: rope_scaling")
    ropes = _known(about.get("rope_parameters"), _ROPES, f"{place}: rope_parameters")
    bases = []
    for kind, (old, default) in _ROPES.items():
        at = f"{place}: rope_parameters.{kind}"
        rope = _known(ropes.get(kind), ("rope_type", "type", "rope_theta"), at)
        for field in ("rope_type", "type"):
            choice(rope.get(field, "default"), ("default",), f"{at}.{field}")
        base = rope.get("rope_theta") or about.get(old) or default
        bases.append(number(base, f"{place}: {old}", above=0.0))
    heads = _MODERNBERTS.get(name) if not about else given["num_attention_heads"]
    return {
        "positions": "rotary",
        "heads": integer(heads, f"{place}: num_attention_heads"),
        "global_every": every,
        "window": given["local_attention"] // 2,
        "rotary_bases": tuple(bases),
        "pad_id": given["pad_token_id"],
        "norm_eps": given["norm_eps"],
    }


# Blocks with a rotary base of their own: its name in older files, and the default.
_ROPES = {
    "full_attention": ("global_rope_theta", 160_000.0),
    "sliding_attention": ("local_rope_theta", 10_000.0),
}
_OFF = (("attention_bias", False), ("norm_bias", False), ("mlp_bias", False))


def _known(value: Any, names: Collection[str], where: str) -> dict[str, Any]:
    """Check that `value` is an object of fields with only these `names`."""
    values = fields(value, where)
    for name, given in values.items():
        if name not in names and given is not None:
            raise CheckpointError(f"{where} has {name} {brief(given)}, which vlm does not support")
    return values


def _every(about: Mapping[str, Any], depth: int, place: str) -> int:
    """Period of the global blocks, which newer files list one by one."""
    kinds = about.get("layer_types")
    if kinds is None:
        every = about.get("global_attn_every_n_layers", 3)
        return integer(every, f"{place}: global_attn_every_n_layers")
    for every in range(1, depth + 1):
        made = ["sliding_attention" if i % every else "full_attention" for i in range(depth)]
        if kinds == made:
            return every
    raise CheckpointError(
        f"{place}: layer_types is {brief(kinds)}: vlm reads global blocks at a fixed interval"
    )


def _t5(name: str, about: Mapping[str, Any], place: str) -> dict[str, Any]:
    about = about if about.get("model_type") in ("mt5", "t5") else {}
    given = with_defaults(about, _T5, place)
    choice(given["feed_forward_proj"], ("gated-gelu",), f"{place}: feed_forward_proj")
    return {
        "positions": "relative",
        "max_distance": given["relative_attention_max_distance"],
        "pad_id": given["pad_token_id"],
        "norm_eps": given["layer_norm_epsilon"],
    }


def _modernbert_sizes(shapes: Shapes, heads: int) -> dict[str, Any]:
    vocab_size, width = shapes[f"{_ROOT}.embeddings.tok_embeddings.weight"]
    if width % heads:
        raise ValueError(f"width {width} of {heads} heads")
    return {
        "vocab_size": vocab_size,
        "width": width,
        "depth": count_layers(shapes, f"{_LAYER}.mlp_norm.weight"),
        "heads": heads,
        "head_dim": width // heads,
        "mlp_dim": shapes[f"{_ROOT}.layers.0.mlp.Wo.weight"][1],
    }


def _t5_sizes(shapes: Shapes) -> dict[str, Any]:
    vocab_size, width = shapes[f"{_ROOT}.embed_tokens.weight"]
    buckets, heads = shapes[_DISTANCE]
    block = f"{_ROOT}.block.0.layer"
    return {
        "vocab_size": vocab_size,
        "width": width,
        "depth": count_layers(shapes, f"{_BLOCK}.layer.0.layer_norm.weight"),
        "heads": heads,
        "head_dim": shapes[f"{block}.0.SelfAttention.q.weight"][0] // heads,
        "mlp_dim": shapes[f"{block}.1.DenseReluDense.wi_0.weight"][0],
        "buckets": buckets,
    }


def fold(tensors: Tensors, c: EncoderTextConfig) -> Tensors:
    """Add the attention norm of ModernBERT's first block, which has none, as ones."""
    if c.positions == "relative":
        return tensors
    name = f"{_ROOT}.layers.0.attn_norm.weight"
    ones = np.ones(c.width, np.float32)
    return ComputedTensors(tensors, {name: ((c.width,), lambda start, stop: ones[start:stop])})


def rules(c: EncoderTextConfig) -> list[Rule]:
    """Rules of a tower, for tensors made by `fold`."""
    table = _modernbert_rules() if c.positions == "rotary" else _t5_rules()
    if c.projection == "mlp":
        table += linear("text.proj.0", "text.projection.up", bias=False)
        table += linear("text.proj.2", "text.projection.down", bias=False)
    elif c.projection == "linear":
        table += linear("text.proj", "text.projection", bias=False)
    return table


def _modernbert_rules() -> list[Rule]:
    parts = tuple(f"{_OURS}.attention.{part}.kernel" for part in ("query", "key", "value"))
    return [
        Rule(f"{_ROOT}.embeddings.tok_embeddings.weight", "text.embedding"),
        Rule(f"{_ROOT}.embeddings.norm.weight", "text.embedding_norm.scale"),
        Rule(f"{_LAYER}.attn_norm.weight", f"{_OURS}.attention_norm.scale"),
        Rule(f"{_LAYER}.attn.Wqkv.weight", parts, LINEAR),
        Rule(f"{_LAYER}.attn.Wo.weight", f"{_OURS}.attention.out.kernel", OUT),
        Rule(f"{_LAYER}.mlp_norm.weight", f"{_OURS}.mlp_norm.scale"),
        Rule(
            f"{_LAYER}.mlp.Wi.weight",
            (f"{_OURS}.mlp.gate.kernel", f"{_OURS}.mlp.up.kernel"),
            LINEAR,
        ),
        *linear(f"{_LAYER}.mlp.Wo", f"{_OURS}.mlp.down", bias=False),
        Rule(f"{_ROOT}.final_norm.weight", "text.norm.scale"),
    ]


def _t5_rules() -> list[Rule]:
    attention, mlp = f"{_BLOCK}.layer.0", f"{_BLOCK}.layer.1"
    parts = (("query", LINEAR), ("key", LINEAR), ("value", LINEAR), ("out", OUT))
    theirs = f"{attention}.SelfAttention"
    heads = [
        Rule(f"{theirs}.{name[0]}.weight", f"{_OURS}.attention.{name}.kernel", form)
        for name, form in parts
    ]
    layers = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    return [
        Rule(f"{_ROOT}.embed_tokens.weight", "text.embedding"),
        Rule(_DISTANCE, "text.relative_position_bias"),
        Rule(f"{attention}.layer_norm.weight", f"{_OURS}.attention_norm.scale"),
        *heads,
        Rule(f"{mlp}.layer_norm.weight", f"{_OURS}.mlp_norm.scale"),
        *(
            rule
            for ours, theirs in layers.items()
            for rule in linear(f"{mlp}.DenseReluDense.{theirs}", f"{_OURS}.mlp.{ours}", bias=False)
        ),
        Rule(f"{_ROOT}.final_layer_norm.weight", "text.norm.scale"),
    ]
