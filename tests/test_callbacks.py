"""Callbacks: trackers have each row once, also after a kill; the live display of notebooks."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from etils import epath

import vlm
from vlm.callbacks import Callback, Divergence, Live, MLflow, RunInfo, TensorBoard, WandB
from vlm.callbacks.trackers import SentRows
from vlm.callbacks.wandb_files import records, values
from vlm.config import Code

CONFIG = {"name": "shapes", "batch_size": 8, "optimizer": {"learning_rate": 0.1}, "seed": 0}
MANY = {f"field{i}": i for i in range(150)}


def run_info(folder, step=0, local=None, total=10, **config) -> RunInfo:
    local = Path(local or folder)
    return RunInfo(epath.Path(folder), local, CONFIG | config, step, total, resumed=step > 0)


def train(callback: Callback, run: RunInfo, stop: int | None = None) -> None:
    """Call a callback as a run does: a row at each step, an evaluation and a checkpoint at 4."""
    callback.on_start(run)
    for step in range(run.step + 1, (stop or run.total_steps) + 1):
        callback.on_step(step, {"loss": 1 / step, "loss/siglip": 1 / step})
        if step == 4:
            callback.on_eval(step, {"eval/image_to_text_R@1": 0.5})
            callback.on_checkpoint(step, {"checkpoint/seconds": 0.1})
    if stop is None:
        callback.on_end(run, {"top1": 0.75}, finished=True)


KILLED = """
import os, signal
import test_callbacks as t
t.train({callback!r}, t.run_info({folder!r}), stop=7)
os.kill(os.getpid(), signal.SIGKILL)
"""


def train_and_kill(callback: Callback, folder: Path) -> None:
    """Train 7 steps in a process of its own, with a checkpoint at step 4, and kill it."""
    code = KILLED.format(callback=callback, folder=os.fspath(folder))
    code = code.replace("t.train(", "t.train(vlm.callbacks.", 1).replace(
        "import os", "import vlm, os"
    )
    paths = [Path(__file__).parent, Path(__file__).parent.parent, *filter(None, sys.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.fspath, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_callback_without_methods_does_nothing(tmp_path):
    train(Callback(), run_info(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "callback",
    [
        WandB(project="birds", mode="offline", options={"tags": ["a", "b"]}),
        MLflow("birds", tags={"team": "vision"}),
        TensorBoard("boards"),
        Live(),
    ],
)
def test_a_config_refers_to_a_callback_by_its_public_name(callback):
    path = str(Code.of(callback))
    assert path.startswith(f"vlm.callbacks:{type(callback).__name__}(")
    loaded = Code.of(path).load()
    assert repr(loaded) == repr(callback)
    experiment = vlm.Experiment(name="birds", callbacks=(Code.of(callback),))
    again = vlm.config.from_dict(
        vlm.Experiment, json.loads(json.dumps(vlm.config.to_dict(experiment)))
    )
    assert again.callbacks == (path,)


# Rows that were sent


class Sent(list):
    """Rows by (kind, step), as a tracker of its own would send them."""

    def __init__(self, run: RunInfo, stop: int, stored: set | None = None):
        self.rows = SentRows(run, "tracker", "project")
        self.id = self.rows.id
        self.again = self.rows.start("abc", stored)
        for row in self.again + [{"step": s, "loss": 0.5} for s in range(run.step + 1, stop + 1)]:
            if row not in self.rows:
                self.append(row["step"])
                self.rows.add(row)


def test_a_resumed_run_sends_what_the_tracker_does_not_have(tmp_path):
    assert Sent(run_info(tmp_path), 7) == [1, 2, 3, 4, 5, 6, 7]
    resumed = Sent(run_info(tmp_path, step=4), 10)
    assert resumed == [8, 9, 10]
    assert resumed.id == "abc"
    assert len(resumed.rows.rows) == 7
    assert Sent(run_info(tmp_path, step=9), 10) == []


def test_rows_that_the_tracker_lost_are_sent_again(tmp_path):
    Sent(run_info(tmp_path), 7)
    stored = {("step", 1), ("step", 2), ("step", 6)}
    assert Sent(run_info(tmp_path, step=4), 8, stored) == [3, 4, 5, 7, 8]
    assert Sent(run_info(tmp_path, step=8), 9) == [9]


def test_a_new_run_in_the_folder_of_an_old_one_starts_again(tmp_path):
    Sent(run_info(tmp_path), 3)
    assert Sent(run_info(tmp_path), 3) == [1, 2, 3]


def test_a_truncated_line_is_one_row(tmp_path):
    Sent(run_info(tmp_path), 7)
    (file,) = (tmp_path / "trackers").iterdir()
    file.write_text(file.read_text()[:-3])
    assert Sent(run_info(tmp_path, step=4), 8) == [7, 8]
    assert Sent(run_info(tmp_path, step=4), 9) == [9]


def test_rows_of_another_learning_rate_are_sent_after_the_checkpoint(tmp_path):
    Sent(run_info(tmp_path), 7)
    rate = {"optimizer": {"learning_rate": 0.2}}
    changed = Sent(run_info(tmp_path, step=4, **rate), 8)
    assert changed == [5, 6, 7, 8]
    assert Sent(run_info(tmp_path, step=4, log_every=3, **rate), 9) == [9]


def test_steps_that_a_rollback_repeats_are_sent_again(tmp_path):
    Sent(run_info(tmp_path), 7).rows.roll_back(3)  # and the process is killed
    assert Sent(run_info(tmp_path, step=3), 5) == [4, 5]
    again = Sent(run_info(tmp_path, step=4), 8)
    assert again == [6, 7, 8]
    again.rows.roll_back(4)
    assert {"step": 5, "loss": 0.5} not in again.rows
    assert {"step": 4, "loss": 0.5} in again.rows


def test_rows_are_written_to_the_local_folder(tmp_path):
    remote, local, other = tmp_path / "remote", tmp_path / "local", tmp_path / "other"
    Sent(run_info(remote, local=local), 7)
    assert not remote.exists()
    local.rename(remote)  # copied to the bucket, and the machine is gone
    assert Sent(run_info(remote, step=4, local=other), 8) == [8]
    assert len((next((other / "trackers").iterdir())).read_text().split("\n")) == 1 + 8


# Weights & Biases


@pytest.mark.slow
def test_wandb_has_each_step_once_after_a_kill(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    callback = WandB(project="birds", mode="offline", options={"tags": ["baseline"]})
    train_and_kill(callback, tmp_path)
    train(callback, run_info(tmp_path, step=4))
    wandb.teardown()  # its service writes the end of the file after the run
    files = sorted(epath.Path(tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    found = [record for file in files for record in records(file)]
    runs = [r.run for r in found if r.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    assert {run.project for run in runs} == {"birds"}
    assert {run.display_name for run in runs} == {tmp_path.name}
    assert set(runs[0].tags) == {"baseline"}
    config = values(runs[0].config.update)
    assert config["optimizer"] == {"learning_rate": 0.1}
    assert config["host"]["vlm"] == vlm.__version__
    rows = [values(r.history.item) for r in found if r.HasField("history")]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, 1 / step) for step in range(1, 11)]
    assert [row["step"] for row in rows if "eval/image_to_text_R@1" in row] == [4]
    assert [row["step"] for row in rows if "checkpoint/seconds" in row] == [4]
    counts = [row["_step"] for row in rows]  # of W&B: rows of equal counts would be one
    assert sorted(set(counts)) == counts
    axes = [r.metric for r in found if r.HasField("metric")]
    assert {(m.glob_name, m.step_metric) for m in axes if m.glob_name} == {("*", "step")}
    summary = {k: v for r in found for k, v in values(r.summary.update).items()}
    assert summary["final/top1"] == 0.75
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]


# MLflow


@pytest.mark.slow
def test_mlflow_has_each_step_once_after_a_kill(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")  # of the full mlflow, for databases
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    callback = MLflow("birds", tracking_uri=uri, tags={"team": "vision"})
    train_and_kill(callback, tmp_path / "run")
    train(callback, run_info(tmp_path / "run", step=4, workers=2, **MANY))
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])

    def history(name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]

    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert history("loss") == history("loss/siglip") == [(s, 1 / s) for s in range(1, 11)]
    assert history("eval/image_to_text_R_1") == [(4, 0.5)]
    assert history("final/top1") == [(10, 0.75)]
    assert run.data.params["optimizer.learning_rate"] == "0.1"
    assert run.data.params["field149"] == "149"
    assert run.data.tags["team"] == "vision"
    assert run.data.tags["host.vlm"] == vlm.__version__
    stopped = run_info(tmp_path / "run", step=10, total=12, seed=1)
    callback.on_start(stopped)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    callback.on_end(stopped, {}, finished=False)
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["changed.seed"]) == ("KILLED", "1")


@pytest.mark.parametrize(("callback", "client"), [(WandB(), "wandb"), (MLflow(), "mlflow")])
def test_a_missing_client_is_one_sentence(callback, client, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, client, None)
    message = f"needs {client}, which is not installed: run pip install 'vlm-jax[{client}]'"
    with pytest.raises(vlm.ConfigError, match=re.escape(message)):
        callback.on_start(run_info(tmp_path))
    callback.on_end(run_info(tmp_path), {}, finished=False)  # of a run that did not start


# TensorBoard


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files as TensorBoard does: a start hides the earlier points from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                found = [point for point in found if point[1] < event.step]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return {tag: [(s, value) for t, s, value in found if t == tag] for tag, *_ in found}


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    callback = TensorBoard(tmp_path / "boards")
    train(callback, run_info(tmp_path / "run"), stop=7)  # nobody closes its files
    train(callback, run_info(tmp_path / "run", step=4))
    found = points(tmp_path / "boards" / "run")
    assert found["loss"] == [(s, pytest.approx(1 / s)) for s in range(1, 11)]
    assert found["eval/image_to_text_R_1"] == [(4, 0.5)]
    assert found["checkpoint/seconds"] == [(4, pytest.approx(0.1))]
    assert found["final/top1"] == [(10, 0.75)]
    assert "config/text_summary" in found
    assert not (tmp_path / "run").exists()


def test_tensorboard_hides_the_points_that_a_rollback_undoes(tmp_path):
    callback, run = TensorBoard(tmp_path / "boards"), run_info(tmp_path / "run")
    train(callback, run, stop=7)
    callback.on_divergence(Divergence(7, "the training diverges", "warn"))
    callback.on_divergence(Divergence(7, "the training diverges", "roll_back", 5))
    callback.on_step(6, {"loss": 2.0})
    callback.on_end(run, {}, finished=True)
    found = points(tmp_path / "boards" / "run")["loss"]
    assert found == [*((s, pytest.approx(1 / s)) for s in range(1, 6)), (6, 2.0)]


def test_tensorboard_without_a_folder_adds_to_the_runs_own_curves(tmp_path):
    train(TensorBoard(), run_info(tmp_path))
    assert set(points(tmp_path / "tensorboard")) == {"config/text_summary", "final/top1"}


# In notebooks


def test_the_live_display_shows_the_last_metrics(tmp_path):
    live, run = Live(), run_info(tmp_path / "birds", total=2000)
    live.on_start(run)
    assert "step 0 of 2,000, starting" in live.html()
    assert "<svg" not in live.html()
    row = {"loss": 2.5, "loss/mine": 0.125, "pairs_per_s": 1234.5, "data_wait": 0.01}
    for step in range(100, 1100, 100):
        live.on_step(step, {**row, "start/seconds": 3.0, "seconds": 20 + step * 0.0065})
    live.on_checkpoint(1000, {"checkpoint/seconds": 0.1})
    live.on_eval(
        1000, {"eval/cars/top1": 0.5, "eval/cars/top5": 0.875, "eval/text_to_image_R@1": 0.25}
    )
    html = live.html()
    ET.fromstring(f"<html>{html}</html>".replace("&nbsp;", " "))
    text = " ".join(ET.fromstring(f"<html>{html}</html>").itertext())
    for part in ("birds", "step 1,000 of 2,000, training", "2.500", "1,234", "1.0%", "0:06"):
        assert part in text, part
    for name in ("loss/mine", "ETA", "cars top-1", "T→I R@1", "evaluation at step"):
        assert name in text, name
    assert "top5" not in text
    assert html.count("<svg") == 2
    live.on_divergence(Divergence(1000, "the training diverges", "roll_back", 500))
    assert "step 500 of 2,000" in live.html()
    live.on_end(run, {"cars/top1": 0.625, "seconds": 3.0}, finished=True)
    assert "finished" in live.html()
    assert "0.625" in live.html()
    assert "ETA" not in live.html()


NOTEBOOK = """
import test_callbacks as t
import vlm
assert vlm.callbacks.in_notebook()
live, run = vlm.callbacks.Live(), t.run_info("birds", total=300)
live.on_start(run)
for step in range(1, 301):
    live.on_step(step, {"loss": 1 / step, "pairs_per_s": 100.0, "data_wait": 0.0})
live.on_end(run, {}, finished=True)
"""


@pytest.mark.slow
def test_a_notebook_stores_the_last_state_once(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    (output,) = notebook.cells[0].outputs
    assert "step 300 of 300, finished" in output.data["text/html"]


def test_outside_of_notebooks_nothing_is_displayed(tmp_path, capsys):
    assert not vlm.callbacks.in_notebook()
    train(Live(), run_info(tmp_path))
    assert capsys.readouterr() == ("", "")
