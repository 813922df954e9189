"""`report.html`: what a run learned, on one page that needs nothing but itself."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from vlm.display import data_uri
from vlm.errors import DataError
from vlm.evaluation.chart import Line, line_chart, smooth
from vlm.evaluation.intervals import Metric, caveat
from vlm.evaluation.page import page, section
from vlm.evaluation.runner import Report
from vlm.heads.top_k import top_k
from vlm.heads.zero_shot import to_scores

SHOTS, GUESSES = 24, 5  # held-out images shown, and captions under each
QUERIES, ANSWERS = 8, 6  # texts shown, and images under each
PICTURE = 144  # pixels

# The names of a log's columns. "eval/top1" and {"eval": {"top1": ...}} count as "top1".
RATE = ("pairs_per_s", "pairs_per_second")
LEARNING_RATE = ("learning_rate", "lr")
TIME = ("seconds", "elapsed", "time")
ACCURACIES = {"top1": "Top-1", "top5": "Top-5"}
NAMES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "mean_per_class_recall": "Mean recall per class",
    "calibration_error": "Calibration error",
    "image_to_text_R@1": "Image → text, R@1",
    "image_to_text_R@5": "Image → text, R@5",
    "image_to_text_R@10": "Image → text, R@10",
    "text_to_image_R@1": "Text → image, R@1",
    "text_to_image_R@5": "Text → image, R@5",
    "text_to_image_R@10": "Text → image, R@10",
}
TILES = ("top1", "top5", "image_to_text_R@1", "text_to_image_R@1")


def write_report(
    run_dir: str | os.PathLike,
    *,
    history: Sequence[Mapping[str, Any]],
    results: Report,
    images: Sequence[Any],
    captions: Sequence[str],
    target: Int[np.ndarray, " n"],
    z_image: Float[np.ndarray, "n d"],
    z_captions: Float[np.ndarray, "m d"],
    config: Mapping[str, Any],
    logit_scale: float | None = None,
    logit_bias: float = 0.0,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    facts: Mapping[str, str] | None = None,
    credits: str = "",
) -> epath.Path:
    """Write `report.html` into the run folder and return its path.

    Args:
        run_dir: local or remote folder.
        history: rows of the training log: `step` and any of `loss`, `learning_rate` (or `lr`),
            `pairs_per_s`, `data_wait` (a share), `seconds`, and metrics such as `top1` (numbers, or
            objects with value, low and high), also nested or as "eval/top1".
        results: the final evaluation.
        images: the n held-out images: PIL, uint8 arrays or paths.
        captions: the m captions to choose from.
        target: each image's right caption.
        z_image: embeddings of the images, unit norm.
        z_captions: embeddings of the captions, unit norm.
        config: the experiment, as `vlm.config.to_dict` gives it.
        logit_scale: with it (and `logit_bias`, `loss`) the gallery shows calibrated scores; without
            it cosines.
        logit_bias: added to the logits.
        loss: the rule from logits to scores.
        facts: more to say about the run, such as {"Parameters": "5.5 M"}.
        credits: the licence and authors of the pictures.

    Raises:
        DataError: images, targets, captions and embeddings of different numbers.
    """
    target = np.asarray(target)
    z_image, z_captions = np.asarray(z_image, np.float32), np.asarray(z_captions, np.float32)
    for what, got, want in (
        ("z_image rows", len(z_image), len(images)),
        ("targets", len(target), len(images)),
        ("z_captions rows", len(z_captions), len(captions)),
    ):
        if got != want:
            of = "captions" if what.startswith("z_captions") else "images"
            raise DataError(f"a report of {want} {of} got {got} {what}: give one for each")
    rows = [_flat(row) for row in history]

    def score(cosines: np.ndarray) -> np.ndarray:
        if logit_scale is None:
            return cosines
        return to_scores(logit_scale * cosines + logit_bias, loss)

    scored = "score" if logit_scale is not None else "cosine"
    sections = [
        _tiles(results),
        _facts(rows, config, facts or {}),
        section("Training", "", _charts(rows)),
        section(
            "Results",
            "Each with its 95% confidence interval, over n queries. Ties count as misses.",
            results_table(results),
        ),
        section(
            "Held-out images and what the model calls them",
            f"{min(SHOTS, len(images))} of {len(images):,} images, evenly spaced through the set: "
            f"nothing is picked. The five nearest of {len(captions):,} captions, each with its "
            f"{scored}; the right one is green.",
            _gallery(images, captions, target, z_image, z_captions, score),
        ),
        section(
            "Captions and the held-out images nearest to them",
            "Captions of evenly spaced images, nearest images first, each with its cosine; the "
            "right one is framed.",
            _queries(images, captions, target, z_image, z_captions),
        ),
        section("Configuration", "", _config(config)),
    ]
    name = str(config.get("name", "experiment"))
    lead = f"A training run of vlm on {_get(config, 'data.source') or 'its data'}."
    path = epath.Path(run_dir) / "report.html"
    html = page(name, lead, sections, [credits, *footnotes(results)])
    partial = path.parent / "report.html.partial"
    partial.write_text(html)
    partial.replace(path)
    return path


# ------------------------------------------------------------------------- numbers and curves


def _tiles(results: Report) -> str:
    metrics = {name: m for result in results.results for name, m in result.metrics.items()}
    shown = [name for name in TILES if name in metrics] or list(metrics)[:4]
    tiles = [
        f'<div class="tile card"><span>{escape(NAMES.get(name, name))}</span>'
        f"<b>{metrics[name].value:.1%}</b>"
        f"<span>{metrics[name].low:.1%} – {metrics[name].high:.1%}, "
        f"n = {metrics[name].n:,}</span></div>"
        for name in shown
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _facts(rows: list[dict], config: Mapping[str, Any], more: Mapping[str, str]) -> str:
    facts: dict[str, str] = {}
    vision, text = (_get(config, f"model.{tower}") or {} for tower in ("vision", "text"))
    if vision:
        sizes = {"patch": "patch_size", "width": "width", "depth": "depth", "heads": "heads"}
        known = [f"{name} {vision[field]}" for name, field in sizes.items() if field in vision]
        facts["Image tower"] = ", ".join([f"{vision.get('image_size')} px", *known])
    if text:
        facts["Text tower"] = (
            f"length {text.get('context_length')}, width {text.get('width')}, depth "
            f"{text.get('depth')}, heads {text.get('heads')}"
        )
    if _get(config, "model.embed_dim"):
        facts["Embedding"] = f"{_get(config, 'model.embed_dim')} dimensions"
        facts["Loss"] = str(_get(config, "model.loss"))
    facts |= {name: str(value) for name, value in more.items()}
    steps, _ = _column(rows, ("step",))
    batch = config.get("batch_size")
    if steps:
        facts["Steps"] = f"{steps[-1]:,.0f}"
        if batch:
            facts["Steps"] += f" of {batch:,} pairs, {steps[-1] * batch / 1e6:.2f} M in all"
    if _get(config, "optimizer.name"):
        facts["Optimizer"] = (
            f"{_get(config, 'optimizer.name')}, peak learning rate "
            f"{_get(config, 'optimizer.learning_rate'):g}, {_get(config, 'optimizer.schedule')}"
        )
    # By its whole name: "checkpoint/seconds" and "start/seconds" are parts of it.
    if seconds := [
        row[name] for row in rows for name in TIME if math.isfinite(row.get(name, math.nan))
    ]:
        minutes, rest = divmod(round(max(seconds)), 60)
        facts["Time"] = f"{minutes} min {rest} s"
    if rates := [v for v in _column(rows, RATE)[1] if math.isfinite(v)]:
        facts["Throughput"] = f"{np.median(rates):,.0f} pairs/s (median)"
    if waits := [v for v in _column(rows, ("data_wait",))[1] if math.isfinite(v)]:
        facts["Waiting for data"] = f"{np.mean(waits):.1%} of the time"
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="card">{cells}</dl>' if cells else ""


def _charts(rows: list[dict]) -> str:
    steps, losses = _column(rows, ("loss",))
    charts = [
        (
            "Loss",
            [
                Line("loss", steps, losses, faint=len(losses) > 20),
                *([Line("loss", steps, smooth(losses))] if len(losses) > 20 else []),
            ],
            {"from_zero": True},
        ),
        (
            "Held-out accuracy",
            [_accuracy(rows, key, name, i) for i, (key, name) in enumerate(ACCURACIES.items())],
            {"y_format": lambda y: f"{100 * y:.3g}%", "from_zero": True},
        ),
        ("Learning rate", [Line("rate", *_column(rows, LEARNING_RATE), color=3)], {}),
        (
            "Throughput, pairs per second",
            [Line("pairs/s", *_column(rows, RATE), color=1)],
            {"from_zero": True},
        ),
    ]
    drawn = [(title, line_chart(lines, title, **how)) for title, lines, how in charts]
    cards = "".join(
        f'<div class="chart card"><h3>{escape(title)}</h3>{svg}</div>'
        for title, svg in drawn
        if svg
    )
    return f'<div class="charts">{cards}</div>' if cards else ""


def _accuracy(rows: list[dict], key: str, name: str, color: int) -> Line:
    """A metric over the steps, with its interval where every row of the log has one."""
    x, y = _column(rows, (key,), of_training=False)
    bounds = [_column(rows, (f"{key}/{side}",), of_training=False)[1] for side in ("low", "high")]
    low, high = bounds if all(len(b) == len(y) for b in bounds) else (None, None)
    return Line(name, x, y, low, high, markers=True, color=color)


def results_table(results: Report) -> str:
    """The metrics of every task with their intervals, as HTML."""
    rows = []
    for result in results.results:
        head = f"<td>{escape(result.task)}</td><td>{escape(str(result.provenance.data))}</td>"
        head += f"<td>{escape('; '.join(result.texts))}</td>"
        for name, metric in result.metrics.items():
            rows.append(
                f"<tr>{head}<td>{escape(NAMES.get(name, name))}</td>"
                f'<td class="right"><b>{metric.value:.1%}</b></td><td>{_interval(metric)}</td>'
                f"<td>{metric.low:.1%} – {metric.high:.1%}</td>"
                f'<td class="right">{metric.n:,}</td></tr>'
            )
            head = "<td></td><td></td><td></td>"
    heads = '<th>Task</th><th>Data</th><th>Texts</th><th>Metric</th><th class="right">Value</th>'
    heads += '<th>0 to 100%</th><th>95% interval</th><th class="right">n</th>'
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    metrics = [metric for result in results.results for metric in result.metrics.values()]
    note = f'<p class="soft">{escape(caveat(metrics))}</p>'
    return f'<div class="card scroll">{table}</div>{note}' if rows else ""


def _interval(metric: Metric) -> str:
    """The interval and the value on a line from 0 to 1."""
    low, high = (100 * min(max(bound, 0), 1) for bound in (metric.low, metric.high))
    return (
        f'<div class="interval"><i></i><u style="left:{low:.1f}%;width:{high - low:.1f}%"></u>'
        f'<s style="left:{100 * metric.value:.1f}%"></s></div>'
    )


# ---------------------------------------------------------------------------------- galleries


def _gallery(images, captions, target, z_image, z_captions, score) -> str:
    cards = []
    for i in spread(len(images), SHOTS):
        cosines = z_captions @ z_image[i]
        scores = score(cosines)
        order = np.argsort(-cosines, kind="stable")
        guesses = []
        for j in order[:GUESSES]:
            width = 100 * float(np.clip(scores[j], 0, 1))
            right = " is-right" if j == target[i] else ""
            guesses.append(
                f'<div class="guess{right}"><i style="width:{width:.1f}%"></i>'
                f"<span>{escape(captions[j])}</span>"
                f"<span>{scores[j]:.3f}</span></div>"
            )
        rank = int(np.flatnonzero(order == target[i])[0]) + 1
        if rank > GUESSES:
            right = escape(captions[target[i]])
            guesses.append(f'<div class="missed">rank {rank:,}: <b>{right}</b></div>')
        picture = f'<img src="{data_uri(images[i], PICTURE)}" alt="{escape(captions[target[i]])}">'
        cards.append(f'<div class="shot card">{picture}<div>{"".join(guesses)}</div></div>')
    return f'<div class="gallery">{"".join(cards)}</div>' if cards else ""


def _queries(images, captions, target, z_image, z_captions) -> str:
    # Halfway between the images of the gallery above, so that the two show different ones.
    asked = dict.fromkeys(int(target[i]) for i in spread(len(images), QUERIES, offset=0.5))
    cards = []
    found, cosines = top_k(z_captions[list(asked)], [z_image], ANSWERS)
    for j, nearest, values in zip(asked, found, cosines, strict=True):
        figures = "".join(
            f"<figure{' class=is-right' if target[i] == j else ''}>"
            f'<img src="{data_uri(images[i], PICTURE)}" alt="{escape(captions[target[i]])}" '
            f'title="{escape(captions[target[i]])}"><figcaption>{value:.3f}</figcaption></figure>'
            for i, value in zip(nearest, values, strict=True)
        )
        heading = f"<h3>“{escape(captions[j])}”</h3>"
        cards.append(f'<div class="query card">{heading}<div class="strip">{figures}</div></div>')
    return f'<div class="gallery">{"".join(cards)}</div>' if cards else ""


def spread(n: int, count: int, offset: float = 0.0) -> list[int]:
    """`count` indices below n, evenly spaced, or all of them; `offset` shifts them by its share."""
    count = min(n, count)
    return [min(n - 1, int((i + offset) * n / count)) for i in range(count)]


# ------------------------------------------------------------------------------ small things


def _config(config: Mapping[str, Any]) -> str:
    text = escape(json.dumps(config, indent=2, default=str, ensure_ascii=False))
    return f'<details class="card"><summary>As JSON</summary><pre>{text}</pre></details>'


def footnotes(results: Report) -> Iterable[str]:
    """One sentence per provenance that differs in more than its task."""
    for origin in dict.fromkeys(
        (r.provenance.model, r.provenance.device, tuple(r.provenance.versions.items()))
        for r in results.results
    ):
        model, device, versions = origin
        date = max(r.provenance.date for r in results.results)
        listed = ", ".join(f"{name} {version}" for name, version in versions)
        yield f"Evaluated {date} with {model} on {device}: {listed}."


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a log row; nested objects as "outer/inner", and `value` as its outer key."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        name = prefix.rstrip("/") if key == "value" and prefix else f"{prefix}{key}"
        if isinstance(value, Metric):
            flat |= {name: value.value, f"{name}/low": value.low, f"{name}/high": value.high}
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{name}/")
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            flat[name] = float(value)
        elif value is None:  # as JSON has a number that is not finite
            flat[name] = math.nan
    return flat


def _column(
    rows: list[dict[str, float]], names: Sequence[str], of_training: bool = True
) -> tuple[list[float], list[float]]:
    """Steps and values of the first key in each row that is, or ends in, one of the names."""
    x, y = [], []
    for i, row in enumerate(rows):
        for key, value in row.items():
            evaluated = key.startswith(("eval", "test", "held"))
            if of_training and evaluated:
                continue
            if any(key == name or key.endswith(f"/{name}") for name in names):
                x.append(row.get("step", float(i)))
                y.append(value)
                break
    return x, y


def _get(config: Mapping[str, Any], path: str) -> Any:
    """A nested value of the config by its dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
