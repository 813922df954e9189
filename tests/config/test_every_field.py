"""Wrong values of every field of every config: choices, numbers, types.

`python tests/config/test_every_field.py` prints how many fields have choices, and the time of all.
"""

import dataclasses
import json
import re
import time
import typing
from typing import Any, Literal

import numpy as np
import pytest

from vlm.cli import parse
from vlm.config import (
    AdapterConfig,
    AugmentConfig,
    Config,
    ConvNeXtConfig,
    DataConfig,
    DistillConfig,
    EfficientNetConfig,
    EncoderTextConfig,
    EvalConfig,
    Experiment,
    FastViTConfig,
    FastViTStage,
    GroupViTConfig,
    MixturePart,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    ResNetConfig,
    ResNetV1Config,
    SelectionConfig,
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

TOWERS = (
    ViTConfig(image_size=256),
    ConvNeXtConfig(),
    ViTaminConfig(image_size=256),
    EfficientNetConfig(image_size=256),
    GroupViTConfig(image_size=256),
    ResNetConfig(image_size=256),
    FastViTConfig(8, (FastViTStage(1, 8, 8, halve=False),), width=8, squeeze=4),
    SwinConfig(image_size=256),
    ResNetV1Config(image_size=256),
)
TEXTS = (TextConfig(projection="linear"), EncoderTextConfig())
# Experiments in which every class of config has a place.
EXPERIMENTS = [
    Experiment(
        model=ModelConfig(tower, text),
        preprocess=PreprocessConfig(image_size=256),
        tokenizer=TokenizerConfig(),
        data=DataConfig(mixture=(MixturePart("a.tar"),)),
        evals=(EvalConfig(source="folder/"),),
        adapter=AdapterConfig(),
        distill=DistillConfig("teacher/"),
        selection=SelectionConfig(),
    )
    for tower, text in [(tower, TEXTS[0]) for tower in TOWERS] + [(TOWERS[0], TEXTS[1])]
]


def choices_of(hint: Any) -> tuple[str, ...]:
    """The choices of a type that is a Literal, or has one inside of it."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    inner = typing.get_args(hint)
    if inner and typing.get_origin(inner[0]) is tuple:  # a mapping: it is refused as a whole
        return ()
    found = (choices_of(part) for part in inner)
    return next((choices for choices in found if choices), ())


def all_classes(cls: type = Config) -> list[type[Config]]:
    found = [c for sub in cls.__subclasses__() for c in (sub, *all_classes(sub))]
    return [c for c in found if dataclasses.is_dataclass(c)]


def fields_with_choices() -> dict[tuple[str, str], tuple[str, ...]]:
    """The choices of every field that has some, by class and field."""
    found = {}
    for cls in all_classes():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            if choices := choices_of(hints[field.name]):
                found[cls.__name__, field.name] = choices
    return found


def places(value: Any, path: tuple = ()):
    """Every config inside `value`, with its path."""
    if isinstance(value, Config):
        yield path, value
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            yield from places(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from places(part, (*path, number))


def wrong_in_each_way():
    """(class, field, choices, function that gives the field a wrong value) for each way."""
    wanted, seen = fields_with_choices(), set()
    for experiment in EXPERIMENTS:
        for path, config in places(experiment):
            for (cls, name), choices in wanted.items():
                if cls != type(config).__name__ or (cls, name) in seen:
                    continue
                seen.add((cls, name))
                yield cls, name, choices, in_python(config, name)
                yield cls, name, choices, in_json(experiment, path, name)
                yield cls, name, choices, on_the_command_line(config, name)
    assert seen == set(wanted), f"no place for {set(wanted) - seen}"


def in_python(config: Config, name: str):
    def build():
        dataclasses.replace(config, **{name: "no-such"})

    return build


def in_json(experiment: Experiment, path: tuple, name: str):
    def build():
        values: Any = to_dict(experiment)
        inner = values
        for part in path:
            inner = inner[part]
        inner[name] = "no-such"
        with pytest.raises(ConfigError) as caught:
            from_dict(Experiment, values)
        where = re.sub(r"\.\d+", "", ".".join(map(str, ("Experiment", *path, name))))
        assert str(caught.value).startswith(where)
        raise caught.value

    return build


def on_the_command_line(config: Config, name: str):
    """The parser of the class alone: that of a whole experiment takes 0.1 s for each option."""

    def build():
        option = f"--{name.replace('_', '-')}"
        with pytest.raises((parse.UsageError, ConfigError)) as caught:
            parse.options(config, "vlm train", [option, "no-such"])
        assert option in str(caught.value) or isinstance(caught.value, ConfigError)
        raise ConfigError(str(caught.value).replace("-", "_"))

    return build


@pytest.mark.untyped
def test_a_wrong_choice_is_refused_from_python_json_and_the_command_line():
    parse.options(AdapterConfig(), "vlm train", [])  # tyro is imported
    count, seconds = check_all()
    assert count >= 37
    assert seconds < 2


def test_an_option_of_a_whole_experiment_is_refused_with_its_path():
    with pytest.raises(parse.UsageError, match=r"'--model\.vision\.stem'.*'linear', 'conv'"):
        parse.options(EXPERIMENTS[0], "vlm train", ["--model.vision.stem", "x"])


@pytest.mark.untyped
def test_a_config_file_with_a_wrong_choice_is_refused(tmp_path):
    python, plain = tmp_path / "config.py", tmp_path / "config.json"
    python.write_text("import vlm\nconfig = vlm.Experiment(lock='image')\n")
    with pytest.raises(ConfigError, match=r"Experiment\.lock is 'image': .*'none', 'vision'"):
        load_config(python)
    plain.write_text(json.dumps({"optimizer": {"name": "AdamW"}}))
    with pytest.raises(ConfigError, match=r"Experiment\.optimizer\.name is 'AdamW': .*'adamw'"):
        load_config(plain)


def numbers_in(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)


def as_wide(value: Any, number: float) -> Any:
    return (number,) * len(value) if isinstance(value, tuple) else number


@pytest.mark.untyped
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, -(10**20), "8", object()])
def test_no_field_takes_a_number_that_cannot_be(number):
    count = 0
    configs = {type(config): config for e in EXPERIMENTS for _, config in places(e)}
    configs[OptimizerConfig] = OptimizerConfig(learning_rate=1e-3, warmup=0.1, ema=0.9)
    for cls, config in configs.items():
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if numbers_in(value):
                count += 1
                with pytest.raises(ConfigError, match=f"{cls.__name__}.{field.name}"):
                    dataclasses.replace(config, **{field.name: as_wide(value, number)})
    assert count > 100


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvNeXtConfig(widths=(-4, 256, 512, 1024)),
        lambda: ViTaminConfig(depth=-3),
        lambda: ViTaminConfig(conv_depths=(0, 4)),
        lambda: DataConfig(workers=-1),
        lambda: DataConfig(shuffle=0),
        lambda: DataConfig(max_bad_share=1.5),
        lambda: AugmentConfig(blur=1.5),
        lambda: MixturePart("a.tar", weight=-1.0),
        lambda: TokenizerConfig(zeroed_id=-1),
        lambda: EvalConfig(source="a/", examples=0),
        lambda: Experiment(seed=-1),
        lambda: Experiment(keep_checkpoints=0),
        lambda: Experiment(profile=(0, 4)),
    ],
)
def test_sizes_that_cannot_be(build):
    with pytest.raises(ConfigError, match=r"^\w+Config\.|^Experiment\.|^MixturePart\."):
        build()


@pytest.mark.untyped
def test_values_become_those_of_the_declared_types():
    config = OptimizerConfig(learning_rate=1, b2=np.float32(0.5))  # pyright: ignore
    assert (type(config.learning_rate), type(config.b2)) == (float, float)
    config = DataConfig(captions=["a", "b"], workers=np.int64(2))  # pyright: ignore
    assert config.captions == ("a", "b")
    assert type(config.workers) is int
    assert json.dumps(to_dict(config))
    assert hash(config) == hash(DataConfig(captions=("a", "b"), workers=2))
    assert Experiment(data={"source": "a.csv"}).data == DataConfig("a.csv")  # pyright: ignore


def check_all() -> tuple[int, float]:
    start, count = time.process_time(), 0
    for cls, name, choices, build in wrong_in_each_way():
        with pytest.raises(ConfigError) as caught:
            build()
        message = str(caught.value)
        assert name in message, (cls, name, message)
        for choice in choices:
            assert repr(choice.replace("-", "_")) in message.replace("-", "_"), (cls, name, message)
        count += 1
    return count // 3, time.process_time() - start


if __name__ == "__main__":
    parse.options(AdapterConfig(), "vlm train", [])  # tyro is imported
    count, seconds = check_all()
    print(f"{count} fields with choices, each wrong in Python, JSON and options: {seconds:.2f} s")
