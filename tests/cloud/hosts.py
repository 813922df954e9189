"""Hosts of a run: groups of processes, started as a cluster does, told to leave and killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from quick import QUICK

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds that hosts may take, compiling on a busy machine included
HEARTBEAT_TIMEOUT = 10  # seconds until a silent process counts as gone

# Commands of a pod's image. SMALL_PREPARE has options that make the shards small.
COMMANDS = {
    "vlm": """\
if [ "$1 $2" = "data prepare" ]; then set -- "$@" $SMALL_PREPARE; fi
exec "$PYTHON" -m vlm "$@"
""",
    "gcloud": f'exec "$PYTHON" {Path(__file__).with_name("gcloud.py")} "$@"\n',
}


class Hosts:
    """`count` processes of `devices` devices each, that run `command` as hosts of one run.

    Each is a session of its own, whose group gets the signals: workers and all.
    """

    def __init__(
        self,
        command: list,
        folder: Path,
        env: dict[str, str],
        *,
        count: int = 1,
        devices: int = 1,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("log*")))
        self.logs = [folder / f"log{number + i}" for i in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes = []
        for i, log in enumerate(self.logs):
            meet = {}
            if count > 1:
                meet = {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                    "VLM_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT),
                }
            flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*map(str, command)],
                        env=env | meet | {"XLA_FLAGS": flags},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def signal(self, number: signal.Signals, *which: int) -> None:
        """To the whole group of each host, or of those named."""
        for i in which or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[i].pid, number)

    def running(self) -> bool:
        return any(p.poll() is None for p in self.processes)

    def wait(self) -> list[str]:
        """Output of each host, after all have ended."""
        end = time.monotonic() + LIMIT
        try:
            for process in self.processes:
                process.wait(max(1, end - time.monotonic()))
        finally:
            self.signal(signal.SIGKILL)
        return [log.read_text() for log in self.logs]

    def finish(self) -> list[str]:
        """`wait`, and all of them ended well."""
        output = self.wait()
        codes = [p.returncode for p in self.processes]
        assert codes == [0] * len(codes), f"exit codes {codes}:\n" + "\n".join(output)
        return output


def environment(folder: Path, bucket: dict[str, str]) -> dict[str, str]:
    """Of hosts whose bucket is on loopback, with the commands that a pod's image has."""
    tools = folder / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name, text in COMMANDS.items():
        (tools / name).write_text("#!/bin/sh\n" + text)
        (tools / name).chmod(0o755)
    return (
        os.environ
        | bucket
        | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "VLM_CACHE": str(folder / "cache"),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # avoids a restart
            "COLUMNS": "200",
            "VLM_STALL_WARNING": "5",
            # The layout of a bucket is asked for over gRPC, which the storage server does not know.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    )
