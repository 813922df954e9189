"""Commands that the page of benchmarks names exist, and its plans run."""

import re
from pathlib import Path

import pytest

from vlm.cli import main

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "vlm/docs/benchmarks.md").read_text(encoding="utf-8")


def test_the_scripts_exist():
    scripts = re.findall(r"(?:python|pytest) (tests/[\w./]+)", PAGE)
    assert len(scripts) > 12
    for script in scripts:
        assert (ROOT / script).exists(), script


def test_each_section_names_its_command():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) > 6
    for section in sections:
        assert re.search(r"`(python|pytest|vlm) ", section), section.partition("\n")[0]


@pytest.mark.untyped  # a plan builds the step of shapes in place of arrays
@pytest.mark.slow
def test_the_plans_run(monkeypatch):
    rows = re.findall(r"^\| `(configs/\S+) (--topology [^`]+)`", PAGE, re.MULTILINE)
    assert len(rows) >= 2
    (sweep,) = re.findall(r"`vlm plan (\S+ --sweep [^`]+)`", PAGE)
    monkeypatch.chdir(ROOT)
    for options in [*map(" ".join, rows), " ".join(sweep.split())]:
        words = ["plan", *options.split(), *([] if "--sweep" in options else ["--sweep"])]
        assert main([*words, "--compiles", "0"]) == 0  # analytic
