"""The documentation site: complete, whole links, small pages, and nothing from the network."""

import dataclasses
import html
import html.parser
import importlib
import inspect
import re
import urllib.parse
from pathlib import Path

import pytest
from test_import import IN_SUBPACKAGES, PUBLIC

import vlm
from vlm.cli.commands import COMMANDS
from vlm.config.base import Config

pytestmark = pytest.mark.slow

MAX_BYTES = 1_500_000  # of a page with its pictures


class Page(html.parser.HTMLParser):
    """The ids, links and loaded files of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(found["href"])
        if tag in ("img", "script", "iframe", "video", "source", "embed") and found.get("src"):
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.fixture(scope="module")
def ids(site, pages):
    """The ids of the reference."""
    return {name for path, page in pages.items() if "reference" in path.parts for name in page.ids}


def text_of(path):
    """The visible text of a page, on one line."""
    return html.unescape(" ".join(re.sub(r"<[^>]+>", "", path.read_text()).split()))


def names_of(thing):
    """All public names of an object."""
    return {
        f"{package}.{name}"
        for package, name in PUBLIC + IN_SUBPACKAGES
        if getattr(importlib.import_module(package), name) is thing
    }


def test_every_public_name_is_there(ids):
    for package, name in PUBLIC + IN_SUBPACKAGES:
        thing = getattr(importlib.import_module(package), name)
        if not inspect.ismodule(thing) and name[0] != "_":
            assert names_of(thing) & ids, f"{package}.{name} is not in the reference"


def test_every_config_field_is_there(ids):
    for package, name in PUBLIC + IN_SUBPACKAGES:
        thing = getattr(importlib.import_module(package), name)
        if inspect.isclass(thing) and issubclass(thing, Config) and dataclasses.is_dataclass(thing):
            for field in dataclasses.fields(thing):
                wanted = {f"{full}.{field.name}" for full in names_of(thing)}
                assert wanted & ids, f"{name}.{field.name} is not in the reference"


def test_a_config_field_has_type_default_and_range(site):
    text = text_of(site / "reference/config/OptimizerConfig.html")
    assert re.search(
        r"l2_sp: float = 0\.0.{0,10}Strength of decay .* Range: from 0 to 1,000\.", text
    )


def test_every_command_is_there(site):
    table = text_of(site / "reference/commands.html")
    for name in COMMANDS:
        assert f"vlm {name} {COMMANDS[name].summary}" in table
        page = (site / f"reference/commands/{name.replace(' ', '-')}.html").read_text()
        assert f"usage: vlm {name}" in page
    assert "--optimizer.l2-sp" in (site / "reference/commands/train.html").read_text()


def test_signatures_are_short(site):
    losses = text_of(site / "reference/api/vlm.losses.html")
    assert "z_image: Float[Array, 'b d']" in losses
    assert "jaxlib" not in losses  # the module of Array


def test_every_internal_link_resolves(site, pages):
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
            if not parts.path:
                target = path
            assert target.exists(), f"{path.relative_to(site)} links to {link}"
            if parts.fragment and target in pages:
                fragment = urllib.parse.unquote(parts.fragment)
                assert fragment in pages[target].ids, f"{path.relative_to(site)} links to {link}"


def test_pages_load_nothing_from_the_network(site, pages):
    for path, page in pages.items():
        for url in page.loaded:
            assert not re.match(r"(https?:)?//", url), f"{path.relative_to(site)} loads {url}"
    for path in site.rglob("*.css"):
        text = path.read_text()
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), path


def test_pages_are_small(site, pages):
    for path, page in pages.items():
        local = {url.partition("?")[0] for url in page.loaded if not url.startswith("data:")}
        files = [file for url in local if (file := path.parent / url).suffix not in (".js", ".css")]
        size = sum(file.stat().st_size for file in [path, *files])
        assert size < MAX_BYTES, f"{path.relative_to(site)} has {size:,} bytes"


def test_the_changelog_and_the_tutorials_are_there(site):
    root = Path(vlm.__file__).parent.parent
    assert "Unreleased" in (site / "changelog.html").read_text()
    for notebook in (root / "notebooks").glob("*.ipynb"):
        assert (site / "tutorials" / f"{notebook.stem}.html").exists()
