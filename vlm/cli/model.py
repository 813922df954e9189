"""The model of a command: `--model`, the variable VLM_MODEL, or the default of the catalogue."""

import contextlib
import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.cli import runtime
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path, is_remote, is_run

VARIABLE = "VLM_MODEL"
WEIGHTS = (".safetensors", ".bin", ".npz", ".pt", ".msgpack", ".index.json")


def model_name(model: str | None) -> str:
    """Return the value of `--model`; without one, that of VLM_MODEL, else the default's name."""
    if model is not None:
        return model
    from vlm.weights.catalogue import default_model

    return os.environ.get(VARIABLE) or default_model().short_name or default_model().name


@contextlib.contextmanager
def chosen_model(model: str | None) -> Iterator[str]:
    """Context manager with the name of the model; errors inside name VLM_MODEL if it is the cause.

    Raises:
        CheckpointError, ConfigError: those of the body.
    """
    try:
        yield model_name(model)
    except (CheckpointError, ConfigError) as error:
        if model is None and os.environ.get(VARIABLE):
            value = os.environ[VARIABLE]
            raise type(error)(f"{VARIABLE} is {value!r}: {error}") from None
        raise


def load_model(model: str | None, **options: Any) -> Any:
    """Load the model of a command with `vlm.load`."""
    from vlm.bundle import load

    with chosen_model(model) as name:
        return load(name, **options)


def leading_model(
    command: str, model: str | None, places: Sequence[str], needed: int = 1, most: int | None = None
) -> tuple[str | None, tuple[str, ...]]:
    """Return the model and the other arguments of a command line in the old form, MODEL first.

    Args:
        command: such as "vlm classify", for messages.
        model: the value of `--model`; with one, no argument is a model.
        places: the positional arguments.
        needed: number of arguments that the command needs besides a model.
        most: largest number of them, if there is one; one more is a model in any case.

    Raises:
        UsageError: the first argument may be a model or images, or the others are missing.
    """
    from vlm.inputs.folders import is_image_name

    places = tuple(places)
    surplus = most is not None and len(places) == most + 1 and not is_image_name(places[0])
    if model is not None or not places or not (surplus or names_model(places[0])):
        return model, places
    first, *rest = places
    option = f"--model {first}"
    if not surplus and len(rest) < needed:
        raise UsageError(f"{command} needs images, and {first!r} is a model: write {option}")
    if not surplus and rest and _is_ambiguous(first):
        raise UsageError(
            f"{first!r} has a model's config, images and no weights: write {option} if it is the "
            f"model, or {os.path.join(first, '*')} for its images"
        )
    shown = " ".join([command, option, *rest[:3], *(["..."] if len(rest) > 3 else [])])
    text = (
        f"the model in first place is deprecated and goes away in the next minor version: {shown}"
    )
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return first, tuple(rest)


def names_model(place: str) -> bool:
    """Return True if an argument is a model: a local one, or a name of the catalogue or the Hub.

    A local path takes precedence, and names of images are no models. OWNER/NAME is not a Hub id if
    there is a folder OWNER here: it is a misspelt path.
    """
    from vlm.inputs.folders import is_image_name

    try:
        path = as_path(place)
    except ConfigError:  # a web address
        return False
    if is_image_name(place):
        return False
    if not path.exists():
        if glob.has_magic(place) or is_remote(place):
            return False
        from vlm.weights.catalogue import resolve
        from vlm.weights.hub import is_hub_id

        return bool(resolve(place)) or (is_hub_id(place) and not Path(place).parent.is_dir())
    runtime.prepare_inference()
    from vlm.weights.registry import is_model

    return is_model(path)


def _is_ambiguous(place: str) -> bool:
    """Return True for a folder with the config of a model and with images, but without weights."""
    from vlm.inputs.folders import is_image_name

    path = as_path(place)
    names = [file.name for file in path.iterdir()] if path.is_dir() and not is_run(path) else []
    return any(map(is_image_name, names)) and not any(name.endswith(WEIGHTS) for name in names)
