"""The help of every command: short, in words, complete, and equal to what the parser accepts."""

import contextlib
import functools
import importlib
import io
import re
import shlex
import textwrap

import pytest
import tyro

import vlm
from vlm.cli import COMMANDS, bench, data, help, main, parse, signatures
from vlm.cli.commands import UsageError, overview
from vlm.config import Experiment
from vlm.config.defaults import with_default_model

# Python forms, and what a reader cannot use.
FORBIDDEN = (
    "{None}", "|None", "STR", "FLOAT", "INT ", "(default: )", "(default: None)", "{fixed}",
    "(default: True)", "(default: False)", "False:", "Literal", "`", "╭", "│",
)  # fmt: skip
MAX_LINES = 60


def words(text):
    return re.sub(r" \\\n", " ", text).split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_in_words(name):
    brief, full = help.render(name, everything=False), help.render(name)
    assert len(brief.splitlines()) < MAX_LINES
    assert brief.startswith(f"usage: vlm {name}")
    assert brief.index("Examples:") < brief.index("ptions:")
    for text in (brief, full):
        for fragment in FORBIDDEN:
            assert fragment not in text, fragment


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_and_a_default(name):
    for option in help.page(name).options:
        assert len(option.text) > 8, option
        assert option.text[0].isupper() or not option.text[0].isalpha(), option
        if not option.is_argument:
            assert option.default != "", option
        if option.is_flag:
            set_or_not = (option.name, f"--no-{option.name[2:]}")
            assert option.default in set_or_not or option.name == "--scan"  # may be unset
            assert f"{option.name}/--no-{option.name[2:]}" in help.render(name)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", [60, 80, 100])
def test_lines_break_between_words(name, width):
    wide = help.page(name).show(1000, everything=True)
    text = help.page(name).show(width, everything=True)
    assert max(map(len, text.splitlines())) <= width
    text = text.replace("/\n  --no-", "/--no-")
    assert sorted(words(text)) == sorted(words(wide)) or "CHOICE" in text


def test_numbers_and_pairs_are_typed_as_in_a_shell():
    options = {option.name: option for option in help.page("train").options}
    assert options["--data.augment.crop"].value == "NUMBER NUMBER"
    assert options["--data.augment.crop"].default == "0.9 1"
    assert options["--optimizer.eps"].default == "1e-06"
    assert options["--data.templates"].value == "TEXT..."
    assert options["--resolution-schedule"].value == "NUMBER INTEGER ..."
    assert options["--optimizer.clip-norm"].default == "1"
    assert options["--optimizer.ema"].default == "no EMA"
    assert options["--model.text.pool"].value == "end|argmax|first|last|class|appended|mean|max|map"
    labelled = signatures.of_config(vlm.DataConfig("x", label="a", templates=("a photo of a {}.",)))
    assert {o.name: o for o in labelled}["--templates"].default == "'a photo of a {}.'"


