"""`vlm search FOLDER QUERY`: an index in the cache, and what is done with the hits."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import vlm
from vlm.cli import hit_files, inline_images, main, search

NAMES = ["test-red-square.png", "test-blue-stripe.png", "test-red-stripe.png"]


@pytest.fixture(scope="module")
def loaded():
    return vlm.load(tiny.run())


@pytest.fixture
def photos(tmp_path, monkeypatch, loaded):
    """A folder with three pictures, in a working directory with a cache of its own.

    The model of VLM_MODEL is loaded once: its programs are compiled for all tests.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLM_MODEL", str(tiny.run()))
    load = search.load_model
    monkeypatch.setattr(search, "load_model", lambda model: load(model) if model else loaded)
    Path("photos").mkdir()
    for name in NAMES:
        shutil.copy(tiny.folder() / "data" / name, "photos")
    return tmp_path / "photos"


@pytest.fixture
def found(capsys):
    """Search: the lines of stdout, and the counts of the status line."""

    def found(*args, code=0):
        assert main(["search", *map(str, args)]) == code
        out, err = capsys.readouterr()
        counts = re.findall(r"^(\d+) images in .* \((\d+) encoded, (\d+) removed\)$", err, re.M)
        return out.splitlines(), [tuple(map(int, row)) for row in counts], err

    return found


def test_only_changed_files_are_encoded_again(photos, found):
    lines, counts, _ = found("photos", "a red square")
    assert counts == [(3, 3, 0)]
    assert {line.split()[-1] for line in lines} == {str(photos / name) for name in NAMES}
    assert found(photos / ".." / "photos", "red")[1] == [(3, 0, 0)]  # the same folder
    shutil.copy(photos / NAMES[0], photos / "new.png")
    (photos / NAMES[1]).unlink()
    os.utime(photos / NAMES[2], ns=(0, 1))
    assert found("photos/", "red")[1] == [(3, 2, 1)]
    assert len(list((photos.parent / "cache" / "indexes").iterdir())) == 1
    lines, counts, _ = found("photos", photos / "new.png", "--k", 2, "--json")
    assert counts == [(3, 0, 0)]
    ids = {json.loads(line)["id"] for line in lines}
    assert ids == {str(photos / "new.png"), str(photos / NAMES[0])}  # the same picture twice
    likes, *_ = found("photos", "photos/new.png", "--like", "--json")
    assert json.loads(likes[0])["id"] == str(photos / NAMES[0])


def test_an_unreadable_file_does_not_save_the_index_again(photos, found):
    (photos / "bad.png").write_bytes(b"no picture")
    found("photos", "red", code=1)
    (folder,) = (photos.parent / "cache" / "indexes").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert found("photos", "red", code=1)[1] == [(3, 0, 0)]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.slow
def test_each_model_has_its_own_index(photos, found, tmp_path):
    golden = Path(__file__).parent.parent / "weights" / "golden" / "oc_eva02"
    assert found("photos", "red")[1] == [(3, 3, 0)]
    assert found("photos", "red", "--model", golden)[1] == [(3, 3, 0)]
    assert found("photos", "red")[1] == [(3, 0, 0)]
    assert search.cached_index("photos", "a") != search.cached_index("photos", "b")
    assert search.cached_index("photos", "a") == search.cached_index(str(photos), "a")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "no list", "another model"])
def test_a_damaged_index_is_built_again(photos, found, damage):
    found("photos", "red")
    (folder,) = (photos.parent / "cache" / "indexes").iterdir()
    if damage == "truncated":
        (rows,) = folder.glob("rows-*.npy")
        rows.write_bytes(rows.read_bytes()[:-9])
    elif damage == "no list":
        (folder / "index.json").write_text("{")
    else:
        about = json.loads((folder / "index.json").read_text())
        about["facts"]["preprocess"] = "of another version"
        (folder / "index.json").write_text(json.dumps(about))
    lines, counts, err = found("photos", "red")
    assert counts == [(3, 3, 0)]
    assert len(lines) == 3
    assert "is replaced: " in err


@pytest.mark.slow
def test_a_search_beside_another_one(photos, found, monkeypatch):
    """Another process saves its index of the folder first: this search goes on with that."""
    encode = vlm.Bundle.encode_image

    def and_another_searches(bundle, images, *args, **options):
        monkeypatch.setattr(vlm.Bundle, "encode_image", encode)
        assert main(["search", "photos", "red"]) == 0
        return encode(bundle, images, *args, **options)

    monkeypatch.setattr(vlm.Bundle, "encode_image", and_another_searches)
    lines, counts, _ = found("photos", "red")
    assert counts == [(3, 3, 0), (3, 0, 0)]
    assert len(lines) == 6


def test_files_that_are_not_read_are_counted(photos, found, monkeypatch):
    (photos / "broken.png").write_bytes(b"\x89PNG")
    (photos / "notes.txt").write_text("")
    for name in ("IMG_1.HEIC", "IMG_2.heic"):
        (photos / name).write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr("vlm.cli.images.importlib.util.find_spec", lambda name: None)
    lines, counts, err = found("photos", "red", code=1)
    assert (len(lines), counts) == (3, [(3, 3, 0)])
    assert "skipped 1 file in photos that are no images: 1 of .txt" in err
    assert (
        "skipped 2 files in photos that are not read, because HEIC needs another package (pip"
        in err
    )
    assert "1 of 4 images could not be read" in err
    assert found(photos / "IMG_1.HEIC", "red", code=1)[2].count('pip install "vlm-jax[heif]"') == 1
    for name in (*NAMES, "broken.png"):
        (photos / name).unlink()
    assert "has only HEIC images (2)" in found("photos", "red", code=1)[2]


