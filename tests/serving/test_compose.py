"""`vlm serve --export compose`: every option is carried, and the container's command works."""

import base64
import functools
import inspect
import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import typing
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from serving import drawn, small_bundle

from vlm._version import __version__
from vlm.cli import main, parse, serve_export
from vlm.cli.serve import serve
from vlm.serving import wheel as wheels

yaml = pytest.importorskip("yaml")

from container import Container  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a model, pictures, and an index of them by that model."""
    folder = tmp_path_factory.mktemp("saved")
    small_bundle().save(folder / "model")
    (folder / "pictures").mkdir()
    for number in range(3):
        drawn(number).save(folder / "pictures" / f"{number}.png")
    line = ["index", "--model", folder / "model", folder / "pictures", folder / "index"]
    assert main([*map(str, line)]) == 0
    return folder


@pytest.fixture
def export(tmp_path, capsys):
    """Function that exports with these arguments; it returns the folder, and the vlm service."""

    def export(*args, out="deploy", code=0):
        folder = tmp_path / out
        capsys.readouterr()
        line = ["serve", *map(str, args), "--export", "compose", str(folder)]
        assert main(line) == code
        if code:
            (message,) = capsys.readouterr().err.splitlines()
            return message
        return folder, yaml.safe_load((folder / "compose.yaml").read_text())["services"]["vlm"]

    return export


def parsed(command):
    """The options that a command of the container gives to `vlm serve`."""
    seen = {}

    @functools.wraps(serve)
    def record(*values, **options):
        seen.update(inspect.signature(serve).bind(*values, **options).arguments)

    parse.call(record, "vlm serve", [word.replace("$$", "$") for word in command])
    return seen


def another(name, parameter):
    """A value of an option that is not its default, and not the default of any option."""
    hint = typing.get_type_hints(serve)[name]  # a new type of option needs a line here
    if isinstance(parameter.default, bool):
        return not parameter.default
    if typing.get_origin(hint) is typing.Literal:
        return next(v for v in typing.get_args(hint) if v != parameter.default)
    kinds = (hint, *typing.get_args(hint))
    if float in kinds:
        return 12.5
    if int in kinds:
        return 77
    if str in kinds:
        return f'-$a {name}\'s "value"'
    assert typing.get_origin(hint) is tuple, f"{name} has a type that this test does not know"
    return (f"one {name} {{}}", 'a "{}" of $2')


def test_every_option_is_carried(saved, export):
    """Each option of `vlm serve` reaches the container, by its signature."""
    parameters = inspect.signature(serve).parameters
    assert set(serve_export.OWN_WAY) < set(parameters)
    given = {n: another(n, p) for n, p in parameters.items() if n not in serve_export.OWN_WAY}
    given["tower"] = "vision"
    given["templates"] = ("a {}", "the $x {}")
    words = [
        f"--model={saved / 'model'}",
        *serve_export.command_options(serve, parameters_of(given)),
    ]
    _, service = export(*words, "--templates", *given["templates"], "--port", 9000)
    seen = parsed(service["command"])
    assert {name: seen[name] for name in given} == given
    assert seen["model"] == str(saved / "model")
    assert service["ports"] == ["127.0.0.1:9000:8000"]


def parameters_of(given):
    """All options: those given, and the defaults of the others."""
    parameters = inspect.signature(serve).parameters
    return {name: p.default for name, p in parameters.items()} | given


def test_options_with_default_values_are_left_out(saved, export):
    _, service = export(saved / "index", "--timeout", 30)
    assert service["command"] == [str(saved / "index"), f"--model={saved / 'model'}"]


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "0.0.0.0"), ("localhost", "127.0.0.1"), ("::1", "[::1]")],
)
def test_host_and_port_are_those_of_the_published_port(saved, export, host, address):
    _, service = export("--model", saved / "model", "--host", host, "--port", 9123)
    assert service["ports"] == [f"{address}:9123:8000"]


def test_only_what_the_server_reads_is_mounted(saved, export):
    folder, service = export(saved / "index")
    binds = [volume for volume in service["volumes"] if volume["type"] == "bind"]
    wanted = [saved / "index", saved / "model", saved / "pictures"]
    assert [volume["source"] for volume in binds] == list(map(str, wanted))
    assert all(volume["read_only"] and volume["source"] == volume["target"] for volume in binds)
    assert not any(volume["bind"]["create_host_path"] for volume in binds)
    names = {path.name for path in folder.iterdir()}
    wheel = f"vlm_jax-{__version__}-py3-none-any.whl"
    assert names == {
        ".dockerignore", ".env", "Dockerfile", "compose.yaml", "prometheus.yml", wheel,
    }  # fmt: skip
    assert f"COPY {wheel} /opt/" in (folder / "Dockerfile").read_text()
    assert (folder / ".dockerignore").read_text().split() == ["*", "!*.whl"]


def test_the_container_has_few_rights(saved, export):
    folder, service = export(saved / "index")
    uid, gid = service["user"].split(":")
    assert "0" not in (uid, gid)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"].startswith("${VLM_MEMORY:-")
    assert f"USER {uid}:{gid}" in (folder / "Dockerfile").read_text()
    others = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for name in ("read_only", "cap_drop", "security_opt"):
        assert others["prometheus"][name] == service[name]
    assert yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]


@pytest.mark.slow
def test_keys_are_given_or_made_and_only_the_owner_reads_them(saved, export, monkeypatch):
    folder, _ = export(saved / "index", "--api-key", "one $x", "two")
    assert "VLM_API_KEYS='one $x,two'" in (folder / ".env").read_text()
    assert stat.S_IMODE((folder / ".env").stat().st_mode) == 0o600
    for path in folder.iterdir():
        assert path.name == ".env" or b"one $x" not in path.read_bytes()
    made = [export(saved / "index", out=name)[0] / ".env" for name in ("a", "b")]
    assert made[0].read_text() != made[1].read_text()
    monkeypatch.setenv("VLM_API_KEYS", "three")
    assert "'three'" in (export(saved / "index", out="c")[0] / ".env").read_text()
    assert "has a quote, a comma" in export(saved / "index", "--api-key", "a,b", out="d", code=1)


def test_what_a_container_cannot_have_is_one_sentence(saved, export, tmp_path, capsys):
    assert "--port 0 chooses" in export(saved / "index", "--port", 0, code=2)
    assert "--host 'myhost' is no address" in export(saved / "index", "--host", "myhost", code=2)
    assert "needs both towers" in export(saved / "index", "--tower", "text", code=2)
    export(saved / "index")
    assert "is not empty" in export(saved / "index", code=1)
    assert main(["serve", str(saved / "index"), "--export", "helm", str(tmp_path / "x")]) == 2
    assert "--export needs compose" in capsys.readouterr().err


@pytest.mark.slow
def test_relative_paths_of_images_need_their_folder(saved, export, bundle, tmp_path):
    from vlm.heads.retrieval import RetrievalIndex

    index = RetrievalIndex(bundle)
    index.add([saved / "pictures" / "0.png"], ids=["0.png"])
    index.save(tmp_path / "relative")
    line = [tmp_path / "relative", "--model", saved / "model"]
    assert "give their folder with --root .=FOLDER" in export(*line, code=1)
    root = f".={saved / 'pictures'}"
    _, service = export(*line, "--root", root)
    assert parsed(service["command"])["root"] == (root,)
    assert str(saved / "pictures") in [volume["source"] for volume in service["volumes"]]


def test_folders_of_images_are_mounted_as_deep_as_possible():
    few = serve_export._few
    assert few({"/a/b", "/a/b/c", "/d"}) == [Path("/a/b"), Path("/d")]
    many = {f"/photos/{year}/{month}" for year in range(10) for month in range(12)}
    assert few(many | {"/other"}) == sorted(
        [Path("/other"), *(Path(f"/photos/{y}") for y in range(10))]
    )


def test_formats_of_images_choose_the_extras(saved, export, bundle, tmp_path):
    from vlm.heads.retrieval import RetrievalIndex

    index = RetrievalIndex(bundle)
    index.add([saved / "pictures" / "0.png"], ids=[str(saved / "pictures" / "0.heic")])
    index.save(tmp_path / "heic")
    folder, _ = export(tmp_path / "heic", "--model", saved / "model")
    assert "ARG EXTRAS=serve,heif\n" in (folder / "Dockerfile").read_text()


@pytest.mark.slow
def test_the_wheel_is_the_package_that_runs(tmp_path, monkeypatch):
    wheel = wheels.write_wheel(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    assert wheels.write_wheel(again).read_bytes() == wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        package = Path(wheels.__file__).parents[1]
        for path in ("serving/page/index.html", "serving/docker/Dockerfile", "chips.toml"):
            assert archive.read(f"vlm/{path}") == (package / path).read_bytes()
        names = archive.namelist()
        record = archive.read(f"vlm_jax-{__version__}.dist-info/RECORD").decode().splitlines()
    assert not any("__pycache__" in name for name in names)
    assert sorted(line.split(",")[0] for line in record) == sorted(names)
    monkeypatch.setattr(wheels, "__version__", "0.0.0")
    with pytest.raises(Exception, match="install it again"):
        wheels.write_wheel(tmp_path)


@pytest.fixture
def mounted():
    """Folder that is neither below /tmp nor private, for sources of mounts and the image."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def ask(url, key=None, body=None):
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read()


