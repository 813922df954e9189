"""The Hub over loopback: repositories, revisions and faults, as huggingface_hub's client asks.

Weights are answered as the real Hub answers them, by a redirect to another host (localhost instead
of 127.0.0.1) that knows neither names nor tokens. Repositories of data sets are named
"datasets/OWNER/NAME". Uploads use the protocol of Git LFS, which the client speaks if
HF_HUB_DISABLE_XET is set.
"""

import base64
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
READER = "hf_tokenthatmayonlyread"
OWNERS = ("me", "lab")  # namespaces that `TOKEN` may write to
_LARGE = (
    ".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".parquet", ".tar", ".png", ".jpg"
)  # what Git LFS holds  # fmt: skip


def _place(name: str, file: str, data: bytes) -> str:
    """Name of a large file on the host of large files."""
    return hashlib.sha256(f"{name}/{file}/".encode() + data).hexdigest()


Fault = Literal["cut", "drop", "stall", "500", "429", "403"]


@dataclasses.dataclass
class Repository:
    """Files by commit, commits by branch or tag, and what is to go wrong."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)  # of commits that were pushed
    gated: bool = False
    private: bool = False
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
        self.tokens: list[tuple[str, str | None]] = []  # host and token of each request
        self.blobs: dict[str, tuple[str, str, bytes]] = {}  # (repository, file, data) by its hash
        self.places: dict[str, tuple[str, str, bytes]] = {}  # the same, by the names too
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
        held = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for folder in sources
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        given = {key.replace("__", "."): data for key, data in files.items()}
        held = {key: data for key, data in (held | given).items() if data is not None}
        repository = self.repositories.setdefault(name, Repository())
        self.commit(name, held, revision)
        return repository

    def commit(self, name: str, held: dict[str, bytes], revision: str) -> str:
        """Make the files `held` the newest commit of a revision, and return its hash."""
        commit = hashlib.sha1(repr((name, sorted(held.items()))).encode()).hexdigest()
        repository = self.repositories[name]
        repository.commits[commit] = held
        repository.revisions[revision] = commit
        for file, data in held.items():
            if file.endswith(_LARGE):
                self.blobs[hashlib.sha256(data).hexdigest()] = (name, file, data)
                self.places[_place(name, file, data)] = (name, file, data)
        return commit

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of the newest commit of a revision."""
        repository = self.repositories[name]
        return repository.commits[repository.revisions[revision]]

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


