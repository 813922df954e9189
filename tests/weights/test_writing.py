"""Ours to a public format and back: bit-equal parameters, equal tokens, and honest refusals."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors import safe_open

from vlm.bundle import Bundle, load
from vlm.config import (
    ConvNeXtConfig,
    ModelConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    ViTaminConfig,
)
from vlm.errors import CheckpointError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import (
    convnext,
    efficientnet,
    eva,
    mobileclip,
    resnet_v1,
    swin,
    text_encoders,
    timm,
    vitamin,
)
from vlm.weights.huggingface import CLIP_RULES
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import flat_arrays, flat_shapes, write
from vlm.weights.writing_huggingface import huggingface_config, write_huggingface
from vlm.weights.writing_open_clip import open_clip_config, write_open_clip

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROUND_TRIPS = [
    ("hf_clip", "huggingface"), ("hf_clip_old", "huggingface"), ("hf_siglip", "huggingface"),
    ("hf_siglip_wide", "huggingface"), ("oc_vit", "open_clip"), ("oc_quick", "open_clip"),
    ("oc_mean", "open_clip"), ("hf_metaclip_2", "huggingface"),
    ("hf_clip", "open_clip"), ("oc_quick", "huggingface"),
    ("hf_tipsv2", "huggingface"), ("hf_tipsv2_giant", "huggingface"), ("hf_align", "huggingface"),
    ("hf_naflex", "huggingface"), ("hf_chinese_clip", "huggingface"), ("hf_altclip", "huggingface"),
    ("hf_fgclip2", "huggingface"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), ROUND_TRIPS)
def test_there_and_back_is_bit_equal(name, form, tmp_path):
    there_and_back(load(GOLDEN / name), form, tmp_path)


def there_and_back(ours, form, tmp_path):
    ours.save(tmp_path / "theirs", format=form)
    again = load(tmp_path / "theirs")
    before, after = flat_arrays(ours.model), flat_arrays(again.model)
    assert [n for n, _ in before] == [n for n, _ in after]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
    # The same function too: what is configured differently must not matter.
    same = {"class_token": True, "norm_pooled": False, "patch_dropout": 0.0}
    if getattr(ours.config.vision, "pool", None) == "class":
        vision = [dataclasses.replace(b.config.vision, **same) for b in (ours, again)]
        assert vision[0] == vision[1]
    else:
        assert ours.config.vision == again.config.vision
    assert ours.config.text == again.config.text
    assert again.preprocess.config == dataclasses.replace(
        ours.preprocess.config, crop_rounding=again.preprocess.config.crop_rounding
    )
    texts = ["a photo of a cat", "Two DOGS!", "", "x" * 90]
    # open_clip always joins white space.
    if form != "open_clip" or ours.tokenizer.config.clean != "none":
        texts.append("tabs\tand\nlines")
    assert np.array_equal(ours.tokenizer(texts), again.tokenizer(texts))


def test_nothing_is_written_over_or_in_part(tmp_path):
    bundle = load(GOLDEN / "oc_vit")
    with pytest.raises(CheckpointError, match=r"layer_scale True .*save the model as a vlm bundle"):
        bundle.save(tmp_path / "out", format="huggingface")
    assert list(tmp_path.iterdir()) == []
    bundle.save(tmp_path / "out", format="open_clip")
    with pytest.raises(CheckpointError, match="exists already"):
        bundle.save(tmp_path / "out", format="open_clip")


# timm's towers by name alone are too large for a test: small ones take their names here.
SMALL_TOWERS = {
    "oc_siglip": "vit_base_patch16_siglip_224",
    "oc_pe": "vit_pe_core_tiny_patch16_384",
    "oc_timm_clip": "vit_base_patch16_clip_224",
}


@pytest.mark.parametrize("name", SMALL_TOWERS)
def test_timms_towers_there_and_back(name, tmp_path, monkeypatch):
    ours = load(GOLDEN / name)
    with pytest.raises(CheckpointError, match=r"none of timm's vision towers is .* nearest"):
        ours.save(tmp_path / "theirs", format="open_clip")
    monkeypatch.setitem(timm.TOWERS, SMALL_TOWERS[name], ours.config.vision)
    there_and_back(ours, "open_clip", tmp_path)
    before, after = (
        json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        for folder in (GOLDEN / name, tmp_path / "theirs")
    )
    assert before["vision_cfg"] == after["vision_cfg"]
    assert before.get("init_logit_bias") == after.get("init_logit_bias")
    with (
        safe_open(GOLDEN / name / "open_clip_model.safetensors", "np") as theirs,
        safe_open(tmp_path / "theirs" / "open_clip_model.safetensors", "np") as written,
    ):
        assert set(theirs.keys()) == set(written.keys())
        for key in written.keys():  # noqa: SIM118 (not a dict)
            assert np.array_equal(theirs.get_tensor(key), written.get_tensor(key)), key


# Likewise of other families, which are given the names of the large ones.
NAMED = {
    "oc_convnext": convnext, "oc_convnext_mlp": convnext, "oc_eva01": eva, "oc_eva02": eva,
    "oc_eva02_enormous": eva, "oc_vitamin": vitamin, "oc_mobileclip_b": mobileclip,
    "oc_swin": swin, "oc_resnet_v1": resnet_v1,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_other_towers_of_timms_there_and_back(name, tmp_path, monkeypatch):
    ours = load(GOLDEN / name)
    with pytest.raises(CheckpointError, match=r"none of timm's .*nearest .*save the model"):
        ours.save(tmp_path / "theirs", format="open_clip")
    about = json.loads((GOLDEN / name / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(NAMED[name], "options", lambda config: about["vision_cfg"])
    there_and_back(ours, "open_clip", tmp_path)
    with (
        safe_open(GOLDEN / name / "open_clip_model.safetensors", "np") as theirs,
        safe_open(tmp_path / "theirs" / "open_clip_model.safetensors", "np") as written,
    ):
        keys = [key for key in theirs.keys() if key.startswith("visual.")]  # noqa: SIM118
        keys = [key for key in keys if not key.endswith("num_batches_tracked")]
        assert keys == [key for key in written.keys() if key.startswith("visual.")]  # noqa: SIM118
        for key in keys:
            assert np.array_equal(theirs.get_tensor(key), written.get_tensor(key)), key


def test_towers_of_full_size_have_timms_names():
    for name, tower in eva.TOWERS.items():
        assert eva.options(tower)["timm_model_name"] == name
    assert convnext.options(ConvNeXtConfig())["timm_model_name"] == "convnext_base"
    large = ConvNeXtConfig(
        320, (3, 4, 30, 3), (384, 768, 1536, 3072), (1536, 3072, 6144, 12288), 1e-5, "mlp"
    )
    assert convnext.options(large) == {
        "timm_model_name": "convnext_xxlarge", "timm_pool": "", "timm_proj": "mlp"
    }  # fmt: skip
    assert vitamin.options(ViTaminConfig())["timm_model_name"] == "vitamin_base_224"
    for name, tower in mobileclip.TOWERS.items():
        assert mobileclip.options(tower)["timm_model_name"] == name


# And encoders of transformers: the Hub's names, and the places that the golden ones have.
SMALL_ENCODERS = {
    "oc_xlm_roberta": ("xlm-roberta-base", 18),
    "oc_nllb": ("facebook/nllb-200-distilled-600M", 1024),
}


@pytest.mark.parametrize("name", SMALL_ENCODERS)
def test_encoders_of_transformers_there_and_back(name, tmp_path, monkeypatch):
    ours, (hub, places) = load(GOLDEN / name), SMALL_ENCODERS[name]
    with pytest.raises(
        CheckpointError, match=r"none of the text encoders .* nearest .*save the model as a vlm"
    ):
        ours.save(tmp_path / "theirs", format="open_clip")
    encoder = dataclasses.replace(ours.config.text, context_length=places)
    monkeypatch.setitem(text_encoders.ENCODERS, hub, encoder)
    there_and_back(ours, "open_clip", tmp_path)
    before, after = (
        json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        for folder in (GOLDEN / name, tmp_path / "theirs")
    )
    assert after["hf_proj_type"] == before.get("hf_proj_type", "mlp")
    for field in ("hf_model_name", "hf_pooler_type", "context_length"):
        assert after[field] == before[field], field
    with (
        safe_open(GOLDEN / name / "open_clip_model.safetensors", "np") as theirs,
        safe_open(tmp_path / "theirs" / "open_clip_model.safetensors", "np") as written,
    ):
        assert set(theirs.keys()) == set(written.keys())
        folded = {text_encoders.POSITION, text_encoders.SEGMENT, text_encoders.NLLB_EMBEDDING}
        for key in written.keys():  # noqa: SIM118 (not a dict)
            x, y = theirs.get_tensor(key), written.get_tensor(key)
            assert x.shape == y.shape if key in folded else np.array_equal(x, y), key


def test_biomedclip_there_and_back(tmp_path, monkeypatch):
    ours = load(GOLDEN / "oc_biomed")
    name = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    encoder = dataclasses.replace(ours.config.text, context_length=20)
    monkeypatch.setitem(text_encoders.ENCODERS, name, encoder)
    monkeypatch.setitem(timm.TOWERS, "vit_base_patch16_224", ours.config.vision)
    there_and_back(ours, "open_clip", tmp_path)
    about = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())["model_cfg"]
    assert about["vision_cfg"]["timm_proj"] == "linear"
    assert about["text_cfg"]["hf_model_name"] == name


def test_a_parameter_without_a_place_is_never_lost():
    bundle = load(GOLDEN / "hf_clip")
    vision = dataclasses.replace(bundle.config.vision, registers=2)
    config = dataclasses.replace(bundle.config, vision=vision)
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=r"no place for vision\.registers: save the model"):
        list(write(model, CLIP_RULES))


def test_encoders_of_full_size_have_the_hubs_names():
    vision, tokenizer = load(GOLDEN / "oc_quick").config.vision, load(GOLDEN / "oc_nllb").tokenizer
    for name, encoder in text_encoders.ENCODERS.items():
        text = dataclasses.replace(encoder, context_length=77, pool="first", projection="linear")
        values = open_clip_config(ModelConfig(vision, text, embed_dim=20), tokenizer)
        assert values["quick_gelu"]  # of the vision tower alone: the encoder's is its own
        values = values["text_cfg"]
        assert text_encoders.ENCODERS[values["hf_model_name"]] == encoder
        assert values["hf_proj_type"] == "linear"
        pooler = "cls_pooler" if "nllb" in name else "cls_last_hidden_state_pooler"
        assert values["hf_pooler_type"] == pooler


def test_ends_that_no_encoder_of_open_clips_has_are_refused():
    bundle = load(GOLDEN / "oc_nllb")
    base = text_encoders.ENCODERS["xlm-roberta-base"]
    for change, message in (
        ({"pool": "last"}, r"no place for text\.pool 'last' \(mean, max or first\)"),
        ({"projection": "linear_bias"}, r"text\.projection 'linear_bias' \(mlp, linear or none\)"),
        ({"context_length": 600}, r"xlm-roberta-base .* context_length 512 \(not 600\)"),
        ({"last_norm": True}, r"xlm-roberta-base .* last_norm False \(not True\)"),
    ):
        text = dataclasses.replace(base, **change)
        config = dataclasses.replace(bundle.config, text=text)
        with pytest.raises(CheckpointError, match=message):
            open_clip_config(config, bundle.tokenizer)


def test_trained_positions_of_nllb_are_refused(tmp_path, monkeypatch):
    """The encoder computes them: what was trained would be lost without a word."""
    bundle = load(GOLDEN / "oc_nllb")
    encoder = dataclasses.replace(bundle.config.text, context_length=1024)
    monkeypatch.setitem(text_encoders.ENCODERS, "facebook/nllb-200-distilled-600M", encoder)
    position = bundle.model.text.position
    assert position is not None
    position.set_value(position.get_value().at[3, 5].add(0.01))
    with pytest.raises(CheckpointError, match=r"no place for the trained text\.position of .*nllb"):
        bundle.save(tmp_path / "out", format="open_clip")
    assert list(tmp_path.iterdir()) == []


def test_a_pool_that_open_clip_lacks_is_refused():
    tower = efficientnet.TOWERS["tf_efficientnet_b0"]
    with pytest.raises(CheckpointError, match=r"no place for vision\.pool 'max'"):
        efficientnet.options(dataclasses.replace(tower, pool="max"))


def test_the_table_of_timms_towers():
    """Every tower is what timm makes of its name, and has as many parameters."""
    recorded = json.loads((GOLDEN / "timm_towers.json").read_text())
    assert set(recorded) == set(timm.TOWERS)
    for name, theirs in recorded.items():
        tower, count = timm.TOWERS[name], theirs.pop("parameters")
        ours = dataclasses.asdict(tower) | {
            "pool_heads": tower.pool_heads or tower.heads,
            "pool_mlp_dim": tower.pool_mlp_dim or tower.mlp_dim,
        }
        assert {field: ours[field] for field in theirs} == theirs, name
        embed_dim = tower.width if tower.projection == "none" else 1024
        model = abstract_model(ModelConfig(tower, SMALL_TEXT, embed_dim=embed_dim), np.float32)
        assert sum(map(math.prod, flat_shapes(model.vision).values())) == count, name
        assert timm.tower_name(tower) == name


SMALL_TEXT = TextConfig(
    vocab_size=280, context_length=12, width=16, depth=1, heads=2, mlp_dim=24, causal=True,
    pool="argmax", projection="linear", activation="quick_gelu", norm_eps=1e-5,
)  # fmt: skip


def test_a_resnet_there_and_back(tmp_path):
    vision = ResNetConfig(image_size=64, depths=(1, 2, 1, 1), width=8, heads=8)
    config = ModelConfig(vision, SMALL_TEXT, embed_dim=20)
    model, rng = DualEncoder(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = rng.standard_normal(variable.shape, np.float32)
        variable.set_value(variable.get_value() + np.abs(noise) * 0.1)
    preprocess = Preprocess(PreprocessConfig(image_size=64, resize="crop"))
    tokenizer = train_bpe(["a photo of a cat", "two dogs"], 280, 12)
    there_and_back(Bundle(model, preprocess, tokenizer, "resnet"), "open_clip", tmp_path)
    values = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())["model_cfg"]
    assert values["vision_cfg"]["layers"] == [1, 2, 1, 1]
    assert values["quick_gelu"] is True


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
def test_a_fastvit_is_not_written(form, tmp_path):
    bundle = load(GOLDEN / "oc_fastvit")
    with pytest.raises(CheckpointError, match=rf"({form}|transformers).*vlm bundle instead"):
        bundle.save(tmp_path / "out", format=form)
    bundle.save(tmp_path / "bundle")
    again = load(tmp_path / "bundle")
    assert again.config == bundle.config
    for (name, a), (_, b) in zip(flat_arrays(bundle.model), flat_arrays(again.model), strict=True):
        assert np.array_equal(a, b), name


@pytest.mark.parametrize(
    ("name", "form", "warned"),
    [
        ("oc_vit", "open_clip", False),
        ("hf_clip", "huggingface", False),
        ("hf_clip", "open_clip", True),
    ],
)
def test_crops_one_pixel_apart_are_told(name, form, warned, tmp_path, caplog):
    load(GOLDEN / name).save(tmp_path / "out", format=form)
    found = [r.getMessage() for r in caplog.records if "odd margin" in r.getMessage()]
    assert len(found) == warned
    assert all("crop_rounding round, not floor" in message for message in found)


def test_half_a_coca_is_not_written():
    bundle = load(GOLDEN / "oc_coca")
    with pytest.raises(CheckpointError, match=r"CoCa only with its captioning decoder.*vlm bundle"):
        open_clip_config(bundle.config, bundle.tokenizer)


def test_naflex_has_its_own_number_of_positions_in_transformers():
    bundle = load(GOLDEN / "hf_naflex")
    fewer = dataclasses.replace(bundle.config.vision, max_patches=20)
    config = dataclasses.replace(bundle.config, vision=fewer)
    values = huggingface_config(config, bundle.tokenizer)
    assert values["vision_config"]["num_patches"] == 25
    with pytest.raises(CheckpointError, match=r"nearest .* width 768 \(not 24\)"):
        open_clip_config(bundle.config, bundle.tokenizer)


def test_refusals_list_everything():
    bundle = load(GOLDEN / "hf_siglip")
    vision = dataclasses.replace(bundle.config.vision, layer_scale=True, pre_norm=True)
    config = dataclasses.replace(bundle.config, vision=vision)
    with pytest.raises(
        CheckpointError, match=r"layer_scale True \(False\).*pre_norm True \(False\)"
    ):
        huggingface_config(config, bundle.tokenizer)
    vision = dataclasses.replace(vision, pool="mean", class_token=False)
    config = dataclasses.replace(config, vision=vision)
    with pytest.raises(CheckpointError, match=r"patch_bias True \(False\).*projection 'none'"):
        open_clip_config(config, bundle.tokenizer)
    vision = timm.TOWERS["vit_base_patch16_siglip_224"]
    vision = dataclasses.replace(vision, activation="gelu_tanh")
    config = dataclasses.replace(config, vision=vision, embed_dim=768)
    with pytest.raises(
        CheckpointError,
        match=r"vit_base_patch16_siglip_224 is the nearest and has "
        r"activation 'gelu' \(not 'gelu_tanh'\)",
    ):
        open_clip_config(config, bundle.tokenizer)


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
@pytest.mark.parametrize("name", ["oc_modernbert", "oc_mt5"])
def test_text_encoders_are_written_as_bundles_alone(name, form, tmp_path):
    ours = load(GOLDEN / name, context_length=9)
    with pytest.raises(CheckpointError, match="does not write them: save the model as a vlm bund"):
        ours.save(tmp_path / "theirs", format=form)
    ours.save(tmp_path / "bundle")
    again = load(tmp_path / "bundle")
    assert np.array_equal(again.encode_text(["a cat"]), ours.encode_text(["a cat"]))


CHANGES = {
    "vision": [{"norm": "branch"}, {"norm_kind": "rms"}, {"last_norm": False}],
    "text": [{"softcap": 50.0}, {"norm_kind": "rms"}, {"last_norm": True}, {"norm": "branch"}],
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("hf_clip", "huggingface"),
        ("hf_siglip", "huggingface"),
        ("hf_chinese_clip", "huggingface"),
        ("hf_altclip", "huggingface"),
        ("hf_tipsv2", "huggingface"),
        ("hf_vt_vit_bert", "huggingface"),
        ("hf_align", "huggingface"),
        ("oc_vit", "open_clip"),
    ],
)
def test_fields_without_a_place_are_refused(name, form, tmp_path):
    bundle = load(GOLDEN / name)
    writer = {"huggingface": write_huggingface, "open_clip": write_open_clip}[form]
    for part, changes in CHANGES.items():
        tower = getattr(bundle.config, part)
        known = {field.name for field in dataclasses.fields(tower)}
        for change in changes:
            ((field, value),) = change.items()
            bert = field == "norm" and getattr(tower, "pooler", False)  # has norm="post" alone
            if field not in known or bert or getattr(tower, field) == value:
                continue
            config = dataclasses.replace(
                bundle.config, **{part: dataclasses.replace(tower, **change)}
            )
            model = abstract_model(config, np.dtype(np.float32))
            altclip = (name, part, field) == ("hf_chinese_clip", "text", "last_norm")
            where = "projection" if altclip else field
            with pytest.raises(CheckpointError, match=rf"{part}\.{where} .* vlm bundle"):
                writer(epath.Path(tmp_path), model, bundle.preprocess, bundle.tokenizer)
    assert not any(tmp_path.iterdir())


def test_a_rule_without_its_parameter_is_an_error():
    config = load(GOLDEN / "hf_clip").config
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, norm_kind="rms"))
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=r"needs text\.norm\.bias.*does not have: save"):
        list(write(model, CLIP_RULES))
