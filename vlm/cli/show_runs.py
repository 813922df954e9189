"""`vlm runs`: table and pages of training runs."""

import datetime
import html
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

from etils import epath
from tyro.conf import arg

from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, VlmError
from vlm.paths import as_path, is_run, replace_text

HOSTS = ("127.0.0.1", "localhost")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
REFRESH = 15  # seconds until a browser loads the page again


def runs(
    runs: Annotated[
        tuple[str, ...], arg(metavar="RUNS...", help="run folders, or folders of them.")
    ] = ("runs",),
    /,
    out: Annotated[str | None, arg(metavar="FILE.html")] = None,
    serve: bool = False,
    port: int = 8321,
) -> None:
    """Show training runs: status, loss, throughput, MFU, data wait, memory, goodput.

    RUNS are run folders, or folders of them; by default runs/. Several runs are compared: their
    curves in common charts, and the settings in which they differ. Runs may still be going on.

    Examples:
      vlm runs
      vlm runs runs/a runs/b --out comparison.html
      vlm runs runs/ --serve

    Args:
        out: write an HTML page, one file without external resources.
        serve: serve that page on this machine alone, always up to date.
        port: the port of --serve; 0 takes a free one.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vlm.cli import run_page

    if out and not out.endswith(".html"):
        raise UsageError(f"--out {out!r} is not an HTML page: give a name that ends in .html")
    if serve:
        return _serve(runs, port)
    records = find_runs(runs)
    if out:
        replace_text(out, run_page.page(records, _now()))
    headings, rows = run_page.table(records)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", min_width=12)
    for heading in ("status", *headings):
        table.add_column(heading, no_wrap=True)
    for record, name, row in zip(records, run_page.labels(records), rows, strict=True):
        table.add_row(escape(name), record.status, *row)
    Console().print(table)
    for record in records:
        if record.reason:
            Console(stderr=True).print(f"{record.name}: {record.reason}", markup=False)


def find_runs(places: Sequence[str]) -> list[Any]:
    """Read the runs in folders, which are runs or have runs in them, oldest first.

    Raises:
        CheckpointError: there is none.
    """
    from vlm.cli.run_record import RunRecord

    folders: list[epath.Path] = []
    for place in places:
        folder = as_path(place)
        inside = [folder]
        if not is_run(folder) and folder.is_dir():
            inside = sorted(path for path in folder.iterdir() if is_run(path))
        if not inside or not folder.is_dir():
            raise CheckpointError(
                f"{place} has no runs: give run folders made by `vlm train`, or a folder of them"
            )
        folders += inside
    records = []
    for folder in dict.fromkeys(folders):
        try:
            records.append(RunRecord.read(folder))
        except VlmError as error:  # a row of the table, beside the others
            records.append(RunRecord.unreadable(folder, str(error)))
    return sorted(records, key=lambda record: record.starts[0]["time"] if record.starts else "~")


def _now() -> str:
    return datetime.datetime.now().isoformat(" ", "seconds")


def _serve(places: Sequence[str], port: int) -> None:
    """Serve the page of the runs until Ctrl-C."""
    find_runs(places)
    server = make_server(places, port)
    print(f"http://{HOSTS[0]}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def make_server(places: Sequence[str], port: int) -> ThreadingHTTPServer:
    """Return a server of the page on the loopback interface.

    Raises:
        UsageError: the port is taken.
    """
    from vlm.cli import run_page

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another name that resolves to this machine may be a page of somebody else's.
            if self.headers.get("Host", "").rpartition(":")[0] not in HOSTS:
                return self.send_error(400, "Unknown host")
            if self.path != "/":
                return self.send_error(404)
            try:
                status, text = 200, run_page.page(find_runs(places), _now())
            except VlmError as error:
                status, text = 500, f"<!doctype html><p>{html.escape(str(error))}"
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Cache-Control", "no-store")
            self.send_header("Refresh", str(REFRESH))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    try:
        return ThreadingHTTPServer((HOSTS[0], port), Handler)
    except OSError as error:
        raise UsageError(
            f"--port {port} cannot be used ({error.strerror}): choose another, or 0"
        ) from None
