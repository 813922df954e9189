"""Models pushed to a Hub over loopback by huggingface_hub's own client, and loaded from it.

That transformers and open_clip load them too is in tests/peers/test_pushed.py.
"""

import json
import pathlib

import hub_client
import pytest
from hub_server import READER, TOKEN
from hub_server import connected as connected  # fixtures
from hub_server import hub as hub

from vlm.bundle import load
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError
from vlm.weights.card_facts import metadata, read_card, shown_facts

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"
RESULT = {
    "task": "zero-shot over 6 captions",
    "metrics": {
        "top1": {"value": 0.51234, "low": 0.41, "high": 0.61, "n": 203},
        "text_to_image_R@1": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 1203},
        "auc": {"value": None, "low": None, "high": None, "n": 203},
    },
    "provenance": {
        "model": "shapes",
        "data": {"name": "/home/someone/secret/pairs.csv", "version": "", "split": "test"},
        "templates": ["{}"],
        "date": "2026-01-02T03:04:05+00:00",
        "evidence": {},
    },
    "kind": "",
}
RUN = {
    "name": "shapes",
    "init_from": "openai/clip-vit-base-patch32",
    "batch_size": 64,
    "optimizer": {"name": "adamw", "learning_rate": 0.001},
    "data": {"source": "hf://datasets/me/shapes@v1/data/{split}-*.parquet"},
}


@pytest.fixture
def model():
    return load(GOLDEN / "hf_clip")


