"""Fine-tuning by each objective, killed and resumed: bitwise equal to an uninterrupted run.

    python tests/training/kill_objectives.py [--kills 2] [--seed 0] [--only flyp LoRA]

Real processes of `vlm train` on drawn shapes, killed by SIGKILL at steps at random. Compared are
all that a run leaves to be loaded, and the loss of every step. Exits with 1 unless all are equal.
On a busy machine VLM_LIMIT=3600 gives each process more seconds than 400.
"""

import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import tiny  # noqa: E402
from killing import main, run_killed  # noqa: E402
from processes import environment, losses, start, wait, write_config  # noqa: E402

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
    """Return (whether a killed run ends like an uninterrupted one, description)."""
    config, env = write_config(experiment, folder / "config.json"), environment()
    whole, killed, log = folder / "whole", folder / "killed", folder / "log"
    wait(start([config, "--run-dir", whole], env, log), log)
    steps = run_killed(config, killed, env, log, [dice.randrange(5, 80) for _ in range(kills)])
    ours, theirs = left(killed), left(whole)
    same, logged = ours == theirs and bool(theirs), losses(killed) == losses(whole)
    end = f"{', '.join(theirs)} {'equal' if same else 'OTHERS'}, losses {logged and 'equal'}"
    return same and logged, f"killed at steps {', '.join(map(str, steps))}: {end}"


if __name__ == "__main__":
    main(__doc__.splitlines()[0], experiments, play, kills=2)
