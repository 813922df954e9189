"""The web page in a real browser: search, inspection, keyboard, accessibility (axe-core)."""

import contextlib
import os
import shutil
import time

import pytest
from serving import drawn, encoded, running, saved_index

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

        def opened(url=server.url, width=1100, height=800, dark=False, query=""):
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
            page.goto(f"{url}/{query}")
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


def check_page(page):
    """Run axe-core, and check that nothing is wider than the page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    violations = [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found]
    assert violations == []
    wide = "[document.documentElement.scrollWidth, innerWidth]"
    used, width = page.evaluate(wide)
    assert used <= width


@pytest.mark.parametrize(("width", "dark"), [(320, False), (1100, True)])
def test_axe_finds_no_violations_and_the_page_fits(opened, width, dark):
    page = opened(width=width, height=640, dark=dark)
    search(page, "a red square")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".term")
    page.click("summary")

    page.evaluate("document.getElementById('grid').classList.add('busy')")  # as in a slow search
    page.wait_for_timeout(500)  # longer than the transition
    check_page(page)
    page.click(".tile >> nth=0")
    page.fill("#labels", "red, green")
    until(page, "document.querySelectorAll('#bars li').length === 2")
    check_page(page)
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
        page.reload()  # the key is kept
        until(page, "document.querySelector('.tile img')?.naturalWidth > 0")
        assert not page.evaluate("document.querySelector('#keyDialog').open")


def test_without_a_key_pictures_are_plain_links(opened):
    page = opened()
    sent = []
    page.on("request", lambda request: sent.append(request.headers.get("authorization")))
    assert page.get_attribute(".tile img >> nth=0", "src").startswith("/v1/items/")
    search(page, "red")
    assert set(sent) == {None}


def test_without_an_index_an_image_is_classified(opened, bundle, tmp_path):
    drawn(2).save(tmp_path / "two.png")
    with running(bundle) as server:
        page = opened(server.url)
        assert page.is_disabled("#text")
        page.set_input_files("#file", tmp_path / "two.png")
        page.wait_for_selector("#inspect[open]")
        page.fill("#labels", "red, green")
        until(page, "document.querySelectorAll('#bars li').length === 2")


def dated_index(bundle, folder):
    """Save an index of four pictures with dates, of which one is missing; return its folder."""
    days = ["2024-05-01", "2024-05-31T18:30", None, "2024-06-01"]
    noon = [
        1_714_564_800,
        1_717_156_800,
        1_717_243_200,
        1_717_329_600,
    ]  # of May 1 and 31, June 1, 2
    metadata = {"taken": days, "modified": [second * 10**9 for second in noon]}
    return saved_index(bundle, folder, metadata)


def test_dates_are_filtered_as_dates(opened, bundle, tmp_path):
    with running(bundle, index=dated_index(bundle, tmp_path)) as server:
        page = opened(server.url)
        search(page, "red")
        page.click("summary")
        kinds = page.locator("#columns input").evaluate_all("all => all.map((one) => one.type)")
        assert kinds == ["date"] * 4
        assert "2024-05-01 to 2024-06-01" in page.inner_text("#columns")

        def found(column, start, end):
            page.fill(f"input[aria-label='{column}, from']", start)
            page.fill(f"input[aria-label='{column}, to']", end)
            page.wait_for_timeout(300)
            until(page, "document.querySelector('#status').textContent.includes(' ms')")
            return sorted(names(page))

        assert found("taken", "2024-05-02", "2024-05-31") == ["01.png"]
        assert found("taken", "", "2024-05-31") == ["00.png", "01.png"]
        assert found("taken", "", "") == [f"0{i}.png" for i in range(4)]
        assert found("modified", "2024-05-31", "2024-06-01") == ["01.png", "02.png"]
        page.click(".tile >> nth=0")
        assert "/2024" in page.inner_text("#facts")
        check_page(opened(server.url, width=320, query=page.url.removeprefix(f"{server.url}/")))
        assert page.url.endswith("modified%3C%3D2024-06-01")


def test_the_query_is_in_the_address_and_the_back_button_restores_it(opened, server):
    page = opened()
    search(page, "red")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".term.minus")
    search(page, "blue, or green")
    page.click("summary")
    page.select_option("select[aria-label=kind]", "odd")
    until(page, "document.querySelectorAll('.tile').length === 11")
    page.locator(".tile >> nth=2").focus()
    order, liked = names(page), names(page)[2]
    address = page.url
    page.keyboard.press("m")
    until(page, "document.querySelectorAll('.term').length === 1")
    assert "item%2C%2F" in page.url
    assert page.title().startswith(liked)

    again = opened(query=address.removeprefix(f"{server.url}/"))  # as another visitor
    until_names(again, order)
    assert again.input_value("#text") == "blue, or green"
    assert again.inner_text(".term.minus .name") == "red"
    assert again.input_value("select[aria-label=kind]") == "odd"
    again = opened(query=page.url.removeprefix(f"{server.url}/"))
    assert again.inner_text(".term .name") == liked

    page.go_back()
    until_names(page, order)
    assert page.url == address
    assert page.input_value("#text") == "blue, or green"
    page.go_back()
    until(page, "document.querySelector('select[aria-label=kind]').value === ''")
    page.go_back()
    until(page, "document.querySelector('#text').value === ''")
    assert page.inner_text(".term .name") == "red"
    page.go_back()  # what was typed is one entry, not one for each key
    until(page, "document.querySelector('#text').value === 'red'")
    page.go_back()
    until(page, "location.search === '' && !document.querySelector('.tile .value')")


def test_an_address_with_what_is_not_here_says_so(opened, server, tmp_path):
    drawn(5).save(tmp_path / "five.png")
    page = opened()
    page.set_input_files("#file", tmp_path / "five.png")
    until(page, "document.querySelector('.tile .id').textContent === '05.png'")
    address = page.url
    page.keyboard.press("Escape")
    until(page, "location.search === ''")
    page.go_back()
    page.wait_for_selector(".term img[src^='data:']")  # of this visit
    more = "&term=1,item,gone.png&where=nothing%3D1&term=2,text,red"
    page = opened(query=address.removeprefix(f"{server.url}/") + more)
    page.wait_for_selector("#problem:not([hidden])")
    text = page.inner_text("#problem")
    assert all(word in text for word in ("the image five.png", "gone.png", "nothing=1"))
    assert page.inner_text(".term .name") == "red"


def test_a_path_is_copied_and_the_original_opens(opened, server, index):
    page = opened()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".tile >> nth=3")
    page.wait_for_selector("#inspect[open]")
    title = page.inner_text("#inspectTitle")
    page.click("#copy")
    until(page, "document.querySelector('#done').textContent === 'Copied the path.'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == str(index.parent / title)
    with page.context.expect_page() as tab:
        page.click("#original")
    tab.value.wait_for_url(f"{server.url}/v1/items/{int(title[:2])}/original")
    size = "[document.images[0].naturalWidth, document.images[0].naturalHeight]"
    assert tab.value.evaluate(size) == [40, 30]
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.click("#next")
    page.click("#copy")  # as on http from another machine
    until(page, "document.querySelector('#done').textContent === 'Copied the path.'")
    assert page.evaluate("document.activeElement.id") == "copy"


def test_a_tile_says_what_is_wrong_with_its_file(opened, bundle, tmp_path):
    folder = saved_index(bundle, tmp_path, {"number": list(range(3))})
    (tmp_path / "00.png").unlink()
    (tmp_path / "01.png").write_bytes(b"<html>")
    for keys in ((), ("secret",)):
        with running(bundle, index=folder, keys=keys) as server:
            page = opened(server.url)
            if keys:
                page.fill("#key", "secret")
                page.keyboard.press("Enter")
            until(page, "document.querySelectorAll('.tile .failed').length === 2")
            shown = page.locator(".tile .pic").all_inner_texts()
            assert shown == ["File not found", "File cannot be read", ""]
            label = page.get_attribute(".tile >> nth=0", "aria-label")
            assert label == "00.png, File not found"
            check_page(page)
            page.click(".tile >> nth=0")
            page.wait_for_selector("#pictureProblem:not([hidden])")
            assert "--root OLD=FOLDER" in page.inner_text("#pictureProblem")
            assert page.is_hidden("#original")
            check_page(page)
            page.click("#next")
            page.click("#next")
            until(page, "document.querySelector('#large').naturalWidth > 0")
            assert page.is_hidden("#pictureProblem")
            if keys:
                with page.context.expect_page() as tab:
                    page.click("#original")
                tab.value.wait_for_url("blob:**")
