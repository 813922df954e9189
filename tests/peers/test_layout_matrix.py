"""Layouts, and the shards that `vlm data prepare` makes of them, as other libraries read them."""

import pytest

pytest.importorskip("webdataset")
pytest.importorskip("datasets")

from layout_readers import image_of, records, reference, shards
from layouts import FORMATS, LAYOUTS, by_pillow, compare, expected, items

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_libraries_read_the_same_pairs(tmp_path, name):
    for way, (written, equal, *others) in compare(name, FORMATS, 1, tmp_path).items():
        assert (equal, others) == (written, [0, 0, 0]), way
    found = items(FORMATS, 1)
    assert reference(name, tmp_path / "data", found)
    wanted = sorted(expected(LAYOUTS[name], found))
    first = [(pixels, texts[0]) for pixels, texts in wanted]
    assert sorted((image_of(e), e["txt"].decode()) for e in shards(tmp_path / "tar")) == first
    texts = "caption"
    made = [
        (by_pillow(r["image"][0]), r.get(texts, [])) for r in records(tmp_path / "array_record")
    ]
    assert sorted(pixels for pixels, _ in made) == [pixels for pixels, _ in wanted]


@pytest.mark.parametrize(("form", "ending"), [("HEIF", "heic"), ("JXL", "jxl")])
def test_formats_of_extras_are_read_in_every_layout(tmp_path, form, ending, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    pillow_heif.register_heif_opener()
    monkeypatch.setitem(FORMATS, form, (form, {}, ending))
    for name in ("img2dataset tar", "texts beside", "class folders", "csv", "array_record"):
        for way, (written, equal, *others) in compare(name, [form], 2, tmp_path / name).items():
            assert (equal, others) == (written, [0, 0, 0]), (name, way)


@pytest.mark.parametrize("stop", ["closed", "not closed"])
def test_tars_of_webdatasets_writer_are_whole_only_when_closed(tmp_path, stop):
    import webdataset
    from layouts import read

    from vlm.config import DataConfig

    writer = webdataset.TarWriter(str(tmp_path / "a.tar"))
    found = items(["PNG"], 6)
    for item in found:
        key = f"{item.number:04d}"
        writer.write({"__key__": key, "png": item.image, "txt": item.caption, "json": {"a": 1}})
    if stop == "closed":
        writer.close()
    else:  # as it stands on the disk when its process is killed
        writer.stream.flush()
    for access in ("random", "stream"):
        config = DataConfig(str(tmp_path / "a.tar"), eval_split=None, access=access)
        pairs, faults = read(config)
        assert (len(pairs), len(faults)) == (6, 0) if stop == "closed" else len(pairs) < 6
        assert all("a.tar is broken" in fault for fault in faults)
        assert bool(faults) == (stop != "closed")
    writer.close()
