"""Scripts that kill real runs of `vlm train`: their command line, and runs killed and resumed."""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import last_step, send_at, start, wait


def run_killed(
    config: Path,
    run: Path,
    env: dict[str, str],
    log: Path,
    steps: Sequence[int],
    options: Sequence[Sequence[Any]] | None = None,
) -> list[int]:
    """Kill a run with SIGKILL after so many further steps, repeatedly; then let it finish.

    Each start has options of its own, one more than there are kills. The steps it was killed at.
    """
    options = options or [()] * (len(steps) + 1)
    arguments, killed = [config, "--run-dir", run], []
    for more, own in zip(steps, options[:-1], strict=True):
        process = start([*arguments, *own], env, log)
        send_at(signal.SIGKILL, last_step(run) + more, run, [process])
        wait(process, log, -signal.SIGKILL)
        killed.append(last_step(run))
        arguments = ["--resume", run]
    wait(start([*arguments, *options[-1]], env, log), log)
    return killed


def main(
    description: str,
    cases: Callable[[], Mapping[str, Any]],
    play: Callable[[Any, Path, int, random.Random], tuple[bool, str]],
    kills: int,
) -> None:
    """Run each case in its own folder and print its result; exit with 1 unless all pass.

    `play` is given a case, the folder, how often to kill, and dice of this case and `--seed`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    found = cases()
    if unknown := set(options.only) - set(found):
        parser.error(f"--only knows {', '.join(found)}, and not {', '.join(sorted(unknown))}")
    failed = False
    for name in options.only or found:
        began, dice = time.monotonic(), random.Random(f"{options.seed} {name}")
        with tempfile.TemporaryDirectory(prefix="vlm-kills-") as folder:
            well, how = play(found[name], Path(folder), options.kills, dice)
        failed |= not well
        print(f"{name:18} {how} ({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(failed)
