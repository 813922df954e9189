"""Words that readers had to translate stay out: each has a plain replacement.

A word is looked for in identifiers, docstrings, comments, messages, help texts and pages.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlm"

# Regular expression of a word: what to write in its place.
REPLACEMENTS = {
    r"said|unsaid": "logged, reported, documented",
    r"mends?|mended|mending": "fix",
    r"torn": "truncated, corrupt",
    r"anew": "again, rebuild",
    r"whoever": "the noun that is meant",
    r"patience|(?<!stop_)(?<!shutdown_)grace(?! period)": "heartbeat timeout, grace period",
    r"counted by hand": "estimated analytically",
    r"knows better": "stronger",
    r"speaks? for": "matches, is evidence for",
    r"of another make": "another CPU",
    r"begin_?s anew": "restarts",
    r"contradicts? itself": "is inconsistent",
    r"nothing fills|learn from none": "without a rule, uses no teacher",
    r"_of_good|_after_death|_of_patches": "a name with the field's term",
    r"kept_of|as_begun|why_not|in_one_sentence|deaf_to_signals": "a name with the field's term",
}
# Docstrings may begin with "What" where it is a question, in all of the package so often.
MAX_WHAT = 10


def banned(text: str) -> list[str]:
    """`line number: word (replacement)` for each banned word in `text`."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if "= environment(" in line:  # names the old variable too
            continue
        for word, replacement in REPLACEMENTS.items():
            if match := re.search(rf"(?<![A-Za-z])({word})(?![A-Za-z])", line, re.IGNORECASE):
                found.append(f"{number}: {match[0]!r} (write: {replacement})")
    return found


def subpackage(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [
    path
    for pattern in ("*.py", "*.md", "*.html", "*.js", "*.css")
    for path in sorted(PACKAGE.rglob(pattern))
    if "/weights/clip/" not in path.as_posix() and path.name != "_deprecation.py"  # old names
]


def test_a_banned_word_is_found():
    assert banned("x = 1\nraise Torn('as it said')") == [
        "2: 'said' (write: logged, reported, documented)",
        "2: 'Torn' (write: truncated, corrupt)",
    ]
    assert banned("aided, amendments, stornieren") == []


@pytest.mark.parametrize("name", sorted({subpackage(path) for path in FILES}))
def test_a_subpackage_uses_plain_words(name):
    for path in FILES:
        if subpackage(path) == name:
            assert banned(path.read_text()) == [], path


def test_configs_notebooks_pages_and_tests_use_plain_words():
    paths = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
    paths += [*(ROOT / "configs").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    paths += [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    for path in paths:
        assert banned(path.read_text()) == [], path
