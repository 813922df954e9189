"""Experiments: JSON there and back, and every wrong field named with its fix."""

import dataclasses
import json
import re

import pytest

from vlm.config import (
    ConvNeXtConfig,
    EfficientNetConfig,
    EfficientNetStage,
    Experiment,
    FastViTConfig,
    FastViTStage,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ResNetConfig,
    ResNetV1Config,
    SwinConfig,
    TextConfig,
    TokenizerConfig,
    ViTaminConfig,
    ViTConfig,
    from_dict,
    load_config,
    to_dict,
)
from vlm.errors import ConfigError

LINEAR = {"projection": "linear"}


def test_an_experiment_survives_json():
    experiment = Experiment(
        name="x",
        mesh=MeshConfig(data=2, fsdp=4),
        optimizer=OptimizerConfig(ema=0.999, clip_norm=None),
        resolution_schedule=((0.5, 112), (0.25, 160)),
        profile=(10, 20),
        epochs=3,
    )
    plain = json.loads(json.dumps(to_dict(experiment)))
    assert from_dict(Experiment, plain) == experiment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5, "epochs": 1.0}, "one length, but steps and epochs are all set"),
        ({"steps": 0}, "Experiment.steps is 0: choose a number from 1 to"),
        ({"seconds": -1.0}, "Experiment.seconds is -1.0: choose a number above 0"),
        ({"batch_size": 0}, "Experiment.batch_size is 0: choose"),
        ({"log_every": 0}, "Experiment.log_every is 0"),
        ({"batch_size": 10, "micro_batch_size": 4}, "10 is not a multiple of micro_batch_size 4"),
        (
            {"tokenizer": TokenizerConfig(context_length=8)},
            "context_length 8 is not the model's 64",
        ),
        (
            {"text_masking": 1.0},
            "Experiment.text_masking is 1.0: choose a number from 0 to below 1",
        ),
        ({"init_towers": "text"}, "has no effect: name a model with init_from"),
        (
            {"lock": "text", "init_from": "x", "optimizer": OptimizerConfig(text_rate=0.1)},
            "OptimizerConfig.text_rate is 0.1 and has no effect: the tower is not trained",
        ),
        ({"distill": {"teacher": "x", "distance": "mse"}}, "give features a weight"),
        ({"model": {"vision": {"kind": "vit", "stem_widths": [8]}}}, "set stem to"),
        ({"resolution_schedule": ((0.5, 100),)}, "multiples of patch_size 16"),
        (
            {"resolution_schedule": ((0.0, 112),)},
            "Experiment.resolution_schedule is 0.0: choose a number above 0",
        ),
    ],
)
@pytest.mark.untyped
def test_an_experiment_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Experiment(**changes)


STAGES = (FastViTStage(1, 8, 12, halve=False), FastViTStage(1, 32, 40, 2, True, True, 4, True))
FASTVIT = FastViTConfig(8, STAGES, width=64, squeeze=4, image_size=32)
RESNET = ResNetConfig(image_size=64, depths=(1, 2), width=8, heads=4)


KINDS = [
    ViTConfig(pool="class"), FASTVIT, RESNET, ConvNeXtConfig(), ViTaminConfig(),
    EfficientNetConfig(), SwinConfig(), ResNetV1Config(projection="linear"),
]  # fmt: skip


@pytest.mark.parametrize("vision", KINDS, ids=lambda v: v.kind)
def test_every_kind_of_tower_survives_json(vision):
    model = ModelConfig(vision, TextConfig(projection="linear"), embed_dim=768)
    plain = json.loads(json.dumps(to_dict(model)))
    assert plain["vision"]["kind"] == vision.kind
    assert from_dict(ModelConfig, plain) == model
    assert from_dict(type(vision), plain["vision"]) == vision


# As bundles and run folders stored it when one class was all kinds of tower.
OLDER = {
    "image_size": 32, "patch_size": 8, "width": 64, "depth": 0, "heads": 4, "mlp_dim": 0,
    "stem": "linear", "pool": "mean", "projection": "linear_bias", "norm_eps": 1e-5,
    "resnet": [], "fastvit": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "tower"),
    [
        (
            OLDER,
            ViTConfig(
                image_size=32, patch_size=8, width=64, depth=0, heads=4, mlp_dim=0, pool="mean",
                projection="linear_bias", norm_eps=1e-5,
            ),
        ),
        (OLDER | {"resnet": [1, 2], "width": 8, "image_size": 64}, RESNET),
        (
            OLDER
            | {"fastvit": {"stem_width": 8, "stages": to_dict(FASTVIT)["stages"], "squeeze": 4}},
            FASTVIT,
        ),
        ({}, ViTConfig()),
    ],
)  # fmt: skip
def test_towers_of_the_older_form_become_those_of_today(values, tower):
    text = to_dict(TextConfig(projection="linear"))
    embed_dim = {"embed_dim": 768}
    assert from_dict(ModelConfig, {"vision": values, "text": text, **embed_dim}).vision == tower


def test_stages_of_a_fastvit_are_checked():
    with pytest.raises(ConfigError, match="FastViTStage 0: width 32 is not a multiple of heads 3"):
        FastViTConfig(8, (FastViTStage(1, 32, 40, 3),), width=64, squeeze=4)
    with pytest.raises(ConfigError, match="FastViTStage 0: width 32 after 8"):
        FastViTConfig(8, (FastViTStage(1, 32, 40, halve=False),), width=64, squeeze=4)
    with pytest.raises(ConfigError, match="width 65 is not a multiple of the last stage's 32"):
        dataclasses.replace(FASTVIT, width=65)


