"""Label sources, hierarchies, "none of these", calibration, and saved classifiers."""

import json
import sys

import numpy as np
import pytest

from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.heads import prompts
from vlm.heads.labels import data_set_of, read_labels, read_templates
from vlm.heads.zero_shot import Classification, ZeroShotClassifier, fit_temperature


def test_labels_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("dog\n\n cat \n")
    assert read_labels(tmp_path / "names.txt") == ["dog", "cat"]
    (tmp_path / "names.json").write_text('["dog", "cat"]')
    assert read_labels(str(tmp_path / "names.json")) == ["dog", "cat"]
    file = tmp_path / "en_classnames.json"
    file.write_text(json.dumps({"pets": ["dog", "cat"], "vtab/x": ["a"]}))
    assert read_labels(f"{file}:pets") == ["dog", "cat"]
    assert read_labels(f"{file}:wds/pets") == ["dog", "cat"]
    templates = tmp_path / "templates.json"
    templates.write_text(json.dumps({"pets": ["a photo of a {c}."], "cupl": {"dog": ["it barks"]}}))
    assert read_templates(f"{templates}:pets") == ["a photo of a {}."]
    assert read_templates(f"{templates}:cupl") == {"dog": ["it barks"]}
    assert read_labels(["a"]) == ["a"]
    assert read_templates(("a {}",)) == ("a {}",)
    (tmp_path / "a:b.txt").write_text("dog")  # a name with a colon
    assert read_labels(tmp_path / "a:b.txt") == ["dog"]


def test_the_classes_of_imagenet_by_name():
    found = data_set_of("imagenet")
    assert (len(found.labels), len(set(found.labels)), len(found.templates)) == (1000, 1000, 80)
    assert [found.labels[i] for i in (0, 657)] == ["tench", "missile (657)"]
    assert [found.names[i] for i in (0, 657, 744)] == ["tench", "missile", "missile"]
    assert len(read_labels("imagenet-r")) == 200


