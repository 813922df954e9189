"""`report.html` of a training run: curves, results and examples on one self-contained page."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from vlm._html import render
from vlm.display import data_uri
from vlm.errors import DataError
from vlm.evaluation.charts import Line, curve, line_chart, percent
from vlm.evaluation.intervals import Metric
from vlm.evaluation.results_page import METRIC_NAMES, footnotes, results_table
from vlm.evaluation.runner import Report
from vlm.heads.top_k import top_k
from vlm.heads.zero_shot import to_scores
from vlm.paths import replace_text

SHOTS, GUESSES = 24, 5  # held-out images shown, and captions under each
QUERIES, ANSWERS = 8, 6  # texts shown, and images under each
PICTURE = 144  # pixels

# The names of a log's columns. "eval/top1" and {"eval": {"top1": ...}} count as "top1".
RATE = ("pairs_per_s", "pairs_per_second")
LEARNING_RATE = ("learning_rate", "lr")
TIME = ("seconds", "elapsed", "time")
ACCURACIES = {"top1": "Top-1", "top5": "Top-5"}
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
            `pairs_per_s`, `data_wait` (a fraction), `seconds`, and metrics such as `top1` (numbers,
            or objects with value, low and high), also nested or as "eval/top1".
        results: the final evaluation.
        images: the n held-out images: PIL, uint8 arrays or paths.
        captions: the m captions to choose from.
        target: index of each image's caption.
        z_image: embeddings of the images, unit norm.
        z_captions: embeddings of the captions, unit norm.
        config: the experiment, as `vlm.config.to_dict` gives it.
        logit_scale: if given, the gallery shows scores by it, `logit_bias` and `loss`, else
            cosines.
        logit_bias: added to the logits.
        loss: the rule from logits to scores.
        facts: further facts of the run, such as {"Parameters": "5.5 M"}.
        credits: licence and authors of the pictures.

    Raises:
        DataError: the numbers of images, targets, captions or embeddings differ.
    """
    target = np.asarray(target)
    z_image, z_captions = np.asarray(z_image, np.float32), np.asarray(z_captions, np.float32)
    for what, got, of, want in (
        ("z_image rows", len(z_image), "images", len(images)),
        ("targets", len(target), "images", len(images)),
        ("z_captions rows", len(z_captions), "captions", len(captions)),
    ):
        if got != want:
            raise DataError(f"a report of {want} {of} got {got} {what}: give one for each")
    rows = [_flat(row) for row in history]

    def score(cosines: np.ndarray) -> np.ndarray:
        if logit_scale is None:
            return cosines
        return to_scores(logit_scale * cosines + logit_bias, loss)

    metrics = {name: m for result in results.results for name, m in result.metrics.items()}
    tiles = [name for name in TILES if name in metrics] or list(metrics)[:4]
    path = epath.Path(run_dir) / "report.html"
    html = render(
        "evaluation/training_report.html",
        title=str(config.get("name", "experiment")),
        lead=f"A training run of vlm on {_get(config, 'data.source') or 'its data'}.",
        footnotes=[credits, *footnotes(results)],
        tiles={name: metrics[name] for name in tiles},
        metric_names=METRIC_NAMES,
        run_facts=_facts(rows, config, facts or {}),
        charts=_charts(rows),
        results=results_table(results),
        image_count=len(images),
        caption_count=len(captions),
        score_name="score" if logit_scale is not None else "cosine",
        images=_gallery(images, captions, target, z_image, z_captions, score),
        queries=_queries(images, captions, target, z_image, z_captions),
        config=json.dumps(config, indent=2, default=str, ensure_ascii=False),
    )
    replace_text(path, html)
    return path


