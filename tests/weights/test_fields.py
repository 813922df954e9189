"""Values in a checkpoint's JSON files: one that cannot be is refused in a sentence."""

import json
import pathlib
import shutil
import time

import pytest

from vlm.bundle import load
from vlm.config import (
    FastViTStage,
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)
from vlm.errors import CheckpointError, ConfigError, VlmError
from vlm.weights.fields import brief

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAN, INF = float("nan"), float("inf")

CLIP = "hf_clip/config.json"
SIGLIP = "hf_siglip/config.json"
NAFLEX = "hf_naflex/config.json"
PIXELS = "hf_clip/preprocessor_config.json"
NAFLEX_PIXELS = "hf_naflex/preprocessor_config.json"
TOKENS = "hf_clip/tokenizer_config.json"
OPEN_CLIP = "oc_vit/open_clip_config.json"
TIMM = "oc_pe/open_clip_config.json"

VALUES = [
    (CLIP, "vision_config.hidden_act", ["gelu"], "hidden_act is .*not a string"),
    (CLIP, "vision_config.hidden_act", {"a": 1}, "hidden_act is .*not a string"),
    (CLIP, "vision_config.num_attention_heads", 0, "num_attention_heads is 0"),
    (CLIP, "vision_config.hidden_size", -8, "hidden_size is -8: it must be"),
    (CLIP, "vision_config.hidden_size", True, "hidden_size is True, not a whole"),
    (CLIP, "vision_config.hidden_size", 24.0, "hidden_size is 24.0, not a whole"),
    (CLIP, "vision_config.hidden_size", 10**30, "more than 20 digits"),
    (CLIP, "vision_config.image_size", 10**9, "image_size is 1000000000: .*16,384"),
    (CLIP, "vision_config.patch_size", 0, "patch_size is 0"),
    (CLIP, "vision_config.num_channels", "3", "num_channels is '3'"),
    (CLIP, "vision_config.layer_norm_eps", "x", "layer_norm_eps is 'x', not a num"),
    (CLIP, "vision_config.layer_norm_eps", -1, "layer_norm_eps is -1: .*greater"),
    (CLIP, "text_config.layer_norm_eps", NAN, "layer_norm_eps is nan, not a finite"),
    (CLIP, "text_config.layer_norm_eps", 0, "layer_norm_eps is 0"),
    (CLIP, "text_config.num_hidden_layers", 10**7, "num_hidden_layers is 10000000"),
    (CLIP, "text_config.eos_token_id", "end", "eos_token_id is 'end'"),
    (CLIP, "text_config.vocab_size", 2**40, "vocab_size is 1099511627776"),
    (CLIP, "text_config", "big", "text_config is 'big', not an object"),
    (CLIP, "projection_dim", None, r"\(20, 24\) \(the model has \(512, 24\)\)"),
    (CLIP, "projection_dim", [20], r"projection_dim is \[20\]"),
    (CLIP, "model_type", ["clip"], r"model_type is \['clip'\]"),
    (CLIP, "model_type", {"a": {"b": 1}}, "model_type is {"),
    (SIGLIP, "text_config.projection_size", "x", "projection_size is 'x'"),
    (SIGLIP, "vision_config.vision_use_head", 0, "vision_use_head is 0, not true"),
    (NAFLEX, "vision_config.num_patches", -4, "num_patches is -4"),
    (PIXELS, "image_mean", None, "image_mean is None"),
    (PIXELS, "image_mean", [0, 0, "x"], "image_mean is 'x'"),
    (PIXELS, "image_std", [0, 1, 1], "image_std is 0: .*greater than 0"),
    (PIXELS, "image_std", [1, 1, INF], "image_std is inf, not a finite"),
    (PIXELS, "resample", [3], r"resample \[3\]"),
    (PIXELS, "rescale_factor", "x", "rescale_factor is 'x'"),
    (PIXELS, "rescale_factor", 10**400, "rescale_factor is an integer"),
    (PIXELS, "size", {"shortest_edge": "x"}, "shortest_edge is 'x'"),
    (PIXELS, "size", {"shortest_edge": 10**8}, "shortest_edge is 1000"),
    (PIXELS, "crop_size", -30, "crop_size.height is -30"),
    (PIXELS, "do_normalize", "yes", "do_normalize is 'yes', not true"),
    (PIXELS, "do_resize", None, "turns do_resize off"),
    (PIXELS, "image_processor_type", 5, "image_processor_type is 5"),
    (NAFLEX_PIXELS, "max_num_patches", 0, "max_num_patches is 0"),
    (NAFLEX_PIXELS, "patch_size", "16", "patch_size is '16'"),
    (TOKENS, "tokenizer_class", ["x"], "tokenizer_class is .*not a string"),
    (TOKENS, "padding_side", "up", "padding_side is 'up'"),
    (TOKENS, "eos_token", 5, "eos_token is 5, not a string"),
    (TOKENS, "pad_token", {"content": [1]}, "pad_token is .*not a string"),
    (OPEN_CLIP, "model_cfg", None, "has no model_cfg"),
    (OPEN_CLIP, "model_cfg.embed_dim", "20", "embed_dim is '20'"),
    (OPEN_CLIP, "model_cfg.quick_gelu", "no", "quick_gelu is 'no'"),
    (OPEN_CLIP, "model_cfg.init_logit_bias", "x", "init_logit_bias is 'x'"),
    (OPEN_CLIP, "model_cfg.vision_cfg", [], r"vision_cfg is \[\], not an obj"),
    (OPEN_CLIP, "model_cfg.vision_cfg.head_width", 0, "head_width is 0"),
    (OPEN_CLIP, "model_cfg.vision_cfg.head_width", 9999, "heads is 0"),
    (OPEN_CLIP, "model_cfg.vision_cfg.mlp_ratio", NAN, "mlp_ratio is nan"),
    (OPEN_CLIP, "model_cfg.vision_cfg.mlp_ratio", -2.0, "mlp_dim is -"),
    (OPEN_CLIP, "model_cfg.vision_cfg.layers", [1, 2], "four stages"),
    (OPEN_CLIP, "model_cfg.vision_cfg.layers", [1, 2, 3, "x"], "layers is 'x'"),
    (OPEN_CLIP, "model_cfg.vision_cfg.layers", 10**7, "layers is 10000000"),
    (OPEN_CLIP, "model_cfg.vision_cfg.image_size", {}, "supports only squares"),
    (OPEN_CLIP, "model_cfg.vision_cfg.act_kwargs", [1], "act_kwargs is"),
    (OPEN_CLIP, "model_cfg.vision_cfg.act_kwargs",
     {"approximate": []}, "act_kwargs .*not support"),
    (OPEN_CLIP, "model_cfg.vision_cfg.norm_kwargs", {"eps": "x"}, "eps is 'x'"),
    (OPEN_CLIP, "model_cfg.text_cfg.pool_type", ["eos"], "pool_type is"),
    (OPEN_CLIP, "model_cfg.text_cfg.tokenizer_kwargs", "x", "tokenizer_kwargs"),
    (OPEN_CLIP, "model_cfg.text_cfg.tokenizer_kwargs",
     {"clean": ["x"]}, "tokenizer_kwargs is"),
    (OPEN_CLIP, "model_cfg.text_cfg.context_length", -1, "context_length is -1"),
    (OPEN_CLIP, "preprocess_cfg", [1], "preprocess_cfg is"),
    (OPEN_CLIP, "preprocess_cfg.interpolation", ["x"], "interpolation is"),
    (OPEN_CLIP, "preprocess_cfg.resize_mode", ["x"], "resize_mode"),
    (OPEN_CLIP, "preprocess_cfg.fill_color", 256, "fill_color is 256"),
    (OPEN_CLIP, "preprocess_cfg.std", [1, 1, -1], "std is -1"),
    (TIMM, "model_cfg.vision_cfg.timm_model_name", 7, "name is 7"),
    (TIMM, "model_cfg.vision_cfg.image_size", 10**6, "image_size"),
]  # fmt: skip


