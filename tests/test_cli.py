"""The command line on real files: what it prints, what it writes, and how it fails."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors import safe_open

import vlm
from vlm.cli import COMMANDS, main
from vlm.cli import embed as embed_command
from vlm.cli.images import find_images
from vlm.errors import VlmError


@pytest.fixture(scope="module")
def run():
    return str(tiny.run())


@pytest.fixture(scope="module")
def data():
    return tiny.folder() / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep indexes of folders out of the user's cache."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache-of-vlm"))


@pytest.fixture
def do(capsys):
    """Run a command that must succeed, and return its stdout."""

    def do(*args):
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return do


@pytest.fixture
def fail(capsys):
    """Run a command that must fail, and return its one sentence."""

    def fail(*args, code):
        got = main([str(arg) for arg in args])
        lines = capsys.readouterr().err.splitlines(keepends=True)
        err = "".join(line for line in lines if not line.startswith("vlm: skipped"))
        assert got == code
        assert err.startswith("vlm: ")
        assert err.count("\n") == 1, "more than one line"
        assert "Traceback" not in err
        return err.removeprefix("vlm: ").strip()

    return fail


def shell(*args, **options):
    command = [sys.executable, "-m", "vlm", *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


# ------------------------------------------------------------------------------------ help


def test_help_lists_every_command(do, capsys):
    shown = do("--help")
    for name, command in COMMANDS.items():
        if name.startswith("bench "):  # together
            assert name.split()[1] in shown
        else:
            assert f"{name}  " in shown
            assert command.summary in shown
    assert main([]) == 2
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("group", ["data", "bench"])
def test_help_lists_the_subcommands_of_a_group(do, group):
    shown = do(group, "--help")
    assert shown.startswith(f"usage: vlm {group} {{")
    assert all(name in shown for name in COMMANDS if name.startswith(f"{group} "))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_by_an_example(do, name):
    shown = do(*name.split(), "--help")
    assert "Example" in shown
    assert f"\n  vlm {name}" in shown


def test_version(do):
    assert do("--version") == f"vlm {vlm.__version__}\n"


def test_help_of_a_config_shows_its_own_values(do):
    shown = do("train", tiny.folder() / "shapes.py", "--help")
    assert "--optimizer.learning-rate NUMBER" in shown
    shown = do("train", tiny.folder() / "shapes.py", "--help", "name of the run")
    assert "(default: shapes)" in " ".join(shown.split())


# ------------------------------------------------------------------------------------ train


@pytest.mark.slow
def test_train_makes_a_run_with_the_fields_that_were_named(tmp_path):
    out = tmp_path / "made"
    options = ["--run-dir", out, "--steps", "2", "--optimizer.learning-rate", "3e-4"]
    message = tiny.command(
        "train", tiny.folder() / "shapes.py", *options, "--data.captions", "caption"
    )
    assert message == f"{out}\n"
    config = vlm.load_config(out / "config.json")
    assert config.optimizer.learning_rate == 3e-4
    assert config.steps == 2
    assert config.data.captions == ("caption",)
    assert vlm.load(out).name == "shapes"


@pytest.mark.slow
def test_a_finished_run_resumes_to_its_end(run):
    before = (tiny.run() / "results.json").read_text()
    assert tiny.command("train", "--resume", run) == f"{run}\n"
    after = (tiny.run() / "results.json").read_text()
    assert [r["metrics"] for r in json.loads(after)["results"]] == [
        r["metrics"] for r in json.loads(before)["results"]
    ]


# --------------------------------------------------------------------------------- evaluate


@pytest.mark.slow
def test_eval_of_a_run_agrees_with_the_run_itself(do, run, tmp_path):
    out = tmp_path / "results.json"
    report = json.loads(do("eval", run, "--json", "--out", out))
    assert vlm.Report.load(out).to_json() == json.dumps(report, indent=2, ensure_ascii=False)
    own = json.loads((tiny.run() / "results.json").read_text())
    assert [r["metrics"] for r in report["results"]] == [r["metrics"] for r in own["results"]]
    table = do("eval", run, "--tasks", "zero-shot")
    assert "top1" in table
    assert "R@1" not in table


@pytest.mark.slow
def test_eval_of_a_bundle_on_named_data(do, run, data):
    options = ["--data.source", data, "--data.label", "caption", "--data.templates", "{}", "see {}"]
    report = vlm.Report.from_json(do("eval", f"{run}/bundle", "--json", *options))
    assert report["zero-shot"].provenance.templates == ("{}", "see {}")
    assert set(report["zero-shot"].metrics) == {"top1", "top5"}


# --------------------------------------------------------------------------------- classify


def test_classify_says_what_the_head_says(do, run, data):
    labels = ["a red square", "a blue stripe"]
    message = do(
        "classify", "--model", run, data, "--labels", ", ".join(labels), "--json"
    ).splitlines()
    paths = find_images([str(data)])
    top = vlm.ZeroShotClassifier(vlm.load(run), labels, ["{}"])(paths).top(5)
    for line, path, best in zip(message, paths, top, strict=True):
        row = json.loads(line)
        assert row["image"] == str(path)
        assert [(x["label"], x["score"]) for x in row["labels"]] == [
            (label, pytest.approx(score, abs=1e-5)) for label, score in best
        ]


def test_classify_for_readers(do, run, data, tmp_path):
    image, names = data / "test-red-square.png", tmp_path / "names.txt"
    names.write_text("a red square\n\na cat, or a dog\n", encoding="utf-8")
    message = do(
        "classify", "--model", run, image, "--labels-file", names, "--top", "1"
    ).splitlines()
    assert message[0] == str(image)
    assert len(message) == 2
    assert "%" in message[1]
    several = do("classify", "--model", run, image, "--labels-file", names, "--templates", "plain")
    assert "a cat, or a dog" in several


# ---------------------------------------------------------------------------- embed, search


def test_embed_writes_what_the_model_encodes(do, run, data, tmp_path):
    paths = find_images([str(data / "test-*.png")])
    z = vlm.load(run).encode_image(paths)
    do("embed", "--model", run, data / "test-*.png", tmp_path / "new" / "z.npz")
    do("embed", "--model", run, *paths, tmp_path / "z.safetensors")
    with np.load(tmp_path / "new" / "z.npz") as file:
        assert np.array_equal(file["embeddings"], z)
        assert file["ids"].tolist() == [str(path) for path in paths]
    with safe_open(tmp_path / "z.safetensors", "numpy") as file:
        assert np.array_equal(file.get_tensor("embeddings"), z)
        assert json.loads(file.metadata()["ids"]) == [str(path) for path in paths]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "z.safetensors"]


def test_search_of_an_index_and_of_a_folder(do, run, data, tmp_path):
    do("index", "--model", run, data, tmp_path / "index")
    do("index", "--model", run, data, tmp_path / "index")  # again, in its place
    image = data / "test-blue-stripe.png"
    for options in ([tmp_path / "index"], [data, "--model", run]):
        where, *options = options
        hits = do("search", where, image, "--k", "3", "--json", *options).splitlines()
        assert len(hits) == 3
        assert json.loads(hits[0]) == {"id": str(image), "score": pytest.approx(1, abs=1e-5)}
        message = do("search", where, "a blue stripe", *options).splitlines()
        assert len(message) == 5
        assert all(str(data) in line for line in message)


def test_index_again_encodes_what_changed(do, run, data, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ["test-red-square.png", "test-blue-stripe.png", "test-red-stripe.png"]
    for name in names:
        shutil.copy(data / name, photos / name)
    index = tmp_path / "index"

    def counts(*options):
        assert main(["index", "--model", run, str(photos), str(index), *options]) == 0
        return re.search(r"(\d+) images .*\((\d+) encoded, (\d+) removed", capsys.readouterr().err)

    assert counts().groups() == ("3", "3", "0")
    assert counts().groups() == ("3", "0", "0")
    (photos / names[0]).unlink()
    shutil.copy(data / "test-blue-square.png", photos / names[1])  # another picture, the same name
    assert counts().groups() == ("2", "1", "1")
    hits = do("search", index, photos / names[1], "--json").splitlines()
    assert json.loads(hits[0])["id"] == str(photos / names[1])
    assert counts("--coding", "int8").groups() == ("2", "2", "0")
    assert counts("--coding", "int8", "--rebuild").groups() == ("2", "2", "0")
    about = json.loads((index / "index.json").read_text())
    about["facts"]["preprocess"] = "as it was before"
    (index / "index.json").write_text(json.dumps(about))
    assert counts("--coding", "int8").groups() == ("2", "2", "0")


def test_an_index_of_relative_paths_still_opens(do, run, data, tmp_path, monkeypatch):
    """Indexes had the paths as they were typed; now paths are absolute."""
    monkeypatch.chdir(data)
    index, model = tmp_path / "index", vlm.load(run)
    old = vlm.RetrievalIndex(model)
    old.add([Path("test-red-square.png"), Path("test-blue-stripe.png")])
    old.save(index)
    hits = do("search", index, "red", "--model", run, "--json").splitlines()
    assert {json.loads(hit)["id"] for hit in hits} == set(old.ids)
    assert do("search", index, "test-red-square.png", "--like", "--model", run)
    do("index", "--model", run, "test-red-square.png", "test-red-stripe.png", index)
    ids = vlm.RetrievalIndex.load(index, model).ids
    assert ids == (str(data / "test-red-square.png"), str(data / "test-red-stripe.png"))
    assert do("search", index, "test-red-square.png", "--like", "--k", "1")


def test_an_index_that_another_process_saved_meanwhile(do, fail, run, data, tmp_path, monkeypatch):
    """The command fails in a sentence of its own, and the other's items stay."""
    index = tmp_path / "index"
    do("index", "--model", run, data / "test-red-square.png", index)
    encode = vlm.Bundle.encode_image

    def and_another_saves(bundle, images, *args, **options):
        monkeypatch.setattr(vlm.Bundle, "encode_image", encode)
        other = vlm.RetrievalIndex.load(index, bundle)
        other.add(np.eye(1, bundle.embed_dim, dtype=np.float32), ids=[7])
        other.save(index)
        return encode(bundle, images, *args, **options)

    monkeypatch.setattr(vlm.Bundle, "encode_image", and_another_saves)
    message = fail("index", "--model", run, data, index, code=1)
    assert f"another process saved to {index} while this command ran: run it again" in message
    assert vlm.RetrievalIndex.load(index, vlm.load(run)).ids[-1] == 7
    assert do("search", index, "7", "--like", "--k", "1")  # an integer id


