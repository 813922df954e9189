"""Rounds of a run in an unsure bucket, each with faults at random: python tests/cloud/rounds.py 20

Each round starts `go.sh` on one to four hosts (`--hosts`), again and again. The first starts meet a
fault: told to leave or killed at a random moment (all of them, or one host alone), with requests
that fail at random all the while. Then it is left to finish. A round is won if the run ends bit for
bit as the run of as many hosts that was left alone, or if it stops with one sentence and a whole
checkpoint. Exits with 1 unless all rounds are won.
"""

import argparse
import collections
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from bucket import Bucket  # noqa: E402
from hosts import Hosts  # noqa: E402
from pod import Pod, losses, partial_checkpoints, weights, whole_checkpoints  # noqa: E402

STARTS = 2  # that a fault ends, or meets
FAULTS = ("leave", "kill all", "kill one", "leave in a checkpoint", "kill in a checkpoint")


def start_with_fault(pod: Pod, run: str, count: int, dice: random.Random) -> tuple[str, list[str]]:
    """(the fault, output of the hosts)."""
    newest = max(whole_checkpoints(pod.run(run)), default=0)
    ahead = [step for step in (12, 24, 36, 48) if step > newest]
    fault = dice.choice(FAULTS if ahead else FAULTS[:3])
    bucket, hosts = pod.bucket, Hosts(pod.go(run), pod.folder / run, pod.env, count=count)
    number = signal.SIGTERM if fault.startswith("leave") else signal.SIGKILL
    which = (dice.randrange(count),) if fault == "kill one" else ()
    if "checkpoint" in fault:
        step = dice.choice(ahead)
        with bucket.hold(f"{run}%2Fcheckpoints%2F{step}") as reached:
            while not reached.wait(0.1) and hosts.running():
                pass
            time.sleep(dice.random())
            hosts.signal(number)
            time.sleep(dice.random())
        return f"{fault} {step}", hosts.wait()
    after = dice.uniform(0, 1.5)  # counted from the first step, whose compiling takes its time
    while hosts.running() and not any("first step after" in x.read_text() for x in hosts.logs):
        time.sleep(0.05)
        if dice.random() < 0.002:  # now and then before it
            break
    time.sleep(after)
    hosts.signal(number, *which)
    return f"{fault} after {after:.1f} s", hosts.wait()


def sentence(message: list[str]) -> str:
    """The last thing that the first host says, if it is one sentence of ours."""
    lines = [line for line in message[0].splitlines() if line.startswith("vlm: ")]
    unexpected = not lines or "did not expect" in lines[-1]
    return "" if unexpected else lines[-1]


def play(pod: Pod, run: str, whole: dict[int, Path], dice: random.Random) -> tuple[bool, str]:
    """One round: (won, what happened); `whole` are the runs left alone, by number of hosts."""
    count = dice.choice(sorted(whole))
    faults = []
    for _ in range(STARTS):
        pod.bucket.rate = dice.choice([0.0, 0.01, 0.03])
        faults.append(start_with_fault(pod, run, count, dice)[0])
    pod.bucket.rate = dice.choice([0.0, 0.01])
    last = Hosts(pod.go(run), pod.folder / run, pod.env, count=count)
    message = last.wait()
    pod.bucket.rate = 0.0
    how = f"{count} hosts: {', '.join(faults)}"
    if all(p.returncode == 0 for p in last.processes):
        same = weights(pod.run(run)) == weights(whole[count])
        logged = losses(pod.run(run)) == losses(whole[count])
        ends = "ended as the run left alone"
        if not (same and logged):
            partial = partial_checkpoints(pod.run(run))
            ends = f"ENDED OTHERWISE (weights {same}, log {logged}, partial {partial})"
        return same and logged, f"{how}: {ends}"
    told, kept = sentence(message), whole_checkpoints(pod.run(run))
    won = bool(told and kept)
    return (
        won,
        f"{how}: {'stopped' if won else 'STOPPED'} with checkpoints {kept}: {told or message}",
    )


def main(rounds: int, seed: int, counts: list[int]) -> None:
    with tempfile.TemporaryDirectory(prefix="vlm-rounds-") as name:
        folder = Path(name)
        with Bucket(folder / "bucket") as bucket:
            pod, whole = Pod(folder, bucket), {}
            for count in counts:
                alone = f"alone{count}"
                Hosts(pod.go(alone), folder / alone, pod.env, count=count).finish()
                whole[count] = pod.run(alone)
            tally = collections.Counter()
            for i in range(rounds):
                began = time.monotonic()
                won, how = play(pod, f"round{i}", whole, random.Random(seed + i))
                tally[won] += 1
                print(f"{i + 1:3} {how} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{tally[True]} of {rounds} rounds won, {bucket.requests:,} requests")
    sys.exit(tally[True] != rounds)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Rounds of a run in an unsure bucket.")
    options.add_argument("rounds", type=int, nargs="?", default=20)
    options.add_argument("seed", type=int, nargs="?", default=0, help="of the first round")
    options.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3, 4], help="drawn from")
    given = options.parse_args()
    main(given.rounds, given.seed, given.hosts)
