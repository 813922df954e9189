"""Every option of `vlm train` says what it is for, in a sentence of its own."""

import dataclasses
import typing

import pytest
from docstring_parser import parse

from vlm import config
from vlm.config import towers

CLASSES = [
    thing
    for module in (config, towers)
    for thing in vars(module).values()
    if dataclasses.is_dataclass(thing) and isinstance(thing, type)
]
FIELDS = [(cls, field.name) for cls in dict.fromkeys(CLASSES) for field in dataclasses.fields(cls)]


def test_the_union_of_towers_is_among_them():
    assert set(typing.get_args(towers.VisionTowerConfig)) <= set(CLASSES)
    assert len(FIELDS) > 120


@pytest.mark.parametrize(
    ("cls", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", str(part))
)
def test_a_field_is_documented(cls, name):
    texts = {param.arg_name: param.description or "" for param in parse(cls.__doc__).params}
    text = texts.get(name, "")
    assert len(text.split()) >= 3, f"{cls.__name__}.{name} has no text in its Args"
    assert text[0].isupper() or text.split(":")[0].islower(), text
    assert text.endswith(".")


@pytest.mark.parametrize("cls", dict.fromkeys(CLASSES), ids=lambda cls: cls.__name__)
def test_no_text_is_of_a_field_that_is_gone(cls):
    known = {field.name for field in dataclasses.fields(cls)}
    assert {param.arg_name for param in parse(cls.__doc__).params} <= known
