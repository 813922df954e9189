"""Read class labels and prompt templates from lists, files, data sets and open_clip.

["dog", "cat"]                    names, or a mapping from a name to its own sentences
"names.txt"                       one name on each line
"names.json"                      a list, or a mapping from a name to its sentences
"en_classnames.json:cifar10"      the entry of a data set, in the format of CLIP_benchmark
"tfds:cifar10"                    class names of a TFDS data set
"folder:pets", "wds:shards.tar"   classes of class folders, or of WebDataset shards
"imagenet"                        ImageNet's 1,000 classes, or those of imagenet-a, -r or -o
"open_clip:imagenet"              class names of an installed open_clip
"""

import ast
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.config import DataConfig
from vlm.data.class_names import names_of, numbered
from vlm.data.known_classes import known_classes
from vlm.errors import ConfigError, DataError
from vlm.paths import decode_text, lines_of

Labels = Sequence[str] | Mapping[str, Sequence[str]]
IMAGENET = {"labels": "IMAGENET_CLASSNAMES", "templates": "OPENAI_IMAGENET_TEMPLATES"}
SIMPLE = "SIMPLE_IMAGENET_TEMPLATES"


def read_labels(source: str | os.PathLike | Labels) -> Labels:
    """Read labels from any of the sources above; a list or a mapping is returned unchanged.

    Raises:
        ConfigError: an unsupported source.
        DataError: a file that is missing or has another content.

    Example:
        >>> from vlm.heads import read_labels
        >>> (folder / "names.txt").write_text("cat\\ndog\\n")
        8
        >>> read_labels(folder / "names.txt")
        ['cat', 'dog']
    """
    if not isinstance(source, str | os.PathLike):
        return source
    place = os.fspath(source)
    if (data_set := data_set_of(place)) is not None:
        return list(data_set.labels)
    if place.startswith("open_clip:"):
        return _open_clip(place.removeprefix("open_clip:"), "labels")
    return _from_file(place, "labels")


class DataSetClasses(NamedTuple):
    """Classes of a data set: labels, names for prompts, and the data set's own templates."""

    labels: list[str]
    names: list[str]
    templates: tuple[str, ...]


def data_set_of(place: str) -> DataSetClasses | None:
    """Read the classes of `tfds:NAME`, `folder:PATH`, `wds:SHARDS` or `imagenet`; else None.

    Raises:
        DataError: no such data.
    """
    kind, _, what = place.partition(":")
    known = known_classes("imagenet1k" if place == "imagenet" else place)
    if known is not None and known.wordnet_ids:
        return DataSetClasses(numbered(known.names), list(known.names), known.templates)
    if kind not in ("tfds", "folder", "wds"):
        return None
    # Not at the top: it imports grain, which takes half a second that inference need not wait.
    from vlm.data.sources import classes_of, open_source, split_names

    config = DataConfig(
        source=place if kind == "tfds" else what,
        label="cls" if kind == "wds" else "label",
        captions=(),
    )
    try:
        known = split_names(config)
        source = open_source(config, known[0] if known else config.train_split)
    except DataError:
        if kind != "tfds":
            raise
        labels = _tfds_names(what)  # not prepared here: ask TFDS itself
        return DataSetClasses(labels, names_of(labels, where=place), ())
    classes = classes_of(config, source)
    return DataSetClasses(*classes, tuple(getattr(source, "templates", None) or ()))


