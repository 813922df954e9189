"""Says for a process what it cannot say itself: that process 0, where a run meets, is gone.

When process 0 dies, JAX's client ends the others at once, from a thread in which no Python runs. So
each of them starts this program beside itself; it waits for the end, and if nobody took leave and
process 0 does not answer, it says so. Run as a file, to start fast and depend on nothing.
"""

import socket
import sys
import time

PATIENCE = 5.0  # seconds: of a process that dies, connections may close before its listening socket


def main(host: str, port: str, sentence: str) -> None:
    """Print `sentence` once stdin has ended without a word and nothing listens at host:port."""
    if sys.stdin.read():
        return
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except OSError:
            print(sentence, file=sys.stderr, flush=True)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
