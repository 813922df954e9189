"""The Hub over loopback: repositories, revisions and faults, as huggingface_hub's client asks.

Weights are answered as the real Hub answers them, by a redirect to another host (localhost instead
of 127.0.0.1) that knows neither names nor tokens.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest

TOKEN = "hf_tokenthatwasaccepted"
_LARGE = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx")  # what Git LFS holds

Fault = Literal["cut", "drop", "stall", "500", "429", "403"]


@dataclasses.dataclass
class Repository:
    """Files by commit, commits by branch or tag, and what is to go wrong."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False
    faults: dict[str, list[Fault]] = dataclasses.field(default_factory=dict)  # "" is the listing


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked for, and how many bytes of a body it got."""

    method: str
    repository: str
    file: str  # "" for a listing
    start: int  # of the range
    sent: int


class Hub:
    """A server of repositories; `asked` holds every request that it answered."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Request] = []
        self.blobs: dict[str, tuple[str, str, bytes]] = {}  # (repository, file, data) by its hash
        self.stalling = threading.Event()  # set at the end: nobody waits any longer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.stalling.set()
        self._server.shutdown()
        self._server.server_close()

    def put(
        self, name: str, *sources: pathlib.Path, revision: str = "main", **files: bytes | None
    ) -> Repository:
        """A commit of the files of folders, and of `files` ("__" stands for a dot); None: none."""
        held = {p.name: p.read_bytes() for folder in sources for p in sorted(folder.iterdir())}
        given = {key.replace("__", "."): data for key, data in files.items()}
        held = {key: data for key, data in (held | given).items() if data is not None}
        commit = hashlib.sha1(repr((name, sorted(held.items()))).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = held
        repository.revisions[revision] = commit
        for file, data in held.items():
            if file.endswith(_LARGE):
                self.blobs[hashlib.sha256(data).hexdigest()] = (name, file, data)
        return repository

    def downloaded(self, name: str) -> dict[str, int]:
        """The bytes of each file of a repository that were sent since the last call."""
        got: dict[str, int] = {}
        for request in self.requests(name):
            if request.file and request.method == "GET":
                got[request.file] = got.get(request.file, 0) + request.sent
        return got

    def requests(self, name: str) -> list[Request]:
        """What was asked of a repository since the last call."""
        mine = [request for request in self.asked if request.repository == name]
        self.asked = [request for request in self.asked if request.repository != name]
        return mine


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if found := re.fullmatch(r"/cdn/(\w+)", path):
            name, file, data = self.hub.blobs[found[1]]
            self._send(name, file, data, {"ETag": f'"{found[1]}"'})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._list(found[1], found[3] or "main", found[2] == "tree")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        else:
            self._refuse(404, "", "", f"no such page: {path}")

    def _commit(self, name: str, revision: str, file: str) -> str | None:
        """The commit that is asked for; None if the answer has been given already."""
        repository = self.hub.repositories.get(name)
        if repository is None:  # the Hub does not tell strangers what is private
            return self._refuse(401, "RepoNotFound", name, "Repository not found")
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            return self._refuse(401, "", name, "Invalid credentials in Authorization header")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", name, f"Invalid rev id: {revision}")
        if file and repository.gated and token is None:
            return self._refuse(401, "GatedRepo", name, f"Access to model {name} is restricted")
        return commit

    def _list(self, name: str, revision: str, tree: bool) -> None:
        if (commit := self._commit(name, revision, "")) is None:
            return
        files = self.hub.repositories[name].commits[commit]
        hashes = {file: hashlib.sha1(data).hexdigest() for file, data in files.items()}
        if tree:
            answer = [
                {"type": "file", "path": file, "size": len(data), "oid": hashes[file]}
                for file, data in files.items()
            ]
        else:
            siblings = [
                {"rfilename": file, "size": len(data), "blobId": hashes[file]}
                for file, data in files.items()
            ]
            if "blobs=true" not in self.path.lower():
                siblings = [{"rfilename": file} for file in files]
            facts = {"private": False, "tags": [], "downloads": 0, "likes": 0}
            answer = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, **facts}
        kind = {"Content-Type": "application/json"}
        self._send(name, "", json.dumps(answer).encode(), kind)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (commit := self._commit(name, revision, file)) is None:
            return
        data = self.hub.repositories[name].commits[commit].get(file)
        if data is None:
            return self._refuse(404, "EntryNotFound", name, "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not file.endswith(_LARGE):
            return self._send(name, file, data, headers)
        digest = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self.send_response(302)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Location", f"http://localhost:{self.hub.port}/cdn/{digest}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.hub.asked.append(Request(self.command, name, file, 0, 0))
        return None

    def _send(self, name: str, file: str, data: bytes, headers: dict[str, str]) -> None:
        waiting = self.hub.repositories[name].faults.get(file, [])
        # Of files, what goes wrong is the transfer.
        fault = waiting.pop(0) if waiting and (self.command == "GET" or not file) else None
        if fault == "stall":
            self.hub.stalling.wait(30)
            self.close_connection = True
            return
        if fault is not None and fault.isdigit():
            self._refuse(int(fault), "", name, "something went wrong")
            return
        start, total = 0, len(data)
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(span[1])
            headers = headers | {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
        body = data[start:]
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        elif fault is not None:
            body = body[: len(body) // 2] if fault == "cut" else b""
        self.hub.asked.append(Request(self.command, name, file, start, len(body)))
        self.wfile.write(body)
        if fault is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _refuse(self, status: int, code: str, name: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.hub.asked.append(Request(self.command, name, "", 0, 0))
