"""Memory of this process and of its devices, for the log of a run."""

import sys

import jax


def memory_row() -> dict[str, float]:
    """Return the peaks so far in bytes: of this process, and of the fullest of its devices.

    Devices that do not count their memory, such as CPUs, are left out.
    """
    row: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes, elsewhere KiB
        row["memory/host"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        row["memory/device"] = max(peaks)
    return row