def _facts(rows: list[dict], config: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, str]:
    facts: dict[str, str] = {}
    vision, text = (_get(config, f"model.{tower}") or {} for tower in ("vision", "text"))
    if vision:
        sizes = {"patch": "patch_size", "width": "width", "depth": "depth", "heads": "heads"}
        known = [f"{name} {vision[field]}" for name, field in sizes.items() if field in vision]
        facts["Vision tower"] = ", ".join([f"{vision.get('image_size')} px", *known])
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
            facts["Steps"] += f" of {batch:,} pairs, {steps[-1] * batch / 1e6:.2f} M in total"
    if _get(config, "optimizer.name"):
        facts["Optimizer"] = (
            f"{_get(config, 'optimizer.name')}, peak learning rate "
            f"{_get(config, 'optimizer.learning_rate'):g}, {_get(config, 'optimizer.schedule')}"
        )
    # By the full key: "checkpoint/seconds" and "start/seconds" are parts of the time.
    if seconds := _finite(row.get(name, math.nan) for row in rows for name in TIME):
        minutes, rest = divmod(round(max(seconds)), 60)
        facts["Time"] = f"{minutes} min {rest} s"
    if rates := _finite(_column(rows, RATE)[1]):
        facts["Throughput"] = f"{np.median(rates):,.0f} pairs/s (median)"
    if waits := _finite(_column(rows, ("data_wait",))[1]):
        facts["Waiting for data"] = f"{np.mean(waits):.1%} of the time"
    return facts


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _charts(rows: list[dict]) -> list[tuple[str, str]]:
    """Return the headings and `<svg>` of the curves that the log has."""
    loss = curve("loss", *_column(rows, ("loss",)))
    accuracy = [_accuracy(rows, key, name, i) for i, (key, name) in enumerate(ACCURACIES.items())]
    rate = [Line("rate", *_column(rows, LEARNING_RATE), color=3)]
    throughput = [Line("pairs/s", *_column(rows, RATE), color=1)]
    charts: list[tuple[str, list[Line], dict[str, Any]]] = [
        ("Loss", loss, {"from_zero": True}),
        ("Held-out accuracy", accuracy, {"y_format": percent, "from_zero": True}),
        ("Learning rate", rate, {}),
        ("Throughput, pairs per second", throughput, {"from_zero": True}),
    ]
    drawn = ((title, line_chart(lines, title, **options)) for title, lines, options in charts)
    return [(title, svg) for title, svg in drawn if svg]


def _accuracy(rows: list[dict], key: str, name: str, color: int) -> Line:
    """Return a metric by step, with its interval if every row of the log has one."""
    x, y = _column(rows, (key,), of_training=False)
    bounds = [_column(rows, (f"{key}/{side}",), of_training=False)[1] for side in ("low", "high")]
    low, high = bounds if all(len(b) == len(y) for b in bounds) else (None, None)
    return Line(name, x, y, low, high, markers=True, color=color)


def _gallery(images, captions, target, z_image, z_captions, score) -> list[tuple]:
    """Return held-out images with their nearest captions, and the rank of the correct one."""
    shown = []
    for i in spread(len(images), SHOTS):
        cosines = z_captions @ z_image[i]
        scores = score(cosines)
        order = np.argsort(-cosines, kind="stable")
        guesses = [
            (captions[j], scores[j], 100 * np.clip(scores[j], 0, 1), j == target[i])
            for j in order[:GUESSES]
        ]
        rank = int(np.flatnonzero(order == target[i])[0]) + 1
        shown.append((data_uri(images[i], PICTURE), captions[target[i]], guesses, rank))
    return shown


def _queries(images, captions, target, z_image, z_captions) -> list[tuple]:
    """Return captions with their nearest images."""
    # Offset by half a step from the gallery above, to show other images.
    queries = dict.fromkeys(int(target[i]) for i in spread(len(images), QUERIES, offset=0.5))
    hits, cosines = top_k(z_captions[list(queries)], [z_image], ANSWERS)
    return [
        (
            captions[j],
            [
                (data_uri(images[i], PICTURE), captions[target[i]], value, target[i] == j)
                for i, value in zip(nearest, values, strict=True)
            ],
        )
        for j, nearest, values in zip(queries, hits, cosines, strict=True)
    ]


def spread(n: int, count: int, offset: float = 0.0) -> list[int]:
    """Return `count` evenly spaced indices below n, or all; `offset` shifts by a part of a step."""
    count = min(n, count)
    return [min(n - 1, int((i + offset) * n / count)) for i in range(count)]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a log row, nested keys as "outer/inner", `value` as its outer key."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        name = prefix.rstrip("/") if key == "value" and prefix else f"{prefix}{key}"
        if isinstance(value, Metric):
            flat |= {name: value.value, f"{name}/low": value.low, f"{name}/high": value.high}
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{name}/")
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            flat[name] = float(value)
        elif value is None:  # a non-finite number in JSON
            flat[name] = math.nan
    return flat


def _column(
    rows: list[dict[str, float]], names: Sequence[str], of_training: bool = True
) -> tuple[list[float], list[float]]:
    """Return steps and values of the first key in each row that is, or ends in, one of `names`."""
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
    """Look up a nested value of the config by its dotted path; None if there is none."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