def set_value(values, place, value):
    *path, last = place.split(".")
    for name in path:
        values = values.setdefault(name, {})
    values[last] = value


@pytest.mark.parametrize(("file", "place", "value", "message"), VALUES)
def test_a_value_that_cannot_be(tmp_path, file, place, value, message):
    golden = GOLDEN / file
    folder = pathlib.Path(shutil.copytree(golden.parent, tmp_path / "model"))
    path = folder / golden.name
    values = json.loads(path.read_text())
    set_value(values, place, value)
    path.write_text(json.dumps(values))
    start = time.process_time()
    with pytest.raises(VlmError, match=message) as refusal:
        load(folder)
    assert time.process_time() - start < 5
    message = str(refusal.value)
    assert len(message) < 600
    assert "\n" not in message
    assert isinstance(refusal.value, ConfigError) or str(folder) in message


@pytest.mark.parametrize(
    "file", [CLIP, PIXELS, OPEN_CLIP,
             TOKENS, "hf_clip/tokenizer.json"],
)  # fmt: skip
@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[1]", "3", "",
             '"\ud800"', "{", '{"model_type": ' + "9" * 10_000 + "}"],
    ids=["lists", "objects", "list", "number", "empty", "surrogate", "truncated", "digits"],
)  # fmt: skip
def test_json_that_is_no_object_of_fields(tmp_path, file, text):
    folder = pathlib.Path(shutil.copytree((GOLDEN / file).parent, tmp_path / "model"))
    (folder / pathlib.Path(file).name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(VlmError, match=pathlib.Path(file).name) as refusal:
        load(folder)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(ViTConfig(heads=0)), "ViTConfig.heads is 0"),
        (lambda: ModelConfig(ViTConfig(depth=10**7)), "ViTConfig.depth is 10000000"),
        (lambda: ModelConfig(ViTConfig(norm_eps=NAN)), "norm_eps is nan: choose a number"),
        (lambda: ModelConfig(ViTConfig(norm_eps=-1.0)), "norm_eps is -1.0"),
        (lambda: ModelConfig(ViTConfig(dropout=1.0)), "dropout is 1.0: choose a number"),
        (lambda: ModelConfig(text=TextConfig(vocab_size=2**40)), "TextConfig.vocab_size"),
        (lambda: ModelConfig(init_scale=0.0), "ModelConfig.init_scale is 0.0"),
        (lambda: ModelConfig(embed_dim=-768), "ModelConfig.embed_dim is -768"),
        (lambda: FastViTStage(1, -8, 8), "FastViTStage.width is -8"),
        (lambda: PreprocessConfig(image_size=10**9), "PreprocessConfig.image_size"),
        (lambda: PreprocessConfig(std=(1.0, 0.0, 1.0)), "PreprocessConfig.std is 0.0"),
        (lambda: PreprocessConfig(pad_value=(0, 0, 256)), "PreprocessConfig.pad_value is 256"),
        (lambda: TokenizerConfig(context_length=10**9), "TokenizerConfig.context_length"),
        (lambda: TokenizerConfig(pad_id=-1), "TokenizerConfig.pad_id is -1"),
    ],
)
def test_bounds_of_configs(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("hf_clip", "CLIPForImageClassification"),
        ("hf_clip", "CLIPVisionModelWithProjection"),
        ("hf_clip", "CLIPTextModel"),
        ("hf_siglip", "SiglipForImageClassification"),
        ("hf_siglip", "SiglipVisionModel"),
    ],
)
def test_what_is_no_dual_encoder_is_called_by_its_kind(tmp_path, name, architecture):
    folder = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"architectures": [architecture]}))
    with pytest.raises(CheckpointError, match=f"describes a '{architecture}', which lacks a tower"):
        load(folder)


def test_values_are_quoted_briefly():
    assert brief([1, 2]) == "[1, 2]"
    assert brief("x" * 300) == "'" + "x" * 59 + "... (302 characters)"
    assert brief(list(range(50))) == "a list of 50 values"
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert brief(deep) == "a deeply nested value"