def test_search_that_adds_subtracts_and_filters(do, fail, run, data, tmp_path):
    index = tmp_path / "index"
    do("index", "--model", run, data, index)
    made = vlm.RetrievalIndex.load(index, vlm.load(run))
    image = data / "test-blue-stripe.png"
    from vlm.heads.query import Query

    options = ["--weight", "2", "--plus", image, "--minus", "red", "--json", "--k", "3"]
    hits = do("search", index, "a stripe", *options).splitlines()
    expected = made.search(2 * Query("a stripe") + Query(image) - Query("red"), k=3)
    assert [json.loads(h)["id"] for h in hits] == [h.id for h in expected]
    liked = do("search", index, image, "--like", "--json").splitlines()
    assert [json.loads(h)["id"] for h in liked] == [h.id for h in made.like(str(image))]
    assert do("search", index, "red", "--where", "bytes<0") == ""
    assert len(do("search", index, "red", "--k", "2", "--where", "bytes>0").splitlines()) == 2
    assert do("search", index, "red", "--min-score", "1.1") == ""
    assert "not a condition" in fail("search", index, "red", "--where", "bytes", code=2)
    assert "no metadata column 'size'" in fail("search", index, "red", "--where", "size>1", code=1)
    assert "no id" in fail("search", index, "nowhere", "--like", code=1)


