"""What the options of `vlm train` make of a config."""

import pytest
import tiny

from vlm.cli.train import experiment_of

CONFIG = tiny.folder() / "shapes.py"  # of 40 steps


@pytest.mark.parametrize(
    "options", [["--epochs", "2"], ["--epochs=2"], ["--batch-size", "4", "--epochs", "2"]]
)
def test_a_length_on_the_command_line_replaces_the_configs(options):
    made = experiment_of([str(CONFIG), *options])
    assert (made.steps, made.epochs) == (None, 2.0)


def test_other_options_leave_the_length():
    assert experiment_of([str(CONFIG), "--batch-size", "4"]).steps == 40
