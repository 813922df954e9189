"""Predicted times beside published ones, and files of measurements that correct them."""

import dataclasses
import json

import pytest
from fit import GROUPS, fit, predicted
from published import JUDGED
from small import experiment

from vlm.bench.train import bench_train
from vlm.chips import CHIPS
from vlm.errors import ConfigError
from vlm.planning import plan
from vlm.planning.calibration import (
    MEMORY,
    SHARES,
    WIDTH,
    Measurement,
    Range,
    calibration_of,
    save_measurement,
)
from vlm.planning.roofline import Roofline


@pytest.mark.parametrize("held_out", [False, True])
def test_published_throughputs_are_inside_the_range(held_out):
    """At least four of five, of the half that the shares were fitted to and of the other."""
    rows = [row for row in JUDGED if row.held_out == held_out]
    inside = sum(row.measured in predicted(row) for row in rows)
    assert inside >= 0.8 * len(rows)
    assert len(JUDGED) >= 20


@pytest.mark.parametrize("chips", GROUPS, ids=lambda chips: min(chips))
def test_the_shares_are_those_of_the_fitted_half(chips):
    arithmetic, _ = fit(chips, MEMORY)
    for chip in chips:
        assert SHARES[chip].arithmetic == pytest.approx(arithmetic, abs=0.006)


def test_every_chip_says_where_its_share_is_from():
    assert set(SHARES) == set(CHIPS)
    for shares in SHARES.values():
        assert "published" in shares.evidence or "taken from" in shares.evidence


def test_a_range():
    seconds = Range(2.0, 3.0)
    assert seconds.inverse(12) == Range(4.0, 6.0)
    assert seconds.middle == pytest.approx(6**0.5)
    assert 2.5 in seconds
    assert 3.5 not in seconds


def test_a_range_is_never_better_than_the_compilers_estimate():
    fast = Roofline(1.0, 0.5, 0.0, 1.0, 0.0, 0.0, "compiled")
    plain = fast.predicted(calibration_of("v5p"))
    for estimate, least in ((0.5, plain.low), (9.0, 9.0)):
        slow = dataclasses.replace(fast, compiler_estimate=estimate).predicted(
            calibration_of("v5p")
        )
        assert slow.low == pytest.approx(least)
        assert slow.high == pytest.approx(WIDTH * least)


def measurement(**changes) -> Measurement:
    fields = {"chip": "h100", "name": "small", "devices": 8, "batch_size": 512, "remat": "full"}
    times = {"measured": 2.0, "predicted": 1.0, "versions": {}}
    return Measurement(**(fields | times | changes))


def test_a_measurement_moves_the_range_and_narrows_it(tmp_path):
    file = tmp_path / "h100.json"
    save_measurement(file, measurement())
    plain, moved = (plan(experiment(512), "h100:8", calibration=c) for c in (None, file))
    assert moved.step_seconds.middle == pytest.approx(2 * plain.step_seconds.middle)
    assert plain.step_seconds.high == pytest.approx(WIDTH * plain.step_seconds.low)
    assert moved.step_seconds.high == pytest.approx(1.2 * moved.step_seconds.low)
    assert "measured on this chip: small at batch 512" in moved.calibration.evidence
    # Another batch on the same chip counts beside it; the same one again takes its place.
    save_measurement(file, measurement(batch_size=256, measured=1.5))
    save_measurement(file, measurement(measured=1.9))
    found = calibration_of("h100", file)
    assert [m.measured for m in found.measurements] == [1.5, 1.9]
    assert found.factor == pytest.approx((1.5 * 1.9) ** 0.5)
    assert found.width == pytest.approx(1.9 / 1.5)


def test_a_calibration_of_another_chip_is_refused(tmp_path):
    file = tmp_path / "h100.json"
    save_measurement(file, measurement())
    with pytest.raises(ConfigError, match="measured on h100 and the plan is for a100"):
        plan(experiment(512), "a100:8", calibration=file)
    with pytest.raises(ConfigError, match="cpu:8 has no published rates"):
        plan(experiment(512), "cpu:8", calibration=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no calibration"),
        ("[]", "is no calibration"),
        ("no json", "is no calibration"),
        (json.dumps({"format": "other", "measurements": []}), "its format is 'other'"),
        (json.dumps({"format": "vlm-calibration-1", "measurements": []}), "has no times"),
        (json.dumps({"format": "vlm-calibration-1", "measurements": [{"chip": 1}]}), "TypeError"),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path, text, message):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{message}.*vlm bench train CONFIG --save FILE"):
        calibration_of("h100", file)


def test_a_calibration_that_is_not_there_or_makes_no_sense(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no calibration file .*vlm bench train"):
        calibration_of("h100", tmp_path / "missing.json")
    file = tmp_path / "negative.json"
    bad = dataclasses.asdict(measurement(measured=-1.0))
    file.write_text(json.dumps({"format": "vlm-calibration-1", "measurements": [bad]}))
    with pytest.raises(ConfigError, match="has no times of a known chip"):
        calibration_of("h100", file)


def test_a_calibration_cannot_be_measured_on_a_cpu(tmp_path):
    file = tmp_path / "cpu.json"
    with pytest.raises(ConfigError, match="no published figures of a cpu: measure on one of v3"):
        bench_train(experiment(), save=str(file))
    assert not file.exists()
