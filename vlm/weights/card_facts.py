"""Facts in a model card: the YAML at the start of a README.md, of a Hub model or a local folder."""

import re
from typing import Any

from etils import epath

from vlm.errors import CheckpointError, brief
from vlm.paths import as_path
from vlm.weights import hub
from vlm.weights.registry import hub_name

CARD_FILE = "README.md"
# Fields to show, with their names in the YAML.
_FIELDS = {
    "licence": ("license", "license_name", "license_link"),
    "base model": ("base_model",),
    "data": ("datasets",),
    "languages": ("language",),
    "library": ("library_name",),
    "task": ("pipeline_tag",),
    "tags": ("tags",),
}
_SHOWN = 500  # characters of a value
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def read_card(model: epath.PathLike) -> dict[str, Any] | None:
    """Read the metadata of a model's card; None if it has no card.

    Args:
        model: a local folder (of a run, its bundle's card counts too), or a Hub id.

    Raises:
        CheckpointError: the card is not readable, or there is no such model, or no network.
    """
    path = as_path(model)
    if path.exists():
        files = [folder / CARD_FILE for folder in (path, path / "bundle")]
        file = next((file for file in files if file.is_file()), None)
        return None if file is None else metadata(file.read_bytes(), str(file))
    name = hub_name(model)
    if not hub.is_hub_id(name):
        raise CheckpointError(f"there is no model {name!r}: check the path")
    file = hub.download_file(name, CARD_FILE)
    return None if file is None else metadata(file.read_bytes(), f"{CARD_FILE} of {name}")


def metadata(content: bytes, where: str) -> dict[str, Any]:
    """Parse the YAML of a card; empty if it has none.

    Raises:
        CheckpointError: it is no valid YAML.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = content.decode("utf-8-sig", errors="replace")
    block = REGEX_YAML_BLOCK.search(text)
    try:
        values = yaml.safe_load(block[2]) if block else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where} has YAML that cannot be read ({why}): correct it") from None
    return values if isinstance(values, dict) else {}


def shown_facts(card: dict[str, Any]) -> dict[str, str]:
    """Return the facts of a card to show: licence, data, languages, base model and evaluation.

    Fields that are missing, or have a type that cannot be shown, are left out.
    """
    facts = {
        name: value
        for name, fields in _FIELDS.items()
        if (value := ", ".join(filter(None, (_text(card.get(field)) for field in fields))))
    }
    return facts | _evaluations(card.get("model-index"))


def _evaluations(index: Any) -> dict[str, str]:
    """Return the metrics in a model index, by data set and metric."""
    found: dict[str, str] = {}
    for model in _dicts(index):
        for result in _dicts(model.get("results")):
            data = result.get("dataset")
            data = data if isinstance(data, dict) else {}
            where = _text(data.get("name")) or _text(data.get("type")) or "unknown data"
            split = _text(data.get("split"))
            for metric in _dicts(result.get("metrics")):
                name = _text(metric.get("name")) or _text(metric.get("type")) or "metric"
                args = metric.get("args")
                value = _text(metric.get("value"))
                if isinstance(args, dict) and {"low", "high"} <= args.keys():
                    value += f" [{_text(args['low'])}, {_text(args['high'])}]"
                    value += f" of {_text(args['n'])}" if "n" in args else ""
                found[f"{name} on {where}{f' [{split}]' if split else ''}"] = value
    return found


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _text(value: Any) -> str:
    """Convert a value of a card to one line; empty if there is none."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, (_text(v) for v in value)))[:_SHOWN]
    if isinstance(value, dict):
        return brief(value)
    return _CONTROL.sub(" ", str(value))[:_SHOWN].strip()
