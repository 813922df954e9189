"""Folder of results, with three files per task.

results.json          the report of all tasks, for `Report.load`
NAME.json             one task, with CLIP_benchmark's fields and more
NAME.parquet          the outcome of each query
NAME.gallery.json     thumbnails of some queries, for a page
"""

import dataclasses
import json
import os
import re
from typing import Any

import numpy as np
from etils import epath

from vlm._json import to_json
from vlm.display import data_uri
from vlm.errors import CheckpointError, VlmError
from vlm.evaluation.evidence import Samples, read_samples, write_samples
from vlm.evaluation.runner import Report, Result
from vlm.evaluation.tasks import RetrievalTask, Task, ZeroShotTask
from vlm.paths import replace_text

RESULTS = "results.json"
SHOWN = 12  # of the most confident correct answers, and of the wrong ones
MAX_PICTURES = 200  # of a task
PICTURE = 112  # pixels

Gallery = dict[int, tuple[str, str, str]]

# CLIP_benchmark's names of the metrics; image_retrieval is that of images by text.
METRICS = {
    "top1": "acc1",
    "top5": "acc5",
    **{f"text_to_image_R@{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)},
    **{f"image_to_text_R@{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
}


def write_result(folder: str | os.PathLike, result: Result) -> None:
    """Write one task, the samples first, so that a result always has them."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if result.samples is not None:
        write_samples(folder / f"{file_name(result.task)}.parquet", result.samples)
    text = to_json(clip_benchmark_fields(result), indent=2, ensure_ascii=False)
    replace_text(folder / f"{file_name(result.task)}.json", text)


def write_gallery(folder: str | os.PathLike, result: Result, task: Task) -> None:
    """Write thumbnails of images for pages and comparisons."""
    samples, entries = result.samples, {}
    image_at = getattr(task, "image_at", None)
    if samples is None or image_at is None:
        return
    if isinstance(task, ZeroShotTask):
        for i in examples(samples):
            query = int(samples["query"][i])
            names = [task.captions[int(samples[column][i])] for column in ("target", "predicted")]
            entries[query] = (query, *names)
    elif isinstance(task, RetrievalTask):
        entries = _retrieved(samples, task)
    pictures = {}
    for key, (image, right, called) in entries.items():
        try:
            pictures[str(key)] = [data_uri(image_at(image), PICTURE), right, called]
        except VlmError:
            continue  # the page omits the picture
    path = epath.Path(folder) / f"{file_name(result.task)}.gallery.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(pictures, ensure_ascii=False))


def _retrieved(samples: Samples, task: RetrievalTask) -> dict[int, tuple[int, str, str]]:
    """Return the image, its own text and the found text of the rows to show.

    For a text query the image is the one that was found, with the first of its own texts.
    """
    pairs = task.positives or [(i, i) for i in range(len(task.texts))]
    text_of: dict[int, str] = {}
    for image, text in pairs:
        text_of.setdefault(int(image), task.texts[int(text)])
    entries = {}
    for way in ("image_to_text", "text_to_image"):
        for i in (row for rows in best_and_worst(samples, way) for row in rows):
            query, nearest = int(samples["query"][i]), int(samples["found"][i])
            if way == "image_to_text":
                image, right, called = query, text_of[query], task.texts[nearest]
            else:
                image, right = nearest, task.texts[query]
                called = text_of.get(nearest, f"image {nearest}")
            if samples["rank"][i] == 0:  # any of its texts is correct
                right = called = called if way == "image_to_text" else right
            entries[i] = (image, right, called)
    return entries


def best_and_worst(samples: Samples, way: str) -> tuple[list[int], list[int]]:
    """Return rows of one direction: correct ones by cosine, and wrong ones by rank."""
    rows = np.flatnonzero(samples["direction"] == way)
    rank, score = samples["rank"][rows], samples["score"][rows]
    best, worst = np.argsort(-score, kind="stable"), np.argsort(-rank, kind="stable")
    best, worst = best[rank[best] == 0], worst[rank[worst] > 0]
    return rows[best[:SHOWN]].tolist(), rows[worst[:SHOWN]].tolist()


def read_gallery(folder: str | os.PathLike, task: str) -> Gallery:
    """Read a gallery: picture, correct and predicted text by query (retrieval: by sample row)."""
    path = epath.Path(folder) / f"{file_name(task)}.gallery.json"
    try:
        contents = json.loads(path.read_text())
        return {
            int(query): (src, right, called) for query, (src, right, called) in contents.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def examples(samples: Samples) -> list[int]:
    """Return rows to show: the most confident correct and wrong answers, then other wrong ones."""
    order = np.argsort(-samples["confidence"], kind="stable")
    right = samples["rank"][order] == 0
    chosen = [*order[right][:SHOWN], *order[~right][: MAX_PICTURES - SHOWN]]
    return [int(i) for i in chosen]


def read_result(folder: str | os.PathLike, task: str) -> Result | None:
    """Read a task that is complete in the folder, with its samples; None if it is not."""
    folder = epath.Path(folder)
    path = folder / f"{file_name(task)}.json"
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text())["vlm"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not a result of vlm: remove it") from None
    report = Report.from_json(json.dumps(body), str(path))
    return with_samples(folder, report.results[0])


def read_report(place: str | os.PathLike) -> Report:
    """Read the report of a folder with samples, or of a JSON file without.

    Raises:
        CheckpointError: no such folder or file.
    """
    path = epath.Path(place)
    if not path.is_dir():
        return Report.load(path)
    report = Report.load(path / RESULTS)
    return Report(tuple(with_samples(path, result) for result in report.results))


def with_samples(folder: epath.Path, result: Result) -> Result:
    """Add the samples from the Parquet file beside a result, if there is one."""
    path = folder / f"{file_name(result.task)}.parquet"
    samples = read_samples(path) if path.is_file() else None
    return dataclasses.replace(result, samples=samples)


def clip_benchmark_fields(result: Result) -> dict[str, Any]:
    """Convert a result to the fields of CLIP_benchmark's files, with intervals and evidence."""
    origin = result.provenance
    return {
        "dataset": re.sub(r"^(tfds|wds):", r"\1/", origin.data.name),
        "model": origin.model,
        "pretrained": origin.evidence.get("fingerprint", ""),
        "task": result.kind,
        "metrics": {METRICS.get(n, n): metric.value for n, metric in result.metrics.items()},
        "language": "en",
        "intervals": {
            METRICS.get(n, n): [metric.low, metric.high] for n, metric in result.metrics.items()
        },
        "vlm": json.loads(Report((result,)).to_json()),
    }


def file_name(task: str) -> str:
    """Make a file name of a task's name."""
    return re.sub(r"[^\w.,+-]+", "_", task).strip("_") or "task"
