"""Flags of `vlm plan` that contradict each other are refused in a sentence that names the fix."""

from pathlib import Path

import pytest

from vlm.cli.parse import UsageError
from vlm.cli.plan import plan

CONFIG = str(Path(__file__).parents[2] / "configs" / "siglip_b16.py")


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (
            {"sweep": True, "batch_per_chip": 64, "micro_batch_size": 32},
            "leave --micro-batch-size out, or give --batch-size",
        ),
        ({"sweep": True, "largest_batch": True}, "leave --largest-batch out"),
        ({"batch_size": 64, "batch_per_chip": 64}, "leave one of them out"),
        ({"sweep": True, "batch_size": 64, "batch_per_chip": 64}, "leave one of them out"),
        ({"batch_per_chip": 0}, "give at least 1"),
        ({"compiles": 2}, "leave it out, or add --sweep"),
    ],
)
def test_flags_that_would_be_ignored(flags, fix):
    with pytest.raises(UsageError, match=fix) as error:
        plan(CONFIG, topology=("h100:8",), **flags)
    assert "\n" not in str(error.value)
