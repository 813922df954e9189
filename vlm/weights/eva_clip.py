"""EVA-CLIP-8B and 18B in transformers' layout: `EvaCLIPModel` of their own code (arXiv:2402.04252).

The model_type is CLIP's, and the class says that it is another. Its towers choose RMSNorm, the
place of the norms and the biases; the projection of images has a bias. A folder without an image
processor has CLIP's, as the model cards say.
"""

import dataclasses
import logging
from typing import Any

from etils import epath

from vlm.config import CLIP_MEAN, CLIP_STD, ModelConfig, PreprocessConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, weights, with_zero_biases
from vlm.weights.fields import boolean, fields, with_defaults
from vlm.weights.layers import linear
from vlm.weights.rules import CONV, Rule

_log = logging.getLogger(__name__)
ARCHITECTURE = "EvaCLIPModel"
_CLIP = huggingface.DEFAULTS["clip"]
_SWITCHES = ("q_bias", "k_bias", "v_bias", "use_rms_norm", "post_layernorm")
# Of a later version of the code, for other models.
_OFF = ("use_rope", "use_swiglu_mlp", "use_sub_ln")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: a switch is missing, an option that vlm does not support, or a field of
            another type or size.
    """
    vision = huggingface.tower_fields(values, "vision", _CLIP["vision"], where)
    text = huggingface.tower_fields(values, "text", _CLIP["text"], where)
    towers = {}
    for part in ("vision", "text"):
        place = f"{where}: {part}_config"
        switches = _switches(values, part, where)
        towers[part] = {
            "norm": "branch" if switches["post_layernorm"] else "pre",
            "norm_kind": "rms" if switches["use_rms_norm"] else "layer",
        }
        for name in _OFF:
            if fields(values.get(f"{part}_config"), place).get(name):
                raise CheckpointError(f"{place}.{name} is on: vlm does not support it in EVA-CLIP")
    tower = huggingface.clip_text(text, "clip", f"{where}: text_config")
    # It pools at the highest id, whatever eos_token_id is.
    tower = dataclasses.replace(tower, pool="argmax", end_id=None, **towers["text"])
    options = huggingface.tower_options(vision, f"{where}: vision_config")
    return ModelConfig(
        ViTConfig(**options, pool="class", projection="linear_bias", **towers["vision"]),
        tower,
        embed_dim=with_defaults(values, _CLIP["model"], where)["projection_dim"],
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit, or an option that vlm does not support.
    """
    tensors, table = weights(folder, *huggingface.WEIGHTS), rules(config)
    for part in ("vision", "text"):
        switches = _switches(values, part, f"{folder / 'config.json'}")
        off = tuple(f".{x}_proj.bias" for x in "qkv" if not switches[f"{x}_bias"])
        own = [rule for rule in table if rule.theirs.startswith(f"{part}_model.")]
        tensors = with_zero_biases(tensors, own, lambda name, off=off: name.endswith(off))
    preprocess = None
    if not any((folder / name).exists() for name in _PROCESSORS):
        preprocess = PreprocessConfig(
            image_size=config.vision.image_size,
            resize="crop",
            crop_rounding="floor",
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )
        _log.info("%s has no image processor: images are prepared as by CLIP's", folder)
    return huggingface.assemble(folder, config, table, tensors=tensors, preprocess=preprocess)


def rules(config: ModelConfig) -> list[Rule]:
    """Rules of a model: CLIP's but for the norms, the bias of the stem and that of the projection.

    RMSNorm has no bias.
    """
    kinds = {tower: getattr(config, tower).norm_kind for tower in ("vision", "text")}
    table = [
        rule
        for rule in huggingface.CLIP_RULES
        if not str(rule.ours).startswith(("vision.pre_norm", "vision.projection", "vision.stem"))
        and not (
            str(rule.ours).endswith("norm.bias") and kinds[str(rule.ours).split(".")[0]] == "rms"
        )
    ]
    stem = "vision_model.embeddings.patch_embedding"
    table += linear(stem, "vision.stem", kernel=CONV)
    return [*table, *linear("visual_projection", "vision.projection")]


def _switches(values: dict[str, Any], part: str, where: str) -> dict[str, bool]:
    """Return the switches of a tower, which must all be given: their defaults are not published."""
    place = f"{where}: {part}_config"
    given = fields(values.get(f"{part}_config"), place)
    if missing := [name for name in _SWITCHES if name not in given]:
        raise CheckpointError(
            f"{place} has no {', '.join(missing)}, which {ARCHITECTURE} needs: download it again"
        )
    return {
        name: given[name] is not None and boolean(given[name], f"{place}.{name}")
        for name in _SWITCHES
    }
