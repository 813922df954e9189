"""Identity of the model behind stored embeddings: settings, weights and probe embeddings.

`embedding_facts` lists all settings that change an embedding, besides weights and input. Every
cache and store of embeddings compares it: class prompts, indexes, `vlm embed`, teachers'
embeddings and finished evaluations.

A saved head also stores the model's embeddings of one text and one image. The same weights
reproduce them in any file format, to a cosine of SAME on any machine and in any precision.
"""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

import vlm.config
from vlm._version import __version__
from vlm.errors import CheckpointError
from vlm.heads.encoder import Encoder
from vlm.heads.token_embeddings import image_tokens, multi_vector_bundle
from vlm.weights.fingerprint import fingerprint_of_model
from vlm.weights.rules import flat_arrays

PROBE_TEXT = "a photo of a red car in the snow"
PROBE_IMAGE = np.add.outer(np.arange(0, 256, 4), np.arange(64)).astype(np.uint8)[..., None] * (
    np.array([1, 2, 3], np.uint8)
)
SAME = 0.999  # least cosine of a probe embedding with itself across machines and precisions
EQUAL = 1 - 1e-6  # the same on one machine in one precision
# Settings that change an embedding only by rounding. Caches that are cheap to rebuild compare them
# too; stores that took hours do not.
ROUNDING = ("vlm", "platform", "matmul_precision")

_TOWERS = {"probe_text": "text", "probe_image": "vision"}
FIELDS: dict[str, type] = {"model": str, "probe_text": list, "probe_image": list}


def embedding_facts(
    model: Encoder, tower: Literal["image", "text"] | None = None
) -> dict[str, str]:
    """Return the settings that embeddings depend on, besides weights and inputs.

    Any option of a model that changes embeddings belongs here.

    Args:
        model: a model from `vlm.load`, or another `Encoder`.
        tower: leave out settings of the other tower.
    """
    import jax

    owner = getattr(model, "bundle", model)  # a server's model has a bundle
    config = getattr(owner, "config", None)
    if isinstance(config, vlm.config.ModelConfig):  # the sizes that it lists change no embedding
        config = dataclasses.replace(config, matryoshka=())
    facts: dict[str, Any] = {
        "vlm": __version__,
        "platform": jax.default_backend(),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        "config": config,
    }
    if (module := getattr(owner, "model", None)) is not None:
        facts["dtype"] = ", ".join(sorted({str(x.dtype) for _, x in flat_arrays(module)}))
    if tower != "text":
        facts["preprocess"] = getattr(getattr(model, "preprocess", None), "config", None)
        facts["video_frames"] = getattr(model, "frames", None)  # of a VideoEncoder
    if tower != "image" and (tokenizer := getattr(owner, "tokenizer", None)) is not None:
        facts["tokenizer"] = getattr(tokenizer, "config", None)
        facts["vocabulary"] = getattr(tokenizer, "fingerprint", None)
    return {name: _shortened(str(value)) for name, value in facts.items() if value is not None}


def _shortened(text: str) -> str:
    """Leave out the default values in the text of a config, as that of a later version has more."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):  # not a config
        return text
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            kind = getattr(vlm.config, call.func.id, None)
            fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
            defaults = {field.name: repr(field.default) for field in fields}
            call.keywords = [
                given for given in call.keywords
                if defaults.get(given.arg or "") != ast.unparse(given.value)
            ]  # fmt: skip
    return ast.unparse(tree)


def stored_facts(model: Encoder, tower: Literal["image", "text"] | None = None) -> dict[str, str]:
    """Return the settings and weights' fingerprint that identify stored embeddings.

    If the model has no fingerprint, its weights are hashed.
    """
    facts = embedding_facts(model, tower)
    fingerprint = getattr(model, "fingerprint", None)
    module = getattr(getattr(model, "bundle", model), "model", None)
    if fingerprint is None and module is not None:
        fingerprint = fingerprint_of_model(module)
    found = {} if fingerprint is None else {"fingerprint": fingerprint}
    return found | {name: fact for name, fact in facts.items() if name not in ROUNDING}


def identity(model: Encoder) -> dict[str, Any]:
    """Return the identity of a model that is stored with its embeddings, as JSON values.

    The probe of a tower that the model does not have is an empty list. A default prompt is left
    out, since queries and items may have one each.
    """
    model = _unprompted(model)
    probes = _probes(model)
    return {
        "model": model.name,
        "fingerprint": getattr(model, "fingerprint", None),
        "facts": embedding_facts(model),
        **{name: probes[name]().tolist() if name in probes else [] for name in _TOWERS},
    }


def _unprompted(model: Encoder) -> Any:
    """Return the model without its default prompt."""
    owner: Any = getattr(model, "bundle", model)
    rules = getattr(getattr(owner, "tokenizer", None), "config", None)
    if getattr(rules, "default_prompt", None) is None:
        return model
    prompted: Any = model if hasattr(model, "with_prompt") else owner
    return prompted.with_prompt(None)


def width_of(model: Encoder) -> int:
    """Return the dimensions of a model's embeddings, found by encoding a probe."""
    return len(next(iter(_probes(model).values()))())