def test_the_names_of_open_clip_are_parsed_without_import(tmp_path, monkeypatch):
    """In the form of its source; importing it would import PyTorch."""
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip/__init__.py").write_text("raise ImportError('it was run')")
    (tmp_path / "open_clip/zero_shot_metadata.py").write_text(
        "import torch\n"
        "OTHERS = ['no']\n"
        "IMAGENET_CLASSNAMES = ('tench', \"king's crab\")\n"
        "OPENAI_IMAGENET_TEMPLATES = (lambda c: f'a photo of the {c}.', lambda c: f'{c}')\n"
        "SIMPLE_IMAGENET_TEMPLATES = (lambda c: f'art of a {c}.',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    for name in ("imagenet", "imagenet_simple"):
        assert read_labels(f"open_clip:{name}") == ["tench", "king's crab"]
    assert read_templates("open_clip:imagenet") == ["a photo of the {}.", "{}"]
    assert read_templates("open_clip:imagenet_simple") == ["art of a {}."]
    (tmp_path / "open_clip/zero_shot_metadata.py").write_text("IMAGENET_CLASSNAMES = names()")
    with pytest.raises(DataError, match="defines no IMAGENET_CLASSNAMES"):
        read_labels("open_clip:imagenet")


@pytest.mark.peers
def test_the_names_of_an_installed_open_clip():
    open_clip = pytest.importorskip("open_clip")
    names, templates = read_labels("open_clip:imagenet"), read_templates("open_clip:imagenet")
    assert list(names) == list(open_clip.IMAGENET_CLASSNAMES)
    filled = [template.replace("{}", "dog") for template in templates]
    assert filled == [template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_bad_sources(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ["a"], "y": 3}')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "truncated.json").write_text("[")
    (tmp_path / "list.json").write_text('["a"]')
    (tmp_path / "numbers.json").write_text('["a", 1]')
    (tmp_path / "mixed.json").write_text('{"x": ["a", 1]}')
    (tmp_path / "pixels.txt").write_bytes(b"\xff\xfe\xff")
    for place, match in {
        "nowhere.txt": "no file 'nowhere.txt' of labels",
        f"{tmp_path}/a.json:z": "no labels of 'z': it has x, y",
        f"{tmp_path}/a.json:y": "no list of labels",
        f"{tmp_path}/a.json": "name one of its entries",
        f"{tmp_path}/empty.txt": "holds no labels",
        f"{tmp_path}/truncated.json": "is not JSON",
        f"{tmp_path}/list.json:x": "no labels of 'x': it has no names at all",
        f"{tmp_path}/numbers.json": "holds no list of labels: write a list of texts",
        f"{tmp_path}/mixed.json": "no list of labels: name one of its entries",
        f"{tmp_path}/pixels.txt": "is not UTF-8 text",
        "tfds:no_such_data": "TFDS cannot load the data set 'no_such_data'",
    }.items():
        with pytest.raises(DataError, match=match):
            read_labels(place)
    with pytest.raises(ConfigError, match="no labels of 'cifar10'"):
        read_labels("open_clip:cifar10")


def test_a_hierarchy(model, paint):
    tree = {
        "warm": {"red": None, "yellow": ["bright yellow"]},
        "cold": {"blue": None},
        "black": None,
    }
    classify = ZeroShotClassifier(model, tree, templates=["a {} wall"])
    assert classify.labels == ("red", "yellow", "blue", "black")
    assert classify.prompts["red"] == ("a red wall",)
    assert classify.groups == [{"warm": ["red", "yellow"], "cold": ["blue"]}]
    result = classify([paint("red"), paint("blue")])
    grouped = result.grouped(classify.groups[0])
    assert grouped.labels == ("warm", "cold", "black")
    expected = result.scores @ np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(grouped.scores, expected, atol=1e-5)
    with pytest.raises(ConfigError, match="'red' of group 'b' is in two groups"):
        result.grouped({"a": ["red"], "b": ["red"]})
    with pytest.raises(ConfigError, match="'red' is given twice"):
        ZeroShotClassifier(model, {"a": {"red": None}, "b": {"red": None}})
    with pytest.raises(ConfigError, match="group 'a' is given twice"):
        ZeroShotClassifier(model, {"x": {"a": {"red": None}}, "y": {"a": {"blue": None}}})
    with pytest.raises(ConfigError, match="'pink' of group 'a' is none of the labels"):
        result.grouped({"a": ["pink"]})


def test_a_hierarchy_of_three_levels_and_ungrouped_labels():
    deep = {"animal": {"dog": {"poodle": None, "pug": None}, "cat": None}, "car": None}
    leaves, levels = prompts.leaves_of(deep, ["a {}"])
    assert leaves == {name: [f"a {name}"] for name in ("poodle", "pug", "cat", "car")}
    assert levels == [{"animal": ["poodle", "pug", "cat"]}, {"dog": ["poodle", "pug"]}]
    # Labels that do not exclude each other: a group is as likely as its best one.
    logits = np.array([[-1.0, 2.0, 0.5]], np.float32)
    grouped = Classification(("a", "b", "c"), logits, "sigmoid").grouped({"ab": ["a", "b"]})
    np.testing.assert_array_equal(grouped.logits, [[2.0, 0.5]])


def test_none_of_these(model, paint):
    classify = ZeroShotClassifier(model, ["red", "blue"], other_label="a green photo")
    top = classify([paint("red"), paint("green")]).top(1)
    assert [row[0][0] for row in top] == ["red", "none of these"]
    with pytest.raises(ConfigError, match="is what `other_label` adds"):
        ZeroShotClassifier(model, ["none of these"], other_label="a photo")


def test_several_labels(model, paint):
    """Each label is a two-way choice against `none`, whatever the other labels are."""
    classify = ZeroShotClassifier(
        model, ["red", "green", "blue"], other_label="black", multi_label=True
    )
    result = classify([paint("red"), paint("black")])
    z, against = model.encode_image([paint("red")])[0], model.encode_text(["black"])[0]
    cosines = classify.z_labels[:3] @ z - against @ z
    np.testing.assert_allclose(result.scores[0], 1 / (1 + np.exp(-50 * cosines)), atol=1e-4)
    assert result.labels == ("red", "green", "blue")
    assert "red" in [label for label, _ in result.above(0.5)[0]]
    assert result.above(0.99)[1] == []
    model.loss = "sigmoid"
    assert ZeroShotClassifier(model, ["red"], multi_label=True).rule == "sigmoid"


def test_temperature(model, paint):
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, 2000)
    logits = rng.standard_normal((2000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = np.array([rng.choice(4, p=row) for row in p])
    assert fit_temperature(7 * logits, target) == pytest.approx(7, rel=0.1)
    assert 0.3 < fit_temperature(np.array([[9.0, 0.0]]), np.array([0])) < 1.5  # one label is little
    yes = rng.random((2000, 1)) < 1 / (1 + np.exp(-logits[:, :1]))  # of two independent labels
    both = np.concatenate([logits[:, :1], -logits[:, :1]], axis=1)
    independent = fit_temperature(7 * both, np.where(yes[:, 0], 0, 1), "sigmoid")
    assert independent == pytest.approx(7, rel=0.1)
    classify = ZeroShotClassifier(model, ["red", "blue"])
    before = classify(paint("red")).logits
    classify.calibrate([paint("red"), paint("blue")], ["red", "blue"])
    np.testing.assert_allclose(
        classify(paint("red")).logits * classify.temperature, before, rtol=1e-4
    )
    with pytest.raises(ConfigError, match="'green' is none of the 2 classes"):
        classify.calibrate([paint("red")], ["green"])
    with pytest.raises(ConfigError, match="2 images and 1 labels"):
        classify.calibrate([paint("red"), paint("blue")], ["red"])


def test_save_and_load(model, paint, tmp_path, make_model):
    classify = ZeroShotClassifier(model, ["red", "{braces}"], other_label="black", multi_label=True)
    classify.temperature = 2.0
    classify.save(tmp_path / "c.safetensors")
    again = ZeroShotClassifier.load(tmp_path / "c.safetensors", model)
    assert again.labels == classify.labels
    np.testing.assert_array_equal(again(paint("red")).logits, classify(paint("red")).logits)
    with pytest.raises(CheckpointError, match="embeds differently"):
        ZeroShotClassifier.load(tmp_path / "c.safetensors", make_model(seed=1))
    assert (again.groups, again.rule, again.prompts) == ([], "sigmoid", classify.prompts)
    (tmp_path / "corrupt").write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match="is not a zero-shot classifier"):
        ZeroShotClassifier.load(tmp_path / "corrupt", model)
    classify.z_labels = classify.z_labels[:2]
    classify.save(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="the numbers of embeddings and labels differ"):
        ZeroShotClassifier.load(tmp_path / "short.safetensors", model)
    model.embed_dim = 16
    with pytest.raises(ConfigError, match=r"shape \(2, 16\) are not those of 3 labels"):
        ZeroShotClassifier.of_embeddings(model, classify.prompts, classify.z_labels)
    two = {"a": ["an a"], "b": ["b"]}
    made = ZeroShotClassifier.of_embeddings(model, two, classify.z_labels)
    plain = classify.z_labels @ model.encode_image([paint("red")])[0]
    np.testing.assert_allclose(made(paint("red")).logits[0], 50 * plain, rtol=1e-4)
    assert (made.labels, made.rule, made.prompts["a"]) == (("a", "b"), "softmax", ("an a",))


def test_many_prompts_are_embedded_once(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    monkeypatch.setattr(prompts, "CACHED", 5)
    labels = [f"thing {i}" for i in range(20)]
    first, second, other = make_model(), make_model(), make_model(seed=1)
    first.fingerprint = second.fingerprint = "same"
    other.fingerprint = "another"
    z = ZeroShotClassifier(first, labels).z_labels
    monkeypatch.setattr(second, "encode_text", lambda texts: pytest.fail("encoded again"))
    np.testing.assert_array_equal(ZeroShotClassifier(second, labels).z_labels, z)
    assert not np.allclose(ZeroShotClassifier(other, labels).z_labels, z)
    held = ZeroShotClassifier(first, labels)
    np.save(tmp_path / "objects.npy", np.array([print] * 20), allow_pickle=True)
    np.save(tmp_path / "rows.npy", z[:3])
    objects, few = ((tmp_path / name).read_bytes() for name in ("objects.npy", "rows.npy"))
    for bad in (b"corrupt", objects, few):  # a pickle could run any code: it is not opened
        for file in (tmp_path / "classifiers").glob("*.npy"):
            file.write_bytes(bad)
        np.testing.assert_array_equal(ZeroShotClassifier(first, labels).z_labels, held.z_labels)


def test_few_prompts_and_unknown_weights_are_embedded_each_time(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    monkeypatch.setattr(prompts, "CACHED", 5)
    named, unknown = make_model(), make_model()
    named.fingerprint = "same"
    ZeroShotClassifier(named, ["red", "blue", "green", "black"])
    ZeroShotClassifier(unknown, [f"thing {i}" for i in range(20)])
    assert not (tmp_path / "classifiers").exists()
    ZeroShotClassifier(named, ["red", "blue", "green", "black", "white"])
    assert len(list((tmp_path / "classifiers").iterdir())) == 1  # and no leftover files


def test_ten_thousand_classes_take_few_calls(model, paint):
    calls = []
    encode = model.encode_text
    model.encode_text = lambda texts: calls.append(len(texts)) or encode(texts)
    classify = ZeroShotClassifier(model, [f"c{i}" for i in range(10_000)], templates=["{}"])
    assert max(calls) == 4096
    assert len(calls) == 3
    assert classify(paint("red")).logits.shape == (1, 10_000)
    assert isinstance(classify(paint("red")), Classification)


def test_lines_end_at_line_feeds_alone(tmp_path):
    names = ["one\u2028name", "next\x85line", "plain"]
    file = tmp_path / "names.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(names).encode())
    assert read_labels(file) == names
