"""A small CLIP on OpenMoji: 3,741 drawings with captions, a few minutes on two CPU cores.

The held-out images are skin-tone variants whose combinations are new and whose parts are not.
"""

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    TextConfig,
    TokenizerConfig,
    VisionConfig,
)

config = Experiment(
    name="openmoji",
    model=ModelConfig(
        vision=VisionConfig(
            image_size=64,
            patch_size=8,
            width=192,
            depth=4,
            heads=4,
            mlp_dim=768,
            pool="mean",
            projection="linear",
            activation="gelu",
        ),
        text=TextConfig(
            vocab_size=2048,
            context_length=24,
            width=192,
            depth=2,
            heads=4,
            mlp_dim=768,
            pool="mean",
            pad_id=0,
            projection="linear",
            activation="gelu",
        ),
        embed_dim=192,
    ),
    preprocess=PreprocessConfig(image_size=64, kernel="bilinear"),
    tokenizer=TokenizerConfig(context_length=24),
    data=DataConfig(
        source="openmoji",
        captions=("caption",),
        augment=AugmentConfig(crop=(0.75, 1.0), jitter=0.1),
        cache=True,
    ),
    optimizer=OptimizerConfig(name="muon", learning_rate=2e-3),
    batch_size=256,
    epochs=2,
    scan=False,
    eval_every=0.25,
)
