"""The web page in a real browser: search, inspection, keyboard, accessibility (axe-core)."""

import contextlib
import os
import shutil
import time

import pytest
from serving import drawn, encoded, running

from vlm.serving.explain import warm_up

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (extra test)"
)
CHROMIUM = (
    os.environ.get("VLM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium: install your system's package chromium"
    ),
]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """Function that opens the page; fails on requests to other hosts and on errors."""
    with contextlib.ExitStack() as stack:
        foreign, errors = [], []

        def opened(url=server.url, width=1100, height=800, dark=False):
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                reduced_motion="reduce",
            )
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(10_000)

            def note(request):
                if not request.url.startswith((f"{url}/", "data:", "blob:")):
                    foreign.append(request.url)

            def on_console(message):
                if message.type == "error" and "status of 4" not in message.text:
                    errors.append(message.text)

            page.on("request", note)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", on_console)
            page.goto(f"{url}/")
            page.wait_for_selector(".tile, #keyDialog[open], #text:disabled")
            return page

        yield opened
        assert (foreign, errors) == ([], [])


def until(page, condition):
    """Wait until a condition holds; playwright's own wait needs eval, which the page forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def names(page):
    """The names under the tiles, in order."""
    return page.locator(".tile .id").all_inner_texts()


def until_names(page, wanted):
    """Wait for these tiles; results of an earlier query may come first."""
    end = time.monotonic() + 10
    while names(page) != wanted and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert names(page) == wanted


def search(page, text):
    page.fill("#text", text)
    until(page, "document.querySelector('#status').textContent.includes(' ms')")


def expected(server, query, k=40):
    reply = server.ask("/v1/search", {"query": query, "k": k})
    return [item["id"].rpartition("/")[2] for item in reply.json["data"]]


def test_typing_searches_and_clearing_restores_the_start_page(opened, server):
    page = opened()
    first = names(page)
    assert len(first) == 24
    search(page, "a red square")
    until_names(page, expected(server, "a red square"))
    assert "24 results in" in page.inner_text("#status")
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('#status').textContent.includes(' ms')")
    assert names(page) == first


def test_terms_weights_filters_and_the_minimum_score(opened, server):
    page = opened()
    search(page, "red")
    page.keyboard.press("Control+Enter")
    assert page.get_attribute(".term .sign", "aria-label").startswith("without red")
    search(page, "blue")
    page.fill(".term input", "2")
    page.keyboard.press("Tab")
    terms = [{"text": "red", "weight": -2}, {"text": "blue"}]
    until_names(page, expected(server, terms))
    page.click("summary")
    page.select_option("select[aria-label=kind]", "odd")
    until(page, "document.querySelectorAll('.tile').length === 11")
    page.select_option("select[aria-label=year]", "2003")
    until(page, "document.querySelectorAll('.tile').length < 11")
    assert page.inner_text("#filterCount") == "2"
    page.fill("#least", "1")
    until(page, "document.querySelectorAll('.tile').length === 0")
    assert page.inner_text("#status").startswith("No results")


def test_a_chosen_dropped_or_pasted_image_finds_itself(opened, tmp_path):
    page = opened()
    drawn(5).save(tmp_path / "five.png")
    page.set_input_files("#file", tmp_path / "five.png")
    until(page, "document.querySelector('.tile .id').textContent === '05.png'")
    assert page.inner_text(".tile .value >> nth=0") == "1.000"
    for number, kind in ((6, "drop"), (8, "paste")):
        page.evaluate(
            """([bytes, kind]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "p.png", {type: "image/png"}));
                const given = kind === "drop" ? {dataTransfer: data} : {clipboardData: data};
                const Kind = kind === "drop" ? DragEvent : ClipboardEvent;
                const how = {bubbles: true, cancelable: true, ...given};
                document.body.dispatchEvent(new Kind(kind, how));
            }""",
            [list(encoded(drawn(number))), kind],
        )
        until(page, f"document.querySelector('.tile .id').textContent === '{number:02}.png'")
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no"})
    page.wait_for_selector("#problem:not([hidden])")
    assert "not an image" in page.inner_text("#problem")


def test_everything_works_by_keyboard(opened):
    page = opened()
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("green")
    until(page, "document.querySelector('#status').textContent.includes(' ms')")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.classList.contains('tile')")
    order = names(page)

    def focused():
        return page.evaluate("document.activeElement.querySelector('.id')?.textContent")

    assert focused() == order[0]
    page.keyboard.press("ArrowRight")
    assert focused() == order[1]
    page.keyboard.press("ArrowDown")
    columns = order.index(focused()) - 1
    assert columns >= 3
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert focused() == order[-1]
    page.keyboard.press("Home")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    page.keyboard.press("Enter")
    page.wait_for_selector("#inspect[open]")
    assert page.inner_text("#inspectTitle") == order[0]
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#inspectTitle") == order[1]
    page.keyboard.press("Escape")
    page.wait_for_selector("#inspect:not([open])", state="attached")
    assert page.input_value("#text") == "green"
    page.keyboard.press("m")
    page.wait_for_selector(".term")
    assert page.input_value("#text") == ""
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Escape")
    assert page.locator(".term").count() == 0


def test_labels_are_scored_while_they_are_typed(opened, server):
    page = opened()
    page.click(".tile >> nth=3")
    page.wait_for_selector("#inspect[open]")
    page.fill("#labels", "red, green, blue")
    until(page, "document.querySelectorAll('#bars li').length === 3")
    title = page.inner_text("#inspectTitle")
    reply = server.ask(
        "/v1/classify", {"images": [int(title[:2])], "labels": ["red", "green", "blue"]}
    )
    best = reply.json["data"][0]["labels"][0]
    label, score = page.inner_text("#bars li >> nth=0").split()
    assert [label, score] == [best["label"], f"{100 * best['score']:.1f}%"]


def test_the_heat_map_covers_the_picture(opened, bundle):
    warm_up(bundle)
    page = opened()
    search(page, "a red square")
    page.click(".tile >> nth=0")
    page.wait_for_selector("#heat:visible", timeout=30_000)
    boxes = [page.locator(name).bounding_box() for name in ("#heat", "#large")]
    assert boxes[0]["width"] == pytest.approx(boxes[1]["width"], abs=2)
    assert page.input_value("#heatText") == "a red square"
    assert page.locator("#heatStatus mark").count() >= 2
    page.fill("#heatText", "")
    page.wait_for_selector("#heat", state="hidden")


@pytest.mark.parametrize(("width", "dark"), [(320, False), (1100, True)])
def test_axe_finds_no_violations_and_the_page_fits(opened, width, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(width=width, height=640, dark=dark)
    search(page, "a red square")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".term")
    page.click("summary")

    def check():
        found = axe.run(page).response["violations"]
        violations = [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found]
        assert violations == []
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width

    check()
    page.click(".tile >> nth=0")
    page.fill("#labels", "red, green")
    until(page, "document.querySelectorAll('#bars li').length === 2")
    check()
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")


def test_the_theme_persists(opened):
    page = opened()
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.wait_for_selector(".tile")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_page_asks_for_a_key_and_loads_pictures_with_it(opened, bundle, index):
    with running(bundle, index=index, keys=("secret",)) as guarded:
        page = opened(guarded.url)
        for key in ("wrong", "secret"):
            page.wait_for_selector("#keyDialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        until(page, "document.querySelector('.tile img')?.naturalWidth > 0")
        assert page.get_attribute(".tile img >> nth=0", "src").startswith("blob:")


def test_without_an_index_an_image_is_classified(opened, bundle, tmp_path):
    drawn(2).save(tmp_path / "two.png")
    with running(bundle) as server:
        page = opened(server.url)
        assert page.is_disabled("#text")
        page.set_input_files("#file", tmp_path / "two.png")
        page.wait_for_selector("#inspect[open]")
        page.fill("#labels", "red, green")
        until(page, "document.querySelectorAll('#bars li').length === 2")
