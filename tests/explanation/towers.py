"""Config of a small vision tower of each kind, trained on OpenMoji; `KIND` chooses.

    KIND=mean vlm train tests/explanation/towers.py --run-dir runs/mean
    KIND=map TEXT=runs/mean vlm train tests/explanation/towers.py --run-dir runs/map

The first run trains both towers. The others train a vision tower for its text tower, which is
locked. Every tower has 8 x 8 positions, so all heat maps have the same resolution.
"""

import os

from vlm.config import (
    AugmentConfig,
    ConvNeXtConfig,
    DataConfig,
    Experiment,
    FastViTConfig,
    FastViTStage,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TokenizerConfig,
    ViTaminConfig,
    ViTConfig,
)

WIDTH = 96

VIT = {
    "image_size": 64,
    "patch_size": 8,
    "stem": "conv",
    "stem_widths": (16, 32, 64),
    "width": WIDTH,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 192,
    "projection": "linear",
    "activation": "gelu",
}
# Plain patches, as NaFlex needs: tests/explanation/curves.py also measures the tower of kind "map"
# as a NaFlex tower. On square images of its size the two are the same function.
PLAIN = VIT | {"stem": "linear", "stem_widths": (), "projection": "none"}

TOWERS = {
    "class": ViTConfig(**VIT, pool="class"),
    "mean": ViTConfig(**VIT | {"depth": 3}, pool="mean"),
    "map": ViTConfig(**PLAIN, pool="map"),
    "query": ViTConfig(**VIT, pool="query"),
    "rotary": ViTConfig(**VIT, pool="class", rotary=0),
    "resnet": ResNetConfig(image_size=64, depths=(1, 2), width=24, heads=4),
    "fastvit": FastViTConfig(
        stem_width=24,
        stages=(
            FastViTStage(1, 24, 48, halve=False),
            FastViTStage(1, 96, 192),
            FastViTStage(1, 96, 192, heads=4, norm=True, halve=False, position=True),
        ),
        width=192,
        squeeze=24,
        image_size=64,
    ),
    "convnext": ConvNeXtConfig(image_size=64, depths=(1, 2), widths=(32, 96), mlp_dims=(64, 192)),
    "vitamin": ViTaminConfig(
        image_size=128,
        stem_width=8,
        conv_widths=(8, 16),
        conv_depths=(1, 1),
        width=WIDTH,
        depth=2,
        heads=4,
        mlp_dim=96,
    ),
}


BOTH = {
    "optimizer": OptimizerConfig(name="muon", learning_rate=3e-3, weight_decay=0.3),
    "steps": 330,
    "scan": False,
    "remat": "none",
}
VISION_ONLY = {
    "optimizer": OptimizerConfig(learning_rate=2e-3),
    "steps": 120,
    "init_from": os.environ.get("TEXT", "runs/mean"),
    "init_towers": "text",
    "lock": "text",
}


def experiment(kind: str) -> Experiment:
    """Return the experiment that trains the tower of that kind."""
    tower = TOWERS[kind]
    return Experiment(
        name=f"explain-{kind}",
        model=ModelConfig(
            vision=tower,
            text=TextConfig(
                vocab_size=2048,
                context_length=20,
                width=WIDTH,
                depth=1,
                heads=4,
                mlp_dim=192,
                pool="mean",
                pad_id=0,
                projection="linear",
                activation="gelu",
            ),
            embed_dim=WIDTH,
        ),
        preprocess=PreprocessConfig(image_size=tower.image_size, kernel="bilinear"),
        tokenizer=TokenizerConfig(context_length=20),
        data=DataConfig(
            source="openmoji",
            augment=AugmentConfig(crop=(0.7, 1.0), aspect=(0.9, 1.11), jitter=0.05),
            cache=True,
        ),
        **(BOTH if kind == "mean" else VISION_ONLY),
        batch_size=128,
        log_every=20,
        eval_every=1.0,
    )


config = experiment(os.environ.get("KIND", "mean"))
