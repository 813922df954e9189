"""Every command line and code block of the README, word for word, on the run of its first command.

That run is made once: the README's own command, with a few steps on drawn shapes. What needs a
cloud, a cluster or data that is not here (all behind "Several devices and hosts") is parsed by the
real parsers and not run; so are commands in the middle of a sentence.
"""

import contextlib
import functools
import io
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm.cli import COMMANDS, main, parse, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = "\n## Several devices and hosts\n"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What is added to a command so that it takes seconds.
SHORTENED = {
    "train": [
        *("--epochs", "2", "--batch-size", "8"),
        *("--data.source", str(tiny.folder() / "data"), "--data.train-split", "train"),
    ],
    "plan": ["--sweep", "--compiles", "0"],  # analytic
    "bench loss": ["--batch-size", "64", "--embed-dim", "8", "--rounds", "1"],
}
NOT_RUN = {"train", "serve"}  # the first `train` is the fixture; a server does not end
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


HERE, FAR = README.split(ELSEWHERE)
RUN_HERE = [words for block in blocks(HERE, "sh") for words in of_vlm(commands(block))]
IN_SENTENCES = sorted(
    {
        shlex.join(shlex.split(code))
        for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", README))
        if re.match(r"(vlm|python|pytest|pip) [^ ]", code)
    }
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the README's commands are typed: a checkout with its run, its pictures and photos."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    first = next(words for words in RUN_HERE if words[0] == "train")
    with contextlib.chdir(folder):
        output = tiny.command(*first, *SHORTENED["train"], "--run-dir", folder / "run")
    (folder / "RUN").symlink_to(output.strip(), target_is_directory=True)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for name in ("cat.png", "dog.png", "photo.png", "photos/1.jpg", "photos/2.png"):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def parsed_only(monkeypatch, place):
    """`main` reads configs and options, and leaves it at that."""
    call = parse.call

    def check(function, prog, args):
        call(functools.wraps(function)(lambda *values, **options: None), prog, args)

    monkeypatch.setattr(parse, "call", check)
    monkeypatch.setattr(train, "_train", lambda *values, **options: None)
    monkeypatch.setattr(train, "_changed", lambda *values, **options: None)
    monkeypatch.chdir(place)


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
def test_the_commands_in_order(place, monkeypatch):
    monkeypatch.chdir(place)
    assert len(RUN_HERE) > 6
    for words in RUN_HERE:
        name = name_of(words)
        if name in NOT_RUN:
            continue
        assert name in SHORTENED or not name.startswith("bench"), f"say how to shorten {name}"
        must([*words, *SHORTENED.get(name, [])])


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks(README, "python"))
def test_the_python(place, monkeypatch, code):
    monkeypatch.chdir(place)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert {name: names[name].shape for name in ("z_image", "z_text")} == {
        "z_image": (2, 192),
        "z_text": (2, 192),
    }


# -------------------------------------------------------------------------------- what is parsed


@pytest.mark.slow
def test_what_runs_elsewhere_is_spelled_right(parsed_only):
    found = [words for block in blocks(FAR, "sh") for words in of_vlm(commands(block))]
    assert len(found) >= 4
    for words in found:
        must(words)


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


@pytest.mark.untyped  # a plan builds the step of shapes in place of arrays
@pytest.mark.slow
def test_the_plans_of_the_table(place, monkeypatch):
    rows = re.findall(r"^\| `(configs/\S+) (--topology [^`]+)`", README, re.MULTILINE)
    assert len(rows) >= 4
    monkeypatch.chdir(place)
    for config, options in rows:
        must(["plan", config, *options.split(), *SHORTENED["plan"]])
    (sweep,) = re.findall(r"`(--sweep [^`]+)`", README)
    must(["plan", "configs/siglip_b16.py", *sweep.split(), "--compiles", "0"])


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


@pytest.mark.parametrize("script", blocks(FAR, "sh"))
def test_scripts_are_valid_shell(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "clasify RUN photo.png --labels a,b",
        "convert RUN out --format onnx",
        "train configs/openmoji.py --optimizer.rate 1",
        "train configs/nowhere.py",
        "plan configs/siglip_b16.py --topologies v5e:4x4",
    ],
)
@pytest.mark.slow
def test_a_wrong_line_is_seen(parsed_only, line):
    with pytest.raises(AssertionError, match="ends with"):
        must(shlex.split(line))