def _probes(model: Encoder) -> dict[str, Callable[[], np.ndarray]]:
    """Return functions that embed a text and an image, with the towers that the model has."""
    config = getattr(getattr(model, "bundle", model), "config", None)
    probes: dict[str, Callable[[], np.ndarray]] = {
        "probe_text": lambda: np.asarray(model.encode_text([PROBE_TEXT]), np.float32)[0],
        "probe_image": lambda: _first_vector(model),
    }
    kinds = {name: getattr(getattr(config, t, None), "kind", "") for name, t in _TOWERS.items()}
    return {name: probe for name, probe in probes.items() if kinds[name] != "none"}


def _first_vector(model: Encoder) -> np.ndarray:
    """Return the embedding of the probe image, or the first if there are several."""
    if (bundle := multi_vector_bundle(model)) is not None:
        return image_tokens(bundle, [PROBE_IMAGE])[0][0]
    return np.asarray(model.encode_image([PROBE_IMAGE]), np.float32)[0]


def check_identity(stored: dict[str, Any], model: Encoder, where: Path) -> None:
    """Raise a CheckpointError unless `model` embeds like the model of a stored identity."""
    for name in _TOWERS:
        numbers = stored.get(name)
        if not isinstance(numbers, list) or not all(
            type(x) in (int, float) and abs(x) < 1e6 for x in numbers
        ):
            raise CheckpointError(f"{where} has no valid {name!r}: save or build it again")
    if not isinstance(stored.get("model"), str) or not isinstance(stored.get("facts", {}), dict):
        raise CheckpointError(f"{where} does not describe its model: save or build it again")
    model = _unprompted(model)
    fix = f"load {stored['model']!r} as it was, or rebuild it with {model.name!r}"
    probes = _probes(model)
    fingerprint = getattr(model, "fingerprint", None)
    same = [name for name in _TOWERS if stored[name]] == list(probes)  # with the same towers
    for name, probe in probes.items() if same else ():
        z, width = probe(), len(stored[name])
        if len(z) != width:
            raise CheckpointError(
                f"{where} holds embeddings of {width} dimensions and the model {model.name!r} "
                f"makes {len(z)}: {fix}"
            )
        same = same and float(z @ np.asarray(stored[name], np.float32)) >= SAME
        # Two models may share a text tower. With equal fingerprints the second probe is skipped,
        # so that a text search does not compile the vision tower.
        if not same or (fingerprint is not None and fingerprint == stored.get("fingerprint")):
            break
    if not same:
        raise CheckpointError(
            f"{where} was built by the model {stored['model']!r}, and {model.name!r} embeds "
            f"differently: {fix}"
        )


def mismatch(stored: dict[str, Any], model: Encoder) -> str | None:
    """Return why embeddings of `model` do not belong in the same index, or None if they do.

    Stricter than `check_identity`: queries may have another precision, items of an index may not.
    """
    model = _unprompted(model)
    if (before := stored.get("facts")) is not None:
        now = embedding_facts(model)
        names = (before.keys() | now.keys()) - set(ROUNDING)
        before = {name: _shortened(str(fact)) for name, fact in before.items()}
        if differ := sorted(name for name in names if before.get(name) != now.get(name)):
            return f"another {', '.join(differ)}"
    fingerprint = getattr(model, "fingerprint", None)
    if None not in (fingerprint, stored.get("fingerprint")):
        return None if fingerprint == stored["fingerprint"] else "other weights"
    alike = all(
        len(stored[name]) > 0 and float(probe().astype(float) @ stored[name]) >= EQUAL
        for name, probe in _probes(model).items()
    )
    return None if alike else "other weights"
