"""Which caption and image a config names, in tars and folders; what is skipped is reported."""

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vlm.cli import main
from vlm.config import DataConfig
from vlm.data.example_reader import ExampleReader
from vlm.data.examples import captions_of, choose_caption
from vlm.data.faults import BadSample
from vlm.data.sources import open_source
from vlm.errors import DataError


def picture(value: int = 0, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 8), (value, 0, 0)).save(out, form)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def img2dataset(number: int, **fields) -> list[tuple[str, bytes]]:
    """The three files of an example as img2dataset writes them."""
    key, text = f"{number:09d}", f"plain {number}"
    fields = {"caption": text, "key": key, "re_caption": f"re {number}", **fields}
    return [
        (f"{key}.jpg", picture(number, "JPEG")),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def write_files(folder: Path, members: list[tuple[str, bytes]], order: int) -> None:
    for name, data in sorted(members)[::order]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


LAYOUTS = ("random", "stream", "files", "files reversed")


def examples(layout: str, folder: Path, members: list[tuple[str, bytes]], **config) -> list:
    """The examples, or what is wrong with them, of one layout of the same members."""
    if layout.startswith("files"):
        write_files(folder / "00000", members, -1 if "reversed" in layout else 1)
        config["source"] = str(folder)
    else:
        write_tar(folder / "a.tar", members)
        config |= {"source": str(folder / "a.tar"), "access": layout}
    reader = ExampleReader(DataConfig(eval_split=None, **config), "train")
    return [read.example for read in reader.read()]


def captions(layout: str, folder: Path, members, *names: str) -> list[list[str]]:
    config = DataConfig("", captions=names or ("caption",))
    found = examples(layout, folder, members, captions=config.captions)
    return [captions_of(example, config) for example in found]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "plain {}"),
        (("caption",), "plain {}"),
        (("txt",), "plain {}"),
        (("json/caption",), "plain {}"),
        (("re_caption",), "re {}"),
        (("json/re_caption",), "re {}"),
        (("key",), "00000000{}"),
    ],
)
def test_a_named_field_is_the_field_that_is_used(tmp_path, layout, names, expected):
    members = [m for n in range(3) for m in img2dataset(n)]
    found = captions(layout, tmp_path, members, *names)
    assert found == [[expected.format(n)] for n in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unknown_name_is_an_error_that_lists_what_there_is(tmp_path, layout):
    members = [m for n in range(3) for m in img2dataset(n)] + [("000000002.npy", b"\x93NUMPY")]
    with pytest.raises(
        DataError, match=r"no feature 'nonsense' that data\.captions names"
    ) as message:
        captions(layout, tmp_path, members, "nonsense")
    for name in ("caption", "re_caption", "key", "txt"):
        assert name in str(message.value)
    if not layout.startswith("files"):
        assert "npy" in str(message.value)


def test_data_show_refuses_an_unknown_name(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [m for n in range(3) for m in img2dataset(n)])
    for more in ([], ["--json"]):
        line = ["data", "show", str(tmp_path / "a.tar"), "--captions", "nonsense", *more]
        assert main(line) == 1
        message = capsys.readouterr().err
        assert "no feature 'nonsense' that data.captions names: it has" in message
        assert "re_caption" in message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_examples_that_lack_a_named_field_are_bad_samples(tmp_path, layout):
    members = [m for n in range(3) for m in img2dataset(n)]
    members[5] = (members[5][0], b'{"caption": "plain 1"}')
    found = examples(layout, tmp_path, members, captions=("re_caption",))
    config = DataConfig("", captions=("re_caption",))
    assert captions_of(found[2], config) == ["re 2"]
    with pytest.raises(BadSample, match=r"00001.* has no caption in re_caption"):
        captions_of(found[1], config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_and_a_field_that_differ_are_not_chosen_between(tmp_path, layout):
    members = [m for n in range(3) for m in img2dataset(n, caption=f"other {n}")]
    with pytest.raises(DataError, match=r"name txt or json/caption in data\.captions"):
        captions(layout, tmp_path, members)
    assert captions(layout, tmp_path, members, "txt")[1] == ["plain 1"]
    assert captions(layout, tmp_path, members, "json/caption")[1] == ["other 1"]
    assert captions(layout, tmp_path, members, "re_caption")[1] == ["re 1"]


@pytest.mark.parametrize("layout", ["random", "stream"])
def test_what_is_broken_in_the_first_example_is_not_the_data_sets(tmp_path, layout):
    members = [m for n in range(4) for m in img2dataset(n)]
    members[2] = (members[2][0], b'{"cut')
    found = examples(layout, tmp_path, members[:4] + members[5:])
    assert isinstance(found[0], BadSample)
    assert [e["caption"] for e in found[1:]] == ["plain 1", "plain 2", "plain 3"]


@pytest.mark.parametrize("layout", ["random", "stream"])
def test_names_with_dots_are_split_at_the_first(tmp_path, layout):
    members = [
        ("in.side/a.v2.jpg", picture(10, "JPEG")),
        ("in.side/a.v2.txt", b"dotted"),
        ("in.side/a.v2.json", b'{"caption": "dotted", "score": 3}'),
        (".hidden.jpg", b"nor this"),
        ("b.png", picture(20)),
        ("b.mask.png", picture(99)),
        ("b.txt", b"plain"),
        ("c.left.png", picture(1)),
        ("c.right.png", picture(2)),
        ("c.txt", b"two"),
    ]
    found = examples(layout, tmp_path, members)
    assert [e["caption"] for e in found[:2]] == ["dotted", "plain"]
    assert found[0]["score"] == 3
    assert [e["image"] for e in found[:2]] == [members[0][1], members[4][1]]
    assert isinstance(found[2], BadSample)
    assert "several images, left.png, right.png: name one of them with data.image" in str(found[2])
    for name in ("right", "right.png"):
        found = examples(layout, tmp_path, members, image=name)
        assert found[2][name] == members[8][1]
        assert found[0].kind == found[1].kind == "no image"


@pytest.mark.parametrize("layout", ["random", "stream"])
def test_members_of_no_known_type_are_counted_and_named(tmp_path, layout):
    members = [("README", b"about"), ("00001", picture(1)), *img2dataset(2), ("3.psd", b"8BPS")]
    found = examples(layout, tmp_path, members)
    assert [e["caption"] for e in found if not isinstance(e, BadSample)] == ["plain 2"]
    faults = [e for e in found if isinstance(e, BadSample)]
    assert {fault.kind for fault in faults} == {"no image"}
    assert sum(fault.samples for fault in faults) == 3
    message = " ".join(map(str, faults))
    assert all(name in message for name in ("README", "00001", "psd"))


@pytest.mark.parametrize("layout", ["random", "stream"])
def test_two_members_of_one_name_are_a_bad_sample(tmp_path, layout):
    members = [("a.jpg", picture(1, "JPEG")), ("a.JPG", picture(2, "JPEG")), ("a.txt", b"a")]
    found = examples(layout, tmp_path, members + img2dataset(1))
    assert [e.kind if isinstance(e, BadSample) else e["caption"] for e in found] == [
        "repeated member",
        "plain 1",
    ]


# ------------------------------------------------------------------------------ prepare


@pytest.mark.parametrize("form", ["tar", "array_record"])
@pytest.mark.parametrize("access", ["random", "stream"])
def test_prepared_shards_keep_every_caption_and_its_name(tmp_path, form, access):
    if (form, access) == ("array_record", "stream"):
        pytest.skip("not a stream")
    members = [
        m
        for n in range(3)
        for m in img2dataset(n, caption=[f"plain {n}", *(f"{i} of {n}" for i in range(4))])
    ]
    (tmp_path / "in").mkdir()
    names = ("caption", "re_caption")
    before = examples("random", tmp_path / "in", members, captions=names)
    out = tmp_path / "out"
    line = ["data", "prepare", str(tmp_path / "in" / "a.tar"), str(out), "--format", form]
    assert main([*line, "--captions", *names]) == 0
    source = str(out / f"train-*.{form}")
    for chosen, weights in [
        (names, ()),
        (names, (3.0, 1.0)),
        (("re_caption",), ()),
        (("txt",), ()),
    ]:
        config = DataConfig(
            source, eval_split=None, captions=chosen, caption_weights=weights, access=access
        )
        after = [read.example for read in ExampleReader(config, "train").read()]
        for a, b in zip(before, after, strict=True):
            assert captions_of(a, config) == captions_of(b, config)
            for u in (0.0, 0.2, 0.5, 0.7, 0.99):
                assert choose_caption(a, config, u) == choose_caption(b, config, u)
    assert len(captions_of(before[0], DataConfig(captions=names))) == 6


def test_what_prepared_shards_cannot_hold_is_named(tmp_path, capsys):
    members = [m for n in range(3) for m in img2dataset(n, nested={"a": [1, None]})]
    members[3:3] = [("000000000.npy", b"x"), ("000000000.mask.png", picture(1))]
    write_tar(tmp_path / "a.tar", members)
    line = ["data", "prepare", str(tmp_path / "a.tar")]
    assert main([*line, str(tmp_path / "tar")]) == 0
    message = capsys.readouterr().err
    assert "not in the shards: npy (1 examples), mask.png (1 examples)" in message
    source = open_source(DataConfig(str(tmp_path / "tar" / "*.tar"), eval_split=None), "train")
    assert source[0]["nested"] == {"a": [1, None]}
    assert main([*line, str(tmp_path / "records"), "--format", "array_record"]) == 0
    assert "nested (3 examples)" in capsys.readouterr().err


# ------------------------------------------------------------------------------ folders


def class_folder(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(picture(i))


@pytest.fixture
def logged(caplog, monkeypatch):
    """What the library logs, each message again."""
    monkeypatch.setattr("vlm.errors.WARNED", set())
    monkeypatch.setattr(logging.getLogger("vlm"), "propagate", True)
    return caplog


def test_linked_class_folders_are_followed_without_loops(tmp_path):
    root, elsewhere = tmp_path / "pets", tmp_path / "elsewhere" / "real"
    class_folder(root)
    elsewhere.mkdir(parents=True)
    (elsewhere / "1.png").write_bytes(picture(7))
    (root / "hamster").symlink_to(elsewhere)
    (root / "cat" / "loop").symlink_to(root)
    source = open_source(DataConfig(str(root), label="label", eval_split=None), "train")
    assert [source[i]["label"] for i in range(len(source))] == [
        *["cat"] * 2,
        *["dog"] * 2,
        "hamster",
    ]


def test_an_image_outside_the_class_folders_is_named_and_no_class(tmp_path, logged):
    root = tmp_path / "pets"
    class_folder(root)
    (root / "stray.png").write_bytes(picture(1))
    source = open_source(DataConfig(str(root), label="label", eval_split=None), "train")
    assert source.label_names == ["cat", "dog"]
    assert f"skipped 1 file in {root} that are in no class folder: 1 of .png" in logged.text
    assert "stray.png" in logged.text
    (root / "dog" / "small").mkdir()
    (root / "dog" / "small" / "1.png").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"lie at different depths .*small"):
        open_source(DataConfig(str(root), label="label", eval_split=None), "train")
    for path in (root / "cat", root / "dog" / "small"):
        with pytest.raises(DataError, match="has images and no class folders"):
            open_source(DataConfig(str(path), label="label", eval_split=None), "train")


def test_files_of_other_types_are_counted_and_named(tmp_path, logged):
    class_folder(tmp_path)
    for name in ("a.svg", "b.svg", "c.psd", "README", ".hidden"):
        (tmp_path / "cat" / name).touch()
    open_source(DataConfig(str(tmp_path), label="label", eval_split=None), "train")
    assert "skipped 4 files" in logged.text
    assert all(part in logged.text for part in ("2 of .svg", "1 of .psd", "1 of no extension"))
    assert "cat/README" in logged.text
    assert ".hidden" not in logged.text


def test_commands_that_read_data_name_what_they_skip(tmp_path, capsys):
    class_folder(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "a.svg").touch()
    (tmp_path / "pets" / "stray.png").write_bytes(picture(1))
    for line in (["show", str(tmp_path / "pets")], ["prepare", str(tmp_path / "pets"), "out"]):
        line = [str(tmp_path / "out") if part == "out" else part for part in line]
        assert main(["data", *line, "--label", "label"]) == 0
        message = capsys.readouterr().err
        assert message.count("skipped 1 file") == 2
        assert "a.svg" in message
        assert "stray.png" in message


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    class_folder(tmp_path)
    import os

    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"dog cannot be read \(Permission denied\)"):
        open_source(DataConfig(str(tmp_path), label="label", eval_split=None), "train")
