"""Every command line and code block of the README, word for word.

Small models of the same kinds stand in for the public ones, under their names; training is
shortened. Commands in sentences are parsed and not run.
"""

import contextlib
import functools
import io
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm.cli import COMMANDS, elastic, main, parse, train
from vlm.weights import catalogue

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = catalogue.default_model().short_name  # of the README
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What is added to a command so that it takes seconds.
SHORTENED = {
    "adapt": ["--method", "probe"],
    "plan": ["--sweep", "--compiles", "0"],  # analytic
    "train": ["--steps", "2", "--batch-size", "8"],
}
NOT_RUN = {"serve"}  # a server does not end
BEFORE_A_COMMAND = {"exec", "srun", "if", "then", "else", "do", "!"}


def blocks(text, language):
    return [body for found, body in FENCED.findall(text) if found == language]


def commands(text):
    """The command lines of a shell script, as lists of words."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        with contextlib.suppress(ValueError):  # a quotation of several lines, of a cloud's script
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "||")), len(words))
                command = words[:end]
                while command and command[0] in BEFORE_A_COMMAND:
                    command = command[1:]
                if command:
                    found.append(command)
                words = words[end + 1 :]
    return found


def name_of(words):
    """The command that the words after `vlm` begin with."""
    return words[0] if words[0] in COMMANDS else " ".join(words[:2])


def of_vlm(found):
    return [words[1:] for words in found if Path(words[0]).name == "vlm" and len(words) > 1]


LINES = [words for block in blocks(README, "sh") for words in of_vlm(commands(block))]
IN_SENTENCES = sorted(
    {
        shlex.join(shlex.split(code))
        for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", README))
        if re.match(r"(vlm|python|pytest|pip) [^ ]", code)
    }
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the README's commands are typed: a checkout, photos, class folders and pairs.

    Small models of the same kinds stand in for the public ones, under their names.
    """
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for name, small in ((MODEL, "oc_eva02"), ("ViT-B-32", "hf_clip")):
        (folder / name).symlink_to(ROOT / "tests/weights/golden" / small, target_is_directory=True)
    rng = np.random.default_rng(0)
    names = ["cat.png", "dog.png", "photo.jpg", "photos/1.jpg", "photos/2.png"]
    names += [f"pets/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / name)
    pairs = [f"{name},a picture of {i}" for i, name in enumerate(names)]
    (folder / "photos.csv").write_text("\n".join(["image,caption", *pairs]))
    return folder


@pytest.fixture
def typed_there(monkeypatch, place):
    monkeypatch.chdir(place)
    monkeypatch.setenv("VLM_MODEL", MODEL)


def only_parse(monkeypatch):
    """From now on `main` reads configs and options, and leaves it at that."""
    call = parse.call

    def check(function, prog, args):
        call(functools.wraps(function)(lambda *values, **options: None), prog, args)

    monkeypatch.setattr(parse, "call", check)
    monkeypatch.setattr(train, "_train", lambda *values, **options: None)
    monkeypatch.setattr(train, "_changed", lambda *values, **options: None)
    monkeypatch.setattr(elastic, "supervise", lambda *values, **options: None)


@pytest.fixture
def parsed_only(monkeypatch, typed_there):
    only_parse(monkeypatch)


def must(words):
    """Run a command that must succeed."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(words)
    assert code == 0, f"vlm {shlex.join(words)} ends with {code}: {err.getvalue()}"


def named(words):
    """The words with something real for a CONFIG that the reader is to choose."""
    names = {"CONFIG": "configs/openmoji.py", "...": "v5e:4x4"}
    return [names.get(word, word) for word in words]


# ------------------------------------------------------------------------------------- what runs


@pytest.mark.untyped  # a plan builds the step of shapes in place of arrays
@pytest.mark.slow
def test_the_commands_in_order(typed_there):
    assert len(LINES) > 8
    for words in LINES:
        name = name_of(words)
        more = SHORTENED.get(name, [])
        if words[:2] == ["train", "configs/openmoji.py"]:
            data = tiny.folder() / "data"
            more = [*more, "--data.source", str(data), "--data.train-split", "train"]
        if name == "train":
            tiny.command(*words, *([] if "--resume" in words else more))
        elif name not in NOT_RUN:
            must([*words, *more])


@pytest.mark.slow
def test_the_python_prints_what_is_shown(typed_there, capsys):
    (code,), (shown,) = blocks(README, "python"), blocks(README, "text")
    exec(compile(code, "README.md", "exec"), names := {})
    width = names["model"].config.embed_dim
    assert capsys.readouterr().out == shown.replace("512", str(width))
    assert "512" in shown
    assert len(names["labels"]) == 2
    assert len(names["hits"]) == 1


# -------------------------------------------------------------------------------- what is parsed


@pytest.mark.slow
@pytest.mark.parametrize("line", IN_SENTENCES)
def test_what_stands_in_sentences_is_spelled_right(parsed_only, line):
    program, *words = shlex.split(line)
    if program != "vlm":
        check_other([program, *words])
    elif words[0] == "plan" and len(words) == 1:
        pass  # the name of the command
    elif name_of(words).startswith("bench") and len(words) == 2:
        assert name_of(words) in COMMANDS
    else:
        must(named(words))


def check_other(words):
    """A command that is not ours names files and extras that exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words[1:]:
        if found := re.search(r"\.\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(extras), word
        elif word.startswith("tests/"):
            assert (ROOT / word).exists(), word


def test_other_commands_name_what_exists():
    found = [words for block in blocks(README, "sh") for words in commands(block)]
    assert any("demo" in word for words in found for word in words)
    for words in found:
        if Path(words[0]).name in ("pip", "python", "python3", "pytest"):
            check_other(words)
    for extra in re.findall(r"[Ee]xtra `(\w+)`", README):
        check_other(["pip", f".[{extra}]"])
    for path in re.findall(
        r"`((?:tests|configs|notebooks|\.github)/[\w./]+)`|\]\(([\w./]+)\)", README
    ):
        assert (ROOT / "".join(path)).exists(), path


def test_the_models_are_those_of_the_catalogue():
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 10
    for name, rest in rows:
        entry = catalogue.find(name)
        facts = [entry.name, f"{entry.parameters:,.0f}", entry.languages, entry.licence]
        assert rest.split(" | ") == [*facts, f"{entry.imagenet:.1f}%" if entry.imagenet else ""]
    assert f"lists all {len(catalogue.ENTRIES)}" in README


def test_the_default_model_is_the_one_named():
    entry = catalogue.default_model()
    assert f"{MODEL}, {entry.licence} licence" in README
    assert f'vlm.load("{MODEL}")' in README


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(
    "line",
    [
        "clasify photo.png --labels a,b",
        f"convert {MODEL} out --format onnx",
        "train configs/openmoji.py --optimizer.rate 1",
        "train configs/nowhere.py",
        "plan configs/siglip_b16.py --topologies v5e:4x4",
    ],
)
@pytest.mark.slow
def test_a_wrong_line_is_seen(parsed_only, line):
    with pytest.raises(AssertionError, match="ends with"):
        must(shlex.split(line))
