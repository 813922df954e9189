"""Exports of a ViT-B/32 pair beside the model itself, every batch from 1 to 33, in each type.

    python tests/exporting/full_size.py
    python tests/exporting/full_size.py --model MODEL --formats onnx

Weights are random unless a model is given. Prints the largest difference of each tower and the
size of its file. `vlm export` writes nothing that differs by more than its type allows.
"""

import argparse
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]

from load import save_bundle  # noqa: E402

import vlm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="what vlm.load takes")
    parser.add_argument("--formats", nargs="+", default=["onnx", "stablehlo"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        if args.model is None:
            save_bundle(place / "model")
        model = vlm.load(args.model or str(place / "model"))
        for kind in args.formats:
            for dtype in args.dtypes:
                start = time.perf_counter()
                out = place / f"{kind}-{dtype}"
                found = vlm.exporting.export(model, out, kind, dtype=dtype, batches=range(1, 34))
                for tower, difference in found.differences.items():
                    size = sum(f.stat().st_size for f in out.glob(f"{tower}.*")) / 2**20
                    print(f"{kind:9} {dtype:8} {tower:5} {difference:.1e}  {size:6.1f} MiB", end="")
                    print(f"  {time.perf_counter() - start:4.0f} s", flush=True)


if __name__ == "__main__":
    main()