@pytest.fixture
def logged_in(connected, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    connected.repositories.clear()
    return connected


@pytest.fixture
def run(model, tmp_path):
    """A run folder with results, as `vlm train` leaves it."""
    folder = tmp_path / "runs" / "shapes"
    model.save(folder / "bundle")
    (folder / "config.json").write_text(json.dumps(RUN))
    rows = [{"total_steps": 100}, {"total_steps": 200}]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = {"format": "vlm evaluation report", "version": 1, "results": [RESULT]}
    (folder / "results.json").write_text(json.dumps(report))
    return folder


def fails(model, *args, kind=CheckpointError, **options):
    with pytest.raises(kind) as caught:
        model.push_to_hub(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def card_of(hub, name, revision="main"):
    """The metadata and the text of the card that the Hub has."""
    text = hub.files(name, revision)["README.md"]
    return metadata(text, name), text.decode()


# ------------------------------------------------------------------------------ what is pushed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "file", "library"),
    [
        ("vlm", "bundle.json", "vlm"),
        ("huggingface", "config.json", "transformers"),
        ("open_clip", "open_clip_config.json", "open_clip"),
    ],
)
def test_every_format_loads_again(logged_in, model, format, file, library):
    address = model.push_to_hub(f"me/{format}", format=format, licence="mit")
    files = logged_in.files(f"me/{format}")
    assert {file, "README.md", "tokenizer.json"} <= files.keys()
    assert (
        address
        == f"{logged_in.url}/me/{format}/commit/"
        + (logged_in.repositories[f"me/{format}"].revisions["main"])
    )
    values, text = card_of(logged_in, f"me/{format}")
    assert values["library_name"] == library
    assert f'vlm.load("me/{format}")' in text
    assert hub_client.digest(load(f"me/{format}")) == hub_client.digest(model)


@pytest.mark.slow
def test_the_next_load_is_of_what_was_pushed(logged_in, model):
    model.push_to_hub("me/twice", licence="mit")
    assert hub_client.digest(load("me/twice")) == hub_client.digest(model)
    other = load(GOLDEN / "hf_siglip")
    other.push_to_hub("me/twice", licence="mit", commit_message="Better")
    assert hub_client.digest(load("me/twice")) == hub_client.digest(other)
    assert logged_in.repositories["me/twice"].messages == ["Upload with vlm", "Better"]


@pytest.mark.slow
def test_a_branch_and_visibility(logged_in, model):
    model.push_to_hub("me/private", licence="mit", private=True)
    assert logged_in.repositories["me/private"].private
    before = logged_in.repositories["me/private"].revisions["main"]
    other = load(GOLDEN / "hf_siglip")
    for _ in range(2):  # the second time it is there
        other.push_to_hub("me/private", licence="mit", revision="v2")
    assert logged_in.repositories["me/private"].revisions["main"] == before
    assert hub_client.digest(load("me/private", revision="v2")) == hub_client.digest(other)
    message = fails(model, "me/private", licence="mit", private=False)
    assert message.startswith("me/private exists and is private: change its visibility")


def test_older_weights_do_not_stay(logged_in, model):
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    kept = {"bundle.json": b"{}", "model.onnx": b"o", "data.bin": b"b"}
    logged_in.put("me/old")
    logged_in.commit("me/old", stale | kept, "main")
    model.push_to_hub("me/old", licence="mit")
    assert logged_in.files("me/old").keys() == {
        "README.md", "bundle.json", "data.bin", "model.onnx", "model.safetensors", "tokenizer.json"
    }  # fmt: skip


@pytest.mark.slow
def test_a_dry_run_writes_the_folder(connected, model, tmp_path):
    out = tmp_path / "out"
    assert model.push_to_hub("me/dry", licence="mit", dry_run=out) == str(out)
    assert hub_client.digest(load(out)) == hub_client.digest(model)
    assert "me/dry" not in connected.repositories
    small = tmp_path / "small"
    model.push_to_hub("me/dry", licence="mit", dry_run=small, quantize="int8")
    model.save(tmp_path / "saved", quantize="int8")
    assert hub_client.digest(load(small)) == hub_client.digest(load(tmp_path / "saved"))
    assert json.loads((small / "bundle.json").read_text())["format"] == 2  # of eight bits
    with pytest.raises(ConfigError, match="quantize"):
        model.push_to_hub("me/dry", format="open_clip", dry_run=small, quantize="int8")
    message = fails(model, "me/dry", licence="mit", dry_run=out)
    assert message == f"{out} exists already: give the path of a new folder"


# ---------------------------------------------------------------------------------- the card


def test_the_card_of_a_run(connected, run, tmp_path):
    load(run).push_to_hub("me/shapes", dry_run=tmp_path / "out", datasets=("lab/more",))
    text = (tmp_path / "out" / "README.md").read_text()
    values = metadata(text.encode(), "README.md")
    assert values["license"] == "mit"  # that of the base model
    assert values["base_model"] == "openai/clip-vit-base-patch32"
    assert values["datasets"] == ["lab/more", "me/shapes"]
    assert values["pipeline_tag"] == "zero-shot-image-classification"
    assert values["metrics"] == ["accuracy", "text_to_image_R@1"]
    ((results,),) = ([entry["results"] for entry in values["model-index"]],)
    assert [row["metrics"][0]["value"] for row in results] == [0.5123, 0.25]
    assert results[0]["metrics"][0]["args"] == {"low": 0.41, "high": 0.61, "n": 203}
    assert "| top1 | 51.2% | 41.0% – 61.0% | 203 |" in text
    assert "| steps | 200 |" in text
    assert "| optimizer.learning_rate | 0.001 |" in text
    assert "that of the base model openai/clip-vit-base-patch32" in text
    assert "/home/someone" not in text  # names of folders are the publisher's own
    facts = shown_facts(values)
    assert facts["data"] == "lab/more, me/shapes"
    assert facts["top1 on pairs.csv [test]"] == "0.5123 [0.41, 0.61] of 203"


@pytest.mark.slow
def test_a_card_that_was_edited_keeps_its_text(logged_in, model, caplog):
    model.push_to_hub("me/edited", licence="mit")
    model.push_to_hub("me/edited", licence="apache-2.0")  # an unedited one is replaced
    values, text = card_of(logged_in, "me/edited")
    assert (values["license"], caplog.messages) == ("apache-2.0", [])
    files = dict(logged_in.files("me/edited"))
    files["README.md"] = text.replace("## Use", "Mind the gap.\n\n## Use").encode()
    files["README.md"] = files["README.md"].replace(b"tags:", b"widget: mine\ntags:")
    logged_in.commit("me/edited", files, "main")
    model.push_to_hub("me/edited", licence="cc-by-4.0")
    values, text = card_of(logged_in, "me/edited")
    assert (values["license"], values["widget"]) == ("cc-by-4.0", "mine")
    assert "Mind the gap." in text
    assert text.count("\n# me/edited\n") == 1
    assert caplog.messages == [
        "README.md of me/edited was edited by hand: its text stays, and its YAML is updated"
    ]


@pytest.mark.slow
def test_the_licence_is_never_guessed(connected, model, run, tmp_path):
    assert fails(model, "me/x") == (
        f"the licence of the model is unknown: the card of its base model {GOLDEN / 'hf_clip'} "
        "names none; name it with licence, such as apache-2.0"
    )
    bundle = load(run / "bundle")
    (run / "config.json").write_text(json.dumps(RUN | {"init_from": None}))
    assert "as no base model is known: name it with licence" in fails(bundle, "me/x")
    (run / "config.json").write_text(json.dumps(RUN | {"init_from": "lab/base"}))
    assert "the card of its base model is not readable (" in fails(bundle, "me/x")
    connected.put("lab/base", README__md=b"# No YAML")
    assert "the card of its base model lab/base names none" in fails(bundle, "me/x")
    licence = b"---\nlicense: other\nlicense_name: lab-1\nlicense_link: https://lab/1\n---\n"
    connected.put("lab/base", README__md=licence)
    bundle.push_to_hub("me/x", dry_run=tmp_path / "out")
    values = read_card(tmp_path / "out") or {}
    assert values["license_name"] == "lab-1"
    assert values["license_link"] == "https://lab/1"
    assert "empty" in fails(bundle, "me/x", licence=" ")


def test_results_of_another_model(model, tmp_path):
    other = json.loads(json.dumps(RESULT))
    other["provenance"]["evidence"]["fingerprint"] = "f" * 32
    report = {"format": "vlm evaluation report", "version": 1, "results": [other]}
    (tmp_path / "results.json").write_text(json.dumps(report))
    message = fails(model, "me/x", licence="mit", results=tmp_path)
    assert "results.json is of another model (fingerprint ffffffffffff, and " in message
    other["provenance"]["evidence"]["fingerprint"] = model.identity
    (tmp_path / "results.json").write_text(json.dumps(report))
    model.push_to_hub("me/x", licence="mit", results=tmp_path, dry_run=tmp_path / "out")
    assert "51.2%" in (tmp_path / "out" / "README.md").read_text()
    assert "there are no results" in fails(model, "me/x", licence="mit", results=tmp_path / "no")
    for text in ("{}", '{"results": [{}]}', '{"results": 3}', "[", '{"results": [3]}'):
        (tmp_path / "bad.json").write_text(text)
        message = fails(model, "me/x", licence="mit", results=tmp_path / "bad.json")
        assert "bad.json" in message


# ----------------------------------------------------------------------------- what is refused


def test_tokens(connected, model, monkeypatch):
    write = "log in with `hf auth login`, or set HF_TOKEN, to a token with write access"
    assert fails(model, "me/x", licence="mit") == f"there is no token to push me/x with: {write}"
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    message = fails(model, "me/x", licence="mit")
    assert message == f"the Hub does not accept the token for me/x (401): {write}"
    message = fails(model, "me/x", licence="mit", token=READER)
    assert message == f"the Hub does not let this token write to me/x (403): {write}"
    message = fails(model, "you/x", licence="mit", token=TOKEN)
    assert message == (
        "the Hub does not let this token write to you/x (403): it is for the namespaces me, lab, "
        "so push to one of them"
    )
    connected.put("lab/theirs", README__md=b"# Theirs")
    assert "(403)" in fails(model, "lab/theirs", licence="mit", token=READER)
    assert connected.repositories["lab/theirs"].messages == []


def test_names_and_formats(logged_in, model):
    for name in ("shapes", "me/", "me/a/b", "me/my model"):
        assert "give OWNER/NAME" in fails(model, name, licence="mit", kind=ConfigError)
    assert "'lab' is not a name on the Hub" in fails(
        model, "me/x", licence="mit", datasets=["lab"], kind=ConfigError
    )
    for option in ("base_model", "repo"):
        options = {"repo": "me/x", "licence": "mit", option: "a..b/c"}
        assert "a..b/c" in fails(model, kind=(ConfigError, CheckpointError), **options)
    logged_in.put("me/theirs", GOLDEN / "oc_vit")
    assert fails(model, "me/theirs", licence="mit") == (
        "me/theirs has a model in the format open_clip, and not 'vlm': push to another "
        "repository, or with format='open_clip'"
    )


@pytest.mark.slow
def test_a_hub_in_trouble(logged_in, model, monkeypatch):
    from huggingface_hub import constants

    model.push_to_hub("me/x", licence="mit")
    repository = logged_in.repositories["me/x"]
    before = dict(logged_in.files("me/x"))
    other = load(GOLDEN / "hf_siglip")
    repository.faults = {"commit": ["500"]}
    message = fails(other, "me/x", licence="mit")
    assert message.startswith("the Hub answers with an error for me/x (")
    assert message.endswith("no file of it was changed, try again later")
    assert logged_in.files("me/x") == before
    repository.faults = {"preupload": ["403"]}
    assert "does not let this token write to me/x (403)" in fails(other, "me/x", licence="mit")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = fails(other, "me/x", licence="mit")
    assert message.startswith("me/x did not reach the Hub at http://127.0.0.1:9 (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in fails(other, "me/x", licence="mit")


@pytest.mark.slow
def test_a_cut_upload_is_continued(logged_in, model):
    logged_in.put("me/cut", README__md=b"")
    logged_in.repositories["me/cut"].faults = {"upload": ["cut"]}
    logged_in.blobs.clear()
    model.push_to_hub("me/cut", licence="mit")
    assert hub_client.digest(load("me/cut")) == hub_client.digest(model)


# --------------------------------------------------------------------------- the command line


def vlm(*words):
    return main([*map(str, words)])


@pytest.mark.slow
def test_the_commands(logged_in, run, capsys):
    assert vlm("push", run, "me/shapes", "--description", "Shapes.", "--licence", "mit") == 0
    assert f"is at {logged_in.url}/me/shapes/commit/" in capsys.readouterr().err
    _, text = card_of(logged_in, "me/shapes")
    assert "\nShapes.\n" in text
    assert vlm("models", "me/shapes", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["card"]["licence"] == "mit"
    assert values["card"]["base model"] == "openai/clip-vit-base-patch32"
    assert vlm("models", "me/shapes") == 0
    shown = capsys.readouterr().out
    assert "top1 on pairs.csv [test]" in shown
    assert "0.5123 [0.41, 0.61] of 203" in shown
    assert vlm("push", run, "you/shapes", "--licence", "mit") == 1
    assert capsys.readouterr().err.startswith("vlm: the Hub does not let this token write to you/")


def test_a_model_without_a_card(connected, run, capsys):
    assert vlm("models", run) == 0
    assert f"{run} has none" in capsys.readouterr().out
    connected.put("me/bare", bundle__json=b"{}")
    assert vlm("models", "me/bare") == 0
    assert "me/bare has none" in capsys.readouterr().out
    connected.put("me/text", README__md=b"# Text")
    assert vlm("models", "me/text") == 0
    assert "me/text has no metadata" in capsys.readouterr().out
    assert vlm("models", "me/absent") == 1
    assert "there is no folder and no Hub model 'me/absent'" in capsys.readouterr().err
    assert vlm("models", "siglip2-base") == 0
    assert "vlm models google/siglip2-base-patch16-224 shows it" in capsys.readouterr().out
    connected.put("google/siglip2-base-patch16-224", README__md=b"---\nlicense: mit\n---\n")
    assert vlm("models", "google/siglip2-base-patch16-224") == 0
    shown = capsys.readouterr().out
    assert "card: licence" in shown
    assert "SigLIP 2" in shown


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("license: mit\nlanguage:\n- en\n- de", {"licence": "mit", "languages": "en, de"}),
        ("license: [mit, apache-2.0]", {"licence": "mit, apache-2.0"}),
        ("license: {a: b}\ndatasets: laion", {"licence": "{'a': 'b'}", "data": "laion"}),
        ("license: 3\nmodel-index: 7", {"licence": "3"}),
        (
            "model-index:\n- results:\n  - dataset: 3\n    metrics:\n    - value: 0.5",
            {"metric on unknown data": "0.5"},
        ),
        ("- a\n- b", {}),
        ('license: "mit\\u001b[31m"', {"licence": "mit [31m"}),
    ],
)  # fmt: skip
def test_cards_of_every_form(card, expected):
    assert shown_facts(metadata(f"---\n{card}\n---\n# A".encode(), "README.md")) == expected


def test_a_card_that_is_no_yaml(tmp_path):
    for text in ("a: [", "a: !!python/object/apply:os.system [ls]", "a: &x [*x]\n\tb: 3"):
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        with pytest.raises(CheckpointError, match=r"README\.md has YAML that cannot be read"):
            read_card(tmp_path)
    assert metadata(b"\xff\xfe no text", "README.md") == {}