def index_below(folder, saved):
    """Index of the pictures of `saved`, with both in a folder that a container can mount."""
    data = folder / "data"
    for name in ("model", "pictures"):
        shutil.copytree(saved / name, data / name)
    line = ["index", "--model", data / "model", data / "pictures", data / "index"]
    assert main([*map(str, line)]) == 0
    return data / "index"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_the_exported_service_answers_with_pictures(saved, export, mounted):
    index, port = index_below(mounted, saved), free_port()
    data = index.parent
    folder, service = export(index, "--name", "named", "--port", port)
    container = Container(folder, mounted / "work", port)
    rights = container.run(
        [sys.executable, "-c", "import os, vlm; print(os.getuid(), vlm.__file__, os.getcwd())"]
    ).split()
    assert rights[1].startswith(str(mounted / "work" / "site"))
    process = container.start(stderr=subprocess.PIPE, text=True)
    try:
        output = []
        while not output or "serving at" not in output[-1]:
            output.append(process.stderr.readline())
            assert output[-1], output
        url = f"http://127.0.0.1:{port}"
        container.run([sys.executable, *container.health_check[1:]])
        assert b"<title>vlm</title>" in ask(url)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/v1/models")
        models = json.loads(ask(f"{url}/v1/models", container.key))
        assert models["data"][0]["id"] == "named"
        image = base64.b64encode((data / "pictures" / "1.png").read_bytes()).decode()
        query = [{"image": f"data:image/png;base64,{image}"}]
        reply = json.loads(ask(f"{url}/v1/search", container.key, {"query": query}))
        best = reply["data"][0]
        assert best["id"] == str(data / "pictures" / "1.png")
        picture = ask(f"{url}/v1/items/{best['item']}/picture", container.key)
        assert Image.open(io.BytesIO(picture)).size == (40, 30)
        if container.isolated:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines())
            assert set(fields["Uid"].split()) == {service["user"].split(":")[0]}
            assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
            assert fields["NoNewPrivs"] == "1"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
    assert list(container.cache.glob("vlm/xla/*"))  # compiled programs: a restart is faster


def engine():
    """Command of a container engine with compose files, if there is one."""
    for name in ("docker", "podman"):
        if shutil.which(name):
            line = [name, "compose", "version"], [name, "info"]
            if all(subprocess.run(words, capture_output=True).returncode == 0 for words in line):
                return [name, "compose"]
    return None


@pytest.mark.slow
@pytest.mark.skipif(engine() is None, reason="there is no container engine")
def test_a_container_engine_builds_and_runs_it(saved, export, mounted):
    index, port = index_below(mounted, saved), free_port()
    folder, _ = export(index, "--port", port)
    key = (folder / ".env").read_text().split("VLM_API_KEYS='")[1].split("'")[0]
    compose = [*engine(), "--project-directory", str(folder)]
    subprocess.run([*compose, "up", "--build", "--detach", "vlm"], check=True, timeout=1500)
    try:
        end = time.monotonic() + 300
        while True:
            try:
                picture = ask(f"http://127.0.0.1:{port}/v1/items/1/picture", key)
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(1)
        assert Image.open(io.BytesIO(picture)).size == (40, 30)
    finally:
        subprocess.run([*compose, "down", "--volumes"], check=True, timeout=120)
