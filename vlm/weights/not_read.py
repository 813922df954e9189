"""Types of models that are popular as embedders and that vlm does not read, with the reasons."""

import json
from typing import Any

from vlm.errors import CheckpointError

_GENERATIVE = (
    "an embedder on a generative language model, which is another architecture than vlm's towers: "
    "encode with its own library, and search the embeddings with vlm.RetrievalIndex, or several "
    "vectors per item with vlm.heads.MultiVectorIndex"
)
_LLM = (
    "a CLIP whose texts are embedded by a language model of billions of parameters, which vlm does "
    "not have: use its base CLIP, or siglip2-large for long captions"
)
_SOUND = "which embeds sound: vlm has towers of images, videos and texts"
_REASONS = {
    **dict.fromkeys(
        (
            "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe",
            "colpali", "colqwen2", "colqwen2_5", "colqwen3", "colmodernvbert", "colidefics3",
            "modernvbert", "paligemma", "llava", "llava_next", "llava_qwen2", "llava_onevision",
            "idefics2", "idefics3", "smolvlm", "phi3_v", "mllama",
            "jina_embeddings_v4", "jina_embeddings_v5_omni",
        ),
        _GENERATIVE,
    ),
    **dict.fromkeys(("clap", "pe_audio", "pe_audio_video"), _SOUND),
    "pe_video": "the video half of PE-AV, whose encoder vlm does not have: use encode_video of a "
    "Perception Encoder in open_clip's layout",
}  # fmt: skip


def refuse_by_name(values: dict[str, Any], where: str) -> None:
    """Raise a CheckpointError with the reason, if a `config.json` is of one of these types."""
    kind = values.get("model_type")
    reason = _REASONS.get(kind) if isinstance(kind, str) else None
    name = f"of the type {kind}"
    if "LLM2CLIP" in json.dumps([values.get("architectures"), values.get("auto_map")]):
        name, reason = "LLM2CLIP", _LLM
    if reason is not None:
        raise CheckpointError(f"{where} is {name}, {reason}")
