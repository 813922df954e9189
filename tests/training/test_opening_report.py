"""The first lines of a run: data, model, devices and length, and sharding only on a mesh."""

import dataclasses

import jax
import pytest
from jax.sharding import Mesh

from vlm.config import EvalConfig, MeshConfig
from vlm.sharding import make_mesh
from vlm.training.loop import train
from vlm.training.opening_report import merged_rows, placement_text
from vlm.training.step import Trainer


def state_on(mesh: Mesh, experiment):
    return Trainer(experiment, mesh, experiment.tokenizer).init(1)


def test_replicated_arrays_are_one_line(tiny):
    mesh = make_mesh(MeshConfig())
    state = state_on(mesh, tiny())
    count = len(jax.tree.leaves((state.params, state.frozen, state.ema, state.opt_state)))
    text = placement_text(state, mesh.size)
    assert text.startswith(f"sharding {count} arrays replicated, ")
    assert text.endswith("bytes on each of 8 devices")
    assert "\n" not in text


def test_groups_that_are_sharded_alike_are_one_row(tiny, monkeypatch):
    monkeypatch.setattr("vlm.sharding.SMALLEST_SHARDED", 64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = state_on(mesh, tiny())
    rows = merged_rows(state)
    over = [axes for axes, *_ in rows]
    assert len(set(over)) == len(over) <= 6
    assert any("fsdp" in axes for axes in over)
    groups = [group for _, groups, *_ in rows for group in groups]
    assert len(set(groups)) == len(groups)
    assert {"text/embedding", "optimizer"} <= set(groups)
    arrays = jax.tree.leaves((state.params, state.frozen, state.ema, state.opt_state))
    assert sum(count for *_, count, _ in rows) == sum(x.size for x in arrays)
    text = placement_text(state, mesh.size)
    for axes in over:
        assert axes.split(",")[0] in text


def test_the_first_lines_say_what_will_happen(tiny, drawings, tmp_path, capsys):
    evals = (EvalConfig("again", "retrieval", drawings, "test", captions=("caption",)),)
    experiment = tiny(steps=2, evals=evals, eval_every=0.5, mesh=MeshConfig(4, 2))
    run = train(dataclasses.replace(experiment, run_dir=str(tmp_path / "run")))
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("sharding"))
    assert first < 14
    start = " ".join(" ".join(lines[:first]).split())
    joined = start.replace(" ", "")  # a line is broken inside of a long path
    assert joined.startswith(f"runfolder{run}")
    assert f"data{drawings},train:40examples" in joined
    assert "parameters: vision 0.0" in start
    assert "(16 pixels), text 0.0" in start
    assert "devices 8 x cpu" in start
    assert "mesh data 4, fsdp 2, tensor 1" in start
    assert f"2 steps of {experiment.batch_size} pairs; a checkpoint every 25% of the run" in start
    assert "evaluation again retrieval; every 50%" in start
    assert "compiling the first step" in start


@pytest.mark.slow
def test_a_resumed_run_says_from_where(tiny, tmp_path, capsys):
    run = train(tiny(steps=2, run_dir=str(tmp_path / "run")))
    train(resume=run, experiment=dataclasses.replace(tiny(steps=3), run_dir=str(tmp_path / "run")))
    assert "3 steps of" in (text := capsys.readouterr().err)
    assert "from step 2 on" in text
