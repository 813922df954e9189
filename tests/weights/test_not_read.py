"""Popular embedders that vlm does not read are refused by name, with the reason and what to use."""

import json

import pytest

import vlm
from vlm.errors import CheckpointError

CASES = [
    ({"model_type": "qwen3_vl"}, "type qwen3_vl, an embedder on a generative.*MultiVectorIndex"),
    ({"model_type": "qwen2_vl", "architectures": ["GmeQwen2VL"]}, "an embedder on a generative"),
    ({"model_type": "llava_next"}, "type llava_next, an embedder on a generative"),
    ({"model_type": "colpali"}, "type colpali, an embedder"),
    (
        {"model_type": "clip", "architectures": ["LLM2CLIPModel"]},
        "LLM2CLIP, a CLIP whose texts are embedded by a language model",
    ),
    ({"model_type": "clip", "auto_map": {"AutoModel": "m.LLM2CLIPModel"}}, "is LLM2CLIP"),
]


@pytest.mark.parametrize("in_modules", [False, True])
@pytest.mark.parametrize(("values", "message"), CASES)
def test_refused_by_name(values, message, in_modules, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    if in_modules:
        modules = [
            {"path": "", "type": "custom_st.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=message) as raised:
        vlm.load(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [None, 3, ["qwen3_vl"], {"a": 1}, "unheard_of"])
def test_other_types_are_refused_with_the_list(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=r"model_type is .*: vlm supports clip, siglip"):
        vlm.load(tmp_path)
