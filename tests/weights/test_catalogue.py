"""The table of known models holds together."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vlm.cli import options
from vlm.cli.models import models
from vlm.cli.parse import UsageError
from vlm.errors import ConfigError
from vlm.models import variants
from vlm.weights.catalogue import (
    ENTRIES,
    choose,
    default_model,
    find,
    resolve,
    similar,
    table,
    undecided,
)
from vlm.weights.hub import is_hub_id
from vlm.weights.instantiate import abstract_model
from vlm.weights.pins import Pin, write_pin


def test_names_are_unique_and_loadable_in_form():
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) > 40
    assert all(is_hub_id(name) or name.endswith(".pt") for name in names)


def test_a_figure_has_its_source_and_is_in_range():
    for entry in ENTRIES:
        assert (entry.imagenet is None) == (entry.source is None)
        assert entry.imagenet is None or 45 < entry.imagenet < 90
        assert entry.context_length in (16, 52, 64, 77, 80, 256, 512)
        assert 84 <= entry.image_size <= 512


def test_one_and_all():
    assert find("laion/CLIP-ViT-B-32-laion2B-s34B-b79K").imagenet == 66.56
    columns, rows = table()
    assert len(rows) == len(ENTRIES)
    assert {len(row) for row in rows} == {len(columns)}
    with pytest.raises(ConfigError, match=r"no 'siglip3-base'; it has siglip-base, siglip2-base"):
        find("siglip3-base")
    with pytest.raises(ConfigError, match="vlm models"):
        find("qwerty")


def test_every_name_of_a_checkpoint_is_its_own():
    plain = [e.short_name.lower() for e in ENTRIES if e.short_name]
    assert len(plain) == len(set(plain)) > 80
    for entry in ENTRIES:
        assert resolve(entry.name) is entry
        if entry.short_name:
            assert resolve(entry.short_name) is entry
            assert "/" not in entry.short_name
        if is_hub_id(entry.name):
            assert resolve(entry.name.split("/")[1]) is entry
    for name in ("ViT-B-32", "vit_b_32", "ViT-B/32", "CLIP-ViT-B-32-DataComp.XL-s13B-b90K"):
        assert resolve(name).name == "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"
    assert resolve("siglip2-base").name == "google/siglip2-base-patch16-224"
    assert resolve("") is resolve("clip") is resolve("ViT-B") is resolve("./ViT-B-32") is None


def test_the_shortest_name_is_of_the_most_accurate_open_checkpoint():
    by_architecture = {}
    for entry in ENTRIES:
        if entry.short_name and entry.imagenet and entry.licence in ("MIT", "Apache-2.0"):
            by_architecture.setdefault(entry.architecture, []).append(entry)
    assert len(by_architecture) > 20
    for entries in by_architecture.values():
        shortest = min(entries, key=lambda entry: len(entry.short_name))
        assert shortest is max(entries, key=lambda entry: entry.imagenet)
        # Names of the others begin with it, so that they are found together.
        assert all(e.short_name.startswith(shortest.short_name) for e in entries)


def test_names_like_a_wrong_one():
    assert similar("ViT-B-23")[0] == similar("vitb32")[0] == "ViT-B-32"
    assert similar("EVA02-B16") == ["EVA02-B-16"]
    assert set(similar("siglip2")) == {e for e in similar("siglip2") if e.startswith("siglip2-")}
    assert similar("qwerty") == similar("") == []


def test_the_default_is_open_small_and_the_most_accurate():
    chosen = default_model()
    assert chosen.short_name == "EVA02-B-16"
    assert "else EVA02-B-16." in options.ModelOption.__metadata__[0].help
    for entry in ENTRIES:
        small = (entry.parameters or 1e9) * 4 < 700 and (entry.image_gflops or 1e9) <= 50
        if small and entry.licence in ("MIT", "Apache-2.0"):
            assert (entry.imagenet or 0) <= chosen.imagenet


def test_a_choice_fits_all_that_is_asked():
    found = choose(max_parameters=400, licence="open", language="de")
    assert {e.name for e in found} >= {"laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k"}
    for entry in found:
        assert (entry.parameters or 1e9) <= 400
        assert entry.licence in ("MIT", "Apache-2.0")
        assert entry.languages in ("multilingual", "worldwide")
    chinese, german = ({e.name for e in choose(language=code)} for code in ("zh", "de"))
    families = ("FG-CLIP 2", "Chinese CLIP")
    assert chinese - german == {e.name for e in ENTRIES if e.family in families}
    assert choose() == list(ENTRIES)
    assert {e.licence for e in choose(licence="Apple")} == {"Apple"}
    languages = {e.languages for e in choose(language="en")}
    assert languages == {e.languages for e in ENTRIES} - {"Chinese"}
    with pytest.raises(ConfigError, match="no known model has the licence 'GPL': choose open, "):
        choose(licence="GPL")
    with pytest.raises(ConfigError, match="no known model fits all of that"):
        choose(max_parameters=1)


# Architectures of the table whose configs the package names: family, size, changes to the image
# tower, words of the vocabulary.
ABSTRACT = {
    "ViT-B/16": ("clip", "B/16", {}, 49_408),
    "ViT-L/14@336": ("clip", "L/14", {"image_size": 336}, 49_408),
    "ViT-H/14@378": ("clip", "H/14", {"image_size": 378}, 49_408),
    "SigLIP B/16": ("siglip", "B/16", {}, 32_000),
    "SigLIP2 B/32@256": ("siglip", "B/16", {"patch_size": 32, "image_size": 256}, 256_000),
    "SigLIP2 B/16 NaFlex": ("siglip", "B/16", {"image_size": 256}, 256_000),
    "SigLIP2 L/16@384": ("siglip", "L/16", {"image_size": 384}, 256_000),
    "SigLIP2 So400m/14@384": ("siglip", "So400m/14", {"image_size": 384}, 256_000),
    "SigLIP2 g-opt/16@256": ("siglip", "g-opt/16", {"image_size": 256}, 256_000),
}


@pytest.mark.parametrize("architecture", ABSTRACT)
def test_a_count_is_that_of_the_abstract_model(architecture):
    family, size, changes, words = ABSTRACT[architecture]
    config = getattr(variants, family)(size)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **changes),
        text=dataclasses.replace(config.text, vocab_size=words),
    )
    model = abstract_model(config, jnp.float32)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    (found,) = {e.parameters for e in ENTRIES if e.architecture == architecture}
    assert found == pytest.approx(count / 1e6, abs=0.006)


def test_every_entry_has_a_count_and_what_is_unknown_is_named(capsys):
    assert all(entry.parameters is not None for entry in ENTRIES)
    names = {entry.name for entry in choose(max_parameters=400)}
    assert "google/siglip2-base-patch16-256" in names
    unknown = undecided(max_parameters=300, licence="open")
    families = {"ALIGN", "TIPSv2", "Chinese CLIP", "X-CLIP", "VideoPrism", "GroupViT"}
    assert {entry.family for entry in unknown} == families
    assert not undecided(max_parameters=300)
    models(max_params="300M", licence="open")
    told = " ".join(capsys.readouterr().out.split())
    assert "Left out, because a requested fact is unknown: kakaobrain/align-base" in told


def test_one_model_has_its_commit_and_its_names(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    models("siglip2-base", json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "google/siglip2-base-patch16-224"
    assert shown["commit"] is None
    write_pin(shown["name"], Pin("abc123", {"config.json": 3}))
    models("google/siglip2-base-patch16-224")
    out = capsys.readouterr().out
    assert "abc123" in out
    assert "siglip2-base" in out
    with pytest.raises(UsageError, match="--update needs the name of a Hub model"):
        models("RN50.pt", update=True)
    with pytest.raises(UsageError, match="--update needs"):
        models(update=True)