GOLDEN = {
    "bench loss": """\
usage: vlm bench loss [options]

Measure time, memory and gradient error of the contrastive losses.

Times include the backward pass, and are compared with 8 B² d FLOPs at the
measured GEMM throughput.

Examples:
  vlm bench loss
  vlm bench loss --batch-size 4096 --kinds sigmoid

Options:
  --batch-size INTEGER          Pairs over all devices (default: 16384)
  --embed-dim INTEGER           Width of the embeddings (default: 512)
  --kinds softmax|sigmoid ...   Losses to measure (default: softmax sigmoid)
  --dtype auto|float32|bfloat16
                                Type of the embeddings. auto: float32 on a CPU,
                                bfloat16 elsewhere (default: auto)
  --tile INTEGER                Rows of a tile (default: chosen by the shapes)
  --dense/--no-dense            Also measure the naive dense loss, if its matrix
                                is under 2 GiB (default: --dense)
  --rounds INTEGER              Number of measurements; the best counts
                                (default: 5)
  --json/--no-json              Print JSON on stdout; tables go to stderr
                                (default: --no-json)

vlm bench loss --help PATTERN shows the options that match.""",
    "convert": """\
usage: vlm convert MODEL OUT [options]

Write a model as a folder: weights, image preprocessing and tokenizer together.

A model that the format cannot describe in full is refused; the error lists the
unsupported features. The token ids of 10,000 texts are compared, and
differences are printed with examples. With --text, the towers of two
checkpoints that were trained in one space become one model.

Examples:
  vlm convert runs/openmoji my-bundle
  vlm convert ViT-B-32 vit-b-32-hf --format huggingface
  vlm convert logs/run/checkpoints/epoch_32.pt my-clip --architecture ViT-B-32
  vlm convert VISION-FOLDER joined --text TEXT-FOLDER

Arguments:
  MODEL                         A run folder, a bundle, a Hub id, or a name of
                                vlm models.
  OUT                           Output folder, which must not exist.

Options:
  --format vlm|huggingface|open_clip
                                Output format (default: vlm)
  --dtype float32|bfloat16|float16|stored
                                Type of the weights; stored: that of MODEL's
                                file (default: float32)
  --quantize int8|float8        Eight bits for large parameters of a vlm bundle,
                                with a scale for each channel (default: none)
  --architecture TEXT           Name of the architecture, if MODEL is a file of
                                weights alone: open_clip's, such as ViT-B-32,
                                timm's of a plain ViT, or a recipe's such as
                                clip-B/16 (default: none)
  --text TEXT                   Model whose text tower is joined to the vision
                                tower of MODEL (default: none)
  --dimensions INTEGER          Truncate embeddings to this many dimensions, for
                                models that were trained for it (Matryoshka)
                                (default: none)

vlm convert --help PATTERN shows the options that match.""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    assert help.render(name) == GOLDEN[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_spelled_right(name):
    """Options exist, and a function accepts the arguments."""
    for example in filter(None, help.page(name).sections["Examples"].splitlines()):
        vlm_, *words = shlex.split(example)
        known = next(n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS)
        options = help.page(known).options
        names = {o.name for o in options} | {o.alias for o in options} | listed(options)
        typed = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert vlm_ == "vlm"
        assert typed <= names, example
        if not COMMANDS[known].takes_list:
            function = functools.wraps(function_of(known))(lambda *values, **given: None)
            parse.call(function, f"vlm {known}", words[len(known.split()) :])


def function_of(name):
    command = COMMANDS[name]
    return getattr(importlib.import_module(f"vlm.cli.{command.module}"), command.function)


# -------------------------------------------------------------------------- the parser agrees


def accepted(target, **settings):
    """The options that tyro accepts."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(target, args=["--help"], config=(tyro.conf.AvoidSubcommands,), **settings)
    found = re.findall(r"(?:│| )(--[\w.-]+)", re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()))
    return {name for name in found if name != "--help"}


def listed(options):
    names = {option.name for option in options if not option.is_argument}
    flags = {o.name for o in options if o.is_flag and o.name != "--scan"}
    return names | {re.sub(r"^--((?:.*\.)?)", r"--\1no-", flag) for flag in flags}


@pytest.mark.parametrize("name", [n for n, command in COMMANDS.items() if not command.takes_list])
def test_help_lists_the_options_of_the_parser(name):
    assert accepted(function_of(name)) >= listed(help.page(name).options)


def test_help_lists_the_fields_of_a_config():
    experiment = with_default_model(Experiment())
    names = listed(signatures.of_config(experiment))
    absent = {
        name
        for name in names
        if re.match(r"--(adapter|distill|selection|model\.vision\.qformer)\.", name)
    }
    assert len(absent) > 10
    assert accepted(Experiment, default=experiment) >= names - absent


# ------------------------------------------------------------------------------ ways to ask


@pytest.fixture
def shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args, code=0):
        assert main(list(args)) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


@pytest.mark.parametrize("name", ["convert", "data show"])
def test_every_way_to_ask_prints_the_same(shown, name):
    text = f"{help.render(name)}\n"
    for args in (["help", *name.split()], *([*name.split(), a] for a in ("-h", "--help-all"))):
        assert shown(*args) == text


def test_train_shows_common_options_and_all(shown):
    common, everything = shown("train", "--help"), shown("train", "openmoji", "--help-all")
    assert "--optimizer.b2" not in common
    assert "--help-all" in common
    assert "--optimizer.b2 NUMBER" in everything
    assert "model.text: " in everything
    assert "--model.text.depth INTEGER" in everything
    found = shown("train", "openmoji", "--help", "optimizer")
    assert "--optimizer.learning-rate NUMBER" in found
    assert "--mesh.data" not in found
    assert shown("help", "train", "optimizer") != found  # the values of that config are not shown


