"""Bundles with towers of the user's own: saved and loaded, and no code is imported on its own."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import own_towers
import pytest
from jax.sharding import PartitionSpec as P
from own_towers import IMAGES, MODEL, WORDS, small_bundle

import vlm
from vlm.cli import main
from vlm.config import MeshConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.sharding import make_mesh


@pytest.fixture(scope="module")
def own():
    return small_bundle()


@pytest.fixture(scope="module")
def saved(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "bundle"
    own.save(folder)
    return folder


def edited(saved: Path, folder: Path, change) -> Path:
    """A copy of the bundle whose bundle.json is changed."""
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    about = json.loads((folder / "bundle.json").read_text())
    change(about)
    (folder / "bundle.json").write_text(json.dumps(about))
    return folder


def test_a_loaded_bundle_embeds_as_before(own, saved):
    again = vlm.load(saved)
    assert type(again.model.vision) is own_towers.ConvNet
    np.testing.assert_array_equal(again.encode_image(list(IMAGES)), own.encode_image(list(IMAGES)))
    np.testing.assert_array_equal(again.encode_text(WORDS), own.encode_text(WORDS))
    assert "16 px, by ConvNet" in repr(again)
    assert again.model.vision.scale[...] == 2.0
    one = vlm.load(saved, tower="text")
    np.testing.assert_array_equal(one.encode_text(WORDS), own.encode_text(WORDS))


def test_a_bundle_loads_onto_a_mesh_by_the_partition(own, saved):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    again = vlm.load(saved, mesh=mesh)
    tower: Any = again.model.vision
    kernel = tower.layers[1].kernel[...]
    assert kernel.sharding.spec == P(None, None, None, "tensor")
    z = again.encode_image(list(IMAGES))
    np.testing.assert_allclose(z, own.encode_image(list(IMAGES)), atol=1e-5)


@pytest.mark.slow
def test_blend_and_ema_average_the_parameters(own, saved, tmp_path):
    other = own.with_parameters(jax.tree.map(lambda x: 2 * x, own._split[1]), "twice")
    other.save(tmp_path / "other")
    mean = vlm.blend(vlm.load(saved), vlm.load(tmp_path / "other"))
    kernel = own.model.vision.projection.kernel[...]
    np.testing.assert_allclose(mean.model.vision.projection.kernel[...], 1.5 * kernel, rtol=1e-6)


SCRIPT = """
import sys, vlm
try:
    vlm.load(sys.argv[1])
except vlm.CheckpointError as error:
    print(error)
print("own_towers" in sys.modules)
"""


@pytest.mark.slow
def test_loading_imports_no_code(saved):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(saved)],
        capture_output=True,
        text=True,
        cwd=Path(own_towers.__file__).parent,  # where it could be imported
        check=True,
    )
    message, imported = done.stdout.splitlines()
    assert message == (
        f"the model {saved} uses code own_towers:ConvNet: import own_towers first "
        "(on the command line: --import own_towers)"
    )
    assert imported == "False"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("antigravity:Tower", r"import antigravity first .*: --import antigravity\)"),
        ("os:system", r"uses code os:system: module os has no subclass of nnx\.Module"),
        ("own_towers:not_a_module", r"has no subclass of nnx\.Module of that name"),
        ("own_towers:NoSuch", r"has no subclass of nnx\.Module of that name"),
        ("<MyTower>", r"uses code <MyTower>: define the class MyTower first"),
        ("own_towers:ConvNet(widths=3)", r"give its arguments in options"),
        ("not a path", r"give an object, or its import path"),
        (3, r"give an object, or its import path"),
    ],
)
@pytest.mark.untyped
def test_a_bundle_of_other_code_is_refused(saved, tmp_path, module, words):
    def change(about):
        about["model"]["vision"]["module"] = module

    with pytest.raises(CheckpointError, match=words):
        vlm.load(edited(saved, tmp_path / "other", change))


def test_a_class_of_a_notebook_is_found_by_its_name(own, saved, tmp_path, monkeypatch):
    folder = edited(
        saved, tmp_path / "m", lambda a: a["model"]["vision"].update(module="<MyTower>")
    )
    monkeypatch.setattr(sys.modules["__main__"], "MyTower", own_towers.ConvNet, raising=False)
    z = vlm.load(folder).encode_image(list(IMAGES))
    np.testing.assert_array_equal(z, own.encode_image(list(IMAGES)))


def test_changed_code_is_reported(saved, tmp_path, caplog):
    def change(about):
        assert len(about["code"]["own_towers:Lstm"]) == 64
        about["code"]["own_towers:Lstm"] = "0" * 64

    folder = edited(saved, tmp_path / "other", change)
    with caplog.at_level(logging.WARNING, "vlm"):
        vlm.load(saved)
        assert not caplog.messages
        vlm.load(folder)
    assert caplog.messages == [f"own_towers:Lstm has changed since the model {folder} was saved"]


@pytest.mark.slow
def test_other_sizes_and_formats_are_refused(own, saved, tmp_path):
    with pytest.raises(ConfigError, match="image_size 32: a tower of your own takes only 16"):
        vlm.load(saved, image_size=32)
    with pytest.raises(ConfigError, match="context_length 8: the text tower is a module of your"):
        vlm.load(saved, context_length=8)
    assert vlm.load(saved, image_size=16, context_length=12).config == MODEL
    for form in ("huggingface", "open_clip"):
        with pytest.raises(CheckpointError, match=f"{form} has no place for own_towers:ConvNet"):
            own.save(tmp_path / form, form)
    for explain in (vlm.explain, lambda m, i, t: vlm.explanation.segment(m, i, ["dog", "cat"])):
        with pytest.raises(ConfigError, match="needs the positions of the vision tower, and own_"):
            explain(own, IMAGES[0], "a dog")
    with pytest.raises(ConfigError, match="the text tower is a module of your own, own_towers:Ls"):
        vlm.adaptation.learn_prompt(own, list(IMAGES), ["a", "b", "a"], n_ctx=1, steps=1)


@pytest.mark.slow
def test_the_command_line_imports_the_code(saved, tmp_path, capfd):
    from PIL import Image

    Image.fromarray(IMAGES[0]).save(tmp_path / "image.png")
    command = ["classify", str(tmp_path / "image.png"), "--model", str(saved), "--labels", "a,b"]
    assert main([*command, "--import", "own_towers"]) == 0
    assert main(["--import=own_towers,json", *command]) == 0
    assert main([*command, "--import", "no_such_parts"]) == 1
    assert "--import names 'no_such_parts', and there is no module" in capfd.readouterr().err
    assert main([*command, "--import", "a-b"]) == 2
    assert main([*command, "--import"]) == 2
    assert "--import takes names of modules such as my_parts" in capfd.readouterr().err


def test_the_card_of_a_pushed_bundle_names_the_code(own, tmp_path):
    own.push_to_hub("me/own", licence="mit", dry_run=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "import vlm\nimport own_towers  # the code of its towers" in text
    np.testing.assert_array_equal(
        vlm.load(tmp_path / "out").encode_text(WORDS[:2]), own.encode_text(WORDS[:2])
    )


@pytest.mark.slow
def test_programs_are_exported(own, tmp_path):
    pytest.importorskip("onnx")
    vlm.export(own, tmp_path / "stablehlo", format="stablehlo")
    vlm.export(own, tmp_path / "onnx", format="onnx", tower="vision")
    with pytest.raises(CheckpointError, match="onnx export does not support random keys"):
        vlm.export(own, tmp_path / "text", format="onnx", tower="text")
