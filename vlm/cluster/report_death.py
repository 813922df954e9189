"""Helper process that reports the death of process 0, the coordinator of a run.

When process 0 dies, JAX's client aborts the other processes from a C++ thread, so they cannot print
a message themselves. Each of them starts this program, which waits for its parent to end. It prints
the message if the parent did not sign off and process 0 does not answer. It runs as a file, to
start fast and without dependencies.
"""

import socket
import sys
import time

# Seconds. A dying process may close its connections before its listening socket.
CONNECT_TIMEOUT = 5.0


def main(host: str, port: str, message: str) -> None:
    """Print `message` if stdin closes without input and nothing listens at host:port."""
    if sys.stdin.read():
        return
    end = time.monotonic() + CONNECT_TIMEOUT
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
        except OSError:
            print(message, file=sys.stderr, flush=True)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