def test_embed_goes_on_where_it_was(do, run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_command, "PART", 2)
    paths = find_images([str(data / "test-*.png")])
    model = vlm.load(run)
    out = tmp_path / "z.npz"
    do("embed", "--model", run, *paths, tmp_path / "folder")
    z = model.encode_image(paths)
    parts = sorted((tmp_path / "folder" / "img_emb").iterdir())
    assert len(parts) == -(-len(paths) // 2)
    # As a kill leaves it: the last part has embeddings and no metadata yet.
    last = len(parts) - 1
    (tmp_path / "folder" / "metadata" / f"metadata_{last}.parquet").unlink()
    calls = []
    encode = vlm.Bundle.encode_image
    monkeypatch.setattr(
        vlm.Bundle, "encode_image", lambda *a, **o: calls.append(1) or encode(*a, **o)
    )
    do("embed", "--model", run, *paths, tmp_path / "folder")
    assert len(calls) == 1
    rows = [np.load(tmp_path / "folder" / "img_emb" / f"img_emb_{i}.npy") for i in range(last + 1)]
    np.testing.assert_allclose(np.concatenate(rows), z, atol=1e-6)
    do("embed", "--model", run, *paths, out)
    with np.load(out) as file:
        np.testing.assert_allclose(file["embeddings"], z, atol=1e-6)
        assert file["ids"].tolist() == [str(path) for path in paths]
    assert not (tmp_path / "z.npz.partial").exists()


def test_embed_does_not_go_on_with_images_that_changed(do, fail, run, data, tmp_path):
    photo = tmp_path / "photo.png"
    shutil.copy(data / "test-red-square.png", photo)
    do("embed", "--model", run, photo, tmp_path / "folder")
    do("embed", "--model", run, photo, tmp_path / "folder")
    shutil.copy(data / "test-blue-stripe.png", photo)
    os.utime(photo, ns=(0, 1))
    assert "images that changed since" in fail(
        "embed", "--model", run, photo, tmp_path / "folder", code=1
    )


def test_embed_on_beam_writes_the_same_parts(capsys, run, data, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra `beam`, which is not installed")
    monkeypatch.setattr(embed_command, "PART", 2)
    (tmp_path / "a.png").write_bytes(b"broken")
    outs = tmp_path / "plain", tmp_path / "beam"
    for out, options in zip(outs, [(), ("--beam", "runner=FnApiRunner")], strict=True):
        paths = [*sorted(data.glob("test-*.png"))[:5], tmp_path / "a.png"]
        assert main(["embed", "--model", str(run), *map(str, paths), str(out), *options]) == 1
        assert "1 of 6 images could not be read" in capsys.readouterr().err
    plain, beam = ({p.relative_to(o): p.read_bytes() for p in o.glob("*/*")} for o in outs)
    assert len(plain) == 6
    assert beam == plain


def test_an_index_whose_model_has_moved(do, fail, run, data, tmp_path):
    do("index", "--model", run, data, tmp_path / "index", "--dtype", "float16")
    about = tmp_path / "index" / "model.json"
    assert json.loads(about.read_text()) == {"model": run}
    about.write_text(json.dumps({"model": str(tmp_path / "gone")}))
    assert "--model" in fail("search", tmp_path / "index", "red", code=1)
    assert do("search", tmp_path / "index", "red", "--model", run)
    about.unlink()
    assert "--model" in fail("search", tmp_path / "index", "red", code=1)


# --------------------------------------------------------------------------- convert, bench


def test_convert_gives_the_same_model(do, run, data, tmp_path):
    do("convert", run, tmp_path / "bundle")
    z = vlm.load(run).encode_image(data / "test-red-square.png")
    again = vlm.load(tmp_path / "bundle").encode_image(data / "test-red-square.png")
    assert np.array_equal(again, z)


@pytest.mark.slow
def test_bench_loss_prints_its_figures():
    sizes = ("--batch-size", 64, "--embed-dim", 8, "--rounds", 1, "--kinds", "sigmoid")
    message = tiny.command("bench", "loss", *sizes, "--json")
    figures = json.loads(message)
    assert figures["batch_size"] == 64
    assert {row["loss"] for row in figures["losses"]} == {"sigmoid"}


# ---------------------------------------------------------------------------------- images


def test_images_are_found_in_order_and_once(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "b/notes.txt", "b/.hidden.png", ".dot/3.png", "a[1].webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "odd.bin").touch()

    def found(*places):
        paths = find_images([str(tmp_path / place) for place in places])
        return [str(path.relative_to(tmp_path)) for path in paths]

    assert found("") == ["a[1].webp", "b/1.jpg", "b/2.PNG"]
    assert found("b/2.PNG", "b", "b/*.jpg") == ["b/2.PNG", "b/1.jpg"]
    assert found("**/*.*") == ["a[1].webp", "b/1.jpg", "b/2.PNG"]
    assert found("a[1].webp", "odd.bin") == ["a[1].webp", "odd.bin"]  # named: taken as they are
    for wrong, message in {".dot/x": "no image", "*.gif": "matches", "*.bin": "matches"}.items():
        with pytest.raises(VlmError, match=message):
            found(wrong)


# ------------------------------------------------------------------------------- bad input

RED = ("--labels", "red,blue")
WRONG_USAGE = {
    ("clasify",): r"no command 'clasify': did you mean vlm classify\?",
    ("--verbose",): "the command comes first",
    ("bench",): r"usage: vlm bench \{loss,train,encode,data,search\}",
    ("train",): "needs a config",
    ("train", "--resume"): "needs the folder of the run",
    ("train", "--steps", "3"): "config comes first",
    ("train", "CONFIG", "extra"): "extra",
    ("train", "CONFIG", "--optimizer.learning-rat", "1"): r"did you mean --optimizer.learning-rate",
    ("train", "CONFIG", "--optimizer.learning-rate", "fast"): "takes a number, not 'fast'",
    ("train", "CONFIG", "--steps"): "--steps",
    ("classify",): "labels are missing",
    ("classify", *RED): "needs images",
    ("classify", "RUN", *RED): r"needs images, and '.*' is a model: write --model ",
    ("classify", "--model", "RUN", "DATA"): "--labels",
    ("classify", "--model", "RUN", "DATA", "--labels", " , ,"): "no labels",
    ("classify", "--model", "RUN", "DATA", "--labels-file", "IMAGE"): "not UTF-8 text",
    ("classify", "--model", "RUN", "DATA", *RED, "--labels-file", "IMAGE"): "either",
    ("classify", "--model", "RUN", "DATA", *RED, "--top", "0"): "--top 0",
    (
        "classify",
        "--model",
        "RUN",
        "DATA",
        *RED,
        "--top",
        "few",
    ): "--top takes an integer, not 'few'",
    ("classify", "--model", "RUN", "DATA", *RED, "--lables", "x"): r"did you mean --labels\?",
    ("embed", "--model", "RUN", "IMAGE"): "vlm embed IMAGES OUT",
    ("embed", "--model", "RUN", "DATA", "IMAGE"): r"\.npz or \.safetensors",
    ("embed", "--model", "RUN", "IMAGE", "DATA"): "something else is there",
    ("index", "--model", "RUN", "IMAGE"): "vlm index IMAGES OUT",
    ("index", "--model", "RUN", "IMAGE", "DATA"): "something else is there",
    ("convert", "RUN", "DATA"): "exists already",
    ("convert", "RUN", "NEW", "--format", "onnx"): "'onnx'",
    ("embed", "RUN", "IMAGE"): "is a model: write --model",
    ("index", "RUN", "IMAGE"): "is a model: write --model",
    ("explain", "IMAGE"): "vlm explain IMAGE TEXT",
    ("explain", "RUN", "IMAGE"): "is a model: write --model",
    ("adapt", "RUN"): "is a model: write --model",
    ("search", "DATA", "red", "--sheet", "hits.txt"): "is not a PNG or JPEG",
    ("search", "DATA", " "): "empty",
    ("search", "DATA", "red", "--k", "0"): "--k 0",
    ("eval",): "model comes first",
    ("eval", "DATA"): "--data.source NAME",
    ("eval", "RUN", "--tasks", "captioning"): "'captioning'",
    ("eval", "RUN", "--data.eval-split", "None"): "--data.eval-split",
    ("eval", "RUN", "--data.label", "caption", "--tasks", "retrieval"): "keep --tasks zero-shot",
}
FAILURES = {
    ("train", "nowhere.py"): r"no config file 'nowhere\.py'",
    ("train", "BROKEN"): "ZeroDivisionError",
    ("train", "NONE"): "binds no `config`",
    ("train", "CONFIG", "--model.vision.width", "7"): "width 7 is not a multiple",
    ("train", "CONFIG", "--remat", "some"): "'some'.*'dots'",
    ("train", "CONFIG", "--mesh.data", "3", "--run-dir", "NEW"): "mesh data 3",
    ("train", "CONFIG", "--data.source", "gone.csv", "--run-dir", "NEW"): r"gone\.csv",
    ("train", "CONFIG", "--run-dir", "RUN"): "already holds a run",
    ("train", "--resume", "DATA"): "is no run folder",
    ("classify", "--model", "nowhere", "DATA", *RED): "'nowhere'",
    ("classify", "--model", "RUN", "nowhere.png", *RED): r"no image 'nowhere\.png'",
    ("classify", "--model", "RUN", "EMPTY", *RED): "holds no images",
    ("classify", "--model", "RUN", "TRUNCATED", *RED): r"truncated\.png",
    ("classify", "--model", "RUN", "DATA", "--labels", "red,red"): "'red' is given twice",
    (
        "classify",
        "--model",
        "RUN",
        "DATA",
        "--labels-file",
        "nowhere.txt",
    ): r"nowhere\.txt: no such file",
    ("classify", "--model", "RUN", "DATA", *RED, "--templates", "a photo"): "'a photo'",
    ("embed", "--model", "RUN", "TRUNCATED", "NEW.npz"): r"truncated\.png",
    ("embed", "--model", "RUN", "IMAGE", "TRUNCATED/z.npz"): r"truncated\.png.*[a-z]",
    ("convert", "nowhere", "NEW"): "'nowhere'",
    ("search", "nowhere", "red"): "'nowhere'",
    ("search", "DATA", "nowhere.png", "--model", "RUN"): r"no image 'nowhere\.png'",
    ("eval", "RUN", "--data.eval-split", "dev"): "has no split 'dev'",
}


@pytest.fixture(scope="module")
def places(run, data, tmp_path_factory):
    """What the names in capitals stand for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    (folder / "truncated.png").write_bytes((data / "test-red-square.png").read_bytes()[:50])
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "none.py").write_text("x = 1\n")
    return {
        "RUN": run,
        "DATA": data,
        "CONFIG": tiny.folder() / "shapes.py",
        "IMAGE": data / "test-red-square.png",
        "EMPTY": folder / "empty",
        "TRUNCATED": folder / "truncated.png",
        "BROKEN": folder / "broken.py",
        "NONE": folder / "none.py",
        "NEW": folder / "new",
        "NEW.npz": folder / "new.npz",
        "TRUNCATED/z.npz": folder / "truncated.png" / "z.npz",
    }


@pytest.mark.parametrize("args", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_is_one_sentence(fail, places, args):
    message = fail(*(places.get(arg, arg) for arg in args), code=2)
    assert _matches(WRONG_USAGE[args], message)


@pytest.mark.parametrize("args", FAILURES, ids=" ".join)
def test_a_failure_is_one_sentence(fail, places, args, tmp_path):
    places = places | {"NEW": tmp_path / "new"}
    message = fail(*(places.get(arg, arg) for arg in args), code=1)
    assert _matches(FAILURES[args], message)
    assert not places["NEW.npz"].exists()


def _matches(pattern, message):
    import re

    return re.search(pattern, message) or pytest.fail(f"{pattern!r} is not in {message!r}")


def test_a_run_that_has_no_bundle_yet(fail, run, data, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text((tiny.run() / "config.json").read_text())
    assert f"vlm train --resume {tmp_path}" in fail(
        "classify", "--model", tmp_path, data, *RED, code=1
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_wrong_usage_is_one_sentence_on_any_terminal(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    with shell("classify", "photo.jpg", "--top", "few", env=environment) as process:
        message = process.stderr.read()
        assert message == "vlm: --top takes an integer, not 'few': see vlm classify --help\n"
        assert process.wait() == 2


def test_a_run_folder_whose_config_is_truncated(fail, run, data, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"name": ')
    assert "config.json" in fail("eval", tmp_path, code=1)
    assert "config.json" in fail("train", "--resume", tmp_path, code=1)


def test_debug_shows_where(run):
    with pytest.raises(VlmError, match="nowhere"):
        main(["--debug", "classify", "--model", run, "nowhere.png", "--labels", "red"])
    with pytest.raises(VlmError, match="nowhere"):
        main(["classify", "--model", run, "nowhere.png", "--labels", "red", "--debug"])


# ------------------------------------------------------------- the world outside the process


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full, shell("--help", stdout=full) as process:
        assert process.stderr.read().startswith("vlm: the disk is full: ")
        assert process.wait() == 1


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with shell("--help", stdout=write) as process:
        os.close(write)
        assert process.stderr.read() == ""
        assert process.wait() == 141


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_is_quiet(tmp_path):
    waiting = tmp_path / "labels"
    os.mkfifo(waiting)
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    with shell("classify", "--model", "model", image, "--labels-file", waiting) as process:
        with open(waiting, "w"):  # opens once the command does
            process.send_signal(signal.SIGINT)
        # Closed, it wakes a command that the signal met between two system calls.
        assert process.stderr.read() == ""
        assert process.wait() == 130


def test_eval_by_name_goes_on_and_compare_says_which_is_better(
    do, fail, run, data, tmp_path, capsys
):
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for shape in ("square", "stripe"):
            shutil.copy(data / f"test-{name}-{shape}.png", tmp_path / "photos" / name)
    task, out = f"folder:{tmp_path / 'photos'}", tmp_path / "out"
    do("eval", run, "--tasks", f"{task},tfds:no_such_data", "--out", out)
    assert main(["eval", run, "--tasks", f"{task},tfds:no_such_data"]) == 0
    assert "left out tfds:no_such_data: " in capsys.readouterr().err
    names = sorted(path.name.split(".", 1)[1] for path in out.iterdir())
    assert names == ["gallery.json", "html", "json", "json", "parquet"]
    before = (out / "results.json").read_text()
    do("eval", run, "--tasks", task, "--out", out)  # finished: read, not measured again
    assert (out / "results.json").read_text() == before
    do("eval", run, "--tasks", task, "--out", out, "--decode", "reference")
    results = json.loads((out / "results.json").read_text())["results"]
    assert results[0]["provenance"]["evidence"]["decode"] == "reference"  # measured again
    model = vlm.load(run)
    prompts = {"query": "a red square: ", "item": "blue: "}
    rules = dataclasses.replace(model.tokenizer.config, prompts=prompts)
    model.tokenizer = model.tokenizer.with_rules(rules)
    model.save(tmp_path / "prompted")
    for prompt in prompts:  # each is measured again
        do("eval", tmp_path / "prompted", "--tasks", task, "--out", out, "--prompt", prompt)
        results = json.loads((out / "results.json").read_text())["results"]
        rules = results[0]["provenance"]["evidence"]["tokenizer"]
        assert f"default_prompt='{prompt}'" in rules
    found = json.loads(do("compare", out, out, "--json", "--out", tmp_path / "page.html"))
    assert found[0]["p_value"] == 1
    assert (tmp_path / "page.html").exists()
    assert "there is no report" in fail("compare", tmp_path, out, code=1)