@pytest.fixture
def connected(hub, tmp_path, monkeypatch) -> Hub:
    """The server, as the Hub of this process, with empty caches and without a token."""
    from huggingface_hub import HfFileSystem, constants, file_download

    url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for module in (constants, file_download):  # older versions have it in the second one
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "vlm"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    HfFileSystem.clear_instance_cache()
    return hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_PUT(self):
        digest = self.path.rpartition("/")[2]
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == digest
        name, file, _ = self.hub.blobs[digest]
        if self._fault(name, "upload"):
            return
        self.hub.blobs[digest] = name, file, data
        self._reply({})

    def do_POST(self):
        """Uploads, and the questions that the client asks with a body."""
        path = urllib.parse.urlsplit(self.path).path
        body = self._body()
        if found := re.fullmatch(rf"/api/(models|datasets)/{_NAME}/paths-info/(.+)", path):
            asked = urllib.parse.parse_qs(body.decode())
            self._paths_info(_full(found[1], found[2]), found[3], asked.get("paths", []))
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READER):
            self._refuse(401, "", "", "Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self._reply({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), token)
        elif found := re.fullmatch(rf"/(?:(datasets)/)?{_NAME}\.git/info/lfs/objects/batch", path):
            self._large_files(_full(found[1], found[2]), json.loads(body))
        elif found := re.fullmatch(
            rf"/api/(models|datasets)/{_NAME}/(preupload|branch|commit)/(.+)", path
        ):
            name, action = _full(found[1], found[2]), found[3]
            revision = urllib.parse.unquote(found[4])
            if not self._may_write(name, token) or self._fault(name, action):
                return
            {"preupload": self._preupload, "branch": self._branch, "commit": self._push}[action](
                name, revision, body
            )
        else:
            self._refuse(404, "", "", f"no such page: {path}")

    def _answer(self) -> None:
        host = self.headers.get("Host", "").partition(":")[0]
        self.hub.tokens.append((host, self.headers.get("Authorization")))
        path = urllib.parse.urlsplit(self.path).path
        if found := re.fullmatch(r"/cdn/(\w+)", path):
            name, file, data = self.hub.places[found[1]]
            self._send(name, file, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        elif path == "/api/whoami-v2":
            self._who()
        elif found := re.fullmatch(rf"/api/(models|datasets)/{_NAME}(?:/revision/(.+))?", path):
            self._list(_full(found[1], found[2]), found[3] or "main")
        elif found := re.fullmatch(rf"/api/(models|datasets)/{_NAME}/auth-check", path):
            if self._commit(_full(found[1], found[2]), "main", "any") is not None:
                self._reply({})
        elif found := re.fullmatch(rf"/api/(models|datasets)/{_NAME}/tree/([^/]+)(?:/(.+))?", path):
            self._tree(_full(found[1], found[2]), found[3], urllib.parse.unquote(found[4] or ""))
        elif found := re.fullmatch(rf"/api/(models|datasets)/{_NAME}/commits/(.+)", path):
            if (commit := self._commit(_full(found[1], found[2]), found[3], "")) is not None:
                facts = {"title": "", "message": "", "date": "2026-01-02T03:04:05.000Z"}
                self._reply([{"id": commit, "authors": [], **facts}])
        elif re.fullmatch(r"/api/(models|datasets)/[^/]+", path):
            self._refuse(401, "RepoNotFound", "", "Repository not found")
        elif found := re.fullmatch(rf"/(?:(datasets)/)?{_NAME}/resolve/([^/]+)/(.+)", path):
            self._resolve(_full(found[1], found[2]), found[3], urllib.parse.unquote(found[4]))
        else:
            self._refuse(404, "", "", f"no such page: {path}")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, answer: object, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fault(self, name: str, part: str) -> bool:
        """Break off or refuse an upload, if a fault is waiting; True if so."""
        waiting = self.hub.repositories[name].faults.get(part, [])
        fault = waiting.pop(0) if waiting else None
        if fault is not None and fault.isdigit():
            self._refuse(int(fault), "", name, "something went wrong")
        elif fault is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return fault is not None

    # ------------------------------------------------------------------------------------ uploads

    def _who(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READER):
            return self._refuse(401, "", "", "Invalid credentials in Authorization header")
        orgs = [{"name": owner} for owner in OWNERS[1:]]
        return self._reply({"type": "user", "name": OWNERS[0], "orgs": orgs})

    def _may_write(self, name: str, token: str) -> bool:
        if name not in self.hub.repositories:
            self._refuse(404, "RepoNotFound", name, "Repository not found")
        elif token == READER or name.split("/")[-2] not in OWNERS:
            self._refuse(403, "", name, "Forbidden: you must use a write token")
        else:
            return True
        return False

    def _create(self, wanted: dict, token: str) -> None:
        owner = wanted["organization"] or OWNERS[0]
        name = _full(f"{wanted.get('type', 'model')}s", f"{owner}/{wanted['name']}")
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self._reply({"error": "You already created this model repo", "url": url}, 409)
        if token == READER or owner not in OWNERS:
            why = f"You don't have the rights to create a model under the namespace {owner!r}"
            return self._refuse(403, "", name, why)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs"}, "main")
        return self._reply({"url": url, "name": name})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._reply({"files": files})

    def _large_files(self, name: str, wanted: dict) -> None:
        objects = []
        for one in wanted["objects"]:
            digest = one["oid"]
            answer = {"oid": digest, "size": one["size"]}
            if digest not in self.hub.blobs or not self.hub.blobs[digest][2]:
                self.hub.blobs[digest] = name, "", b""  # until it arrives
                href = f"http://localhost:{self.hub.port}/upload/{digest}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._reply({"transfer": "basic", "objects": objects})

    def _branch(self, name: str, revision: str, body: bytes) -> None:
        revisions = self.hub.repositories[name].revisions
        if revision in revisions:
            return self._reply({"error": "Reference already exists"}, 409)
        revisions[revision] = revisions["main"]
        return self._reply({})

    def _push(self, name: str, revision: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        if revision not in repository.revisions:
            return self._refuse(404, "RevisionNotFound", name, f"Invalid rev id: {revision}")
        held = dict(self.hub.files(name, revision))
        for line in filter(None, body.splitlines()):
            key, value = (row := json.loads(line))["key"], row["value"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                held[value["path"]] = self.hub.blobs[value["oid"]][2]
            elif key == "deletedFile":
                del held[value["path"]]
        commit = self.hub.commit(name, held, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self._reply({"success": True, "commitOid": commit, "commitUrl": url})

    # ---------------------------------------------------------------------------------- downloads

    def _commit(self, name: str, revision: str, file: str) -> str | None:
        """The commit that is asked for; None if the answer has been given already."""
        revision = urllib.parse.unquote(revision)
        repository = self.hub.repositories.get(name)
        if repository is None:  # the Hub does not tell strangers what is private
            return self._refuse(401, "RepoNotFound", name, "Repository not found")
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}", f"Bearer {READER}"):
            return self._refuse(401, "", name, "Invalid credentials in Authorization header")
        if repository.private and token is None:
            return self._refuse(401, "RepoNotFound", name, "Repository not found")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", name, f"Invalid rev id: {revision}")
        if file and repository.gated and token is None:
            return self._refuse(401, "GatedRepo", name, f"Access to model {name} is restricted")
        return commit

    def _list(self, name: str, revision: str) -> None:
        if (commit := self._commit(name, revision, "")) is None:
            return
        files = self.hub.repositories[name].commits[commit]
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
        ]
        if "blobs=true" not in self.path.lower():
            siblings = [{"rfilename": file} for file in files]
        private = self.hub.repositories[name].private
        facts = {"private": private, "tags": [], "downloads": 0, "likes": 0}
        answer = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings}
        kind = {"Content-Type": "application/json"}
        self._send(name, "", json.dumps(answer | facts).encode(), kind)

    def _entries(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        """The files and folders under a folder, as the Hub describes them."""
        start = f"{folder}/" if folder else ""
        found: dict[str, dict] = {}
        for file, data in files.items():
            if not file.startswith(start):
                continue
            steps = file[len(start) :].split("/")
            for depth in range(1, len(steps)):
                inner = start + "/".join(steps[:depth])
                if recursive or depth == 1:
                    found[inner] = {"type": "directory", "path": inner, "size": 0, "oid": "0" * 40}
            if recursive or len(steps) == 1:
                found[file] = _described(file, data)
        return list(found.values())

    def _tree(self, name: str, revision: str, folder: str) -> None:
        if (commit := self._commit(name, revision, "")) is None:
            return None
        files = self.hub.repositories[name].commits[commit]
        entries = self._entries(files, folder, "recursive=true" in self.path.lower())
        if folder and not entries:
            return self._refuse(404, "EntryNotFound", name, "Entry not found")
        kind = {"Content-Type": "application/json"}
        return self._send(name, "", json.dumps(entries).encode(), kind)

    def _paths_info(self, name: str, revision: str, paths: list[str]) -> None:
        if (commit := self._commit(name, revision, "")) is None:
            return
        files = self.hub.repositories[name].commits[commit]
        every = {entry["path"]: entry for entry in self._entries(files, "", True)}
        self._reply([every[path] for path in paths if path in every])

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
        place = _place(name, file, data)
        self.send_header("Location", f"http://localhost:{self.hub.port}/cdn/{place}")
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
        end = total
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            start, end = int(span[1]), min(int(span[2] or total) + 1, total)
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
        body = data[start:end]
        self.send_response(206 if start or end < total else 200)
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
        if self.command != "HEAD":
            self.wfile.write(body)
        self.hub.asked.append(Request(self.command, name, "", 0, 0))


_NAME = "([^/]+/[^/]+?)"


def _full(kind: str | None, name: str) -> str:
    """The name in `Hub.repositories`."""
    return f"datasets/{name}" if kind == "datasets" else name


def _described(file: str, data: bytes) -> dict:
    """A file as the Hub lists it."""
    about: dict = {"type": "file", "path": file, "size": len(data)}
    about["oid"] = hashlib.sha1(data).hexdigest()
    if file.endswith(_LARGE):
        digest = hashlib.sha256(data).hexdigest()
        about["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return about
