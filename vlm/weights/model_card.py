"""Model card of a bundle: the README.md that is uploaded with it.

The YAML at its start has the fields that the Hub knows. The body is `model_card.md.jinja`. Facts
come from the bundle, and from the run folder that it was loaded from.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from etils import epath

from vlm._html import render
from vlm._version import __version__
from vlm.config import to_dict
from vlm.errors import CheckpointError
from vlm.paths import as_path, is_run
from vlm.weights import catalogue
from vlm.weights.adapter import AdapterOrigin
from vlm.weights.bundle_format import BUNDLE_FILE
from vlm.weights.card_facts import metadata, read_card
from vlm.weights.fields import read_json
from vlm.weights.hub import is_hub_id
from vlm.weights.registry import hub_name
from vlm.weights.writing import SavedFormat

LIBRARIES: dict[SavedFormat, str] = {
    "vlm": "vlm",
    "huggingface": "transformers",
    "open_clip": "open_clip",
}
TASK = "zero-shot-image-classification"
_LICENCE_FIELDS = ("license", "license_name", "license_link")
_HUB_DATA = re.compile(r"hf://datasets/([^/@]+/[^/@]+)")
_MARK = re.compile(r"\n<!-- vlm \S+ (\w{64}) -->\s*$")  # ends a card that nobody has edited


@runtime_checkable
class SupportsJson(Protocol):
    """An evaluation report."""

    def to_json(self) -> str: ...


@runtime_checkable
class Described(Protocol):
    """The parts of a bundle that its card describes."""

    name: str
    source: str | None
    adapter: AdapterOrigin | None

    @property
    def config(self) -> Any: ...

    @property
    def preprocess(self) -> Any: ...

    def _facts(self) -> tuple[str, dict[str, str]]: ...


class Measured(NamedTuple):
    """A metric of an evaluation report."""

    task: str
    data: str
    split: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    date: str


@dataclass(frozen=True)
class Origin:
    """Facts on the training of a model; empty if unknown."""

    base: str | None = None  # argument of `vlm.load`
    sources: tuple[str, ...] = ()  # of training data
    training: dict[str, str] = field(default_factory=dict)
    results: tuple[Measured, ...] = ()


def origin_of(
    model: Described, identity: Callable[[], str], results: epath.PathLike | SupportsJson | None
) -> Origin:
    """Collect what is known on the origin of a model.

    Args:
        identity: function that returns the fingerprint of the model's checkpoint.
        results: a report, or the path of a results.json or of its folder. None: that of the run
            which the model was loaded from, if it has one.

    Raises:
        CheckpointError: `results` is not readable, or is of another model.
    """
    run = _run_of(model)
    base = None if model.adapter is None else model.adapter.base
    sources: tuple[str, ...] = ()
    training: dict[str, str] = {}
    if run is not None:
        config = read_json(run / "config.json")
        base, sources = base or config.get("init_from"), _sources(config)
        training = _training(config, run)
        if results is None and _is_report(run / "results.json"):
            results = run / "results.json"
    elif base is None and model.source is not None and _is_public(model.source):
        base = model.source
    measured = () if results is None else tuple(_read_results(results, model.name, identity))
    return Origin(base, sources, training, measured)


def base_model_id(base: str | None) -> str | None:
    """Return the Hub id of a base model; None if it has none."""
    if base is None or as_path(base).exists():
        return None
    name = hub_name(base).removeprefix("hf-hub:")
    return name if is_hub_id(name) else None


def licence_fields(licence: str | None, base: str | None) -> tuple[dict[str, str], str]:
    """Return the licence's fields of the card, and where the licence is from.

    Args:
        licence: as named by the user, such as "apache-2.0". None: that of the base model.
        base: an argument of `vlm.load`.

    Raises:
        CheckpointError: no licence is named, and the base model's card has none.
    """
    if licence is not None:
        if not licence.strip():
            raise CheckpointError("licence is empty: name one, such as apache-2.0")
        name = licence.strip().lower()
        return {"license": name}, "named by the publisher"
    if base is None:
        raise CheckpointError(
            "the licence of the model is unknown, as no base model is known: name it with licence, "
            "such as apache-2.0"
        )
    try:
        card, why = read_card(base), f"the card of its base model {base} names none"
    except CheckpointError as error:
        card, why = None, f"the card of its base model is not readable ({error})"
    texts = {name: (card or {}).get(name) for name in _LICENCE_FIELDS}
    found = {name: text for name, text in texts.items() if isinstance(text, str)}
    if "license" in found:
        return found, f"that of the base model {base}"
    entry = catalogue.resolve(base)
    if entry is not None and entry.licence in catalogue.OPEN_LICENCES:
        return {"license": str(entry.licence).lower()}, f"that of the base model {base}"
    raise CheckpointError(
        f"the licence of the model is unknown: {why}; name it with licence, such as apache-2.0"
    )


def write_card(
    model: Described,
    repo: str,
    form: SavedFormat,
    origin: Origin,
    *,
    licence: dict[str, str],
    licence_from: str,
    base_model: str | None,
    datasets: Sequence[str],
    description: str,
) -> str:
    """Write the text of a card."""
    import huggingface_hub as hub

    datasets = [*dict.fromkeys([*datasets, *filter(None, map(_hub_data, origin.sources))])]
    evaluated = [
        hub.EvalResult(
            task_type=TASK if row.metric.startswith("top") else "image-text-retrieval",
            dataset_type=row.data,
            dataset_name=row.data,
            dataset_split=row.split or None,
            metric_type="accuracy" if row.metric == "top1" else row.metric,
            metric_name=row.metric,
            metric_value=round(row.value, 4),
            metric_args={"low": round(row.low, 4), "high": round(row.high, 4), "n": row.n},
            task_name=row.task,
        )
        for row in origin.results
    ]
    config = model.config
    data = hub.ModelCardData(
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        library_name=LIBRARIES[form],
        pipeline_tag=TASK,
        tags=["vlm", "siglip" if config.loss == "sigmoid" else "clip", "jax"],
        base_model=base_model,
        datasets=datasets or None,
        metrics=list(dict.fromkeys(r.metric_type for r in evaluated)) or None,
        eval_results=evaluated or None,
        model_name=repo.partition("/")[2],
    )
    if not evaluated:
        data.model_name = None
    settings = {"model": to_dict(config), "preprocess": to_dict(model.preprocess.config)}
    body = render(
        "weights/model_card.md.jinja",
        repo=repo,
        form=form,
        modules=sorted(
            str(tower.module).partition(":")[0]
            for tower in (config.vision, config.text)
            if hasattr(tower, "module")
        ),
        facts=model._facts()[1],
        base_model=base_model,
        datasets=datasets,
        sources=[_shown(source) for source in origin.sources if not _hub_data(source)],
        training=origin.training,
        results=[tuple(map(_cell, _row(row))) for row in origin.results],
        dates=sorted({row.date[:10] for row in origin.results if row.date}),
        licence=licence,
        licence_from=licence_from,
        description=description,
        settings=json.dumps(settings, indent=2),
        version=__version__,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"
    return f"{text}\n<!-- vlm {__version__} {_hash(text)} -->\n"


def updated_card(old: bytes, new: str, where: str) -> str:
    """Merge a card into one that the Hub has: text that was edited by hand is kept.

    The YAML of an edited card gets the new values of the fields that vlm writes.

    Raises:
        CheckpointError: the YAML of the old card is not readable.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from huggingface_hub.utils import yaml_dump

    text = old.decode("utf-8-sig", errors="replace")
    mark = _MARK.search(text)
    body = REGEX_YAML_BLOCK.sub("", text, count=1)
    if not body.strip() or (mark is not None and mark[1] == _hash(text[: mark.start()])):
        return new
    values = metadata(old, where) | metadata(new.encode(), where)
    return f"---\n{yaml_dump(values).strip()}\n---\n\n{body.lstrip()}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").strip().encode()).hexdigest()


