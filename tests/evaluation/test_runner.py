"""Tasks and the runner over a small model with real arithmetic."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import rich
from rich.console import Console

from vlm.config import PreprocessConfig
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.evaluation.metrics import pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluation.runner import Report, Result, evaluate, provenance
from vlm.evaluation.tasks import DataInfo, RetrievalTask, ZeroShotTask

WORDS = ["dark", "grey", "light", "red", "green", "blue"]
COLOURS = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 0, 0], [0, 2, 0], [0, 0, 2]]) * 127
DATA = DataInfo("colours", "1.0.0", "test")


class NoisyColours:
    """Mean colours of pictures against colour words, with a fixed distortion so that it errs."""

    name, loss, logit_scale, logit_bias = "noisy colours", "softmax", 20.0, 0.0
    distortion = np.eye(4) + 0.5 * np.random.default_rng(5).standard_normal((4, 4))

    def encode_image(self, images, batch_size=32):
        means = np.array([np.asarray(image, np.float32).mean((0, 1)) for image in images])
        return self._unit(means) @ self.distortion.astype(np.float32)[:, :3]

    def encode_text(self, texts):
        rows = [COLOURS[[w in text for w in WORDS].index(True)] for text in texts]
        return self._unit(np.array(rows, np.float32)) @ self.distortion.astype(np.float32)[:, :3]

    def _unit(self, colours):
        z = np.concatenate([colours / 127 - 1, np.ones((len(colours), 1))], axis=1)
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def pictures(n=48):
    rng = np.random.default_rng(0)
    target = np.arange(n) % len(WORDS)
    noise = 90 * rng.standard_normal((n, 1, 1, 3)) + np.zeros((n, 8, 8, 1))
    return (COLOURS[target][:, None, None] + noise).clip(0, 255).astype(np.uint8), target


@pytest.fixture(scope="module")
def report():
    images, target = pictures()
    return evaluate(
        NoisyColours(),
        [
            ZeroShotTask(iter(images), WORDS, target, DATA, templates=("a {} wall",)),
            RetrievalTask(images[:6], WORDS, DATA, ks=(1, 2)),
        ],
    )


def test_results_are_those_of_the_pure_functions(report):
    model, (images, target) = NoisyColours(), pictures()
    z_image, z_text = model.encode_image(images), model.encode_text(WORDS)
    z_text /= np.linalg.norm(z_text, axis=1, keepdims=True)
    assert report["zero-shot"].metrics == zero_shot_metrics(z_image, z_text, target)
    # The stand-in is no oracle and no coin: the numbers in this test are worth comparing.
    assert 0.3 < report["zero-shot"].metrics["top1"].value < 1
    expected = pair_retrieval_metrics(z_image[:6], model.encode_text(WORDS), ks=(1, 2))
    assert report["retrieval"].metrics == expected


def test_provenance_says_where_a_number_comes_from(report):
    origin = report["zero-shot"].provenance
    assert (origin.model, origin.data, origin.templates) == ("noisy colours", DATA, ("a {} wall",))
    assert origin.seconds > 0
    assert origin.date.endswith("+00:00")
    assert {"vlm", "jax", "flax", "python"} <= set(origin.versions)
    assert "x cpu" in origin.device
    assert str(DATA) == "colours 1.0.0 [test]"


def test_a_report_says_how_image_files_were_decoded():
    model, (images, target) = NoisyColours(), pictures()
    model.preprocess = SimpleNamespace(config=PreprocessConfig(decode="reference"))
    found = evaluate(model, [ZeroShotTask(images, WORDS, target, DATA)])
    assert found["zero-shot"].provenance.evidence["decode"] == "reference"
    console = Console(width=100, file=io.StringIO())
    console.print(found)
    assert "Images are decoded as: reference" in console.file.getvalue()
    assert "decoded as: reference" in found._repr_html_()


def test_json_round_trip(report, tmp_path):
    report.save(tmp_path / "results.json")
    assert Report.load(tmp_path / "results.json") == report


def test_displays(report):
    out = io.StringIO()
    rich.print(report, file=out)
    console = Console(file=out, width=120)
    console.print(report)
    text = out.getvalue()
    top1 = report["zero-shot"].metrics["top1"]
    assert f"{top1.value:.1%}" in text
    assert f"{top1.low:.1%} – {top1.high:.1%}" in text
    assert "text_to_image_R@2" in text
    assert f"<td>{top1.value:.1%}</td>" in report._repr_html_()


def test_bad_reports(report, tmp_path):
    with pytest.raises(ConfigError, match="no task 'imagenet': it has 'zero-shot', 'retrieval'"):
        report["imagenet"]
    with pytest.raises(CheckpointError, match="there is no report"):
        Report.load(tmp_path / "gone.json")
    for text in ("{", "[]", "{}", '{"format": "other", "version": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"bad\.json is no"):
            Report.load(tmp_path / "bad.json")
    changed = report.to_json().replace('"low"', '"lo"')
    with pytest.raises(CheckpointError, match="the report is not"):
        Report.from_json(changed)


@pytest.mark.untyped
def test_bad_tasks():
    images, target = pictures()
    with pytest.raises(ConfigError, match=r"'red' of colours 1\.0\.0 .* is given twice"):
        ZeroShotTask(images, [*WORDS, "red"], target, DATA)
    with pytest.raises(ConfigError, match="'a wall' has no place"):
        ZeroShotTask(images, WORDS, target, DATA, templates=["a wall"])
    task = ZeroShotTask(images, WORDS, target, DATA)
    with pytest.raises(ConfigError, match="two tasks are called 'zero-shot'"):
        evaluate(NoisyColours(), [task, task])
    with pytest.raises(ConfigError, match="no tasks"):
        evaluate(NoisyColours(), [])
    with pytest.raises(DataError, match="target must be 48 integers"):
        evaluate(NoisyColours(), [ZeroShotTask(images, WORDS, target[:9], DATA)])


def test_a_trainer_builds_a_report_from_embeddings_it_has(report):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((9, 4)).astype(np.float32)
    result = Result("held-out", pair_retrieval_metrics(z, z), provenance("run", DATA))
    assert Report.from_json(Report((result,)).to_json())["held-out"] == result
