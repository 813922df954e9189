"""Trained adapters on a model: one, a weighted sum, or a switch between several."""

import os
from collections.abc import Iterator, Mapping, Sequence

from etils import epath
from flax import nnx

from vlm.bundle import Bundle, adapted
from vlm.config import AdapterConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.models import adapters
from vlm.weights.adapter import SavedAdapter
from vlm.weights.peft import write_peft
from vlm.weights.registry import open_adapter


def attach(
    bundle: Bundle, *folders: epath.PathLike, weights: Sequence[float] | None = None
) -> Bundle:
    """Return `bundle` with an adapter, or with the weighted sum of several.

    A folder is in vlm's or peft's format. Weights are 1 by default; a weight of 0 leaves the model
    exactly as it was.

    Raises:
        CheckpointError: no adapter in a folder, or one of another model.
        ConfigError: not one weight per folder, or a DoRA adapter among several.

    Example:
        >>> vlm.adaptation.attach(model)
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """
    if not folders:
        raise ConfigError("there is no adapter to attach: name at least one folder")
    if weights is None and len(folders) == 1:
        return adapted(bundle, _open(folders[0]))
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise ConfigError(
            f"there are {len(weights)} weights for {len(folders)} adapters: give one for each"
        )
    saved = [_open(folder) for folder in folders]
    total = adapters.stacked([_factors(bundle, s) for s in saved], weights)
    new = bundle.with_adapter(total, _config(total))
    new.name = " + ".join(f"{w:g} {s.name}" for w, s in zip(weights, saved, strict=True))
    return new


class AdapterSwitch(Mapping[str, Bundle]):
    """Several adapters on one model, each as a bundle that shares the model and its programs.

    All are padded to one shape, so switching does not recompile. The kernels are those of
    `bundle`, also for adapters that were trained with int8 kernels.

    Raises:
        CheckpointError: no adapter in a folder, or one of another model.
        ConfigError: a mixture of DoRA and other adapters.

    Example:
        >>> folders = {"birds": "runs/birds/bundle", "cars": "runs/cars/bundle"}
        >>> switch = vlm.adaptation.AdapterSwitch(model, folders)  # doctest: +SKIP
        >>> z_birds = switch["birds"].encode_image(pictures)  # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle, folders: Mapping[str, epath.PathLike]):
        if not folders:
            raise ConfigError("there is no adapter to switch to: name at least one folder")
        saved = {name: _open(folder) for name, folder in folders.items()}
        forms = adapters.padded([_factors(bundle, s) for s in saved.values()])
        first = bundle.with_adapter(forms[0], _config(forms[0]))
        self._bundles: dict[str, Bundle] = {}
        for (name, one), factors in zip(saved.items(), forms, strict=True):
            parameters = nnx.state(adapters.attach(first.model, factors))
            self._bundles[name] = first.with_parameters(parameters, one.name)
            self._bundles[name].adapter = first.adapter
            self._bundles[name].fingerprint = one.fingerprint

    def __getitem__(self, name: str) -> Bundle:
        return self._bundles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundles)

    def __len__(self) -> int:
        return len(self._bundles)


def save_peft(bundle: Bundle, folder: epath.PathLike) -> None:
    """Write the adapter of a bundle for `peft` on transformers' CLIPModel or SiglipModel.

    Raises:
        ConfigError: the bundle has no adapter.
        CheckpointError: transformers does not support the model, or `peft` a layer; or the folder
            exists.

    Example:
        >>> vlm.adaptation.save_peft(model, folder / "adapter")  # it has none
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """
    factors = adapters.adapter_of(bundle.model)
    if bundle.adapter is None or not factors:
        raise ConfigError(f"{bundle.name} has no adapter: attach or train one first")
    write_peft(folder, factors, bundle.model, bundle.tokenizer, bundle.adapter.base)


def _open(folder: epath.PathLike) -> SavedAdapter:
    saved = open_adapter(folder)
    if saved is None:
        raise CheckpointError(
            f"{os.fspath(folder)} has no adapter: give a folder with an adapter.json, or with "
            "peft's adapter_config.json"
        )
    return saved


def _factors(bundle: Bundle, saved: SavedAdapter) -> adapters.Adapter:
    """Return the factors of an adapter after a check that it belongs to `bundle`."""
    saved.check_base(bundle.identity, bundle.name)
    return saved.factors_for(bundle.model, bundle.tokenizer)


def _config(adapter: adapters.Adapter) -> AdapterConfig:
    """Make the config of a combined adapter."""
    rank = max((factors.rank for factors in adapter.values()), default=0)
    dora = any(factors.magnitude is not None for factors in adapter.values())
    return AdapterConfig(rank=rank, alpha=float(rank), targets=tuple(sorted(adapter)), dora=dora)
