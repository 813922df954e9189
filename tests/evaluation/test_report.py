"""The page a run leaves behind, and the README's picture."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageFont

from vlm.config import Experiment, to_dict
from vlm.config.defaults import with_defaults
from vlm.errors import DataError
from vlm.evaluation.gallery import GOOD, GOOD_BAR, fit, gallery_png
from vlm.evaluation.intervals import proportion
from vlm.evaluation.metrics import pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluation.runner import Report, Result, provenance
from vlm.evaluation.tasks import DataInfo
from vlm.evaluation.training_report import GUESSES, QUERIES, SHOTS, spread, write_report

VOID = {"meta", "link", "img", "br"}
CREDITS = "Pictures by <somebody>, CC BY-SA 4.0"


class Checker(html.parser.HTMLParser):
    """Collects what a page refers to, its text, and whether its tags match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_startendtag(self, tag, attrs):
        pass  # SVG shapes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    n, m = 40, 60
    z_captions = rng.standard_normal((m, 12))
    z_captions /= np.linalg.norm(z_captions, axis=1, keepdims=True)
    target = rng.permutation(m)[:n]
    z_image = z_captions[target] + 0.6 * rng.standard_normal((n, 12))
    z_image /= np.linalg.norm(z_image, axis=1, keepdims=True)
    z_image, z_captions = z_image.astype(np.float32), z_captions.astype(np.float32)
    origin = provenance("runs/<x>", DataInfo("dots", "1.0.0", "test"))
    results = Report(
        (
            Result("zero-shot", zero_shot_metrics(z_image, z_captions, target), origin),
            Result("retrieval", pair_retrieval_metrics(z_image, z_captions[target]), origin),
        )
    )
    history = [
        {
            "step": s,
            "loss": 5 / s,
            "lr": 1e-3,
            "pairs_per_s": 900.0,
            "data_wait": 0.02,
            "seconds": s,
        }
        for s in range(1, 61)
    ]
    for row in history[19::20]:
        row["eval"] = {"top1": vars(proportion(row["step"] // 2, 40)), "top5": proportion(35, 40)}
    history.insert(0, {"step": 1, "start/seconds": 99.0})
    history.append({"step": 60, "checkpoint/seconds": 1.0})  # neither is the time of the run
    return {
        "history": history,
        "results": results,
        "images": list(rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)),
        "captions": [f"dot & <b>{i}</b>" for i in range(m)],
        "target": target,
        "z_image": z_image,
        "z_captions": z_captions,
        "config": to_dict(with_defaults(Experiment(name="my <run>"))),
    }


def test_the_page_stands_alone_and_is_well_formed(run, tmp_path):
    path = write_report(tmp_path, **run, credits=CREDITS)
    page = path.read_text()
    checked = Checker(page)
    assert checked.links
    assert all(link.startswith("data:") for link in checked.links)
    assert "url(" not in page
    assert "<script" not in page
    assert "@import" not in page
    text = " ".join(checked.text)
    assert CREDITS in text
    assert "my <run>" in text
    assert "dot & <b>" in text  # escaped in the source, whole on the page
    assert "<b>7</b>" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert write_report(tmp_path, **run) == path  # a second report replaces the first


def test_the_page_says_what_was_measured(run, tmp_path):
    text = " ".join(Checker(write_report(tmp_path, **run).read_text()).text)
    for result in run["results"].results:
        for metric in result.metrics.values():
            assert f"{metric.value:.1%}" in text
            assert f"{metric.low:.1%} – {metric.high:.1%}" in text
    assert "900 pairs/s" in text
    assert "2.0% of the time" in text
    assert "1 min 0 s" in text
    assert "dots 1.0.0 [test]" in text
    assert "runs/<x>" in text
    assert "n = 40" in text


def test_right_captions_are_marked_where_they_are_right(run, tmp_path):
    page = write_report(tmp_path, **run).read_text()
    cosines = run["z_image"].astype(np.float64) @ run["z_captions"].astype(np.float64).T
    ranks = [int((row > row[t]).sum()) for row, t in zip(cosines, run["target"], strict=True)]
    shown = [ranks[i] for i in spread(40, SHOTS)]
    assert 0 < sum(rank >= GUESSES for rank in shown) < SHOTS  # the fixture errs now and then
    assert page.count('class="guess is-right"') == sum(rank < GUESSES for rank in shown)
    assert page.count('class="missed"') == sum(rank >= GUESSES for rank in shown)
    for rank in shown:
        assert rank < GUESSES or f"rank {rank + 1:,}:" in page
    assert page.count('class="shot card"') == SHOTS
    assert page.count('class="query card"') == QUERIES


def test_scores_follow_the_rule_of_the_model(run, tmp_path):
    cosines = run["z_captions"] @ run["z_image"][0]
    plain = write_report(tmp_path, **run).read_text()
    assert f"<span>{cosines.max():.3f}</span>" in plain
    assert "with its cosine" in plain
    scaled = write_report(
        tmp_path, **run, logit_scale=10.0, logit_bias=-5.0, loss="sigmoid"
    ).read_text()
    assert f"<span>{1 / (1 + np.exp(5 - 10 * cosines.max())):.3f}</span>" in scaled
    assert "with its score" in scaled


def test_pictures_on_the_page_are_the_images(run, tmp_path):
    page = write_report(tmp_path, **run).read_text()
    encoded = re.search(r'src="data:image/webp;base64,([^"]+)"', page).group(1)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), float)
    flat = Image.fromarray(run["images"][0]).convert("RGB")
    assert shown.shape == np.asarray(flat).shape
    assert np.abs(shown.mean((0, 1)) - np.asarray(flat, float).mean((0, 1))).max() < 12


