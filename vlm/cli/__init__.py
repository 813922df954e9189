"""The command `vlm`: one module per subcommand, imported when the subcommand runs.

A new subcommand is a module with a function whose parameters are the options, and a line in
`commands.py`.
"""

import atexit
import difflib
import errno
import gc
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from vlm._version import __version__
from vlm.cli import parse, runtime
from vlm.cli.commands import COMMANDS, UsageError, overview, table
from vlm.config.code import import_module
from vlm.errors import WARNED, VlmError
from vlm.paths import storage_error_reason

INTERRUPTED, CLOSED_PIPE = 130, 141  # as shells report SIGINT and SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for a failure, 2 for wrong usage.

    A failure prints one sentence to stderr; with `--debug` the exception is raised.
    """
    if argv is None:  # the real command line: no other code runs in this process
        runtime.restart_with_huge_pages(sys.argv[1:])
        atexit.register(gc.freeze)  # else Python collects half a million objects as it exits: 0.4 s
    args = list(sys.argv[1:] if argv is None else argv)
    _accept_any_file_name()
    _print_log(own_process=argv is None)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        modules, args = _modules_to_import(args)
        code = _dispatch(args, modules)
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
        log.addHandler(_StderrHandler(logging.INFO))
    logging.getLogger("vlm.weights").setLevel(logging.INFO)  # downloads, and short names
    log.propagate = not own_process
    if own_process:
        warnings.filterwarnings("default", "the (option|model in first place)", DeprecationWarning)
        warnings.formatwarning = lambda message, *_, **__: f"vlm: {message}\n"
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


def _modules_to_import(args: list[str]) -> tuple[list[str], list[str]]:
    """Remove `--import MODULE[,MODULE]` from the arguments; return the modules and the rest."""
    modules, rest, stream = [], [], iter(args)
    for arg in stream:
        name, given, value = arg.partition("=")
        if name != "--import":
            rest.append(arg)
            continue
        value = value if given else next(stream, "")
        names = [part.strip() for part in value.split(",")]
        for module in names:
            if not all(part.isidentifier() for part in module.split(".")):
                raise UsageError(
                    f"--import takes names of modules such as my_parts, not {module!r}"
                )
        modules += names
    return modules, rest


def _dispatch(args: list[str], modules: Sequence[str] = ()) -> int:
    first, *rest = args or [""]
    if first == "help" and rest:  # vlm help COMMAND
        count = 2 if " ".join(rest[:2]) in COMMANDS else 1
        return _dispatch([*rest[:count], "--help", *rest[count:]])
    if first in ("", "-h", "--help", "help"):
        print(overview())
        return 0 if args else 2
    if first == "--version":
        print(f"vlm {__version__}")
        return 0
    name = first
    if group := {name: known for name, known in COMMANDS.items() if name.startswith(f"{first} ")}:
        name = " ".join(args[:2])
        usage = f"usage: vlm {first} {{{','.join(known.split()[1] for known in group)}}}"
        if rest[:1] in (["-h"], ["--help"], ["--help-all"]):
            print(f"{usage}\n\n{table(group)}\n\nvlm help {name.split()[0]} COMMAND explains one.")
            return 0
        if name not in group:
            raise UsageError(usage)
    if name not in COMMANDS:
        raise UsageError(_unknown(first))
    command, rest = COMMANDS[name], args[len(name.split()) :]
    runtime.leave_out_absent_tpu()
    function = getattr(importlib.import_module(f"vlm.cli.{command.module}"), command.function)
    for module in modules:
        import_module(module, f"--import names {module!r}")
    if command.takes_list:
        function(rest)
    else:
        parse.call(function, f"vlm {name}", rest)
    return 0


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"the command comes first, and {name} is not a command: see vlm --help"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    fix = f"did you mean vlm {close[0]}?" if close else "vlm --help lists the commands"
    return f"there is no command {name!r}: {fix}"
