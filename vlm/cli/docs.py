"""`vlm docs`: the documentation, built from the installed package and shown in a browser."""

import functools
import hashlib
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

import vlm
from vlm.cli.parse import UsageError
from vlm.errors import ConfigError, VlmError
from vlm.paths import cache_dir

PACKAGE = Path(vlm.__file__).parent
SOURCES = PACKAGE / "docs"
# Parts of the documentation that are elsewhere in a clone; a wheel has them in `vlm/docs`.
IN_A_CLONE = {
    "tutorials": PACKAGE.parent / "notebooks",
    "changelog.md": PACKAGE.parent / ".github" / "CHANGELOG.md",
}


def docs(
    *,
    out: Annotated[str | None, arg(metavar="FOLDER")] = None,
    port: int = 8080,
    strict: bool = False,
) -> None:
    """Show the documentation: tutorials, how-to pages, concepts and the reference.

    The pages are built at first use, which takes about half a minute, and need no network. Needs
    the extra `docs`.

    Examples:
      vlm docs
      vlm docs --out site

    Args:
        out: write the pages to this new folder, and start no server.
        port: serve them at http://localhost:PORT/ until Ctrl-C.
        strict: fail on any warning, such as a broken link.
    """
    from vlm.cli.terminal import print_status

    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{out!r} exists already: give another folder")
        build(folder, strict=strict)
        print_status(f"the documentation in {out}: open {folder / 'index.html'}")
        return
    pages = Path(cache_dir()) / "docs" / f"{vlm.__version__}-{_fingerprint()}"
    handler = functools.partial(_QuietHandler, directory=str(pages))
    try:
        server = http.server.ThreadingHTTPServer(("localhost", port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"port {port} cannot be served ({reason}): choose another") from None
    with server:
        if strict or not pages.exists():
            print_status("building the documentation")
            for older in pages.parent.glob(f"{vlm.__version__}-*"):
                shutil.rmtree(older)
            build(pages, strict=strict)
        address = f"http://localhost:{server.server_port}/"
        print_status(f"the documentation at {address}")
        if sys.stdout.isatty():
            webbrowser.open(address)
        server.serve_forever()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    """HTTP handler without a log line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def build(folder: Path, *, strict: bool = False) -> None:
    """Write the pages to a new folder. With `strict`, a warning of Sphinx is an error.

    Raises:
        ConfigError: the packages of the extra `docs` are not installed.
        VlmError: Sphinx fails; the message ends with its output.
    """
    for package in ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "pagefind"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'vlm docs needs {package}, which is not installed: run pip install "vlm-jax[docs]"'
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".docs-", dir=folder.parent) as scratch:
        sources, pages = Path(scratch, "sources"), Path(scratch, "pages")
        copy_sources(sources)
        line = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-j", "auto"]
        line += ["-d", f"{scratch}/doctrees", *(["-W", "--keep-going"] if strict else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [*line, str(sources), str(pages)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise VlmError(f"the documentation cannot be built: {done.stderr.strip()}")
        pages.replace(folder)


def copy_sources(folder: Path) -> None:
    """Copy the sources of all pages to a new folder, as Sphinx needs them."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if (SOURCES / "changelog.md").exists():
        return  # a wheel
    for name, path in IN_A_CLONE.items():
        if path.is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy(path, folder / name)


def _fingerprint() -> str:
    """Return a digest of the files that the pages come from, by their size and time."""
    digest = hashlib.sha256()
    for path in [*sorted(PACKAGE.rglob("*")), *sorted(IN_A_CLONE["tutorials"].glob("*"))]:
        if path.suffix in (".py", ".md", ".ipynb", ".csv", ".css"):
            about = path.stat()
            digest.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]
