"""The benches measure what they say and answer in JSON."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import pytest
import tiny
from rich.console import Console

from vlm.bench import data, measure
from vlm.bench.data import bench_data, bench_synthetic_data
from vlm.bench.encode import bench_encode
from vlm.bench.search import bench_search
from vlm.bench.train import bench_train, random_batch, step_resident_peak
from vlm.config import DistillConfig, load_config
from vlm.errors import ConfigError, ShardingError
from vlm.models.flops import model_flops
from vlm.planning.compile import peak_of
from vlm.sharding import global_batch, make_mesh
from vlm.training.step import Trainer

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """What the machine can do is no matter here."""
    monkeypatch.setattr(measure, "matrix_side", lambda platform: 128)


@pytest.fixture
def paper():
    return Console(file=io.StringIO(), width=120)


def small():
    return load_config(str(tiny.folder() / "shapes.py"))


def is_json(result) -> bool:
    return json.loads(json.dumps(result)) == result


def test_a_training_step_and_its_parts(paper, tmp_path):
    result = bench_train(small(), rounds=1, trace=str(tmp_path / "trace"), console=paper)
    assert is_json(result)
    assert result["devices"] == jax.device_count()
    assert result["model_flops"] == model_flops(small())
    step = result["seconds"]["step"]
    assert result["pairs_per_second"] == pytest.approx(8 / step)
    assert result["model_flops_per_second"] == pytest.approx(result["model_flops"] / step)
    assert result["mfu"] is None  # no published figures of this CPU
    assert result["planned_peak_bytes"] > 0
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert "pairs/s" in paper.file.getvalue()


@pytest.mark.slow
def test_the_memory_that_the_compiler_plans_is_what_a_step_takes():
    e = dataclasses.replace(load_config(str(CONFIGS / "openmoji.py")), batch_size=256)
    trainer = Trainer(e, make_mesh(e.mesh))
    batch = global_batch(random_batch(e), trainer.mesh)
    compiled = trainer.step.lower(trainer.abstract_state, batch).compile()
    for _ in range(3):  # other threads of the process take memory too, now and then
        measured = step_resident_peak(trainer, compiled, batch)
        if peak_of(compiled) == pytest.approx(measured, rel=0.1):
            return
    raise AssertionError(f"planned {peak_of(compiled)}, measured {measured} bytes")


def test_a_step_whose_batch_does_not_divide():
    with pytest.raises(ShardingError, match="batch_size 9 does not divide"):
        bench_train(dataclasses.replace(small(), batch_size=9))


def test_a_step_with_a_teacher_is_not_measured():
    taught = dataclasses.replace(small(), distill=DistillConfig("teacher"))
    with pytest.raises(
        ConfigError, match=r"vlm bench train supports only two towers .* without distill"
    ):
        bench_train(taught)


def test_encoding_by_batch_size(paper):
    result = bench_encode(small().model, batch_sizes=(1, 4), rounds=1, console=paper)
    assert is_json(result)
    assert {(r["tower"], r["batch_size"]) for r in result["rows"]} == {
        (tower, n) for tower in ("image", "text") for n in (1, 4)
    }
    for row in result["rows"]:
        assert row["per_second"] == pytest.approx(row["batch_size"] / row["seconds"])


def test_the_pipeline_and_whether_a_step_would_wait(paper):
    result = bench_data(small(), batches=2, step_seconds=1e-9, console=paper)
    assert is_json(result)
    assert result["pairs_per_second"] == pytest.approx(8 / result["seconds"])
    assert result["waiting"] > 0.9
    assert "would wait" in paper.file.getvalue()


def test_the_pipeline_on_synthetic_photographs(paper, monkeypatch):
    monkeypatch.setattr(data, "SIZES", ((40, 30),))
    monkeypatch.setattr(data, "SHARDS", 2)
    monkeypatch.setattr(data, "EACH", 32)
    result = bench_synthetic_data(batches=1, console=paper)
    assert is_json(result)
    assert [r["batch_size"] for r in result] == [64]
    assert "pairs/s" in paper.file.getvalue()


def test_search_finds_every_row_by_itself(paper):
    result = bench_search((500,), 16, queries=(1, 8), k=3, rounds=1, console=paper)
    assert is_json(result)
    assert [r["found_themselves"] for r in result["rows"]] == [1.0, 1.0]
