"""Tasks by name over real files, their folder of results, and the page."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm.errors import CheckpointError, ConfigError
from vlm.evaluation.comparison import compare
from vlm.evaluation.results_folder import (
    read_gallery,
    read_report,
    read_result,
    write_gallery,
    write_result,
)
from vlm.evaluation.results_page import write_page
from vlm.evaluation.runner import Report, evaluate, measure
from vlm.evaluation.suites import Missing, expand, open_task
from vlm.evaluation.tasks import DataInfo, SelectionTask

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}


class Model:
    """Means of pictures against colour words, with noise that differs by model."""

    loss, logit_scale, logit_bias = "softmax", 10.0, 0.0

    def __init__(self, name="a", noise=0.0):
        self.name, self.fingerprint, self.noise = name, name, noise

    def encode_image(self, images, batch_size=32):
        from vlm.inputs.opening import open_image

        rows = [np.asarray(open_image(image), np.float32).mean((0, 1)) for image in images]
        rng = np.random.default_rng(len(self.name))
        z = np.array(rows) / 127 - 1 + self.noise * rng.standard_normal((len(rows), 3))
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

    def encode_text(self, texts):
        at = [next((c for c in COLOURS if c in text), "red") for text in texts]
        z = np.array([COLOURS[c] for c in at], np.float32) / 127 - 1
        return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for colour, value in COLOURS.items():
        (folder / "test" / colour).mkdir(parents=True)
        for i in range(8):
            pixels = (np.array(value) + 90 * rng.standard_normal((6, 6, 3)) * (i % 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "test" / colour / f"{i}.png")
    return folder


def test_suites_are_named_and_expanded():
    assert len(expand(("vtab",))) == 19
    assert len(expand(("datacomp38",))) == 38
    assert expand(("coco,tfds:mnist", "coco")) == ["retrieval:coco_captions", "tfds:mnist"]
    with pytest.raises(ConfigError, match="no task or suite 'captioning'"):
        expand(("captioning",))


def test_what_is_not_here_is_named(tmp_path):
    for name in ("tfds:cifar10", "retrieval:flickr30k", f"folder:{tmp_path}/gone"):
        missing = open_task(name, data_dir=str(tmp_path))
        assert isinstance(missing, Missing)
        assert missing.why
    assert not list(tmp_path.iterdir())  # and nothing was downloaded


def test_a_folder_is_classified_and_recorded(photos, tmp_path):
    name = f"folder:{photos}"
    task = open_task(name)
    result = measure(Model(), task)
    assert set(result.metrics) == {"top1", "mean_per_class_recall", "calibration_error"}
    assert result.metrics["top1"].n == 24
    assert result.provenance.evidence["fingerprint"] == "a"
    write_gallery(tmp_path, result, task)
    write_result(tmp_path, result)
    body = json.loads(
        next(p for p in tmp_path.glob("*.json") if "gallery" not in p.name).read_text()
    )
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= set(body)
    assert body["task"] == "zeroshot_classification"
    assert body["metrics"]["acc1"] == result.metrics["top1"].value
    again = read_result(tmp_path, name)
    assert again == result
    for column, values in result.samples.items():
        np.testing.assert_array_equal(again.samples[column], values)
    assert read_result(tmp_path, "another") is None
    assert read_gallery(tmp_path, name)
    Report((result,)).save(tmp_path / "results.json")
    assert read_report(tmp_path)[name].samples is not None


def write_shards(photos, folder, names: str | None) -> dict[str, str]:
    """The photos in CLIP_benchmark's layout, and as bare shards."""
    folder.mkdir()
    (folder / "test").mkdir()
    (folder / "test" / "nshards.txt").write_text("1\n")
    if names:
        (folder / "classnames.txt").write_text(names)
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as shard:
        for number, path in enumerate(sorted((photos / "test").rglob("*.png"))):
            label = sorted(COLOURS).index(path.parent.name)
            members = (("png", path.read_bytes()), ("cls", str(label).encode()))
            for extension, data in members:
                info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return {"folder": f"wds:{folder}", "tars": f"wds:{folder}/test/0.tar"}


def test_images_in_shards_score_as_in_folders(photos, tmp_path):
    """A class number as a caption ("0") scored 0% where the folder had 83%."""
    expected = measure(Model(noise=0.7), open_task(f"folder:{photos}"))
    assert 0.4 < expected.metrics["top1"].value < 1
    named = write_shards(photos, tmp_path / "named", "\n".join(sorted(COLOURS)))
    task = open_task(named["folder"])
    assert task.templates == ("a photo of a {}.",)
    found = measure(Model(noise=0.7), task)
    assert found.metrics == expected.metrics
    # Numbers alone are no names: of a folder without classnames.txt, and of bare shards.
    bare = write_shards(photos, tmp_path / "bare", None)
    (tmp_path / "names.txt").write_text("\n".join(sorted(COLOURS)))
    for name in bare.values():
        missing = open_task(name)
        assert isinstance(missing, Missing)
        assert "the class '0'" in missing.why
        assert "--class-names FILE" in missing.why
        task = open_task(name, class_names=str(tmp_path / "names.txt"))
        assert measure(Model(noise=0.7), task).metrics == expected.metrics


def test_the_data_hash_sees_the_pixels(photos, tmp_path):
    hashes = [
        measure(Model(), open_task(f"folder:{photos}")).provenance.evidence["data_hash"]
        for _ in range(2)
    ]
    assert hashes[0] == hashes[1]
    path = photos / "test" / "red" / "0.png"
    kept = path.read_bytes()
    Image.new("RGB", (6, 6), (200, 30, 30)).save(path)
    changed = measure(Model(), open_task(f"folder:{photos}")).provenance.evidence["data_hash"]
    path.write_bytes(kept)
    assert changed != hashes[0]