def test_towers_of_convolutions_are_checked():
    with pytest.raises(ConfigError, match=r"ConvNeXtConfig has depths \(3, 3\)"):
        ConvNeXtConfig(depths=(3, 3))
    with pytest.raises(ConfigError, match="image_size 100 is no multiple of 16"):
        ViTaminConfig(image_size=100)
    with pytest.raises(ConfigError, match="a nested stem halves 5 times"):
        ViTConfig(stem="nested", stem_widths=(8,) * 5)


def test_an_efficientnet_is_checked():
    with pytest.raises(ConfigError, match="kernel 4 has no middle"):
        EfficientNetStage(1, 16, kernel=4)
    with pytest.raises(ConfigError, match=r"EfficientNetStage\.depth is 0: choose a number from 1"):
        EfficientNetStage(0, 16)
    with pytest.raises(ConfigError, match=r"squeeze is 1\.5"):
        EfficientNetConfig(squeeze=1.5)
    with pytest.raises(ConfigError, match="stages is empty"):
        EfficientNetConfig(stages=())
    with pytest.raises(ConfigError, match="width 320 must equal embed_dim 512"):
        ModelConfig(EfficientNetConfig(projection="none"), TextConfig(), embed_dim=512)


def test_a_resnet_is_checked():
    with pytest.raises(ConfigError, match=r"pools 64 channels.* not a multiple of heads 7"):
        dataclasses.replace(RESNET, heads=7)
    with pytest.raises(ConfigError, match="image_size 4 holds no patch of patch_size 8"):
        dataclasses.replace(RESNET, image_size=4)
    with pytest.raises(ConfigError, match=r"ResNetConfig\.depths is 0: choose a number from 1"):
        dataclasses.replace(RESNET, depths=(1, 0))


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"max_patches": 9, "registers": 2}, {}, "ViTConfig.max_patches 9 is only valid"),
        ({}, {"pooler": True}, 'which has norm="post": set that too'),
        (
            {"max_patches": 9, "pool": "class"},
            {},
            "ViTConfig.max_patches 9 is only valid for NaFlex",
        ),
        ({"max_patches": 9, "pre_norm": True}, {}, "rotary, stem_norm and pre_norm, and"),
        ({"width": 100}, {}, "ViTConfig.width 100 is not a multiple of heads 12"),
        ({}, {"width": 512, "heads": 8, "projection": "none"}, "must equal embed_dim 768"),
        ({"image_size": 12}, {}, "image_size 12 holds no patch of patch_size 16"),
        (
            {"image_size": 72, "stem": "conv", "stem_widths": (8, 8, 16, 16)},
            {},
            "image_size 72 is no multiple of that",
        ),
        (
            {"stem": "conv", "stem_widths": (8, 16)},
            {},
            "2 stages makes patches of 4 pixels, not 16",
        ),
        ({"pool": "query", "projection": "none"}, {}, 'pool "query" needs a projection'),
    ],
)
def test_a_model_that_cannot_be_is_refused(vision, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelConfig(vision=ViTConfig(**(LINEAR | vision)), text=TextConfig(**(LINEAR | text)))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 4}, "Experiment has no field 'batch': it has name, model"),
        ({"model": {"vision": {"widht": 4}}}, "Experiment.model.vision has no field 'widht'"),
        (
            {"model": {"vision": {"kind": "mlp"}}},
            "Experiment.model.vision.kind is 'mlp': choose one of vit, resnet",
        ),
        (
            {"model": {"vision": 3}},
            "Experiment.model.vision must be an object of fields, or one of ViTConfig",
        ),
        ({"batch_size": "many"}, "Experiment.batch_size must be int, not 'many'"),
        ({"batch_size": True}, "Experiment.batch_size must be int, not True"),
        ({"lock": "both"}, "Experiment.lock is 'both': choose one of 'none', 'vision', 'text'"),
        ({"profile": [1]}, "Experiment.profile takes 2 values, not [1]"),
        ({"data": []}, "Experiment.data must be an object of fields, not []"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_dict(Experiment, values)


def test_a_config_file_is_python_or_json(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("import vlm.config as c\nconfig = c.Experiment(name='here', steps=3)\n")
    experiment = load_config(file)
    assert experiment.name == "here"
    other = tmp_path / "config.json"
    other.write_text(json.dumps(to_dict(experiment)))
    assert load_config(other) == experiment


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "config = 3", "binds no `config` of type"),
        ("a.py", "1 / 0", "failed with ZeroDivisionError: division by zero"),
        ("a.py", "def", "failed with SyntaxError"),
        ("a.json", "{", "is not JSON"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match=r"no config file 'nowhere\.py'"):
        load_config("nowhere.py")


@pytest.mark.untyped
def test_a_field_of_the_wrong_type_in_a_config_file_is_named(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("import vlm.config as c\nconfig = c.Experiment(batch_size=2.5)\n")
    with pytest.raises(ConfigError, match=r"batch_size must be int, not 2\.5"):
        load_config(file)


def test_experiments_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().steps = 3


@pytest.mark.parametrize("sizes", [(0, 1, 8), (-1, -1, 1), (-2, 1, 1)])
def test_sizes_of_a_mesh_are_positive_or_one_is_left_open(sizes):
    with pytest.raises(ConfigError, match="MeshConfig"):
        MeshConfig(*sizes)
