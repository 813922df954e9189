"""An elastic run of four processes under random faults, compared with an undisturbed run.

    python tests/training/elastic_faults.py [--faults 20] [--only same shrinking] [--local]

Real supervisors and training processes over loopback, killed by SIGKILL: training processes, whole
hosts, the coordinator, also during a start and during the write of a checkpoint. In "same" every
host comes back at once, and the run must end bit-identical. In "shrinking" hosts also stay away for
a while, the run goes on without them, and every loss must be within 1e-5 of the undisturbed run.
With --local each host also has local checkpoints, and half of the hosts that are killed come back
with an empty disk; the run folder has a checkpoint only at half of the run. Exits with 1 unless all
hold. On a busy machine VLM_LIMIT=3600 gives each wait more seconds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from processes import LIMIT, environment, last_step, losses, weights, write_config  # noqa: E402
from processes import start as start_training  # noqa: E402
from tiny import COLOURS  # noqa: E402

from vlm.config import (  # noqa: E402
    DataConfig,
    Experiment,
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)

HOSTS = 4
TOLERANCE = 1e-5  # of a loss, relative
SIZES = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "pool": "mean", "projection": "linear"}


def make_data(folder: Path) -> str:
    """Make 60 drawings of squares, whose captions differ."""
    rows = ["image,caption"]
    for colour, rgb in COLOURS.items():
        for x in range(5):
            for y in range(4):
                pixels = np.full((16, 16, 3), 255, np.uint8)
                pixels[3 * y : 3 * y + 4, 3 * x : 3 * x + 4] = rgb
                Image.fromarray(pixels).save(folder / f"{colour}-{x}-{y}.png")
                rows.append(f"{colour}-{x}-{y}.png,a {colour} square at {x} {y}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


def experiment(data: str, steps: int, local: bool) -> Experiment:
    """Twelve pairs a step divide over one to four processes of one device."""
    return Experiment(
        name="squares",
        model=ModelConfig(
            vision=ViTConfig(image_size=16, patch_size=8, dropout=0.1, **SIZES),
            text=TextConfig(vocab_size=280, context_length=12, pad_id=0, **SIZES),
            embed_dim=16,
        ),
        preprocess=PreprocessConfig(image_size=16),
        tokenizer=TokenizerConfig(context_length=12),
        data=DataConfig(source=data, eval_split=None),
        batch_size=12,
        steps=steps,
        log_every=1,
        checkpoint_every=0.5 if local else 0.04,
        local_checkpoints={"folder": "$LOCAL_DISK/vlm", "every": 4} if local else {},  # pyright: ignore
    )


class Cluster:
    """Four hosts with a supervisor each, on loopback."""

    def __init__(self, folder: Path, config: Path, fewest: int, rejoin_timeout: float):
        self.folder, self.run = folder, folder / "run"
        self.supervisors: dict[int, subprocess.Popen] = {}
        self._arguments = [config, "--run-dir", self.run, "--processes", f"{fewest}:{HOSTS}"]
        self._arguments += ["--rejoin-timeout", rejoin_timeout, "--max-restarts", 20]
        self._arguments += ["--local-addr", "127.0.0.1"]

    def start(self, *hosts: int) -> None:
        for host in hosts:
            disk = str(self.folder / f"disk-{host}")
            env = environment(VLM_HEARTBEAT_TIMEOUT="8", LOCAL_DISK=disk)
            log = self.folder / f"log-{host}-{time.monotonic():.0f}"
            arguments = [*self._arguments, "--process-id", host]
            self.supervisors[host] = start_training(arguments, env, log)

    def kill_host(self, host: int, dice: random.Random) -> None:
        """Kill a supervisor, and the kernel its training process; half of the time its disk too."""
        self.supervisors[host].kill()
        self.supervisors[host].wait()
        if dice.random() < 0.5:
            shutil.rmtree(self.folder / f"disk-{host}", ignore_errors=True)

    def kill_process(self, host: int) -> None:
        """Kill the training process of a host, once its supervisor has started it."""
        self.wait_for(lambda: self._children(host) or self.ended(), "a process")
        for child in self._children(host):
            os.kill(child, signal.SIGKILL)

    def _children(self, host: int) -> list[int]:
        pid = self.supervisors[host].pid
        try:
            return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    def group(self) -> tuple[int, list[int]]:
        """Return the number of the newest group and its hosts."""
        paths = self.run.glob("elastic/group-*.json")
        newest = max(paths, key=lambda p: int(p.stem.removeprefix("group-")), default=None)
        if newest is None:
            return -1, []
        content = json.loads(newest.read_text())
        return content["number"], [int(host) for host in content["sessions"]]

    def wait_for(self, condition, what: str) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"{what} took too long:\n{self.output()}"
            time.sleep(0.01)

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.supervisors.values())

    def output(self) -> str:
        logs = sorted(self.folder.glob("log-*"))
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in logs)

    def close(self) -> None:
        for process in self.supervisors.values():
            process.kill()


def disturb(cluster: Cluster, faults: int, dice: random.Random, shrinking: bool) -> Counter:
    """Cause so many faults at random times; return how many of each kind."""
    kinds = ["process", "host", "coordinator", "starting", "writing"]
    kinds += ["leaving"] * 4 if shrinking else []
    caused, last_group, away = Counter(), -1, []
    while sum(caused.values()) < faults:
        cluster.wait_for(lambda n=last_group: cluster.group()[0] > n or cluster.ended(), "a start")
        if cluster.ended():
            break
        last_group, hosts = cluster.group()
        kind = dice.choice(kinds)
        host = hosts[0] if kind == "coordinator" else dice.choice(hosts)
        began = last_step(cluster.run)
        if kind == "starting":
            time.sleep(dice.uniform(0, 8))
        else:
            steps = dice.randrange(1, 10)
            cluster.wait_for(
                lambda s=began + steps: last_step(cluster.run) >= s or cluster.ended(), "a step"
            )
        if kind == "writing":
            folder = cluster.folder
            cluster.wait_for(lambda f=folder: being_written(f) or cluster.ended(), "a checkpoint")
        if cluster.ended():
            break
        leaves = kind == "leaving" and len(hosts) > 2
        caused[kind if leaves or kind != "leaving" else "host"] += 1
        if kind in ("process", "writing") or (
            kind in ("coordinator", "starting") and dice.random() < 0.5
        ):
            cluster.kill_process(host)
        else:
            cluster.kill_host(host, dice)
            if leaves:
                away.append(host)
            else:
                cluster.start(host)
        if away and not leaves:
            cluster.start(away.pop(0))
    cluster.start(*away)
    return caused


def being_written(folder: Path) -> bool:
    """Whether a checkpoint is being written, to the run folder or a local disk."""
    return any(folder.glob("run/checkpoints/*tmp*")) or any(folder.glob("disk-*/*/*/*.unfinished"))


def reference(folder: Path, config: Path) -> Path:
    """Run without faults, and return its run folder."""
    cluster = Cluster(folder, config, HOSTS, 300)
    try:
        cluster.start(*range(HOSTS))
        cluster.wait_for(cluster.ended, "the undisturbed run")
    finally:
        cluster.close()
    assert (cluster.run / "bundle").exists(), cluster.output()
    return cluster.run


def play(
    folder: Path, config: Path, whole: Path, faults: int, dice: random.Random, shrinking: bool
) -> tuple[bool, str]:
    """Return (whether the disturbed run ends as it should, description)."""
    folder.mkdir()
    cluster = Cluster(folder, config, 2 if shrinking else HOSTS, 10 if shrinking else 300)
    try:
        cluster.start(*range(HOSTS))
        caused = disturb(cluster, faults, dice, shrinking)
        cluster.wait_for(cluster.ended, "the rest of the run")
        codes = [process.returncode for process in cluster.supervisors.values()]
    finally:
        cluster.close()
    assert (cluster.run / "bundle").exists(), f"{codes}\n{cluster.output()}"
    ours, theirs = np.array(losses(cluster.run)), np.array(losses(whole))
    assert ours.shape == theirs.shape
    difference = np.abs(ours / theirs - 1).max()
    same = weights(cluster.run) == weights(whole) and bool((ours == theirs).all())
    rows = [json.loads(row) for row in (cluster.run / "history.jsonl").read_text().splitlines()]
    sizes = Counter(row["processes"] for row in rows)
    text = (
        f"{sum(caused.values())} faults ({dict(caused)}), {cluster.group()[0] + 1} starts, of "
        f"which {len(rows)} trained, {cluster.output().count('starting from the local')} from "
        f"local checkpoints, on processes {dict(sizes)}: "
        f"{'bit-identical' if same else f'largest relative difference of a loss {difference:.1e}'}"
    )
    return difference <= TOLERANCE if shrinking else same, text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["same", "shrinking"])
    parser.add_argument("--local", action="store_true")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="vlm-elastic-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "whole").mkdir()
        data = make_data(folder / "data")
        e = experiment(data, options.steps, options.local)
        config = write_config(e, folder / "config.json")
        whole = reference(folder / "whole", config)
        for mode in options.only:
            began, dice = time.monotonic(), random.Random(f"{options.seed} {mode}")
            well, text = play(
                folder / mode, config, whole, options.faults, dice, mode == "shrinking"
            )
            failed |= not well
            print(f"{mode:10} {text} ({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
