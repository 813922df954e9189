"""vlm's exceptions. A message names the offending value, where it was found, and how to fix it."""

import logging
from collections.abc import Iterable

WARNED: set[str] = set()  # messages that `warn_once` has logged


class VlmError(Exception):
    """Base class of all errors that the user can fix; the CLI prints them without a traceback.

    Attributes:
        retriable: whether the same command may succeed later, as after an outage of the storage.

    Example:
        >>> try:
        ...     vlm.load("no/such/folder/at/all")
        ... except vlm.VlmError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """

    retriable = False


class ConfigError(VlmError):
    """An invalid configuration: a wrong field, type, size or combination.

    Example:
        >>> try:
        ...     vlm.ViTConfig(image_size=8, patch_size=16)
        ... except vlm.ConfigError as error:
        ...     print(error)
        image_size 8 holds no patch of patch_size 16: choose an image size that the patches tile
    """


class DataError(VlmError):
    """Data that is missing, unreadable, or different from its description.

    Example:
        >>> try:
        ...     model.encode_image("no-such-photo.png")
        ... except vlm.DataError as error:
        ...     print("no-such-photo.png" in str(error))
        True
    """


class CheckpointError(VlmError):
    """A run, bundle or public checkpoint that is missing, corrupt, or of another architecture.

    Example:
        >>> (folder / "diary.txt").write_text("mine")
        4
        >>> try:
        ...     model.save(folder)
        ... except vlm.CheckpointError as error:
        ...     print("would not write over it")
        would not write over it
    """


class ConflictError(CheckpointError):
    """A file or folder that another process changed since this process read it.

    Example:
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures)
        >>> index.save(folder / "index")
        >>> other = vlm.RetrievalIndex.load(folder / "index", model)
        >>> other.remove(0)
        >>> other.save(folder / "index")
        >>> try:
        ...     index.save(folder / "index")
        ... except vlm.ConflictError:
        ...     index.reload()
        ...     index.save(folder / "index")
        >>> index.ids
        (1, 2)
    """


class ShardingError(VlmError):
    """A mesh or a batch that does not fit the devices.

    Example:
        >>> try:
        ...     vlm.sharding.make_mesh(vlm.MeshConfig(data=3, fsdp=5))
        ... except vlm.ShardingError as error:
        ...     print("the sizes do not multiply to the devices")
        the sizes do not multiply to the devices
    """


class TrainingError(VlmError):
    """A training run that had to stop, such as a loss that is no longer finite.

    Example:
        >>> issubclass(vlm.TrainingError, vlm.VlmError)
        True
    """


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warn_once(text: str) -> None:
    """Log a warning, unless this process has logged the same text before."""
    if text not in WARNED:
        WARNED.add(text)
        logging.getLogger("vlm").warning(text)


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Refuse an argument that is none of its choices.

    Raises:
        ConfigError: it names the argument, the value and the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{name} is {brief(value)}: choose one of {', '.join(map(repr, choices))}"
        )


def brief(value: object) -> str:
    """Format a value for an error message, in about 80 characters at most."""
    if isinstance(value, dict | list | tuple) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,} values"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    try:
        shown = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return shown if len(shown) <= 80 else f"{shown[:60]}... ({len(shown):,} characters)"
