"""Fine-tuning by each objective, killed and resumed: does it end bit for bit as if left alone?

    python tests/train/kill_objectives.py [--kills 2] [--seed 0] [--only flyp LoRA]

Real processes of `vlm train` on drawn shapes, killed by SIGKILL at steps at random. Compared are
all that a run leaves to be loaded, and the loss of every step. Exits with 1 unless all are equal.
On a busy machine VLM_LIMIT=3600 gives each process more seconds than 400.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import tiny  # noqa: E402
from processes import environment, last_step, losses, send_at, start, wait, write_config  # noqa: E402

from vlm.config import AdapterConfig, DataConfig, DistillConfig, Experiment  # noqa: E402

STEPS = 400
LABELS = {"label": "caption", "captions": (), "templates": ("{}", "the {}")}


def experiments() -> dict[str, Experiment]:
    """A run for each objective, all from one model that has learned the shapes."""
    model, data = str(tiny.run()), str(tiny.folder() / "data")
    teacher = DistillConfig(model, features=1.0, projection=True)
    forms = {
        "classification": {"objective": "classification", "data": LABELS},
        "flyp": {"objective": "flyp", "data": LABELS},
        "LoRA": {"adapter": AdapterConfig(rank=2)},
        "distillation": {"distill": teacher},
    }
    return {
        name: Experiment(
            **form | {"data": DataConfig(data, eval_split=None, **form.get("data", {}))},
            init_from=model,
            batch_size=8,
            steps=STEPS,
            log_every=1,
            checkpoint_every=0.05,
        )
        for name, form in forms.items()
    }


def left(run: Path) -> dict[str, bytes]:
    """The files of a run that are loaded: its model or adapter, and a classifier."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("**/*.safetensors")}


def play(experiment: Experiment, folder: Path, kills: int, dice: random.Random) -> tuple[bool, str]:
    """(whether a killed run ends as one left alone, what happened)."""
    config, env = write_config(experiment, folder / "config.json"), environment()
    whole, killed, log = folder / "whole", folder / "killed", folder / "log"
    wait(start([config, "--run-dir", whole], env, log), log)
    arguments, steps = [config, "--run-dir", killed], []
    for _ in range(kills):
        process = start(arguments, env, log)
        send_at(signal.SIGKILL, last_step(killed) + dice.randrange(5, 80), killed, [process])
        wait(process, log, -signal.SIGKILL)
        steps.append(last_step(killed))
        arguments = ["--resume", killed]
    wait(start(arguments, env, log), log)
    ours, theirs = left(killed), left(whole)
    same, logged = ours == theirs and bool(theirs), losses(killed) == losses(whole)
    end = f"{', '.join(theirs)} {'equal' if same else 'OTHERS'}, losses {logged and 'equal'}"
    return same and logged, f"killed at steps {', '.join(map(str, steps))}: {end}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    failed = False
    for name, experiment in experiments().items():
        if options.only and name not in options.only:
            continue
        began, dice = time.monotonic(), random.Random(f"{options.seed} {name}")
        with tempfile.TemporaryDirectory(prefix="vlm-kills-") as folder:
            won, how = play(experiment, Path(folder), options.kills, dice)
        failed |= not won
        print(f"{name:15} {how} ({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
