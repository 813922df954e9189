"""Names of classes: from a label as a data set writes it to the words of a prompt.

The label stays the id of its class, in results and files; its name is what a sentence says. A label
is made readable by `readable`, alone and everywhere the same, unless the data set or a file of the
user's gives the name.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vlm.config import DataConfig
from vlm.data.known_classes import check_names, imagenet_names
from vlm.errors import DataError
from vlm.paths import as_path

NAME = "\0name"  # under this, an example may have the name of its class, beside its label

# "001.Black_footed_Albatross" (CUB, Caltech-256), "n02085620-Chihuahua" (Stanford Dogs), "/a/abbey"
# (SUN397): a number with a dot, a number of WordNet, an initial, and then the name.
_PREFIX = re.compile(r"^(?:\d+\.|n\d{8}[-_ ]+|/[a-z]/)(?=[^\W\d_])")
_SLASH = re.compile(r"(?<=\w)/(?=\w)")  # of SUN397 alone: "F/A-18" is a name
# "AnnualCrop" (EuroSAT): only words of three letters and more, so that "DeLorean" stays.
_CAMEL = re.compile(r"(?:[A-Z][a-z]{2,}){2,}")
_CAMEL_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")
# "american-flag" has a separator and "t-shirt", "747-400", "X-ray" a hyphen.
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")


def readable(label: str) -> str:
    """The words of a label: without a number before them, with spaces between them.

    Underscores are spaces. Hyphens are, where a label has no other separator and words
    on both sides of each. A label of nothing but capitalised words is taken to pieces. What has no
    letter stays as it is.

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
    """The name of each label, in order: as given, else ImageNet's, else as `readable` makes it.

    Raises:
        DataError: two labels that would be read as one name, or one that is no name but a number or
            a WordNet id that is not ImageNet's.
    """
    given = {**imagenet_names(labels), **(given or {})}
    names = [given[label] if label in given else readable(label) for label in labels]
    check_names([label for label in labels if label not in given], where)
    twice = {name for name, count in Counter(names).items() if count > 1}
    for name in twice:
        merged = [label for label, own in zip(labels, names, strict=True) if own == name]
        if not all(label in given for label in merged):  # what somebody wrote is as it is written
            raise DataError(
                f"the classes {', '.join(map(repr, merged))} of {where} would all be called "
                f"{name!r}: give each a name of its own with class_names (--class-names FILE)"
            )
    return names


def numbered(names: Sequence[str]) -> list[str]:
    """The names as labels: with their number where another class has the name, or it is blank.

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
    """The names that a file gives to labels.

    The file has a line LABEL<tab>NAME for each, or as many lines as there are labels, in their
    order; or it is a JSON object from label to name, or a JSON list in the order of the labels.

    Raises:
        DataError: no such file, or one that does not name every label.
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
    """The name of the label of one example, where the labels of its data set are not known.

    Raises:
        DataError: see `names_of`; or `class_names` of the config names a file that is in the order
            of the labels.
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
    """How many labels a prompt calls otherwise, with one of them; empty where none is."""
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
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason}): save it as UTF-8") from None
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
