"""`train` with parts of the user, `steps`, callbacks, and what happens if one of them fails."""

import json
import math
import signal

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import vlm
from vlm.errors import CheckpointError, ConfigError, TrainingError
from vlm.training.history import read_rows
from vlm.training.run import Run

pytestmark = pytest.mark.untyped  # fields that take objects hold their import paths

SMALL = {"vision": {"depth": 1}, "text": {"depth": 1}, "steps": 6, "log_every": 2}


def closer(inputs):
    return 1 - jnp.sum(inputs.z_image * inputs.z_text, axis=1).mean()


def cosines(bundle, step):
    z = bundle.encode_text(["a red square", "a blue disc"])
    return {"cosine": float(z[0] @ z[1]), "step": step}


def fails_later(bundle, step):
    if step:
        raise ValueError("no data here")
    return {}


class Recorder(vlm.callbacks.Callback):
    def __init__(self, fail_in="", at=0):
        self.calls, self.fail_in, self.at = [], fail_in, at

    def _note(self, name, step, *more):
        self.calls.append((name, step, *more))
        if name == self.fail_in and step >= self.at:
            raise RuntimeError("the tracker\nis down")

    def on_start(self, run):
        self._note("on_start", run.step, run.total_steps, run.resumed)

    def on_step(self, step, metrics):
        self._note("on_step", step, sorted(metrics))

    def on_eval(self, step, metrics):
        self._note("on_eval", step, dict(metrics))

    def on_checkpoint(self, step, metrics):
        self._note("on_checkpoint", step)

    def on_end(self, run, results, finished):
        self._note("on_end", run.total_steps, dict(results), finished)


