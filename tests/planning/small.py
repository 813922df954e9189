"""A dual encoder small enough to compile in seconds, with every kind of part."""

from pathlib import Path

import tiny

from vlm.config import (
    DataConfig,
    DistillConfig,
    Experiment,
    MeshConfig,
    ModelConfig,
    PreprocessConfig,
    SelectionConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)

# Towers with heads of 64 dimensions, as the public models have.
TPU_HEADS = {
    "vision": {"width": 128, "heads": 2, "projection": "linear"},
    "text": {"width": 128, "heads": 2},
}

TEACHER = str(Path(__file__).parent.parent / "weights" / "golden" / "hf_clip")


def taught(how: str) -> dict:
    """The fields of an experiment that is taught more than its pairs: six classes, or a teacher."""
    if how == "distillation":
        return {"distill": DistillConfig(TEACHER, features=1.0, projection=True)}
    if how == "selection":
        return {"selection": SelectionConfig(reference=TEACHER, filter_ratio=0.5, chunks=4)}
    data = DataConfig(str(tiny.folder() / "data"), label="caption", captions=(), eval_split=None)
    return {"objective": how, "init_from": "model", "data": data}


def experiment(
    batch_size=64, mesh=None, loss="softmax", vision=None, text=None, preprocess=None, **fields
) -> Experiment:
    tower = {"width": 64, "heads": 4, "mlp_dim": 256}
    pixels = {"image_size": 32, "patch_size": 8, "depth": 3} | tower | (vision or {})
    words = {"vocab_size": 512, "context_length": 16, "depth": 2} | tower | (text or {})
    return Experiment(
        name="small",
        model=ModelConfig(
            vision=ViTConfig(**pixels),
            text=TextConfig(**words),
            embed_dim=64,
            loss=loss,
            init_bias=None if loss == "softmax" else -10.0,
        ),
        preprocess=PreprocessConfig(image_size=pixels["image_size"], **(preprocess or {})),
        tokenizer=TokenizerConfig(context_length=16),
        batch_size=batch_size,
        mesh=mesh or MeshConfig(),
        **fields,
    )
