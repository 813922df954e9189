"""What a resumed run may change is decided for every field of every config."""

import dataclasses
import typing

from test_every_field import EXPERIMENTS, all_classes, places

from vlm.config import Config, Experiment, TextTowerConfig, VisionTowerConfig
from vlm.config import resume as rules


def of_towers(hint: typing.Any) -> set[type]:
    """The classes of the towers and of their parts."""
    found = set()
    for part in typing.get_args(hint) or (hint,):
        if isinstance(part, type) and issubclass(part, Config):
            inner = typing.get_type_hints(part).values()
            found |= {part} | {c for h in inner for c in of_towers(h)}
        elif typing.get_args(part):
            found |= of_towers(part)
    return found


def test_every_field_of_every_config_is_decided():
    towers = of_towers(VisionTowerConfig) | of_towers(TextTowerConfig)
    ours = {c for c in all_classes() if c.__module__.startswith("vlm.")}
    named = {cls.__name__: cls for cls in ours - towers}
    assert not {cls.__name__ for cls in towers} & rules._DECISIONS.keys()
    assert named.keys() == rules._DECISIONS.keys()
    for name, decided in rules._DECISIONS.items():
        fields = {field.name for field in dataclasses.fields(named[name])}  # pyright: ignore
        assert decided.keys() == fields, name
    named = {field.name for cls in towers for field in dataclasses.fields(cls)}
    assert rules._TOWERS.keys() <= named


def test_a_decision_is_an_effect_for_every_field_of_an_experiment():
    count = 0
    for experiment in EXPERIMENTS:
        for _, config in places(experiment):
            for field in dataclasses.fields(config):
                effect = rules.effect_of_change(config, config, field.name)
                assert isinstance(effect, rules.Effect)
                count += 1
    assert count > 1000


def test_the_position_depends_on_fields_that_exist():
    e = Experiment()
    depends = rules.position_fields(e.data, e.seed, e.batch_size)
    assert depends["data.mixture"] == []
    assert depends["batch_size"] == 1024
    assert not rules.begins_new_pass(["batch_size", "data.source", "data.filters"])
    assert rules.begins_new_pass(["batch_size", "seed"])
