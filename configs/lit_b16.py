"""LiT: a locked ViT-B/16 and a text tower that learns to read it (arXiv:2111.07991).

The vision tower comes from `init_from`; it gets no gradient and no optimizer state.

`vlm plan configs/lit_b16.py --topology v5e:8x8` says:

    peak of a chip                     2.66 GiB of 15.75 GiB (compiled)
    a chip sends: FSDP gathers         514.69 MiB (compiled)
    a chip sends: gradient reduction   435.42 MiB (compiled)
    a chip sends: loss ring            72.00 MiB (compiled)
    FLOPs of the model and step        1.12 PFLOP (analytic)
    step, bound by compute             202 to 303 ms, 54k to 81k pairs/s (expected)
    MFU                                29 to 44% (expected)
"""

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    OptimizerConfig,
)
from vlm.evaluation.presets import coco, imagenet
from vlm.models import recipes

config = Experiment(
    **recipes.siglip("B/16", tokenizer_file="gs://BUCKET/tokenizers/c4_en/tokenizer.json"),
    name="lit-b16",
    init_from="gs://BUCKET/siglip-b16",
    init_towers="vision",
    lock="vision",
    data=DataConfig(
        source="gs://BUCKET/pairs/*.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=None),
        interleave=1024,  # shards read side by side: several for each worker of 64 hosts
        shuffle=131_072,  # samples, over all readers
        workers=16,
    ),
    evals=(
        imagenet("wds:gs://BUCKET/evals/imagenet1k", templates="siglip"),
        coco("wds:gs://BUCKET/evals/coco"),
    ),
    eval_every=0.02,
    optimizer=OptimizerConfig(
        name="adafactor",
        learning_rate=1e-3,
        b2=0.999,
        weight_decay=1e-4,
        weight_decay_rule="big_vision",
        max_scale=None,
    ),
    batch_size=16_384,
    examples=900_000_000,
    remat="dots_no_batch",
)
