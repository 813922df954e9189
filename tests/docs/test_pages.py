"""The how-to and concept pages: Python runs, shell lines parse, quoted messages exist.

The Python blocks of a page run in order in a folder of small files; a model that they name is a
tiny one with random weights. Commands are parsed by the real parsers and not run.
"""

import ast
import dataclasses
import functools
import json
import re
import tarfile
from pathlib import Path

import figures
import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from test_import import IN_SUBPACKAGES
from test_readme import blocks, commands, must, of_vlm, only_parse

import vlm
from vlm.cli import evaluate
from vlm.config import AdapterConfig, to_dict
from vlm.inputs import Preprocess
from vlm.models import DualEncoder, adapters
from vlm.weights.vocabularies import clip_tokenizer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "vlm" / "docs"
PAGES = [DOCS / "install.md", *sorted(DOCS.glob("howto/*.md")), *sorted(DOCS.glob("concepts/*.md"))]
PAGES = [page for page in PAGES if page.name != "index.md"]
SHELL = [page for page in PAGES if of_vlm(commands("".join(blocks(page.read_text(), "sh"))))]
PYTHON = [page for page in PAGES if blocks(page.read_text(), "python")]


def identifier(page):
    return page.relative_to(DOCS).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that pages name."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    pets = [f"pets/{split}/{kind}/{i}.jpg" for split in ("train", "test")
            for kind in ("cat", "dog") for i in range(5)]  # fmt: skip
    names = ["photo.jpg", "cat.jpg", "dog.jpg", "logo.png", *(f"photos/{i}.jpg" for i in range(4))]
    for name in [*names, *pets]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / name)
    rows = [f"photos/{i}.jpg,a photo number {i}" for i in range(4)]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(4):
            (folder / f"{i}.txt").write_text(f"a photo number {i}")
            (folder / f"{i}.json").write_text(json.dumps({"similarity": i / 4}))
            tar.add(folder / f"photos/{i}.jpg", f"{i}.jpg")
            for kind in ("txt", "json"):
                tar.add(folder / f"{i}.{kind}", f"{i}.{kind}")
    (folder / "names.txt").write_text("cat\ndog\n")
    own_parts = blocks((DOCS / "howto" / "own_parts.md").read_text(), "python")
    (folder / "my_parts.py").write_text(own_parts[0])  # a config, too
    sizes = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "projection": "linear"}
    vision = vlm.ViTConfig(
        image_size=16, patch_size=8, pool="class", pre_norm=True, patch_bias=False, **sizes
    )
    text = vlm.TextConfig(vocab_size=49_408, context_length=77, causal=True, pool="argmax", **sizes)
    config = vlm.ModelConfig(vision, text, embed_dim=16)  # OpenAI's form: other libraries have it
    prompts, tokenizer = {"query": "query: ", "passage": "passage: "}, clip_tokenizer(77)
    model = vlm.Bundle(
        DualEncoder(config, rngs=nnx.Rngs(0)),
        Preprocess(vlm.PreprocessConfig(image_size=16, resize="crop")),
        tokenizer.with_rules(dataclasses.replace(tokenizer.config, prompts=prompts)),
        "tiny",
    )
    experiment = vlm.load_config(tiny.folder() / "shapes.py")
    model.save(folder / "MODEL")
    lora = AdapterConfig(rank=2)
    adapter = adapters.fresh(model.model, lora, jax.random.key(0))
    vlm.load(folder / "MODEL").with_adapter(adapter, lora).save_adapter(folder / "runs" / "pets")
    model.save(folder / "RUN" / "bundle")
    (folder / "RUN" / "config.json").write_text(json.dumps(to_dict(experiment)))
    return folder


# ------------------------------------------------------------------------------------- what runs


@pytest.mark.slow
@pytest.mark.untyped  # a page shows what wrong values are
@pytest.mark.parametrize("page", PYTHON, ids=identifier)
def test_python_runs(page, place, tmp_path, monkeypatch):
    for file in place.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    load = vlm.load

    def load_tiny(name, *args, **options):
        """Load a folder that exists; for a public model, the tiny one."""
        options.pop("revision", None)
        return load(name if Path(name).exists() else "MODEL", *args, **options)

    monkeypatch.setattr(vlm, "load", load_tiny)
    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    for number, code in enumerate(blocks(page.read_text(), "python"), 1):
        if file := re.match(r"# (\w+\.py)\n", code):  # a module that the next blocks import
            Path(file[1]).write_text(code)
            continue
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


# -------------------------------------------------------------------------------- what is parsed


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL, ids=identifier)
def test_commands_are_spelled_right(page, place, monkeypatch):
    only_parse(monkeypatch)
    monkeypatch.setattr(evaluate, "evaluate", lambda model, options: None)
    monkeypatch.chdir(place)
    for block in blocks(page.read_text(), "sh"):
        for words in of_vlm(commands(block)):
            if "--init-from" in words:  # its config is read for the defaults
                words[words.index("--init-from") + 1] = "MODEL"
            words = [word for word in words if word != "$@"]  # the options of a script
            must(["configs/openmoji.py" if word == "CONFIG" else word for word in words])


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_a_page_is_short_and_names_public_names(page):
    text = page.read_text()
    assert text.startswith("# ")
    for block in re.findall(r"^```(.*)$", text, re.MULTILINE):
        assert block in ("", "sh", "python", "text"), block
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert len(re.sub(r"<svg.*?</svg>", "", prose, flags=re.DOTALL).split()) <= 1200
    for module in re.findall(r"(?:from|import) (vlm[a-z_.]*)", text):
        parts = module.split(".")
        assert len(parts) < 3 or (".".join(parts[:2]), parts[2]) in IN_SUBPACKAGES, module
    for name in re.findall(r"`(vlm\.[\w.]+)`", text):
        target = vlm
        for part in name.split(".")[1:]:
            target = getattr(target, part)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_the_output_of_its_script(name):
    assert (figures.FOLDER / name).read_text() == figures.FIGURES[name]()


# ------------------------------------------------------------------------------ troubleshooting


@functools.cache
def messages() -> str:
    """All strings of the package, one on each line, with `{}` for values."""
    found = []
    for path in (ROOT / "vlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                ))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.slow
def test_quoted_messages_are_those_of_the_code():
    """A block of text on the page is a message; "..." stands for its values."""
    text = (DOCS / "howto" / "troubleshooting.md").read_text()
    quoted = [line for block in blocks(text, "text") for line in block.splitlines() if line]
    assert len(quoted) > 15
    for line in quoted:
        for part in line.split("..."):
            assert part.strip(" :") in messages(), line


def test_every_error_class_is_explained():
    text = (DOCS / "howto" / "troubleshooting.md").read_text()
    for name in (n for n in vars(vlm.errors) if n.endswith("Error")):
        assert f"`vlm.{name}`" in text, name
