"""The command `vlm`: one module per subcommand, imported when the subcommand runs.

A new subcommand is a module with a function whose parameters are the options, and a line in
`COMMANDS`.
"""

import difflib
import errno
import importlib
import io
import logging
import os
import sys
import warnings
from typing import NamedTuple

from vlm._version import __version__
from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.errors import WARNED, VlmError
from vlm.paths import storage_error_reason


class Command(NamedTuple):
    """A subcommand: summary, module, function."""

    summary: str
    module: str
    function: str
    takes_list: bool = False  # the function parses its arguments itself


COMMANDS = {
    "train": Command("train a model from a config, or resume a run", "train", "main", True),
    "adapt": Command("fine-tune on labelled images within a time budget", "adapt", "adapt"),
    "blend": Command("average the weights of models", "blend", "blend"),
    "eval": Command("evaluate a model on held-out data", "evaluate", "main", True),
    "compare": Command("compare two evaluations, with significance tests", "compare", "compare"),
    "classify": Command("classify images with labels of your choice", "classify", "classify"),
    "explain": Command("draw a heat map of the regions that match a text", "explain", "explain"),
    "embed": Command("write the embeddings of images to a file", "embed", "embed"),
    "index": Command("build a search index of images", "index", "index"),
    "search": Command("search images by a text or by another image", "search", "search"),
    "serve": Command("start an HTTP API and a web search page", "serve", "serve"),
    "convert": Command("convert a model to the format of another library", "convert", "convert"),
    "export": Command("export a model as programs that run without vlm", "export", "export"),
    "models": Command("list the known public checkpoints", "models", "models"),
    "data show": Command("print statistics of a data set, with a page of examples", "data", "show"),
    "data prepare": Command("write a data set as shards for fast training", "data", "prepare"),
    "data index": Command("index tar shards for random access", "data", "index"),
    "data reinforce": Command(
        "precompute teacher embeddings for distillation", "data", "reinforce"
    ),
    "docs": Command("show the reference of every public name", "docs", "docs"),
    "plan": Command("estimate memory, step time and cost on a TPU/GPU slice", "plan", "plan"),
    "bench loss": Command("measure the contrastive losses on this machine", "bench", "loss"),
    "bench train": Command("measure a training step on this machine", "bench", "train"),
    "bench encode": Command("measure encoding on this machine", "bench", "encode"),
    "bench data": Command("measure reading and augmenting on this machine", "bench", "data"),
    "bench search": Command("measure search on this machine", "bench", "search"),
}

USAGE = """\
usage: vlm COMMAND ...

Contrastive vision-language models in JAX.

{commands}

Examples:
  vlm train configs/openmoji.py
  vlm classify runs/openmoji photo.jpg --labels "dog,cat,pizza"
  vlm COMMAND --help

--version prints the version; --debug, with any command, shows the traceback of an error."""

INTERRUPTED, CLOSED_PIPE = 130, 141  # as shells report SIGINT and SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for a failure, 2 for wrong usage.

    A failure prints one sentence to stderr; with `--debug` the exception is raised.
    """
    if argv is None:  # the real command line: no other code runs in this process
        runtime.restart_with_huge_pages(sys.argv[1:])
    args = list(sys.argv[1:] if argv is None else argv)
    _accept_any_file_name()
    _print_log(own_process=argv is None)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        code = _dispatch(args)
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
        return code
    except SystemExit as stop:  # of --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed the pipe
        _close_stdout()
        return CLOSED_PIPE
    except Exception as error:
        _close_stdout()
        if debug:
            raise
        print(f"vlm: {error_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _accept_any_file_name() -> None:
    """Let stdout accept every file name: as its bytes if UTF-8, else with "?" for characters."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict":
        utf8 = stdout.encoding.lower().replace("-", "") == "utf8"
        stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")


class _StderrHandler(logging.Handler):
    """Print log records in the form of the commands' own messages."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"vlm: {record.getMessage()}", file=sys.stderr, flush=True)


def _print_log(*, own_process: bool) -> None:
    """Print the library's log; in a process of our own, other handlers do not get it too."""
    log = logging.getLogger("vlm")
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler(logging.WARNING))
    log.propagate = not own_process
    if own_process:
        warnings.filterwarnings("default", "the option", DeprecationWarning)
    WARNED.clear()  # of an earlier command


def _close_stdout() -> None:
    """Flush stdout; if that fails, replace it so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def error_message(error: Exception) -> str:
    """Format an exception as one sentence with the fix."""
    if isinstance(error, VlmError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" to write {error.filename}" if error.filename else ""
        return f"the disk is full: there is no room{where}, so free some and run the command again"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}"
    if (why := storage_error_reason(error)) is not None:  # of a bucket, say
        return f"a file could not be read or written ({why}): fix that and run the command again"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: use a smaller model or batch, or more devices ({text[:200]})"
    return (
        f"an error that vlm did not expect, {type(error).__name__}: {text[:300]} "
        "(run it again with --debug to see where)"
    )


def _dispatch(args: list[str]) -> int:
    first, *rest = args or [""]
    if first in ("", "-h", "--help", "help"):
        print(USAGE.format(commands=_table(COMMANDS)))
        return 0 if args else 2
    if first == "--version":
        print(f"vlm {__version__}")
        return 0
    name = first
    if group := {name: known for name, known in COMMANDS.items() if name.startswith(f"{first} ")}:
        name = " ".join(args[:2])
        usage = f"usage: vlm {first} {{{','.join(known.split()[1] for known in group)}}}"
        if rest[:1] in (["-h"], ["--help"]):
            print(f"{usage}\n\n{_table(group)}")
            return 0
        if name not in group:
            raise UsageError(usage)
    if name not in COMMANDS:
        raise UsageError(_unknown(first))
    command, rest = COMMANDS[name], args[len(name.split()) :]
    runtime.leave_out_absent_tpu()
    function = getattr(importlib.import_module(f"vlm.cli.{command.module}"), command.function)
    if command.takes_list:
        function(rest)
    else:
        parse.call(function, f"vlm {name}", rest)
    return 0


def _table(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {known.summary}" for name, known in commands.items())


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"the command comes first, and {name} is not a command: see vlm --help"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    fix = f"did you mean vlm {close[0]}?" if close else "vlm --help lists the commands"
    return f"there is no command {name!r}: {fix}"
