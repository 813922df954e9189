"""Hub models fetched for real: huggingface_hub's own client against a Hub over loopback."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hub_client
import pytest
from hub_server import TOKEN, Hub
from hub_server import hub as hub  # a fixture
from PIL import Image

from vlm.bundle import load

GOLDEN = pathlib.Path(__file__).parent / "golden"
# What repositories hold besides.
BESIDES = {
    "README__md": b"# A model",
    "__gitattributes": b"*.safetensors filter=lfs",
    "LICENSE__txt": b"All yours",
    "pytorch_model__bin": b"p" * 5000,
    "flax_model__msgpack": b"f" * 5000,
    "tf_model__h5": b"t" * 5000,
    "model__onnx": b"o" * 5000,
    "trainer_state__json": b"{}",
}
WITHOUT_TESTS = {"outputs__npz": None, "resized__npz": None}


def environment(hub: Hub, home: pathlib.Path, **more: str) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return mine | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "VLM_CACHE": str(home / "vlm"),
        "NO_PROXY": "*",
        **more,
    }


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Ask a new process to load a model."""
    limits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    process = subprocess.Popen(
        [sys.executable, hub_client.__file__],
        env=environment(hub, tmp_path_factory.mktemp("home"), **limits),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def ask(model, **options):
        process.stdin.write(json.dumps({"model": model, **options}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(20)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def get(client, cache):
    """Load a model that is there, and return the digest of its parameters."""

    def get(model, **options):
        result = client(model, **{"cache": cache} | options)
        assert "error" not in result, result["error"]
        assert result["name"] == model
        return result["digest"]

    return get


@pytest.fixture
def fail(client, cache):
    """Load a model that cannot be had, and return the one sentence that says why."""

    def fail(model, **options):
        result = client(model, **{"cache": cache} | options)
        assert "error" in result
        assert "\n" not in result["error"]
        return result["error"]

    return fail


@functools.cache
def digest(folder: pathlib.Path, **options) -> str:
    return hub_client.digest(load(folder, **options))


def snapshot(cache: str, model: str) -> pathlib.Path:
    (found,) = pathlib.Path(cache, "models--" + model.replace("/", "--"), "snapshots").iterdir()
    return found


# --------------------------------------------------------------------------- what is fetched


@pytest.mark.parametrize("golden", ["hf_siglip", "hf_clip", "hf_siglip_wide", "oc_vit"])
def test_what_is_needed_is_fetched_once(hub, get, golden):
    name = f"whole/{golden}"
    hub.put(name, GOLDEN / golden, **BESIDES, **WITHOUT_TESTS)
    expected = digest(GOLDEN / golden)
    assert get(name) == expected
    kept = {p.name: p.stat().st_size for p in (GOLDEN / golden).iterdir() if p.suffix != ".npz"}
    assert hub.downloaded(name) == kept
    assert get(name) == expected
    assert hub.requests(name) == []
    assert get(name, offline=True) == expected
    assert get(f"hf-hub:{name}", offline=True) == expected
    assert hub.requests(name) == []


def test_modules_of_sentence_transformers_are_fetched_with_their_folders(hub, get, tmp_path):
    folder = tmp_path / "st"
    shutil.copytree(GOLDEN / "hf_clip", folder / "0_CLIPModel")
    (folder / "modules.json").write_text('[{"path": "0_CLIPModel", "type": "m.CLIPModel"}]')
    hub.put("st/clip", folder)
    assert get("st/clip") == digest(GOLDEN / "hf_clip")
    assert not any(file.endswith(".npz") for file in hub.downloaded("st/clip"))
    assert get("st/clip", offline=True) == digest(GOLDEN / "hf_clip")


def test_shards_of_pytorch_files(hub, get):
    hub.put("some/bin", GOLDEN / "hf_clip", GOLDEN / "hf_clip_bin", model__safetensors=None)
    assert get("some/bin") == digest(GOLDEN / "hf_clip")
    assert get("some/bin", offline=True) == digest(GOLDEN / "hf_clip")


def test_a_bundle_of_our_own(hub, get, tmp_path):
    load(GOLDEN / "hf_siglip").save(tmp_path / "bundle")
    hub.put("some/bundle", tmp_path / "bundle")
    assert get("some/bundle") == digest(GOLDEN / "hf_siglip")
    assert get("some/bundle", offline=True) == digest(GOLDEN / "hf_siglip")


@pytest.mark.parametrize("remnant", ["clip", "timm"])
def test_weights_of_the_family_that_is_read(hub, get, remnant):
    # Beside open_clip's files lie those of another library, and it is not they that load.
    other = "pytorch_model__bin" if remnant == "clip" else "model__safetensors"
    config = json.dumps({"model_type": remnant}).encode()
    name = f"two/{remnant}"
    hub.put(name, GOLDEN / "oc_vit", config__json=config, **{other: b"x" * 999})
    assert get(name) == digest(GOLDEN / "oc_vit")
    assert other.replace("__", ".") not in hub.downloaded(name)


def test_one_tower(hub, get):
    hub.put("some/half", GOLDEN / "hf_clip")
    assert get("some/half", tower="text") == digest(GOLDEN / "hf_clip", tower="text")


def test_revisions(hub, get):
    name = "some/moving"
    old = hub.put(name, GOLDEN / "hf_siglip", revision="v1.0").revisions["v1.0"]
    hub.put(name, GOLDEN / "hf_clip")
    for revision in ("v1.0", old):
        assert get(name, revision=revision) == digest(GOLDEN / "hf_siglip")
    assert get(name) == digest(GOLDEN / "hf_clip")
    for revision, golden in {"v1.0": "hf_siglip", old: "hf_siglip", None: "hf_clip"}.items():
        assert get(name, revision=revision, offline=True) == digest(GOLDEN / golden)
    hub.put(name, GOLDEN / "hf_clip", README__md=b"new")  # the branch moves on
    hub.requests(name)
    assert get(name) == get(name, offline=True) == digest(GOLDEN / "hf_clip")
    assert hub.requests(name) == []
    assert get(name, revision="main") == digest(GOLDEN / "hf_clip")
    assert hub.downloaded(name) == {}  # the same bytes as before


def test_the_first_commit_is_used_until_an_update(hub, client, get, cache):
    name = "some/pinned"
    first = hub.put(name, GOLDEN / "hf_siglip").revisions["main"]
    assert get(name) == digest(GOLDEN / "hf_siglip")
    record = pathlib.Path(f"{cache}-of-vlm", "hub", "models--some--pinned.json")
    assert json.loads(record.read_text())["commit"] == first
    second = hub.put(name, GOLDEN / "hf_clip").revisions["main"]
    assert get(name) == digest(GOLDEN / "hf_siglip")
    assert get(name, revision="main") == digest(GOLDEN / "hf_clip")
    assert get(name) == digest(GOLDEN / "hf_siglip")
    assert "is not updated" in client(name, cache=cache, update=True, offline=True)["error"]
    assert get(name, update=True) == digest(GOLDEN / "hf_clip")
    assert get(name, offline=True) == digest(GOLDEN / "hf_clip")
    assert json.loads(record.read_text())["commit"] == second


@pytest.mark.parametrize("record", ["", "{", "[]", '{"commit": "0", "files": {}}', "gone"])
def test_a_record_that_is_of_no_use(hub, get, cache, record):
    name = f"record/{len(record)}"
    hub.put(name, GOLDEN / "hf_siglip")
    file = pathlib.Path(f"{cache}-of-vlm", "hub", f"models--record--{len(record)}.json")
    file.parent.mkdir(parents=True)
    if record == "gone":  # a commit that the Hub has no more
        record = json.dumps({"commit": "c" * 40, "files": {"config.json": 1}})
    file.write_text(record)
    assert get(name) == digest(GOLDEN / "hf_siglip")
    assert get(name, offline=True) == digest(GOLDEN / "hf_siglip")


def test_the_recorded_commit_is_fetched_again(hub, get, cache):
    name = "some/emptied"
    hub.put(name, GOLDEN / "hf_siglip")
    whole = get(name)
    hub.put(name, GOLDEN / "hf_clip")
    shutil.rmtree(cache)
    assert get(name) == whole


# ------------------------------------------------------------------------- what is broken off


def test_a_cut_is_repaired(hub, client, get, cache):
    name = "cut/once"
    hub.put(name, GOLDEN / "hf_siglip").faults = {"model.safetensors": ["cut"]}
    size = (GOLDEN / "hf_siglip" / "model.safetensors").stat().st_size
    # Clients before huggingface_hub 2 leave a cut to the next load.
    assert "did not arrive" in client(name, cache=cache).get("error", "did not arrive")
    assert get(name) == digest(GOLDEN / "hf_siglip")
    parts = [r for r in hub.requests(name) if r.method == "GET" and r.file.endswith("tensors")]
    assert [part.sent for part in parts] == [size // 2, size - parts[1].start]
    assert size // 2 - 4096 < parts[1].start <= size // 2


@pytest.mark.parametrize("part", ["of another file", "too long"])
def test_a_wrong_part_of_a_file_is_not_used(hub, get, fail, cache, part):
    name = f"cut/{len(part)}"
    hub.put(name, GOLDEN / "hf_siglip")
    data = (GOLDEN / "hf_siglip" / "model.safetensors").read_bytes()
    blobs = pathlib.Path(cache, f"models--cut--{len(part)}", "blobs")
    blobs.mkdir(parents=True)
    file = blobs / f"{hashlib.sha256(data).hexdigest()}.part"
    if part == "too long":
        file.write_bytes(data + b"more")
    else:
        file.write_bytes(b"x" * 1000)
        assert "arrived damaged and was deleted: try again" in fail(name)
    assert get(name) == digest(GOLDEN / "hf_siglip")
    assert not [path.name for path in blobs.iterdir() if "part" in path.name]


@pytest.mark.parametrize("golden", ["hf_siglip", "hf_siglip_wide"])
def test_a_cut_for_good_is_repaired_by_the_next_load(hub, get, fail, cache, golden):
    name = f"cut/{golden}"
    file = {
        "hf_siglip": "model.safetensors",
        "hf_siglip_wide": "model-00002-of-00003.safetensors",
    }[golden]
    repository = hub.put(name, GOLDEN / golden, **WITHOUT_TESTS)
    repository.faults = {file: ["cut"] + ["drop"] * 50}
    message = fail(name)
    assert message.startswith(f"{file} of the Hub model '{name}' did not arrive")
    assert "RemoteProtocolError" in message or "onnection" in message
    assert os.path.join(cache, f"models--cut--{golden}") in message
    assert message.endswith("connect and try again")
    message = fail(name, offline=True)  # a part of a model is none
    assert "is not on this disk, and the Hub cannot be reached (HF_HUB_OFFLINE is set)" in message
    repository.faults = {}
    hub.requests(name)
    assert get(name) == digest(GOLDEN / golden)
    got = hub.downloaded(name)
    assert file in got
    assert not {"config.json", "tokenizer.json", "model-00001-of-00003.safetensors"} & got.keys()


def test_a_broken_update_leaves_the_old_model(hub, client, get, cache):
    name = "cut/update"
    hub.put(name, GOLDEN / "hf_siglip")
    assert get(name) == digest(GOLDEN / "hf_siglip")
    repository = hub.put(name, GOLDEN / "hf_clip")
    repository.faults = {"model.safetensors": ["drop"] * 50}
    assert "is not updated" in client(name, cache=cache, update=True)["error"]
    assert get(name) == digest(GOLDEN / "hf_siglip")
    assert get(name, offline=True) == digest(GOLDEN / "hf_siglip")
    repository.faults = {}
    assert get(name, update=True) == digest(GOLDEN / "hf_clip")
    assert get(name, offline=True) == digest(GOLDEN / "hf_clip")


@pytest.mark.parametrize("damage", ["dangling", "truncated", "truncated config", "incomplete"])
def test_a_damaged_cache_is_repaired(hub, get, fail, cache, damage):
    name = f"damage/{damage.replace(' ', '-')}"
    hub.put(name, GOLDEN / "hf_siglip")
    whole = get(name)
    folder = snapshot(cache, name)
    blob = (folder / "model.safetensors").resolve()
    if damage == "truncated config":
        blob = (folder / "config.json").resolve()
    data = blob.read_bytes()
    if damage.startswith("truncated"):
        blob.write_bytes(data[: len(data) // 2])
        complaint = "is truncated" if damage == "truncated" else "is not JSON"
    else:  # killed while it was fetched again, for instance
        blob.unlink()
        complaint = "has no model.safetensors"
    if damage == "incomplete":
        (folder / "model.safetensors").unlink()
        blob.with_name(f"{blob.name}.1a2b3c4d.incomplete").write_bytes(data[:1000])
        blob.with_name(f"{blob.name}.incomplete").write_bytes(data[:1000])
    message = fail(name, offline=True)
    assert complaint in message
    assert f"the cached files of {name}" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert get(name) == whole
    assert get(name, offline=True) == whole
    assert blob.read_bytes() == data


# --------------------------------------------------------------------------- what is refused


def test_no_such_model_or_revision(hub, fail):
    assert "there is no folder and no Hub model 'some/absent': check the name" in fail(
        "some/absent"
    )
    hub.put("some/model", GOLDEN / "hf_siglip")
    message = fail("some/model", revision="v9")
    assert "the Hub model 'some/model' has no revision 'v9': choose" in message
    assert f"{hub.url}/some/model/commits/main" in message
    assert "no Hub model can have that name" in fail("some/..model")


def test_a_gated_model(hub, get, fail):
    hub.put("some/gated", GOLDEN / "hf_siglip").gated = True
    message = fail("some/gated")
    assert (
        f"'some/gated' asks for your consent: accept its terms at {hub.url}/some/gated" in message
    )
    assert "log in with `hf auth login`" in message
    message = fail("some/gated", token="hf_outdated")
    assert "the Hub does not let you read the model 'some/gated'" in message
    assert "401" in message
    assert "set HF_TOKEN" in message
    assert get("some/gated", token=TOKEN) == digest(GOLDEN / "hf_siglip")
    assert get("some/gated") == digest(GOLDEN / "hf_siglip")  # what is there is there


def test_a_model_that_is_not_for_us(hub, fail):
    config = json.dumps({"model_type": "llama"}).encode()
    hub.put("some/llm", config__json=config, model__safetensors=b"l" * 9999)
    message = fail("some/llm")
    assert "config.json of some/llm: model_type is 'llama'" in message
    assert "model.safetensors" not in hub.downloaded("some/llm")
    hub.put("some/flax", GOLDEN / "hf_siglip", model__safetensors=None, flax_model__msgpack=b"f")
    assert "'some/flax' has no model.safetensors and no pytorch_model.bin" in fail("some/flax")
    hub.put("some/data", README__md=b"# Data", data__onnx=b"d")
    assert "none of bundle.json, config.json, open_clip_config.json" in fail("some/data")


@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json"])
def test_a_model_without_a_file(hub, fail, missing):
    name = f"without/{missing.split('.')[0]}"
    hub.put(name, GOLDEN / "hf_siglip", **{missing.replace(".", "__"): None})
    assert f"has no {missing}" in fail(name)


def test_an_index_of_shards_that_are_not_there(hub, fail):
    shard = "model-00003-of-00003.safetensors"
    hub.put("some/truncated", GOLDEN / "hf_siglip_wide", **{shard.replace(".", "__"): None})
    message = fail("some/truncated")
    assert message.startswith(f"{shard} of the Hub model 'some/truncated' did not arrive")
    assert "404" in message


@pytest.mark.parametrize("status", ["403", "429", "500"])
def test_a_hub_in_trouble(hub, get, fail, cache, status):
    name = f"status/{status}"
    repository = hub.put(name, GOLDEN / "hf_siglip")
    repository.faults = {"": [status] * 9}
    message = fail(name)
    assert status in message
    assert name in message
    if status != "403":
        assert "the Hub answers with an error" in message
        assert f"elsewhere and copy it to {cache}/models--status--{status}" in message
        assert "try again later" in message
    repository.faults = {}
    assert get(name) == digest(GOLDEN / "hf_siglip")
    repository.faults = {"": [status] * 9}
    assert get(name) == digest(GOLDEN / "hf_siglip")  # the copy does


def test_a_silent_hub(hub, client, get, fail, cache):
    repository = hub.put("some/slow", GOLDEN / "hf_siglip")
    repository.faults = {"": ["stall"] * 9}
    message = fail("some/slow")
    assert "the Hub cannot be reached (ReadTimeout: " in message
    assert f"elsewhere and copy it to {cache}" in message
    repository.faults = {"model.safetensors": ["stall"]}
    assert "did not arrive" in client("some/slow", cache=cache).get("error", "did not arrive")
    assert get("some/slow") == digest(GOLDEN / "hf_siglip")


def test_a_cache_that_cannot_be_written(hub, fail, tmp_path):
    hub.put("some/model", GOLDEN / "hf_siglip")
    (tmp_path / "file").write_text("")
    message = fail("some/model", cache=str(tmp_path / "file"))
    assert "cannot be written" in message
    assert "set HF_HOME" in message


# ------------------------------------------------------------------------- as a user meets it


@pytest.mark.slow
def test_the_command_line(hub, tmp_path):
    hub.put("user/model", GOLDEN / "hf_siglip", **BESIDES)
    hub.put("user/gated", GOLDEN / "hf_siglip").gated = True
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")

    def start(model, **more):
        command = [
            sys.executable,
            "-m",
            "vlm",
            "classify",
            "--model",
            model,
            str(tmp_path / "image.png"),
        ]
        return subprocess.Popen(
            [*command, "--labels", "cat,dog"],
            env=environment(hub, tmp_path / "home", **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, refused = start("user/model"), start("user/gated")
    out, err = first.communicate(timeout=100)
    assert first.returncode == 0, err
    assert "cat" in out
    assert (tmp_path / "home" / "hub" / "models--user--model" / "refs" / "main").exists()
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 1
    assert err.startswith("vlm: the model 'user/gated' asks for your consent")
    assert err.count("\n") == 1
    hub.requests("user/model")
    again = start("user/model", HF_HUB_OFFLINE="1")
    elsewhere = start("user/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.communicate(timeout=100)[0] == out
    assert hub.requests("user/model") == []
    _, err = elsewhere.communicate(timeout=100)
    assert elsewhere.returncode == 1
    assert err.startswith("vlm: the model 'user/other' is not on this disk, and the Hub cannot be")
    assert err.count("\n") == 1
