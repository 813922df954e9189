"""Streamed runs, killed and resumed with other numbers of workers: the exact same samples?

    python tests/data/kill_streams.py [--kills 3] [--seed 0] [--only mixture]

Real processes of `vlm train` with data workers, killed by SIGKILL at steps at random; each goes on
with another number of workers. The run that is left alone has none. Compared are the loss of every
step, the weights bit for bit, the position in the last checkpoint and the bad samples by name: a
sample more, less or elsewhere changes one of them. Exits with 1 unless all are equal.
On a busy machine VLM_LIMIT=3600 gives each process more seconds than 400.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "train"), str(TESTS), str(TESTS.parent)]

import kinds  # noqa: E402
from killing import main, run_killed  # noqa: E402
from processes import environment, losses, start, wait, weights, write_config  # noqa: E402

from vlm.config import (  # noqa: E402
    Experiment,
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    ViTConfig,
)

STEPS = 300
TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "pool": "mean", "projection": "linear"}
MODEL = ModelConfig(
    vision=ViTConfig(image_size=8, patch_size=4, **TOWER),
    text=TextConfig(vocab_size=300, context_length=12, pad_id=0, **TOWER),
    embed_dim=16,
)
STREAMS = {  # to the source in which one image is broken
    "tar, streamed": "",
    "tar, filtered": "",
    "parquet of bytes": "",
    "mixture": "csv/007.jpg",
}


def experiment(kind: str, folder: Path) -> Experiment:
    """A run on a kind of stream of `kinds`, written into `folder`."""
    data = kinds.make(kind, folder / "data")
    if broken := STREAMS[kind]:
        (folder / "data" / broken).write_bytes(b"no image")
    kinds.TOKENIZER.save(folder)
    return Experiment(
        name="stream",
        model=MODEL,
        preprocess=PreprocessConfig(image_size=8),
        tokenizer=kinds.TOKENIZER.config,
        tokenizer_file=str(folder / "tokenizer.json"),
        data=dataclasses.replace(data, prefetch=2),
        batch_size=8,
        steps=STEPS,
        log_every=1,
        checkpoint_every=0.1,
    )


def left(run: Path) -> dict[str, Any]:
    """Identity of the samples of a run."""
    bad = run / "bad-samples.jsonl"
    position = run / "checkpoints" / str(STEPS) / "data" / "metadata"
    return {
        "losses": losses(run),
        "weights": weights(run),
        "position": json.loads(position.read_text()),
        "bad samples": bad.read_text() if bad.exists() else "",
    }


def play(kind: str, folder: Path, kills: int, dice: random.Random) -> tuple[bool, str]:
    """(whether a killed run has the samples of one left alone, what happened)."""
    config, env = write_config(experiment(kind, folder), folder / "config.json"), environment()
    whole, killed, log = folder / "whole", folder / "killed", folder / "log"
    wait(start([config, "--run-dir", whole], env, log), log)
    steps, workers = [], [2]
    for _ in range(kills):
        steps.append(dice.randrange(2, STEPS // (kills + 1)))
        workers.append(dice.choice([n for n in range(5) if n != workers[-1]]))
    options = [("--data.workers", n) for n in workers]
    at = run_killed(config, killed, env, log, steps, options)
    stops = [f"{step} ({n} workers)" for step, n in zip(at, workers[:-1], strict=True)]
    ours, theirs = left(killed), left(whole)
    differ = [name for name in theirs if ours[name] != theirs[name]]
    bad = len(theirs["bad samples"].splitlines())
    text = f"killed at steps {', '.join(stops)}, ended with {workers[-1]}; {bad} bad samples: "
    return not differ, text + (f"OTHER {', '.join(differ)}" if differ else "all equal")


if __name__ == "__main__":
    main(__doc__.splitlines()[0], lambda: {kind: kind for kind in STREAMS}, play, kills=3)
