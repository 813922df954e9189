"""Log of requests: one record of the logger `vlm.serving.requests` for each, as text or JSON."""

import json
import logging
import sys
import time
from typing import Any, Literal

from starlette.types import Scope

LOGGER = logging.getLogger(__name__.replace("request_log", "requests"))

LogFormat = Literal["none", "text", "json"]


def log_request(scope: Scope, status: int, seconds: float, size: int, code: str | None) -> None:
    """Log an answered request: query and body are left out, since they may be private.

    Args:
        status: the HTTP status; 499 if the client closed the connection before the answer.
        size: bytes of the request's body.
        code: error code of a rejected request.
    """
    if not LOGGER.isEnabledFor(logging.INFO):
        return
    client = scope.get("client")
    fields: dict[str, Any] = {
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 6),
        "bytes": size,
        "code": code,
    }
    # The path is any text of the client: quoted, it cannot begin a new line.
    LOGGER.info(
        "%(client)s %(method)s %(path)r %(status)d %(seconds).3f s %(bytes)d bytes",
        fields,
        extra={"request": fields},
    )


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON; the fields of a request are keys of their own."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line |= getattr(record, "request", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_request_log(form: LogFormat) -> None:
    """Write the log of requests to stderr; "json" also writes the server's errors as JSON."""
    if form == "none":
        return
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