def test_the_page_of_two_runs_stands_alone(photos, tmp_path):
    task = f"folder:{photos}"
    a, b = (Report((measure(m, open_task(task)),)) for m in (Model(), Model("bb", 0.8)))
    galleries = []
    for report, place in ((a, tmp_path / "a"), (b, tmp_path / "b")):
        write_gallery(place, report.results[0], open_task(task))
        galleries.append({task: read_gallery(place, task)})
    write_page(tmp_path / "one.html", a, galleries=galleries)
    write_page(tmp_path / "two.html", a, b, compare(a[task], b[task]), galleries)
    for name in ("one.html", "two.html"):
        page = (tmp_path / name).read_text()
        assert not re.findall(r'(?:src|href)="(?!data:)', page)
        assert page.count("Reliability") == (1 if name == "one.html" else 2)
        assert "Confusion" in page
        assert "data:image/webp" in page
    assert "McNemar" in page


def test_selection(tmp_path):
    red, blue = (Image.new("RGB", (4, 4), COLOURS[c]) for c in ("red", "blue"))
    task = SelectionTask(
        [[red, blue]] * 3, [["red", "blue"]] * 2 + [["blue", "red"]], DataInfo("w")
    )
    found = evaluate(Model(), [task])["selection"]
    assert found.metrics["acc"].value == pytest.approx(2 / 3)
    assert found.kind == "image_caption_selection"
    with pytest.raises(ConfigError, match="give each the same number"):
        evaluate(Model(), [SelectionTask([[red], [blue]], [["a"], ["b", "c"]], DataInfo("w"))])


def test_the_page_shows_what_retrieval_found(tmp_path):
    names = list(COLOURS)
    rows = ["image,caption,split"]
    for i, colour in enumerate([*names, "red"]):  # the last picture is captioned wrongly
        Image.new("RGB", (8, 8), COLOURS[colour]).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'a green thing' if i == 3 else f'{colour} {i}'},test")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    name = f"retrieval:{tmp_path}"
    task = open_task(name)
    result = measure(Model(), task)
    write_gallery(tmp_path / "out", result, task)
    gallery = read_gallery(tmp_path / "out", name)
    output = {entry[1:] for entry in gallery.values()}
    assert ("blue 2", "blue 2") in output  # right in both directions
    assert ("a green thing", "red 0") in output  # a red picture
    write_page(tmp_path / "page.html", Report((result,)), galleries=[{name: gallery}])
    page = (tmp_path / "page.html").read_text()
    for title in ("Texts of images: best", "Texts of images: worst", "Images of texts: worst"):
        assert title in page
    assert "a green thing, not red 0 (rank " in page


def lay_out(root):
    """Winoground and SugarCrepe as their authors' files lie, of two and one examples."""
    for folder, name, colour in (
        ("winoground/images", "ex_0_img_0.png", "red"),
        ("winoground/images", "ex_0_img_1.png", "blue"),
        ("winoground/images", "ex_1_img_0.png", "red"),
        ("winoground/images", "ex_1_img_1.png", "green"),
        ("sugarcrepe/val2017", "000000085329.jpg", "green"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), COLOURS[colour]).save(root / folder / name)
    rows = [
        {
            "id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1",
            "caption_0": captions[0], "caption_1": captions[1],
            "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object",
        }
        for i, captions in enumerate([("red on top", "blue on top"), ("a green one", "a red one")])
    ]  # fmt: skip
    (root / "winoground" / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {
        "filename": "000000085329.jpg",
        "caption": "a green cup",
        "negative_caption": "a blue cup",
    }
    for category in ("add_att", "swap_obj"):
        (root / "sugarcrepe" / f"{category}.json").write_text(json.dumps({"0": row}))
    return root


def test_winoground_and_sugarcrepe_by_name(tmp_path):
    names = expand(("winoground,sugarcrepe",))
    assert len(names) == 8
    assert all(isinstance(open_task(name, str(tmp_path)), Missing) for name in names)
    lay_out(tmp_path)
    tasks = {name: open_task(name, str(tmp_path)) for name in names}
    here = {name: task for name, task in tasks.items() if not isinstance(task, Missing)}
    assert list(here) == ["winoground", "sugarcrepe:add_att", "sugarcrepe:swap_obj"]
    assert "replace_att.json" in tasks["sugarcrepe:replace_att"].why
    report = evaluate(Model(), here.values())
    for metric in ("text_acc", "image_acc", "acc"):  # the second instance is the wrong way round
        assert report["winoground"].metrics[metric].value == 0.5
    assert report["sugarcrepe:add_att"].metrics["acc"].value == 1
    (tmp_path / "winoground" / "images" / "ex_1_img_1.png").unlink()
    assert "ex_1_img_1.png" in open_task("winoground", str(tmp_path)).why
    (tmp_path / "sugarcrepe" / "add_att.json").write_text('{"0": {"filename": 3}}')
    assert "without the text 'filename'" in open_task("sugarcrepe:add_att", str(tmp_path)).why
    (tmp_path / "sugarcrepe" / "add_att.json").write_text("{")
    assert "is not JSON" in open_task("sugarcrepe:add_att", str(tmp_path)).why


def test_bad_folders(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a result of vlm"):
        read_result(tmp_path, "x")
    with pytest.raises(CheckpointError, match="there is no report"):
        read_report(tmp_path)
