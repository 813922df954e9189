"""The command `vlm`: one module per door, each imported only when it is opened.

A new command is a module with a `main(args)` and a line in `COMMANDS`.
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
from vlm.cli import runtime
from vlm.cli.parse import UsageError
from vlm.errors import WARNED, VlmError
from vlm.paths import storage_error_reason


class Command(NamedTuple):
    """A door: what it is for, and the module that opens it."""

    summary: str
    module: str
    function: str = "main"


COMMANDS = {
    "train": Command("train the model that a config describes, or resume a run", "train"),
    "adapt": Command("make a model good at labelled images, within a budget of time", "adapt"),
    "blend": Command("average models weight by weight", "blend"),
    "eval": Command("measure a model on held-out data", "evaluate"),
    "compare": Command("say which of two evaluated models is better, and how sure", "compare"),
    "classify": Command("name what images show, in words of your choice", "classify"),
    "explain": Command("show which places of an image speak for a text", "explain"),
    "embed": Command("write the embeddings of images to a file", "embed"),
    "index": Command("make images searchable", "index"),
    "search": Command("find images by a text or by another image", "search"),
    "serve": Command("answer over HTTP, with a page to search by", "serve"),
    "convert": Command("write a model in the format of another library", "convert"),
    "export": Command("write a model as programs that run without vlm", "export"),
    "models": Command("list the known public checkpoints", "models"),
    "data show": Command("say what a data set holds, with a page of it", "data", "show_main"),
    "data prepare": Command("write data as shards that train fast", "data", "prepare_main"),
    "data index": Command("give tar shards random access", "data", "index_main"),
    "data reinforce": Command(
        "store what a teacher says of every example", "data", "reinforce_main"
    ),
    "docs": Command("show the reference of every public name", "docs"),
    "plan": Command("say what a slice of chips will do with a config", "plan"),
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

    A failure is one sentence on stderr, and with `--debug` its traceback.
    """
    if argv is None:  # the real command line, whose process is ours
        runtime.restart_with_huge_pages(sys.argv[1:])
    args = list(sys.argv[1:] if argv is None else argv)
    _print_any_name()
    _print_log(alone=argv is None)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        code = _dispatch(args)
        sys.stdout.flush()  # a reader that left is noticed here, not at exit
        return code
    except SystemExit as stop:  # of --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads our output has seen enough
        _let_go_of_stdout()
        return CLOSED_PIPE
    except Exception as error:
        _let_go_of_stdout()
        if debug:
            raise
        print(f"vlm: {error_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _print_any_name() -> None:
    """Let stdout take every file name: as its bytes where it is UTF-8, else with "?" in it."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict":
        utf8 = stdout.encoding.lower().replace("-", "") == "utf8"
        stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")


class _OnStderr(logging.Handler):
    """Print what the library logs as the commands print their own messages."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"vlm: {record.getMessage()}", file=sys.stderr, flush=True)


def _print_log(*, alone: bool) -> None:
    """Print what the library logs; where the process is ours, other packages' handlers do not."""
    log = logging.getLogger("vlm")
    if not any(isinstance(handler, _OnStderr) for handler in log.handlers):
        log.addHandler(_OnStderr(logging.WARNING))
    log.propagate = not alone
    if alone:
        warnings.filterwarnings("default", "the option", DeprecationWarning)
    WARNED.clear()  # of an earlier command


def _let_go_of_stdout() -> None:
    """Write out what can be written. If nothing can, Python must not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def error_message(error: Exception) -> str:
    """What happened, in one sentence with the mend."""
    if isinstance(error, VlmError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" to write {error.filename}" if error.filename else ""
        return f"the disk is full: there is no room{where}, so free some and run the command again"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}"
    if (why := storage_error_reason(error)) is not None:  # of a bucket, say
        return f"a file could not be read or written ({why}): mend that and run the command again"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: use a smaller model or batch, or more devices ({text[:200]})"
    return (
        f"an error that vlm did not expect, {type(error).__name__}: {text[:300]} "
        "(run it again with --debug to see where)"
    )


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        rows = (f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
        print(USAGE.format(commands="\n".join(rows)))
        return 0 if args else 2
    if args[0] == "--version":
        print(f"vlm {__version__}")
        return 0
    name = args[0] if args[0] in COMMANDS else " ".join(args[:2])
    if name not in COMMANDS:
        raise UsageError(_unknown(args))
    command = COMMANDS[name]
    runtime.leave_out_absent_tpu()
    module = importlib.import_module(f"vlm.cli.{command.module}")
    getattr(module, command.function)(args[len(name.split()) :])
    return 0


def _unknown(args: list[str]) -> str:
    group = [name for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if group:
        return f"{args[0]} needs one more word: choose vlm {', vlm '.join(group)}"
    if args[0].startswith("-"):
        return f"the command comes first, and {args[0]} is none: see vlm --help"
    close = difflib.get_close_matches(args[0], COMMANDS, n=1)
    mend = f"did you mean vlm {close[0]}?" if close else "vlm --help lists the commands"
    return f"there is no command {args[0]!r}: {mend}"