def read_templates(source: str | os.PathLike | Sequence[str]) -> Sequence[str] | Mapping:
    """Read templates from a JSON file in the format of CLIP_benchmark, or from open_clip.

    CLIP_benchmark's `{c}` is replaced by `{}`. A mapping has sentences for each class (CuPL,
    arXiv:2209.03320) and is used in place of labels.

    Raises:
        ConfigError, DataError: see `read_labels`.

    Example:
        >>> from vlm.heads import read_templates
        >>> (folder / "sentences.json").write_text('["a photo of a {c}.", "a drawing of a {c}."]')
        44
        >>> list(read_templates(folder / "sentences.json"))
        ['a photo of a {}.', 'a drawing of a {}.']
    """
    if not isinstance(source, str | os.PathLike):
        return source
    place = os.fspath(source)
    if place.startswith("open_clip:"):
        return _open_clip(place.removeprefix("open_clip:"), "templates")
    templates = _from_file(place, "templates")
    if isinstance(templates, Mapping):
        return templates
    return [template.replace("{c}", "{}") for template in templates]


def _from_file(place: str, what: str) -> Any:
    path, _, key = place.rpartition(":") if not os.path.isfile(place) else (place, "", "")
    if not path:
        path, key = place, ""
    file = Path(path).expanduser()
    try:
        text = decode_text(file.read_bytes(), path)
    except FileNotFoundError:
        raise DataError(f"there is no file {path!r} of {what}: check the path") from None
    if file.suffix != ".json":
        names = [line.strip() for line in lines_of(text) if line.strip()]
        if not names:
            raise DataError(f"{path} holds no {what}: give one on each line")
        return names
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): write it again") from None
    if key:
        entry = key if not isinstance(content, dict) or key in content else key.rpartition("/")[2]
        if not isinstance(content, dict) or entry not in content:
            known = ", ".join(list(content)[:8]) if isinstance(content, dict) else "no names at all"
            raise DataError(f"{path} has no {what} of {key!r}: it has {known}")
        content = content[entry]
    of_texts = isinstance(content, list) and all(isinstance(name, str) for name in content)
    of_lists = isinstance(content, dict) and all(
        isinstance(own, list) and all(isinstance(text, str) for text in own)
        for own in content.values()
    )
    if not (of_texts or of_lists):
        hint = "write a list of texts"
        if isinstance(content, dict):
            hint = f"name one of its entries, {path}:{next(iter(content))}"
        raise DataError(f"{path} holds no list of {what}: {hint}")
    return content


def _tfds_names(name: str) -> list[str]:
    import tensorflow_datasets as tfds

    name, _, feature = name.partition(":")
    try:
        features = tfds.builder(name).info.features
    except Exception as error:
        raise DataError(
            f"TFDS cannot load the data set {name!r} ({type(error).__name__}): check its name, "
            "and that it is prepared on this machine"
        ) from None
    known: dict[str, Any] = {}
    if isinstance(features, tfds.features.FeaturesDict):
        known |= features.items()
    named = [f for f in ([feature] if feature else known) if hasattr(known.get(f), "names")]
    if not named:
        raise DataError(f"the data set {name!r} has no feature {feature or 'of labels'!r}")
    return list(known[named[0]].names)


def _open_clip(name: str, what: str) -> list[str]:
    """Parse a list from the source of `open_clip.zero_shot_metadata`, without importing torch."""
    if name not in ("imagenet", "imagenet_simple"):
        raise ConfigError(f"open_clip has no {what} of {name!r}: it has those of imagenet")
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ConfigError("open_clip is not installed: pip install open_clip_torch")
    file = Path(spec.origin).parent / "zero_shot_metadata.py"
    wanted = IMAGENET[what] if name == "imagenet" or what == "labels" else SIMPLE
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.List | ast.Tuple):
            continue
        if getattr(node.targets[0], "id", None) == wanted:
            return [_text(element) for element in node.value.elts]
    raise DataError(f"{file} defines no {wanted}: install another version of open_clip")


def _text(node: Any) -> str:
    """Return a string constant, or the template of a lambda with an f-string, with `{}`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Lambda) and isinstance(node.body, ast.JoinedStr):
        parts = node.body.values
        return "".join(_text(p) if isinstance(p, ast.Constant) else "{}" for p in parts)
    raise DataError("open_clip's templates have an unknown form: install another version of it")
