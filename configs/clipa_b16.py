"""CLIPA's ViT-B/16 on LAION-400M as one run: 112 pixels first, then 224 (arXiv:2305.07017).

The schedule, learning rates, batch size and steps are those of its code: seven epochs of small
images, then 4,000 steps at the full size with a tenth of the learning rate. Two things differ:
position embeddings are learned from the start, and the text tower is CLIP's.

`vlm plan configs/clipa_b16.py --topology v5e:16x16` plans both phases.
"""

import dataclasses

from vlm.config import AugmentConfig, DataConfig, Experiment, OptimizerConfig, Phase
from vlm.evaluation.presets import imagenet
from vlm.models import recipes

SMALL_STEPS, FULL_STEPS = 85_449, 4_000  # 2.8 billion pairs, and 131 million
CONTEXT = 32

recipe = recipes.clip("B/16", image_size=112)
recipe["model"] = dataclasses.replace(
    recipe["model"],
    text=dataclasses.replace(recipe["model"].text, context_length=CONTEXT),  # pyright: ignore
)
recipe["tokenizer"] = dataclasses.replace(recipe["tokenizer"], context_length=CONTEXT)

config = Experiment(
    **recipe,
    name="clipa-b16",
    data=DataConfig(
        source="gs://BUCKET/laion400m/*.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=(0.4, 1.0)),
        workers=16,
    ),
    evals=(imagenet("wds:gs://BUCKET/evals/imagenet1k"),),
    eval_every=0.05,
    optimizer=OptimizerConfig(
        learning_rate=1.024e-3, warmup=1_600 / SMALL_STEPS, b2=0.95, weight_decay=0.2
    ),
    batch_size=32_768,
    steps=SMALL_STEPS + FULL_STEPS,
    remat="dots",
    checkpoint_every=0.01,
    phases=(
        Phase(
            {
                "model.vision.image_size": 224,
                "preprocess.image_size": 224,
                "optimizer.learning_rate": 1.024e-4,
                "optimizer.warmup": 800 / FULL_STEPS,
            },
            step=SMALL_STEPS,
            restart_schedule=True,
        ),
    ),
)
