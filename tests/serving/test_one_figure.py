"""All commands report the same zero-shot accuracy of a model on a folder."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from serving import running

import vlm
from vlm.bundle import Bundle
from vlm.cli import main
from vlm.config import (
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    TextConfig,
    ViTConfig,
)
from vlm.heads.prompts import TEMPLATES
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder

# Sorted class folders, and their names in prompts.
NAMES = {
    "001.Grey_parrot": "Grey parrot",
    "AnnualCrop": "Annual Crop",
    "golden_retriever": "golden retriever",
    "n02124075-Egyptian_cat": "Egyptian cat",
    "tabby_cat": "tabby cat",
    "zebra": "zebra",  # no image in the validation split
}
CONFIG = ModelConfig(
    vision=ViTConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16,
        pool="mean", projection="linear",
    ),
    text=TextConfig(
        vocab_size=300, context_length=40, width=16, depth=1, heads=2, mlp_dim=16,
        pool="mean", pad_id=0, projection="linear",
    ),
    embed_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A class folder with the splits train and val."""
    root, rng = tmp_path_factory.mktemp("one") / "pets", np.random.default_rng(0)
    for label in NAMES:
        colour = rng.integers(0, 256, 3)
        for split, count in (("train", 6), ("val", 7)):
            if (label, split) == ("zebra", "val"):
                continue
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = colour + rng.normal(0, 90, (20, 20, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def base(pets):
    """A random model whose accuracy is neither chance nor 1."""
    tokenizer = train_bpe([f"a photo of a {name}." for name in NAMES.values()], 300, 40)
    model = DualEncoder(CONFIG, rngs=nnx.Rngs(4))
    bundle = Bundle(model, Preprocess(PreprocessConfig(image_size=16)), tokenizer, "base")
    bundle.save(pets.parent / "base")
    return pets.parent / "base"


@pytest.fixture(scope="module", params=["photo", "clip_best"])
def run(request, pets, base):
    """A run from that model, evaluated on its validation split and by an extra evaluation."""
    templates = TEMPLATES[request.param] if request.param != "photo" else ()
    experiment = Experiment(
        name="pets",
        model=CONFIG,
        preprocess=PreprocessConfig(image_size=16),
        tokenizer=vlm.load(base).tokenizer.config,
        data=DataConfig(
            str(pets), label="label", captions=(), eval_split="val", templates=templates
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.1),
        evals=(EvalConfig("again", source=str(pets), split="validation"),),
        init_from=str(base),
        batch_size=8,
        steps=8,
        run_dir=str(pets.parent / f"run-{request.param}"),
    )
    vlm.training.train(experiment)
    return pets.parent / f"run-{request.param}"


def reference(model, pets, templates):
    """Top-1 in plain numpy, from the embeddings of files and prompts."""
    labels, z = list(NAMES), []
    for name in NAMES.values():
        mean = model.encode_text([t.replace("{}", name) for t in templates]).sum(0)
        z.append(mean / np.sqrt((mean**2).sum()))
    hits = [
        labels[int(np.argmax(np.stack(z) @ model.encode_image([path])[0]))] == path.parent.name
        for path in sorted((pets / "val").rglob("*.png"))
    ]
    return sum(hits) / len(hits)


def printed(*args):
    """Run a command and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(arg) for arg in args]) == 0
    return out.getvalue()


def eval_result(*args):
    (result,) = json.loads(printed("eval", *args, "--json"))["results"]
    return result


def test_all_commands_give_the_same_figure(pets, base, run, tmp_path):
    model = vlm.load(run)
    templates = TEMPLATES[run.name.removeprefix("run-")]
    assert model.templates == templates
    figures = {"numpy": reference(model, pets, templates)}

    results = json.loads((run / "results.json").read_text())["results"]
    for result in results:
        if "top1" in result["metrics"]:
            figures[f"run: {result['task']}"] = result["metrics"]["top1"]["value"]
            assert tuple(result["provenance"]["templates"]) == templates
            assert result["provenance"]["data"]["split"] == "val"
    assert len(figures) == 3
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = next(row for row in log if "eval/top1" in row)
    assert first["step"] == 0

    for name, args in {
        "eval of the run": (),
        "eval --tasks": ("--tasks", f"folder:{pets}"),
        "eval of the bundle": ("--data.source", pets, "--data.label", "label"),
    }.items():
        place = run / "bundle" if "bundle" in name else run
        result = eval_result(place, *args)
        figures[name] = result["metrics"]["top1"]["value"]
        assert result["provenance"]["data"]["split"] == "val"
        assert "5 of 6 labels reworded" in result["provenance"]["evidence"]["class_names"]

    out = tmp_path / "adapted"
    args = ("--test", pets, "--method", "probe", "--budget", "60s", "--out", out)
    table = printed("adapt", "--model", run, pets, *args)
    assert f"templates: {'photo' if len(templates) == 1 else 'clip_best'}" in table
    held = json.loads((out / "results.json").read_text())
    figures["adapt"] = held["methods"][0]["test"]["value"]
    assert held["methods"][0]["method"] == "zero-shot"

    args = ("--labels-file", f"folder:{pets}", "--top", "1", "--json")
    rows = map(json.loads, printed("classify", "--model", run, pets / "val", *args).splitlines())
    right = [row["labels"][0]["label"] == row["image"].split("/")[-2] for row in rows]
    figures["classify"] = sum(right) / len(right)
    figures["serve"] = served(model, pets)

    print(json.dumps(figures, indent=2))  # pytest -s shows them
    assert len(set(figures.values())) == 1, figures
    assert 1 / 6 < figures["numpy"] < 1, figures

    # The initial model, by the log of the run and by the commands.
    initial = reference(vlm.load(base), pets, templates)
    given = ("--templates", *templates)
    args = ("--data.source", pets, "--data.label", "label", *given)
    assert eval_result(base, *args)["metrics"]["top1"]["value"] == initial
    assert first["eval/top1"] == first["eval/again/top1"] == initial


def served(model, pets):
    """Top-1 of `/v1/classify` with class names and without templates."""
    paths = sorted((pets / "val").rglob("*.png"))
    urls = [
        f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in paths
    ]
    with running(model) as server:
        body = {"images": urls, "labels": list(NAMES.values()), "top": 1}
        rows = server.ask("/v1/classify", body).json["data"]
    called = [row["labels"][0]["label"] for row in rows]
    right = [one == NAMES[path.parent.name] for one, path in zip(called, paths, strict=True)]
    return sum(right) / len(right)