@pytest.mark.parametrize(
    "form",
    [
        lambda step, value: {"step": step, "top1": value},
        lambda step, value: {"step": step, "eval/top1": value},
        lambda step, value: {"step": step, "eval": {"top1": value}},
        lambda step, value: {"step": step, "eval": {"zero-shot": {"top1": {"value": value}}}},
    ],
)
def test_logs_are_read_however_they_name_their_metrics(run, tmp_path, form):
    history = [form(10, 0.25), form(20, 0.5)]
    page = write_report(tmp_path, **{**run, "history": history}).read_text()
    assert "Top-1 at step 20: 50%" in page


def test_a_log_without_curves_makes_a_page_without_charts(run, tmp_path):
    page = write_report(tmp_path, **{**run, "history": [], "config": {}}).read_text()
    Checker(page)
    assert "<svg" not in page
    assert "Training</h2>" not in page


@pytest.mark.untyped
def test_sizes_that_disagree_are_named(run, tmp_path):
    with pytest.raises(DataError, match="40 images got 39 targets"):
        write_report(tmp_path, **{**run, "target": run["target"][:-1]})
    with pytest.raises(DataError, match="40 images got 3 z_image rows"):
        write_report(tmp_path, **{**run, "z_image": run["z_image"][:3]})
    with pytest.raises(DataError, match="59 captions got 60 z_captions rows"):
        write_report(tmp_path, **{**run, "captions": run["captions"][:-1]})
    assert not list(tmp_path.iterdir())


def test_spread_is_even_and_without_repeats():
    for n in range(1, 60):
        picked = spread(n, 24)
        assert len(set(picked)) == len(picked) == min(n, 24)
        assert picked[0] >= 0
        assert picked[-1] < n
        assert picked == sorted(picked)


# -------------------------------------------------------------------------------- the picture


def test_gallery_draws_every_image_and_the_right_caption_in_green(tmp_path):
    images = [Image.new("RGB", (30, 20), c) for c in ("#ff0000", "#0000fe", "#ffff00")]
    captions = [[("red", 0.9), ("blue", 0.1)]] * 3
    gallery_png(tmp_path / "a.png", images, captions, right=["red", "blue", "green"], columns=2)
    colours = {c: n for n, c in Image.open(tmp_path / "a.png").getcolors(1 << 24)}
    for colour in ((255, 0, 0), (0, 0, 254), (255, 255, 0)):
        assert colours[colour] > 10_000
    gallery_png(tmp_path / "b.png", images, captions)
    plain = {c: n for n, c in Image.open(tmp_path / "b.png").getcolors(1 << 24)}
    for green in (GOOD, GOOD_BAR):
        assert colours.get(green, 0) > 0
        assert green not in plain


def test_gallery_refuses_what_does_not_match(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(DataError, match="no images"):
        gallery_png(tmp_path / "a.png", [], [])
    with pytest.raises(DataError, match="1 images and 2 top_captions"):
        gallery_png(tmp_path / "a.png", [image], [[("a", 1)], [("b", 1)]])
    with pytest.raises(DataError, match="1 images and 0 right"):
        gallery_png(tmp_path / "a.png", [image], [[("a", 1)]], right=[])


def test_long_captions_keep_both_ends():
    font = ImageFont.load_default(size=20)
    text = "man in manual wheelchair facing right: medium-dark skin tone"
    for width in (120, 200, 400):
        cut = fit(text, font, width)
        assert font.getlength(cut) <= width
        head, tail = cut.split("...")
        assert text.startswith(head)
        assert text.endswith(tail)
        assert abs(len(head) - len(tail)) <= 3
    assert fit(text, font, 2000) == text
