"""Class names for prompts, derived from the labels of a data set.

The label remains the id of its class in results and files; the name is used in prompts. Unless the
data set or a file of the user gives the name, `readable` derives it from the label, independently
of other labels.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vlm.config import DataConfig
from vlm.data.known_classes import check_names, imagenet_names
from vlm.errors import DataError
from vlm.paths import as_path, decode_text

NAME = "\0name"  # key of the class name in an example

# "001.Black_footed_Albatross" (CUB, Caltech-256), "n02085620-Chihuahua" (Stanford Dogs), "/a/abbey"
# (SUN397): a number with a dot, a WordNet id or an initial before the name.
_PREFIX = re.compile(r"^(?:\d+\.|n\d{8}[-_ ]+|/[a-z]/)(?=[^\W\d_])")
_SLASH = re.compile(r"(?<=\w)/(?=\w)")  # only for SUN397: "F/A-18" is a name
# "AnnualCrop" (EuroSAT): only words of three letters or more, so "DeLorean" is unchanged.
_CAMEL = re.compile(r"(?:[A-Z][a-z]{2,}){2,}")
_CAMEL_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")
# "american-flag" has a separator and "t-shirt", "747-400", "X-ray" a hyphen.
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")


def readable(label: str) -> str:
    """Convert a label to words: remove a number before them, and separate them by spaces.

    Underscores become spaces. So do hyphens, if the label has no other separator and each hyphen is
    between words. A label that consists of capitalised words is split. A label without letters is
    unchanged.

    Example:
        >>> from vlm.data.class_names import readable
        >>> [readable(label) for label in ("golden_retriever", "001.Black_footed_Albatross")]
        ['golden retriever', 'Black footed Albatross']
        >>> [readable(label) for label in ("n02085620-Chihuahua", "AnnualCrop", "t-shirt")]
        ['Chihuahua', 'Annual Crop', 't-shirt']
    """
    if not any(character.isalpha() for character in label):
        return label
    name = _PREFIX.sub("", label.strip())
    if label.startswith("/"):
        name = _SLASH.sub(" ", name)
    if not re.search(r"[\s_]", name):
        name = _HYPHEN.sub(" ", name)
        if _CAMEL.fullmatch(name):
            name = _CAMEL_WORD.sub(" ", name)
    return re.sub(r"[\s_]+", " ", name).strip() or label


def names_of(
    labels: Sequence[str], given: Mapping[str, str] | None = None, where: str = "the data"
) -> list[str]:
    """Return the name of each label: as given, else ImageNet's, else by `readable`.

    DataError if two labels get one name, or a name is a number or an unknown WordNet id.
    """
    given = {**imagenet_names(labels), **(given or {})}
    names = [given[label] if label in given else readable(label) for label in labels]
    check_names([label for label in labels if label not in given], where)
    for name in (name for name, count in Counter(names).items() if count > 1):
        merged = [label for label, own in zip(labels, names, strict=True) if own == name]
        if not all(label in given for label in merged):  # given names may repeat
            raise DataError(
                f"the classes {', '.join(map(repr, merged))} of {where} would all be called "
                f"{name!r}: give each a name of its own with class_names (--class-names FILE; of "
                "vlm train: --data.label label --data.class-names FILE)"
            )
    return names


def numbered(names: Sequence[str]) -> list[str]:
    """Make unique labels from names: append the number if a name repeats or is blank.

    Example:
        >>> from vlm.data.class_names import numbered
        >>> numbered(["missile", "tench", "missile"])
        ['missile (0)', 'tench', 'missile (2)']
    """
    count = Counter(names)
    return [
        name if name and count[name] == 1 else f"{name} ({i})".strip()
        for i, name in enumerate(names)
    ]


def read_class_names(file: str, labels: Sequence[str], where: str) -> dict[str, str]:
    """Read the names of labels from a file.

    The file has a line LABEL<tab>NAME for each label, or one name per line in the order of the
    labels. It may also be a JSON object from label to name, or a JSON list in the order of labels.
    DataError if the file is missing, or lacks a label.
    """
    found = _read(file)
    names = found if isinstance(found, dict) else {}
    if isinstance(found, list) and len(found) == len(labels):
        names = dict(zip(labels, found, strict=True))
    missing = [label for label in labels if label not in names]
    if missing:
        raise DataError(
            f"{file} has {len(found)} lines for the {len(labels)} labels of {where}, and none "
            f"names {missing[0]!r}: give a name for each, in order or as LABEL<tab>NAME"
        )
    return {label: names[label] for label in labels}


def class_name(label: str, config: DataConfig) -> str:
    """Return the name of one label, if the labels of the data set are unknown.

    DataError as in `names_of`, or if the file `class_names` is in the order of labels.
    """
    if config.class_names is None:
        return names_of([label], where=config.source)[0]
    found = _read_once(config.class_names)
    if not isinstance(found, dict):
        raise DataError(
            f"{config.class_names} is in the order of the labels, which are not known before a "
            "stream is read: give lines LABEL<tab>NAME"
        )
    if label not in found:
        raise DataError(f"{config.class_names} does not name the label {label!r}: add a line")
    return found[label]


def described(labels: Iterable[str], names: Iterable[str]) -> str:
    """Describe how many labels have another name in prompts, with an example; else empty."""
    pairs = list(zip(labels, names, strict=True))
    changed = [(label, name) for label, name in pairs if label != name]
    if not changed:
        return ""
    label, name = changed[0]
    return f"{len(changed):,} of {len(pairs):,} labels reworded, such as {label!r} to {name!r}"


def _read(file: str) -> dict[str, str] | list[str]:
    path = as_path(file)
    if not path.is_file():
        raise DataError(f"there is no file of class names {path}: check class_names")
    text = decode_text(path.read_bytes(), file)
    if path.suffix == ".json":
        try:
            held = json.loads(text)
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}): write it again") from None
        texts = held.values() if isinstance(held, dict) else held
        if not isinstance(held, dict | list) or not all(isinstance(one, str) for one in texts):
            raise DataError(f"{file} holds no names: write an object from label to name")
        return held
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and all("\t" in line for line in lines):
        return {key: name.strip() for key, name in (line.split("\t", 1) for line in lines)}
    if any("\t" in line for line in lines):
        raise DataError(f"{file} has lines with and without a tab: write LABEL<tab>NAME in each")
    return [line.strip() for line in lines]


_read_once = functools.lru_cache(16)(_read)
