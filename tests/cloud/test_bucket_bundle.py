"""A model is saved to a bucket and loaded from it."""

import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "weights" / "golden" / "hf_clip"
CODE = """
import sys
import numpy as np
from etils import epath
import vlm

model = vlm.load(sys.argv[1])
model.save("gs://bucket/models/clip")
loaded = vlm.load("gs://bucket/models/clip")
assert np.array_equal(model.encode_text(["a dog"]), loaded.encode_text(["a dog"]))
print(*sorted(path.name for path in epath.Path("gs://bucket/models/clip").iterdir()))
"""


@pytest.mark.first_tier
def test_a_bundle_in_a_bucket_is_the_same_model(pod):
    done = subprocess.run(
        [sys.executable, "-c", CODE, GOLDEN],
        env=pod.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bundle.json" in done.stdout
    assert "model.safetensors" in done.stdout
