"""Time from nothing to an answer: install, search and classify, with a Hub over loopback.

    python tests/cli/fresh_machine.py [--wheel FILE]

Builds the wheel, then measures three commands with empty caches in a new virtual environment:
`pip install`, `vlm search` and `vlm classify`. Packages come from the index that pip is configured
with. The default model is a small one with random weights, so a real download comes on top.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent / "weights")]

from hub_server import Hub  # noqa: E402

from vlm.weights.catalogue import default_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", help="a wheel of vlm-jax; default: built now, not timed")
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if wheel is None:
            pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
            subprocess.run([*pip, str(ROOT), "--wheel-dir", made], check=True)
            (wheel,) = map(str, folder.glob("*.whl"))
        (folder / "photos").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
        for number, picture in enumerate(pixels):
            Image.fromarray(picture).resize((1200, 900)).save(folder / "photos" / f"{number}.jpg")
        hub = Hub()
        hub.put(default_model().name, HERE.parent / "weights" / "golden" / "oc_eva02")
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "VLM_", "JAX_"))}
        own = own | {"HOME": made, "HF_ENDPOINT": hub.url, "NO_PROXY": "*", "PYTHONPATH": ""}
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        program = folder / "env" / "bin"
        commands = [
            [program / "pip", "install", "--quiet", wheel],
            [program / "vlm", "search", "photos", "a dog in the snow"],
            [program / "vlm", "classify", "photos/1.jpg", "--labels", "dog,cat,pizza"],
        ]
        total = 0.0
        for command in commands:
            start = time.monotonic()
            subprocess.run([*map(str, command)], env=own, cwd=folder, check=True)
            seconds = time.monotonic() - start
            total += seconds
            print(f"{seconds:6.1f} s  {Path(command[0]).name} {' '.join(map(str, command[1:]))}")
        print(f"{total:6.1f} s  in total")
        hub.close()


if __name__ == "__main__":
    main()