def test_a_pattern_is_looked_for_in_names_and_texts(shown):
    found = shown("data", "show", "--help", "HTML")
    assert re.findall(r"^  (--[\w-]+)", found, re.MULTILINE) == ["--out"]
    assert shown("data", "show", "--help=html").splitlines()[1:] == found.splitlines()[1:]
    message = shown("data", "show", "--help", "thumbnial", code=2)
    assert message == (
        "vlm: no option of vlm data show matches 'thumbnial': did you mean --thumbnails?\n"
    )
    assert "see vlm data show --help-all" in shown("data", "show", "--help", "qqq", code=2)


@pytest.mark.parametrize("group", ["data", "bench"])
def test_groups_explain_their_commands(shown, group):
    assert shown("help", group) == shown(group, "--help") == shown(group, "-h")


def test_the_overview_is_short():
    lines = overview().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line in ("Use a model:", "Train:", "Data:", "Measure:")]


def test_help_of_no_command_is_one_sentence(shown):
    assert shown("help", "serach", code=2).endswith("did you mean vlm search?\n")


# ------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("args", "cache", "dense"),
    [
        (["--data.cache"], True, True),
        (["--no-data.cache"], False, True),
        (["--data.no-cache", "--no-dense"], False, False),
        (["--no-data.cache", "--data.cache", "--dense"], True, True),
    ],
)
def test_both_flags_of_a_pair_are_accepted(args, cache, dense):
    def command(dense: bool = True) -> None:
        assert dense is expected

    of_data = [arg for arg in args if "data" in arg]
    made = parse.options(Experiment(), "vlm train", of_data)
    assert made.data.cache is cache
    expected = dense
    parse.call(command, "vlm x", [arg for arg in args if "data" not in arg])


def test_a_part_is_made_by_the_negative_flag_too():
    made = parse.options(Experiment(init_from="x"), "vlm train", ["--no-adapter.dora"])
    assert made.adapter is not None
    assert made.adapter.dora is False


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.cachee"], "did you mean --data.cache?"),
        (["--learning-rate", "1"], "did you mean --optimizer.learning-rate?"),
        (["--profile", "1", "x"], "--profile takes INTEGER INTEGER, not '1 x'"),
        (["--batch-size", "many"], "--batch-size takes an integer, not 'many'"),
        (["--keep-hours", "long"], "--keep-hours takes a number, not 'long'"),
        (["--seed"], "--seed needs a value: see vlm train --help"),
        (
            ["--no-data.cachee"],
            "there is no option --no-data.cachee: did you mean --no-data.cache?",
        ),
        (["--batch_siz=4"], "there is no option --batch_siz: did you mean --batch-size?"),
        (["--mesh.fsdp", "2", "stray"], "unexpected arguments: stray: see vlm train --help"),
    ],
)
def test_wrong_usage_is_in_words(args, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse.options(Experiment(), "vlm train", args)
    assert "\n" not in str(caught.value)


def test_missing_arguments_are_named():
    with pytest.raises(UsageError, match=r"^vlm bench train needs CONFIG: see vlm bench train -"):
        parse.call(bench.train, "vlm bench train", [])
    with pytest.raises(UsageError, match=r"^vlm data reinforce needs OUT: see"):
        parse.call(data.reinforce, "vlm data reinforce", ["photos/"])

    with pytest.raises(UsageError, match=r"^vlm compare needs A and B: see vlm compare --help$"):
        parse.call(function_of("compare"), "vlm compare", ["--json"])

    def command(a: str, b: str, /, teacher: str) -> None:
        """Do nothing."""

    with pytest.raises(UsageError, match=r"^vlm x needs B and --teacher: see vlm x --help$"):
        parse.call(command, "vlm x", ["photos/"])


def test_examples_are_joined_by_a_shell():
    long = "vlm x " + " ".join(f"--option-{i} 'two words'" for i in range(9))
    doc = f"Do it.\n\nExamples:\n{textwrap.indent(long, '  ')}\n"
    lines = help.of_config(vlm.MeshConfig(), "vlm x", doc).show(50).splitlines()
    text = "\n".join(lines[lines.index("Examples:") + 1 : lines.index("Options:") - 1])
    assert " ".join(text.replace("\\\n", "").split()) == long
    assert "two\n" not in text
