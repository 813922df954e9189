"""The bucket of the shipped configs: `gs://BUCKET` stands for a bucket of yours.

`--bucket` replaces it in every field. A run whose config still has it is refused.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from vlm.config.base import Config
from vlm.config.training import Experiment
from vlm.errors import ConfigError

C = TypeVar("C", bound=Config)

PLACEHOLDER = "gs://BUCKET"  # no real bucket: names of buckets are in lower case


def with_bucket(config: C, bucket: str) -> C:
    """Return the config with `gs://BUCKET` replaced by `bucket` in all of its fields.

    Args:
        config: an Experiment, or a part of one.
        bucket: a bucket or one of its folders, such as gs://my-bucket, or a local folder.

    Example:
        >>> from vlm.config import with_bucket
        >>> with_bucket(vlm.load_config("siglip_b16"), "gs://my-bucket").data.source
        'gs://my-bucket/pairs/*.tar'
    """
    return _replaced(config, bucket.rstrip("/"))


def _replaced(value: Any, bucket: str) -> Any:
    if isinstance(value, Config):
        fields = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
        new = {f.name: _replaced(getattr(value, f.name), bucket) for f in fields}
        changed = {name: x for name, x in new.items() if x != getattr(value, name)}
        return dataclasses.replace(value, **changed)  # pyright: ignore[reportArgumentType]
    if isinstance(value, tuple):
        return tuple(_replaced(item, bucket) for item in value)
    return value.replace(PLACEHOLDER, bucket) if isinstance(value, str) else value


def without_evals(experiment: Experiment, names: Collection[str]) -> Experiment:
    """Return the experiment without the evaluations `names`.

    Raises:
        ConfigError: it has no such evaluation; the message lists those that it has.
    """
    known = [e.name for e in experiment.evals]
    for name in names:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"the config has no evaluation {name!r} to leave out: {has}")
    kept = tuple(e for e in experiment.evals if e.name not in names)
    return dataclasses.replace(experiment, evals=kept)


def require_bucket(experiment: Experiment) -> None:
    """Raise a ConfigError that lists the options of all fields with the placeholder, if any."""
    fields = dict.fromkeys(_placeholders(experiment, ""))
    options = [f"--{field.replace('_', '-')}" for field in fields]
    if not options:
        return
    evals = [e.name for e in experiment.evals if [*_placeholders(e, "")]]
    leave_out = f"; --skip-evals {','.join(evals)} leaves evaluations out" if evals else ""
    raise ConfigError(
        f"BUCKET in the config stands for a bucket of yours: give --bucket gs://NAME, or set "
        f"{' and '.join(filter(None, [', '.join(options[:-1]), options[-1]]))}{leave_out}"
    )


def _placeholders(value: Any, path: str) -> Iterator[str]:
    """Yield the dotted names of the fields that have the placeholder."""
    if isinstance(value, Config):
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            inner = f"{path}.{field.name}" if path else field.name
            yield from _placeholders(getattr(value, field.name), inner)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            # tyro names the items of a tuple of configs, and takes other tuples whole.
            yield from _placeholders(item, f"{path}.{number}" if isinstance(item, Config) else path)
    elif isinstance(value, str) and PLACEHOLDER in value:
        yield path
