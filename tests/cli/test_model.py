"""The model of a command: the option, the variable, the default, and MODEL in first place."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from vlm.cli import main
from vlm.cli.model import leading_model, load_model, model_name, names_model
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError

GOLDEN = Path(__file__).parent.parent / "weights" / "golden"
MODEL = str(GOLDEN / "oc_eva02")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, photos, and things that resemble either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLM_MODEL", raising=False)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache-of-vlm"))
    shutil.copytree(GOLDEN / "oc_eva02", "model")
    Path("photos").mkdir()
    for name in ("test-red-square.png", "test-blue-stripe.png"):
        shutil.copy(tiny.folder() / "data" / name, "photos")
    shutil.copytree("photos", "dataset")
    Path("dataset/config.json").write_text('{"made_by": "somebody"}')
    shutil.copytree("photos", "ViT-L-14")  # photos, in a folder with the name of a model
    return tmp_path


def test_the_option_precedes_the_variable_and_that_the_default(place, monkeypatch):
    assert model_name(None) == "EVA02-B-16"
    monkeypatch.setenv("VLM_MODEL", "")
    assert model_name(None) == "EVA02-B-16"
    monkeypatch.setenv("VLM_MODEL", "model")
    assert model_name(None) == "model"
    assert model_name("another") == "another"
    assert load_model(None).embed_dim == load_model(MODEL).embed_dim


def test_an_error_names_the_variable_if_it_is_the_cause(place, monkeypatch, capsys):
    monkeypatch.setenv("VLM_MODEL", "ViT-B-23")
    with pytest.raises(CheckpointError, match=r"^VLM_MODEL is 'ViT-B-23': there is no model .*32"):
        load_model(None)
    with pytest.raises(CheckpointError, match=r"^there is no model 'nothing'"):
        load_model("nothing")
    assert main(["classify", "photos", "--labels", "red,blue"]) == 1
    assert "vlm: VLM_MODEL is 'ViT-B-23': there is no model" in capsys.readouterr().err
    assert main(["data", "reinforce", str(tiny.folder() / "shapes.py"), "out"]) == 1
    assert "vlm: VLM_MODEL is 'ViT-B-23': there is no model" in capsys.readouterr().err


def test_what_is_a_model(place):
    for model in (
        *("model", "model/", str(tiny.run()), str(tiny.run() / "bundle")),
        *("ViT-B-32", "siglip2-base", "google/siglip2-base-patch16-224", "some-lab/model"),
        *("openai/clip-vit-base-patch32", "ViT-B/32"),
    ):
        assert names_model(model), model
    for other in (
        *("photos", "photos/", "photos/test-red-square.png", "photos/*.png", "missing.png"),
        *("photos/mising", "missing", "some/missing.png", "ViT-L-14", "a/b/c", "https://x.org/a"),
        *("tfds:cifar10", "folder:photos", ""),
    ):
        assert not names_model(other), other


@pytest.mark.slow
def test_a_model_in_first_place_works_with_a_warning(place, capsys):
    images, labels = str(place / "photos"), ["--labels", "red,blue", "--json"]
    lines = {
        ("classify", "model", images, *labels): ("classify", images, *labels),
        ("embed", "model", images, "a.npz"): ("embed", images, "b.npz"),
        ("index", "model", images, "a"): ("index", images, "b"),
    }
    for old, new in lines.items():
        fix = rf"is deprecated .*: vlm {old[0]} --model model {images}"
        with pytest.warns(DeprecationWarning, match=fix):
            assert main([*old]) == 0
        before = capsys.readouterr().out
        assert main([*new, "--model", "model"]) == 0
        assert capsys.readouterr().out == before
    models = [json.loads(Path(name, "model.json").read_text()) for name in "ab"]
    assert models == [{"model": str(place / "model")}] * 2
    with pytest.warns(DeprecationWarning, match="vlm explain --model ViT-B-32 photo.png dog"):
        assert leading_model("vlm explain", None, ("ViT-B-32", "photo.png", "dog"), 2, 2) == (
            "ViT-B-32",
            ("photo.png", "dog"),
        )


def test_what_may_be_either_is_refused_with_the_fix(place):
    with pytest.raises(UsageError, match=r"--model dataset if it is the model, or dataset/\*"):
        leading_model("vlm classify", None, ("dataset", "photos"))
    assert leading_model("vlm classify", "model", ("dataset",)) == ("model", ("dataset",))
    with pytest.raises(UsageError, match="needs images, and 'model' is a model: write --model"):
        leading_model("vlm classify", None, ("model",))
    same = "ViT-L-14", "photos"  # a folder here takes precedence over the name of a model
    assert leading_model("vlm classify", None, same) == (None, same)
    assert leading_model("vlm serve", None, ()) == (None, ())
    unquoted = "photo.jpg", "a", "dog"  # an image is never a model
    assert leading_model("vlm explain", None, unquoted, 2, 2) == (None, unquoted)


def test_teacher_is_the_old_name_of_the_model(place, tmp_path):
    config = str(tiny.folder() / "shapes.py")
    with pytest.warns(DeprecationWarning, match="the option --teacher is renamed to --model"):
        assert main(["data", "reinforce", config, "out", "--teacher", "nothing"]) == 1
