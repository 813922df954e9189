"""Ids that are paths: absolute by default, found by relative paths, and moved to other folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.errors import ConfigError
from vlm.heads.image_paths import is_relative, relocated
from vlm.heads.retrieval import RetrievalIndex


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Working directory with two pictures, named by relative paths."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    paths = [Path("photos/a.png"), Path("photos/b.png")]
    for number, path in enumerate(paths):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(path)
    return paths


def test_relative_paths_are_stored_as_absolute_ones_and_found_by_both(model, pictures, tmp_path):
    index = RetrievalIndex(model)
    index.add(pictures)
    assert index.ids == tuple(str(tmp_path / path) for path in pictures)
    assert pictures[0] in index
    assert "photos/a.png" in index
    assert "a.png" not in index
    assert index.like(pictures[0], k=1)[0].id == index.ids[1]
    index.update(pictures, metadata={"year": [2001, 2002]})
    assert len(index) == 2
    assert index.metadata("photos/b.png") == {"year": 2002}
    index.remove(pictures[0])
    assert index.ids == (str(tmp_path / "photos/b.png"),)


def test_an_index_of_relative_paths_is_updated_and_not_doubled(model, pictures):
    index = RetrievalIndex(model)
    index.add(pictures, ids=["photos/a.png", "photos/b.png"])
    index.update(pictures)
    assert index.ids == ("photos/a.png", "photos/b.png")


def test_images_that_moved_get_new_ids_which_a_save_keeps(model, pictures, tmp_path):
    index = RetrievalIndex(model)
    index.add(pictures)
    index.save("index")
    moved = RetrievalIndex.load("index", model)
    moved.relocate({str(tmp_path / "photos"): "/new place/"})
    wanted = ("/new place/a.png", "/new place/b.png")
    assert moved.ids == wanted
    assert moved.search(pictures[1], k=1)[0].id == wanted[1]
    moved.remove(wanted[0])
    moved.reload()
    assert moved.ids == wanted[1:]
    moved.save("index")
    again = RetrievalIndex.load("index", model)
    assert again.ids == wanted[1:]
    np.testing.assert_array_equal(again.embeddings(), moved.embeddings())
    again.add(pictures[:1])
    again.save("index")
    assert RetrievalIndex.load("index", model).ids == (*wanted[1:], str(tmp_path / "photos/a.png"))


def test_a_folder_that_no_image_lies_in_is_an_error(model, pictures, tmp_path):
    index = RetrievalIndex(model)
    index.add(pictures)
    with pytest.raises(ConfigError, match=r"no image of the index lies in '/odl': one is .*a\.png"):
        index.relocate({"/odl": "/new"})
    numbered = RetrievalIndex(model)
    numbered.add(pictures, ids=[1, 2])
    with pytest.raises(ConfigError, match="its ids are no paths"):
        numbered.relocate({".": "/new"})
    index.add([tmp_path / "photos/b.png"], ids=["/other/a.png"])
    with pytest.raises(ConfigError, match="two images the same path"):
        index.relocate({"/other": str(tmp_path / "photos")})
    assert "/other/a.png" in index


@pytest.mark.parametrize(
    ("id", "folders", "wanted"),
    [
        ("/old/a.png", {"/old": "/new"}, "/new/a.png"),
        ("/old/a.png", {"/old/": "/new/"}, "/new/a.png"),
        ("/older/a.png", {"/old": "/new"}, "/older/a.png"),
        ("/a.png", {"/": "/new"}, "/new/a.png"),
        ("/old/b/a.png", {"/old": "/x", "/old/b": "/y"}, "/y/a.png"),
        ("b/a.png", {".": "/new"}, "/new/b/a.png"),
        ("/b/a.png", {".": "/new"}, "/b/a.png"),
        ("note", {".": "/new"}, "note"),
        (7, {".": "/new"}, 7),
        ("gs://one/a.png", {"gs://one": "/new"}, "/new/a.png"),
        ("/old/a.png", {"/old": "gs://two/x"}, "gs://two/x/a.png"),
        ("C:\\photos\\x\\a.png", {"C:\\photos": "/new"}, "/new/x/a.png"),
    ],
)
def test_moved_paths(id, folders, wanted):
    ids, unused = relocated([id], folders)
    assert ids == [wanted]
    if len(folders) == 1:
        assert bool(unused) == (id == wanted)


def test_relative_paths_of_images():
    assert is_relative("photos/a.png")
    assert not any(map(is_relative, ["/a.png", "C:/a.png", "\\a.png", "s3://b/a.png", "a", 7]))
