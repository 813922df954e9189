"""The table of known models holds together."""

import pytest

from vlm.errors import ConfigError
from vlm.weights.catalogue import ENTRIES, choose, find, table
from vlm.weights.hub import is_hub_id


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
        assert entry.parameters <= 400
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
