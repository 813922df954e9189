"""`vlm runs`: table, page and server of runs that are finished, stopped, killed or going on."""

import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny

from vlm.cli import run_page
from vlm.cli.run_record import RunRecord
from vlm.cli.show_runs import find_runs, make_server, runs
from vlm.errors import CheckpointError
from vlm.paths import as_path


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a copy of a finished run, `first`."""
    shutil.copytree(tiny.run(), tmp_path / "runs" / "first")
    return tmp_path / "runs"


def copy(place: Path, name: str, lines: int | None = None, idle: float = 0.0) -> Path:
    """Copy the run, with so many lines of its account of time, idle for so many seconds."""
    run = place / name
    shutil.copytree(place / "first", run)
    if lines is not None:
        file = run / "goodput.jsonl"
        file.write_text("\n".join(file.read_text().splitlines()[:lines]) + "\n")
    for name in ("log.jsonl", "goodput.jsonl"):
        then = time.time() - idle
        os.utime(run / name, (then, then))
    return run


def end_with(run: Path, **row) -> None:
    with (run / "goodput.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, **row}) + "\n")


def test_each_status_is_told(place):
    copy(place, "going", lines=2)
    copy(place, "killed", lines=2, idle=3600)
    (copy(place, "broken") / "config.json").write_text("{")
    end_with(copy(place, "stopped"), end="stopped")
    end_with(copy(place, "failed"), end="failed", error="the disk <b>is full</b>")
    new = copy(place, "new")
    for name in ("log.jsonl", "goodput.jsonl", "history.jsonl"):
        (new / name).unlink()
    found = {record.name: record for record in find_runs([str(place)])}
    assert {name: record.status for name, record in found.items()} == {
        "first": "finished",
        "going": "going on",
        "killed": "no heartbeat",
        "broken": "unreadable",
        "stopped": "stopped",
        "failed": "failed",
        "new": "not started",
    }
    assert found["killed"].reason.startswith("Its process has written nothing for 1:00:0")
    assert "config.json cannot be read" in found["broken"].reason
    assert found["failed"].reason == "the disk <b>is full</b>"
    assert not list(run_page.differences(list(found.values())))
    html = run_page.page(list(found.values()), "now")
    assert "the disk &lt;b&gt;is full&lt;/b&gt;" in html


def test_a_run_whose_step_number_stays_the_same_has_no_new_step(place):
    """A thread writes `goodput.jsonl` while the main thread hangs, for example in a collective."""
    hangs, slow = copy(place, "hangs", lines=2), copy(place, "slow", lines=2)
    rows = [{"step": 20, "compute": 30.0, "data": 0.5} for _ in range(9)]
    rows += [{"step": 21, "evaluation": 400.0}]  # most of it before the last step
    for run, own in ((hangs, [*rows, *[{**rows[0], "step": 21}] * 6]), (slow, rows)):
        with (run / "goodput.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in own)
    record, other = find_runs([str(hangs), str(slow)])
    assert (record.status, other.status, other.reason) == ("no new step", "going on", "")
    assert re.search(r"its step number has been 21 for 0:03:\d\d, since \d{4}-", record.reason)
    assert '"compute"' in record.reason
    starts = copy(place, "starts", lines=1)
    with (starts / "goodput.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "start": 200.0}) + "\n")
    (record,) = find_runs([str(starts)])
    assert record.status == "no new step"
    assert '"start"' in record.reason


def test_a_page_has_the_curves_and_fetches_nothing(place, tmp_path, capsys):
    out = tmp_path / "page.html"
    runs((str(place / "first"),), out=str(out))
    html = out.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)|@import|url\(""", html)
    for heading in ("Loss", "Throughput", "Waiting for data", "Peak memory", "Goodput"):
        assert f"<h3>{heading}" in html
    record = RunRecord.read(as_path(place / "first"))
    assert f"{record.tally.shares()['compute'] * 100:.3g}%" in html
    table = capsys.readouterr().out
    assert "first" in table
    assert "finished" in table
    assert "40/40" in table


def test_several_runs_are_compared(place):
    other = copy(place, "second")
    config = json.loads((other / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.25
    (other / "config.json").write_text(json.dumps(config))
    records = find_runs([str(place)])
    before = json.loads((place / "first" / "config.json").read_text())["optimizer"]["learning_rate"]
    rows = list(run_page.differences(records))
    assert rows == [["optimizer.learning_rate", json.dumps(before), "0.25"]]
    html = run_page.page(records, "now")
    comparison = html[html.index("<h2>Comparison") : html.index("<h2>Different settings")]
    assert comparison.count("<svg") >= 4
    assert ">first<" in comparison
    assert ">second<" in comparison
    assert 'href="#run-2"' in html


def test_a_run_of_one_step_has_points(place):
    run = copy(place, "one")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    (run / "log.jsonl").write_text(json.dumps(row | {"step": 1}) + "\n")
    html = run_page.page(find_runs([str(run)]), "now")
    assert '<circle class="dot c0"' in html


def test_no_run_is_one_sentence(tmp_path):
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="has no runs: give run folders"):
            find_runs([str(wrong)])


def test_the_page_is_served_on_loopback_and_stays_up_to_date(place):
    server = make_server([str(place)], 0)
    assert server.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url) as answer:
            assert "<h1>first</h1>" in answer.read().decode()
            assert answer.headers["Refresh"] == "15"
        copy(place, "second")
        with opener.open(url) as answer:
            assert "<h1>Training runs</h1>" in answer.read().decode()
        for wrong in (
            url + "config.json",
            urllib.request.Request(url, headers={"Host": "evil.example:80"}),
        ):
            with pytest.raises(urllib.error.HTTPError):
                opener.open(wrong)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
