"""The table of all subcommands, and the overview that `vlm --help` prints."""

from typing import NamedTuple

from vlm.errors import VlmError


class UsageError(VlmError):
    """A wrong command line; the exit code is 2."""


class Command(NamedTuple):
    """A subcommand: summary, module, function."""

    summary: str
    module: str
    function: str
    takes_list: bool = False  # the function parses its arguments; the module has `help_page`


USE = {
    "classify": Command("classify images with labels of your choice", "classify", "classify"),
    "search": Command("search images by a text or by another image", "search", "search"),
    "index": Command("build a search index of images", "index", "index"),
    "explain": Command("draw a heat map of the regions that match a text", "explain", "explain"),
    "embed": Command("write the embeddings of images to a file", "embed", "embed"),
    "serve": Command("start an HTTP API and a web search page", "serve", "serve"),
    "convert": Command("convert a model to the format of another library", "convert", "convert"),
    "push": Command("upload a model to the Hugging Face Hub", "push", "push"),
    "export": Command("export a model as programs that run without vlm", "export", "export"),
    "models": Command("list the known public checkpoints", "models", "models"),
    "docs": Command("show the documentation", "docs", "docs"),
}
TRAIN = {
    "train": Command("train a model from a config, or resume a run", "train", "main", True),
    "adapt": Command("fine-tune on labelled images within a time budget", "adapt", "adapt"),
    "blend": Command("average the weights of models", "blend", "blend"),
    "runs": Command("show training runs, with a page that compares them", "show_runs", "runs"),
    "plan": Command("estimate memory, step time and cost on a TPU/GPU slice", "plan", "plan"),
}
DATA = {
    "data show": Command("print statistics of a data set, with a page of examples", "data", "show"),
    "data prepare": Command("write a data set as shards for fast training", "data", "prepare"),
    "data tokenizer": Command(
        "write a tokenizer.json: of a model, or trained on captions", "tokenizer", "tokenizer"
    ),
    "data index": Command("index tar shards for random access", "data", "index"),
    "data reinforce": Command(
        "precompute teacher embeddings for distillation", "data", "reinforce"
    ),
    "data score": Command("write CLIP scores of image-text pairs, to filter by", "score", "score"),
}
MEASURE = {
    "eval": Command("evaluate a model on held-out data", "evaluate", "main", True),
    "compare": Command("compare two evaluations, with significance tests", "compare", "compare"),
}
BENCH = {
    "bench loss": Command("measure the contrastive losses on this machine", "bench", "loss"),
    "bench train": Command("measure a training step on this machine", "bench", "train"),
    "bench encode": Command("measure encoding on this machine", "bench", "encode"),
    "bench data": Command("measure reading and augmenting on this machine", "bench", "data"),
    "bench search": Command("measure search on this machine", "bench", "search"),
}
COMMANDS = USE | TRAIN | DATA | MEASURE | BENCH

# Options of the short help, for commands with many; the others show all.
COMMON = {
    "train": (
        "data.source",
        "data.captions",
        "data.label",
        "data.eval-split",
        "init-from",
        "objective",
        "model.loss",
        "batch-size",
        "micro-batch-size",
        "epochs",
        "steps",
        "optimizer.name",
        "optimizer.learning-rate",
        "optimizer.schedule",
        "adapter.rank",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "data.workers",
        "seed",
        "run-dir",
        "eval-every",
        "checkpoint-every",
    ),
    "eval": (
        "tasks",
        "data.source",
        "data.label",
        "data.captions",
        "data.eval-split",
        "data.templates",
        "data.class-names",
        "data.data-dir",
        "decode",
        "out",
        "json",
    ),
    "data prepare": (
        "format",
        "short-side",
        "deduplicate",
        "near-duplicates",
        "max-similarity",
        "against",
        "min-side",
        "languages",
        "split",
        "captions",
        "label",
        "filters",
        "beam",
    ),
    "serve": (
        "model",
        "host",
        "port",
        "api-key",
        "name",
        "tower",
        "dtype",
        "templates",
        "root",
        "max-batch",
        "timeout",
        "export",
    ),
}

OVERVIEW = """\
usage: vlm COMMAND ...
Contrastive vision-language models in JAX.

{commands}

Examples:
  vlm search photos/ "a dog in the snow"
  vlm classify photo.jpg --labels "dog,cat,pizza"
  vlm train openmoji

vlm help COMMAND explains a command; vlm COMMAND --help PATTERN, its options.
--version. With any command: --debug (traceback), --import MODULE (your code)."""


def overview() -> str:
    """Return the help of `vlm` itself: all commands by purpose."""
    bench = Command("measure loss, train, encode, data or search on this machine", "bench", "")
    measure = MEASURE | {"bench ...": bench}
    purposes = {"Use a model": USE, "Train": TRAIN, "Data": DATA, "Measure": measure}
    width = max(map(len, COMMANDS))
    groups = [f"{purpose}:\n{table(known, width)}" for purpose, known in purposes.items()]
    return OVERVIEW.format(commands="\n".join(groups))


def table(commands: dict[str, Command], width: int = 0) -> str:
    """Return a line for each command, with its summary."""
    width = width or max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {known.summary}" for name, known in commands.items())
