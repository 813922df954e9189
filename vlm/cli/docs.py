"""`vlm docs`: the reference of every public name, as pages."""

import functools
import http.server
import importlib
import inspect
import pkgutil
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli.parse import UsageError
from vlm.errors import ConfigError


def docs(
    *,
    out: Annotated[str | None, arg(metavar="FOLDER")] = None,
    port: int = 8080,
) -> None:
    """Show the reference: every public name with its arguments, errors and an example.

    The test suite runs the examples. Needs the extra `docs`.

    Examples:
      vlm docs
      vlm docs --out site

    Args:
        out: write the pages to this new folder, and start no server.
        port: serve them at http://localhost:PORT/ until Ctrl-C.
    """
    from vlm.cli.terminal import print_status

    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{out!r} exists already: give another folder")
        render(folder)
        print_status(f"the reference in {out}: open {folder / 'vlm.html'}")
        return
    with tempfile.TemporaryDirectory(prefix="vlm-docs-") as pages:
        handler = functools.partial(_QuietHandler, directory=pages)
        try:
            server = http.server.ThreadingHTTPServer(("localhost", port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"port {port} cannot be served ({reason}): choose another") from None
        with server:
            render(Path(pages))
            print_status(f"the reference at http://localhost:{server.server_port}/vlm.html")
            server.serve_forever()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    """HTTP handler without a log line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def render(folder: Path) -> None:
    """Write the pages of vlm and its subpackages.

    Raises:
        ConfigError: pdoc is not installed.
    """
    try:
        import pdoc
        import pdoc.render
        import pdoc.render_helpers
    except ModuleNotFoundError:
        raise ConfigError(
            'vlm docs needs pdoc, which is not installed: run pip install "vlm-jax[docs]"'
        ) from None
    pdoc.render.configure(
        docformat="google", show_source=False, template_directory=Path(__file__).parent / "pages"
    )
    pdoc.render.env.filters["format_signature"] = functools.partial(
        _signature, pdoc.render_helpers.format_signature
    )
    modules = [_with_public_names(name) for name in subpackages()]
    pdoc.pdoc(*modules, r"!vlm\.\w+\.", output_directory=folder)


class _Text(str):
    """Text of a type in a signature, without quotes."""

    __repr__ = str.__str__


def _signature(formatted: Callable[..., Any], signature: inspect.Signature, colon: bool) -> Any:
    """Format a signature with pdoc, without the modules of types."""

    def short(annotation: Any) -> Any:
        if annotation is inspect.Signature.empty:
            return annotation
        return _Text(re.sub(r"(\w+\.)+(?=[A-Za-z_])", "", inspect.formatannotation(annotation)))

    parameters = [p.replace(annotation=short(p.annotation)) for p in signature.parameters.values()]
    result = short(signature.return_annotation)
    return formatted(signature.replace(parameters=parameters, return_annotation=result), colon)


def subpackages() -> list[str]:
    """Return the names of vlm and of each subpackage with public names."""
    package = str(Path(__file__).parent.parent)
    inside = [name for _, name, is_package in pkgutil.iter_modules([package]) if is_package]
    return ["vlm", *(f"vlm.{name}" for name in sorted(inside) if name != "cli")]


def _with_public_names(name: str) -> str:
    """Load the lazy names of a module into it, because pdoc does not trigger lazy imports."""
    module = importlib.import_module(name)
    names = [n for n in dir(module) if not n.startswith("_")]
    things = {n: thing for n in names if not inspect.ismodule(thing := getattr(module, n))}
    vars(module).update(things, __all__=sorted(things))
    return name
