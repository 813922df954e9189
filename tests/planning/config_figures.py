"""Write what `vlm plan` says into the docstrings of configs.

    python tests/planning/config_figures.py [CONFIG ...]

The docstring of a config names the slice. Each plan for TPUs is compiled, which takes minutes.
"""

import re
import sys
from pathlib import Path

from vlm import load_config
from vlm.planning import Plan, plan
from vlm.planning.report import _of, _percent, _short, _size, _time_of

CONFIGS = Path(__file__).parents[2] / "configs"
FIGURES = re.compile(r"(--topology (\S+)` says:\n\n)((?: {4}.*\n)+)")


def figures(made: Plan) -> str:
    """Return the lines of a plan for a docstring."""
    assert made.prediction is not None
    assert made.roofline is not None
    limit = f" of {_size(made.memory.limit)}" if made.memory.limit else ""
    basis, expected = made.memory.basis, made.prediction
    sent = {p: size for p, size in made.sent.items() if size > 2**24}
    rows = {
        "peak of a chip": f"{_size(made.memory.peak)}{limit} ({basis})",
        **{f"a chip sends: {place}": f"{_size(size)} ({basis})" for place, size in sent.items()},
        "FLOPs of the model and step": f"{sum(p.model for p in made.flops.values()) / 1e15:.3g} "
        "PFLOP (analytic)",
        f"step, bound by {made.roofline.bound}": f"{_of(expected.step_seconds, _time_of)}, "
        f"{_of(expected.pairs_per_second, _short)} pairs/s (expected)",
        "MFU": f"{_of(expected.mfu, _percent)} (expected)",
    }
    return "".join(f"    {name:34} {value}\n" for name, value in rows.items())


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in CONFIGS.glob("*.py"))
    for path in (CONFIGS / f"{name}.py" for name in names):
        text = path.read_text()
        if found := FIGURES.search(text):
            made = plan(load_config(path), found[2], loss=False)
            path.write_text(text.replace(found[3], figures(made)))
            print(f"{path.name}:\n{figures(made)}", flush=True)


if __name__ == "__main__":
    main()