def test_copies_of_the_hits(photos, found):
    (photos / "more").mkdir()
    shutil.copy(photos / NAMES[1], photos / "more" / NAMES[0])  # the same name, another picture
    *_, err = found("photos", "red", "--copy", "out")
    assert "4 images copied to out" in err
    red = {(photos / NAMES[0]).read_bytes(), (photos / NAMES[1]).read_bytes()}
    names = sorted(os.listdir("out"))
    assert names == sorted([*NAMES, "test-red-square-2.png"])
    pair = [Path("out", name).read_bytes() for name in names if name.startswith("test-red-square")]
    assert set(pair) == red
    assert "0 images copied to out" in found("photos", "red", "--copy", "out")[2]
    assert sorted(os.listdir("out")) == names


def test_a_contact_sheet(photos, found):
    (
        photos / "a name that is so long that it does not fit below its picture at all.png"
    ).symlink_to(photos / NAMES[0])
    found("photos", "a red square", "--sheet", "hits.png", "--k", 3)
    sheet = np.asarray(Image.open("hits.png").convert("RGB"))
    size = hit_files.CELL + hit_files.GAP
    assert sheet.shape[1] == 2 * size + hit_files.GAP
    red = (np.abs(sheet.astype(int) - (220, 30, 30)).max(-1) < 8).sum()
    assert red > 500
    found("photos", "red", "--sheet", "hits.jpg", "--k", 1)
    assert Image.open("hits.jpg").format == "JPEG"


def test_the_viewer_of_the_system(photos, found, monkeypatch):
    started = []
    monkeypatch.setattr(hit_files.subprocess, "Popen", lambda line, **_: started.append(line))
    monkeypatch.setattr(hit_files.shutil, "which", lambda program: program)
    monkeypatch.setattr(hit_files.sys, "platform", "linux")
    lines, *_ = found("photos", "red", "--open", "--k", 2, "--json")
    files = [json.loads(line)["id"] for line in lines]
    assert started == [["xdg-open", file] for file in files]
    started.clear()
    monkeypatch.setattr(hit_files.sys, "platform", "darwin")
    found("photos", "red", "--open", "--k", 2)
    assert started == [["open", *files]]
    monkeypatch.setattr(hit_files.shutil, "which", lambda program: None)
    assert (
        "--open needs the program open, which is not" in found("photos", "a", "--open", code=1)[2]
    )


def test_hits_without_files_are_not_opened(found, photos, tmp_path, monkeypatch, loaded):
    monkeypatch.setattr(search, "load_model", lambda model: loaded)
    index = vlm.RetrievalIndex(loaded)
    index.add(np.eye(2, loaded.embed_dim, dtype=np.float32), ids=[7, "gone.png"])
    index.save(tmp_path / "index")
    options = [tmp_path / "index", "red", "--model", tiny.run()]
    for option in (["--open"], ["--copy", "out"]):
        assert f"{option[0]} needs the files of the hits" in found(*options, *option, code=1)[2]
    found(*options, "--sheet", "hits.png")  # grey cells


def test_moved_images_are_found_by_root(photos, found):
    assert main(["index", "photos", "my-index"]) == 0
    photos.rename("a=b")
    new = photos.parent / "a=b"
    lines, *_ = found("my-index", "red", "--root", f"{photos}={new}", "--copy", "copies")
    assert {line.split()[-1] for line in lines} == {str(new / name) for name in NAMES}
    assert {path.name for path in Path("copies").iterdir()} == set(NAMES)
    like = ("my-index", new / NAMES[0], "--like", "--root", f"{photos}={new}")
    assert len(found(*like)[0]) == 2
    for args, code, message in (
        (("my-index", "red", "--root", f"{photos}=nowhere"), 2, "there is no such folder"),
        (("my-index", "red", "--root", photos), 2, "write --root OLD=NEW"),
        (("my-index", "red", "--root", f"/elsewhere={new}"), 1, "no image of the index lies in"),
        (("a=b", "red", "--root", f"{photos}={new}"), 2, "--root is for an index"),
    ):
        assert message in found(*args, code=code)[2]


def test_pictures_in_a_terminal(photos, capsys, monkeypatch):
    monkeypatch.setattr(inline_images, "protocol", lambda: "iterm")
    for options, drawn in (((), 2), (("--no-pictures",), 0), (("--json",), 0)):
        assert main(["search", "photos", "red", "--k", "2", *options]) == 0
        assert capsys.readouterr().out.count("\033]1337;File=inline=1") == drawn


def test_bad_input_is_one_sentence(photos, found, monkeypatch):
    for args, code, message in (
        (("nowhere", "red"), 1, "build an index with vlm index IMAGES nowhere"),
        (("photos", "red", "--sheet", "hits.txt"), 2, "is not a PNG or JPEG"),
        (("photos", "red", "--where", "bytes"), 2, "not a condition"),
        (("photos", "nowhere.png"), 1, "no image 'nowhere.png'"),
        (("photos",), 2, "QUERY"),
        (("photos", "red", "--like"), 1, "no id"),
    ):
        *_, err = found(*args, code=code)
        assert message in err
        assert err.count("vlm: ") == 1
    monkeypatch.setenv("VLM_CACHE", "photos/test-red-square.png/cache")
    assert "set VLM_CACHE" in found("photos", "red", code=1)[2]
