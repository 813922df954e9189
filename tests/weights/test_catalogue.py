"""The table of known models holds together."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vlm.cli.models import models
from vlm.errors import ConfigError
from vlm.models import variants
from vlm.weights.catalogue import ENTRIES, choose, find, table, undecided
from vlm.weights.hub import is_hub_id
from vlm.weights.instantiate import abstract_model


def test_names_are_unique_and_loadable_in_form():
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) > 40
    assert all(is_hub_id(name) or name.endswith(".pt") for name in names)


def test_a_figure_has_its_source_and_is_in_range():
    for entry in ENTRIES:
        assert (entry.imagenet is None) == (entry.source is None)
        assert entry.imagenet is None or 45 < entry.imagenet < 90
        assert entry.context_length in (16, 64, 77, 80)
        assert 84 <= entry.image_size <= 512


def test_one_and_all():
    assert find("laion/CLIP-ViT-B-32-laion2B-s34B-b79K").imagenet == 66.56
    columns, rows = table()
    assert len(rows) == len(ENTRIES)
    assert {len(row) for row in rows} == {len(columns)}
    with pytest.raises(ConfigError, match=r"no 'siglip2-base'; it has google/siglip2-base"):
        find("siglip2-base")
    with pytest.raises(ConfigError, match="vlm models"):
        find("qwerty")


def test_a_choice_fits_all_that_is_asked():
    found = choose(max_parameters=400, licence="open", language="de")
    assert {e.name for e in found} >= {"laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k"}
    for entry in found:
        assert (entry.parameters or 1e9) <= 400
        assert entry.licence in ("MIT", "Apache-2.0")
        assert entry.languages in ("multilingual", "worldwide")
    chinese, german = ({e.name for e in choose(language=code)} for code in ("zh", "de"))
    assert chinese - german == {e.name for e in ENTRIES if e.family == "FG-CLIP 2"}
    assert choose() == list(ENTRIES)
    assert {e.licence for e in choose(licence="Apple")} == {"Apple"}
    assert {e.languages for e in choose(language="en")} == {e.languages for e in ENTRIES}
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
    assert {entry.family for entry in unknown} == {"ALIGN", "TIPSv2"}
    assert not undecided(max_parameters=300)
    models(max_params="300M", licence="open")
    told = " ".join(capsys.readouterr().out.split())
    assert "Left out, because a requested fact is unknown: kakaobrain/align-base" in told