def params_of(result):
    return jax.tree.map(np.asarray, vlm.load(result).model.vision.__dict__["position"][...])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run with own parts, its callback, and its result."""
    recorder = Recorder()
    run = tmp_path_factory.mktemp("open") / "run"
    experiment = tiny(run_dir=str(run), eval_every=0.5, checkpoint_every=0.5, **SMALL)
    jaxtyping.config.update("jaxtyping_disable", True)  # as `untyped` does for a test
    result = vlm.train(
        experiment, loss={"softmax": 1.0, closer: 0.5}, evals=[cosines], callbacks=[recorder]
    )
    return result, recorder


def test_train_returns_the_run_with_its_model(finished):
    result, _ = finished
    assert result.finished
    assert (result.step, result.total_steps) == (6, 6)
    assert result.bundle.encode_text("a red square").shape == (1, 16)
    assert vlm.load(result).fingerprint == result.bundle.fingerprint
    assert (result / "log.jsonl").exists()
    assert result.metrics["cosines/step"] == 6
    assert -1 <= result.metrics["cosines/cosine"] <= 1


def test_callbacks_see_start_steps_evaluations_checkpoints_and_end(finished):
    _, recorder = finished
    calls = {name: [c[1] for c in recorder.calls if c[0] == name] for name, *_ in recorder.calls}
    assert calls["on_start"] == [0]
    assert calls["on_step"] == [2, 3, 4, 6]  # a row is closed before an evaluation
    assert calls["on_eval"] == [3, 6]
    assert calls["on_checkpoint"] == [3, 6]
    step = next(c for c in recorder.calls if c[0] == "on_step")
    assert {"loss", "loss/softmax", "loss/closer", "learning_rate"} <= set(step[2])
    evaluation = next(c for c in recorder.calls if c[0] == "on_eval")[2]
    assert evaluation["eval/cosines/step"] == 3
    name, _, results, done = recorder.calls[-1]
    assert (name, done) == ("on_end", True)
    assert results["cosines/step"] == 6


def test_the_config_of_the_run_names_the_code_and_its_hash(finished):
    result, _ = finished
    config = json.loads((result / "config.json").read_text())
    assert config["losses"] == [["softmax", 1.0], ["test_open_loop:closer", 0.5]]
    assert config["evals"] == ["test_open_loop:cosines"]
    code = dict(config["code"])
    assert len(code["test_open_loop:closer"]) == 64
    assert config["callbacks"] == ["<a Recorder>"]


@pytest.mark.slow
def test_a_loop_of_one_s_own_is_the_same_run(finished, tiny, tmp_path):
    result, _ = finished
    experiment = tiny(run_dir=str(tmp_path / "run"), **SMALL)
    handler = signal.getsignal(signal.SIGINT)
    with vlm.steps(experiment, loss={"softmax": 1.0, closer: 0.5}) as loop:
        for state, metrics in loop:
            assert math.isfinite(float(metrics["loss"]))
            if int(state.step) == 4:
                assert loop.bundle(state).encode_text("a").shape == (1, 16)
                break
    assert signal.getsignal(signal.SIGINT) is handler
    assert not loop.result.finished
    with pytest.raises(TrainingError, match="stopped at step 4 of 6 and has no bundle yet"):
        _ = loop.result.bundle
    again = vlm.train(resume=loop.result)
    assert again.finished
    np.testing.assert_array_equal(params_of(again), params_of(result))


@pytest.mark.slow
def test_an_error_in_the_body_ends_the_run_and_is_raised(tiny, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    loop = vlm.steps(tiny(run_dir=str(tmp_path / "run"), **SMALL))

    def body():
        with loop:
            next(loop)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert signal.getsignal(signal.SIGINT) is handler
    assert loop.result is None


@pytest.mark.slow
def test_an_object_without_an_import_path_is_given_again(tiny, tmp_path, caplog):
    experiment = tiny(run_dir=str(tmp_path / "run"), **SMALL)

    def local_loss(inputs):
        return closer(inputs)

    loop = vlm.steps(experiment, loss=local_loss)
    next(loop)
    loop.close()
    with pytest.raises(ConfigError, match=r"losses was <.*local_loss.*pass it again"):
        vlm.train(resume=loop.result)
    assert vlm.train(resume=loop.result, loss=local_loss).finished


@pytest.mark.slow
@pytest.mark.parametrize("method", ["on_step", "on_eval", "on_checkpoint"])
def test_a_callback_that_raises_stops_the_run_with_a_checkpoint(tiny, tmp_path, method):
    run = tmp_path / "run"
    experiment = tiny(run_dir=str(run), eval_every=0.3, checkpoint_every=0.3, **SMALL)
    with pytest.raises(TrainingError) as caught:
        vlm.train(experiment, evals=[cosines], callbacks=[Recorder(method, at=2)])
    assert f"Recorder failed in {method} with RuntimeError: the tracker: fix it" in str(
        caught.value
    )
    newest = max(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdigit())
    assert 2 <= newest < 6
    after = Recorder()
    assert vlm.train(resume=run, callbacks=[after]).finished
    assert after.calls[0] == ("on_start", newest, 6, True)
    assert [row["step"] for row in read_rows(Run.open(run).log) if "loss" in row][-1] == 6


def test_a_callback_that_fails_at_the_start_or_is_none(tiny, tmp_path):
    experiment = tiny(run_dir=str(tmp_path / "run"), **SMALL)
    with pytest.raises(
        TrainingError, match=r"Recorder failed in on_start .* fix it, and start the run again"
    ):
        vlm.train(experiment, callbacks=[Recorder("on_start")])
    assert not (tmp_path / "run").exists()
    experiment = tiny(run_dir=str(tmp_path / "other"), **SMALL)
    with pytest.raises(ConfigError, match=r"which is a function without any of on_start, on_step"):
        vlm.train(experiment, callbacks=[closer])
    with pytest.raises(ConfigError, match="method on_stp is never called: choose among on_start"):
        vlm.train(experiment, callbacks=[Misspelt()])
    for loss in ({}, ["softmax"]):
        with pytest.raises(ConfigError, match="give a function, or a mapping of functions"):
            vlm.train(experiment, loss=loss)
    with pytest.raises(ConfigError, match="all weights of losses"):
        vlm.train(experiment, loss={"softmax": 0.0})


@pytest.mark.slow
def test_an_evaluation_that_raises_stops_the_run_with_a_checkpoint(tiny, tmp_path):
    run = tmp_path / "run"
    experiment = tiny(run_dir=str(run), eval_every=0.5, checkpoint_every=1.0, **SMALL)
    with pytest.raises(
        TrainingError, match="fails_later at step 3 failed with ValueError: no data"
    ):
        vlm.train(experiment, evals=[fails_later])
    assert (run / "checkpoints" / "3").is_dir()
    text = "returned a float and not a mapping of names to numbers"
    with pytest.raises(TrainingError, match=text):
        vlm.train(tiny(run_dir=str(tmp_path / "b"), eval_every=0.5, **SMALL), evals=[float_eval])


class Misspelt(vlm.callbacks.Callback):
    def on_stp(self, step, metrics):
        pass


def float_eval(bundle, step):
    return 1.0


@pytest.mark.slow
def test_changed_code_is_logged_at_resume(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changing_loss.py").write_text(
        "def loss(inputs):\n    return inputs.z_image.mean()\n"
    )
    run = tmp_path / "run"
    loop = vlm.steps(tiny(run_dir=str(run), **SMALL), loss="changing_loss.loss")
    next(loop)
    loop.close()
    (tmp_path / "changing_loss.py").write_text(
        "def loss(inputs):\n    return -inputs.z_image.mean()\n"
    )
    monkeypatch.delitem(__import__("sys").modules, "changing_loss")
    vlm.train(resume=run)
    message = "source of changing_loss:loss has changed since the run was last started"
    assert message in " ".join(capfd.readouterr().err.split())
    rows = (run / "history.jsonl").read_text().splitlines()
    assert "code" in json.loads(rows[1])["changes"]


def test_nothing_to_train_and_no_run(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train"):
        vlm.train()
    with pytest.raises(CheckpointError, match="is no run folder"):
        vlm.train(resume=tmp_path)