# ------------------------------------------------------------------------------ facts of a run


def _run_of(model: Described) -> epath.Path | None:
    """Return the run folder that a model was loaded from."""
    if model.source is None:
        return None
    path = as_path(model.source)
    folders = [path, path.parent] if path.name == "bundle" else [path]
    return next((folder for folder in folders if is_run(folder)), None)


def _is_public(source: str) -> bool:
    """Whether this is a model of the Hub, or a local folder with a card; not a bundle of ours."""
    path = as_path(source)
    return not path.exists() or not (path / BUNDLE_FILE).exists()


def _sources(config: dict[str, Any]) -> tuple[str, ...]:
    data = config.get("data") or {}
    parts = [data, *(data.get("mixture") or ())]
    sources = (part.get("source") for part in parts if isinstance(part, dict))
    return tuple(source for source in sources if isinstance(source, str) and source)


def _training(config: dict[str, Any], run: epath.Path) -> dict[str, str]:
    """Return the settings of a run to show, by their names in the config."""
    names = ("objective", "batch_size", "seed", "lock", "distill")
    found = {name: config.get(name) for name in names}
    optimizer = config.get("optimizer")
    for name in ("name", "learning_rate", "schedule", "weight_decay"):
        found[f"optimizer.{name}"] = optimizer.get(name) if isinstance(optimizer, dict) else None
    history = run / "history.jsonl"
    if history.exists() and (lines := history.read_text().split("\n")[:-1]):
        found["steps"] = json.loads(lines[-1]).get("total_steps")
    plain = {n: v for n, v in found.items() if isinstance(v, str | int | float)}
    return {name: _cell(value) for name, value in plain.items() if value != "none"}


