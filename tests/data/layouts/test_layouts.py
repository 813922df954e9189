"""Every layout with images of every format among them: each pair is what was written."""

import pytest
from layouts import FORMATS, LAYOUTS, compare


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pair_is_read_as_it_was_written(tmp_path, name):
    for way, counts in compare(name, FORMATS, 1, tmp_path).items():
        written, equal, different, faults, silent = counts
        assert (equal, different, faults, silent) == (written, 0, 0, 0), way
