"""What a run asks for besides its step: worked by hand from a step's time."""

import dataclasses

import pytest
from small import experiment

from vlm.config import DataConfig
from vlm.errors import ConfigError
from vlm.planning import plan
from vlm.planning.calibration import Range
from vlm.planning.needs import BUCKET_RATE, DECODES, needs
from vlm.planning.topology import parse_topology


def test_time_money_and_what_hosts_bring():
    e = experiment(1024, examples=1024 * 1000)
    found = needs(e, parse_topology("h100:16"), Range(0.1, 0.15), state_bytes=2 * 10**9, price=3.0)
    assert found.examples == 1024 * 1000
    assert (found.seconds.low, found.seconds.high) == pytest.approx((100.0, 150.0))
    assert found.chip_hours.low == pytest.approx(16 * 100 / 3600)
    assert found.cost.high == pytest.approx(3 * 16 * 150 / 3600)
    assert found.hosts == 2
    assert found.images_per_second.high == pytest.approx(1024 / 2 / 0.1)
    assert found.cores.high == pytest.approx(1024 / 2 / 0.1 / DECODES)
    assert found.checkpoint_seconds == pytest.approx(2e9 / 2 / BUCKET_RATE)
    batch = 512 * (3 * 32**2 + 4 * 16)
    assert found.host_memory == 10**9 + 4 * batch
    assert not found.data_bound


def test_workers_hold_more_batches():
    e = experiment(1024, steps=10)
    busy = dataclasses.replace(e, data=DataConfig(workers=8))
    one, many = (
        needs(x, parse_topology("h100:8"), Range(1.0, 1.5), 0).host_memory for x in (e, busy)
    )
    assert many > 4 * one


def test_the_bound_is_the_data_where_hosts_have_too_few_cores():
    """A small model on a TPU takes images faster than 56 cores of its host open them."""
    fast = needs(experiment(4096, steps=1), parse_topology("v5e:2x2"), Range(0.1, 0.15), 0)
    assert fast.cores.middle > fast.cores_limit == 56
    assert fast.data_bound
    assert not needs(
        experiment(64, steps=1), parse_topology("v5e:2x2"), Range(0.1, 0.15), 0
    ).data_bound


def test_a_length_in_epochs_has_no_time_and_one_in_seconds_its_own():
    e = experiment(64, epochs=3.0)
    assert needs(e, parse_topology("h100:8"), Range(1.0, 1.5), 0).seconds is None
    e = experiment(64, seconds=3600.0)
    assert needs(e, parse_topology("h100:8"), Range(1.0, 1.5), 0).chip_hours == Range(8.0, 8.0)


@pytest.mark.parametrize("price", [-1.0, float("inf"), float("nan")])
def test_a_price_that_cannot_be(price):
    with pytest.raises(ConfigError, match=r"a price of .* is invalid"):
        plan(experiment(512), "h100:8").needs(price)
