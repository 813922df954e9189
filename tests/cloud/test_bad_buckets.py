"""What is wrong with a bucket, or with the hosts, is one sentence before the first step."""

import json
import signal
import sys

import pytest
from hosts import Hosts
from pod import whole_checkpoints

pytestmark = pytest.mark.slow


def refused(pod, run: str, *options: str) -> str:
    """What `vlm train` says of a run folder that it refuses."""
    line = [sys.executable, "-m", "vlm", "train", *pod.train, "--run-dir", run]
    hosts = Hosts([*line, *options], pod.folder / "refused", pod.env)
    output = hosts.wait()[0]
    assert hosts.processes[0].returncode == 1, output
    assert "first step after" not in output
    assert "Traceback" not in output[output.rindex("vlm: ") :]
    return output[output.rindex("vlm: ") :]


def test_a_bucket_that_does_not_exist(pod):
    output = refused(pod, "gs://no-such-bucket/runs/a")
    assert "the run folder gs://no-such-bucket/runs/a cannot be written" in output
    assert "there is no such bucket" in output


@pytest.mark.parametrize(
    ("code", "part", "says"),
    [
        ("403", "refused403", "grant it Storage Object Admin"),
        ("401", "refused401", "no credentials for it: run `gcloud auth application-default login`"),
        # What the log may do, TensorStore may not: its credentials are its own.
        ("403", "refused-seen%2F.seen", "cannot write checkpoints to"),
    ],
)
def test_a_bucket_that_may_not_be_written(pod, code, part, says):
    name = part.split("%2F")[0]
    where = f"upload/storage/v1/b/bucket/o?uploadType=media&name=runs%2F{part}"
    pod.bucket.fail(code, part if "seen" not in part else where, 40)
    output = refused(pod, f"gs://bucket/runs/{name}")
    pod.bucket.faults.clear()
    assert says in output


# A host with a disk of its own where the other one has the run, and a host with another command.
ODD_HOST = """
import os, sys
from vlm.cli import main
from vlm.training import preflight

preflight.SHARED_AFTER = 1.0
odd = os.environ["JAX_PROCESS_ID"] == "1"
if odd and sys.argv[1] == "disk":
    os.chdir("other")
more = ["--seed", "2"] if odd and sys.argv[1] == "seed" else []
sys.exit(main(["train", *sys.argv[2:], *more]))
"""


@pytest.mark.parametrize(
    ("what", "run", "says"),
    [
        ("disk", "run", "cannot find the run folder run that process 0 of 2 made: put it where"),
        ("seed", "gs://bucket/runs/differ", "--seed is 2 here and 0 there"),
    ],
)
def test_hosts_that_share_no_folder_or_differ(pod, tmp_path, what, run, says):
    (tmp_path / "other").mkdir()
    (tmp_path / "start.py").write_text(ODD_HOST)
    train = f"{sys.executable} start.py {what} {' '.join(pod.train)} --run-dir {run}"
    line = ["sh", "-c", f"cd {tmp_path} && exec {train}"]
    for output in Hosts(line, pod.folder / "refused", pod.env, count=2).wait():
        assert says in output
        assert "first step after" not in output


def test_a_passing_error_does_not_cost_the_newest_checkpoint(pod):
    """403 is what no client tries again: a token that was renewed too late, say."""
    run, bucket = pod.run("passing"), pod.bucket
    hosts = Hosts(pod.go("passing"), pod.folder / "passing", pod.env)
    with bucket.hold("passing%2Fcheckpoints%2F48") as reached:
        while not reached.wait(0.2):
            assert hosts.running(), hosts.wait()
        hosts.signal(signal.SIGKILL)
        hosts.wait()
    before = whole_checkpoints(run)
    newest = before[-1]

    bucket.fail("403", f"passing%2Fcheckpoints%2F{newest}%2Fstate", 10_000)
    hosts = Hosts(pod.go("passing"), pod.folder / "passing", pod.env)
    output = hosts.wait()[0]
    bucket.faults.clear()
    assert hosts.processes[0].returncode == 1
    assert (
        f"checkpoint {newest} of gs://bucket/runs/passing/checkpoints could not be read" in output
    )
    assert "may not be corrupt: nothing was changed" in output
    assert whole_checkpoints(run) == before

    bucket.fail("403", f"passing%2Fcheckpoints%2F{newest}%2Fstate", 2)
    Hosts(pod.go("passing"), pod.folder / "passing", pod.env).finish()
    history = [json.loads(x) for x in (run / "history.jsonl").read_text().splitlines()]
    assert history[-1]["step"] == newest
