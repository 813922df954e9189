"""`bench_loss` measures what it says and answers in JSON."""

import io
import json

import jax
import pytest
from rich.console import Console

from vlm.bench import measure
from vlm.bench.loss import bench_loss
from vlm.errors import ShardingError


def test_figures_of_a_small_batch(monkeypatch):
    monkeypatch.setattr(measure, "matrix_side", lambda platform: 128)  # no matter here
    out = io.StringIO()
    result = bench_loss(64, 16, rounds=1, tile=4, console=Console(file=out, width=120))
    assert json.loads(json.dumps(result)) == result
    assert result["devices"] == jax.device_count()
    forms = {(row["loss"], row["form"]) for row in result["losses"]}
    assert forms == {(k, f) for k in ("softmax", "sigmoid") for f in ("tiles", "dense")}
    for row in result["losses"]:
        assert row["seconds"] > 0
        assert row["times_floor"] == pytest.approx(row["seconds"] / result["floor_seconds"])
    for errors in result["errors"].values():
        assert max(errors.values()) < 1e-5
    assert "bound" in out.getvalue()


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(ShardingError, match="a batch of 63 does not divide over 8 devices"):
        bench_loss(63, 16, rounds=1)