def _is_report(path: epath.Path) -> bool:
    """Whether a file is an evaluation report; `vlm adapt` writes another kind of results.json."""
    return path.is_file() and "results" in read_json(path)


def _read_results(
    results: epath.PathLike | SupportsJson, name: str, identity: Callable[[], str]
) -> Iterator[Measured]:
    """Read the metrics of a report."""
    if not isinstance(results, SupportsJson):
        path = as_path(results)
        path = path / "results.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"there are no results {path}: evaluate the model with vlm eval")
        body, where = read_json(path), str(path)
    else:
        body, where = json.loads(results.to_json()), "the report"
    try:
        for result in body["results"]:
            origin = result["provenance"]
            recorded = (origin.get("evidence") or {}).get("fingerprint")
            if recorded is not None and recorded != identity():
                raise CheckpointError(
                    f"{where} is of another model (fingerprint {recorded[:12]}, and {name} has "
                    f"{identity()[:12]}): evaluate this model"
                )
            data = origin["data"]
            for metric, values in result["metrics"].items():
                value, low, high = (values[part] for part in ("value", "low", "high"))
                if all(isinstance(x, int | float) for x in (value, low, high)):  # null: not finite
                    yield Measured(
                        task=result["task"],
                        data=_shown(data["name"]),
                        split=data["split"],
                        metric=metric,
                        value=value,
                        low=low,
                        high=high,
                        n=values["n"],
                        date=origin["date"],
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is not an evaluation report ({error!r}): evaluate the model with vlm eval"
        ) from None


def _row(row: Measured) -> tuple[str, ...]:
    data = f"{row.data} [{row.split}]" if row.split else row.data
    interval = f"{row.low:.1%} – {row.high:.1%}"
    return row.task, data, row.metric, f"{row.value:.1%}", interval, f"{row.n:,}"


def _hub_data(source: str) -> str | None:
    match = _HUB_DATA.match(source)
    return None if match is None else match[1]


def _shown(source: str) -> str:
    """Return the name of a data set, without folders and buckets of the publisher."""
    if (name := _hub_data(source)) is not None:
        return name
    if source.startswith("tfds:"):
        return source
    kind = match[0] if (match := re.match(r"\w{2,}:(?!//)", source)) else ""
    return kind + source.removeprefix(kind).rstrip("/").rpartition("/")[2]


def _cell(value: Any) -> str:
    """Format a value for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
