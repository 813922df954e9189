"""Mixed load for 20 seconds; `python tests/serving/load.py soak` is the long version."""

import asyncio
import gc
import json
import pathlib
import re

import numpy as np
import pytest
from load import body_of, closed_loop
from serving import data_url, drawn, encoded


def resident():
    """Resident memory of this process in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="reads /proc")
def test_no_request_is_lost_and_memory_does_not_grow(server):
    good = [body_of(data_url(encoded(drawn(i, (300, 200))))) for i in range(20)]
    good += [body_of(f"text {i} " * (i % 9 + 1)) for i in range(20)]
    bad = [body_of(""), body_of("data:image/png;base64,AAAA"), b"{", json.dumps({}).encode()]
    port = server.socket.getsockname()[1]
    asyncio.run(closed_loop(port, good + bad, 4, 16))
    gc.collect()
    before = resident()
    found = asyncio.run(closed_loop(port, good + bad, 14, 16))
    gc.collect()
    assert set(found["statuses"]) == {200, 400, 422}
    share = found["statuses"][200] / sum(found["statuses"].values())
    assert share == pytest.approx(40 / 44, abs=0.05)
    assert resident() - before < 48 << 20
    assert server.service.admission.in_flight == 0
    assert np.isfinite(found["p99"])
    assert server.ask("/healthz").status == 200
