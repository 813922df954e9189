"""The arithmetic of a model and of a training step, counted part by part.

Counted are matrix products and convolutions, a multiplication and an addition as two operations.
Normalisations, activations and softmaxes are left out: they are limited by memory, not arithmetic.
Attention counts its whole n x n matrix, causal or not, as the dense form computes it.

**Model FLOPs** are those that the mathematics asks for: forward once, backward twice. **Executed
FLOPs** add what is computed again to save memory: rematerialised blocks, the second forward pass
of micro-batches, and the logits of the softmax loss, which nobody stores. MFU, the model FLOPs
utilisation (Chowdhery et al., 2022, arXiv:2204.02311, appendix B), counts the former.

The compiler's own count is of no use here: it sees the body of a loop over layers once.
"""

from dataclasses import dataclass

from vlm.config import Experiment, ModelConfig, TextConfig, VisionConfig

# The share of each part that a rematerialisation policy computes again in the backward pass. No
# gradient needs a block's last product, so even "full" computes half an MLP; one product in four
# of attention's projections is never kept, and attention's weights are not.
RECOMPUTED = {
    "none": {},
    "dots": {"projections": 0.25, "scores": 0.5},
    "dots_no_batch": {"projections": 0.25, "scores": 1.0},
    "full": {"projections": 1.0, "scores": 1.0, "mlp": 0.5},
}


@dataclass(frozen=True)
class PartFlops:
    """Operations of one part in one step over the global batch."""

    forward: float
    backward: float
    recomputed: float = 0.0  # again, beyond what the mathematics asks for

    @property
    def model(self) -> float:
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.model + self.recomputed


def vision_flops(config: VisionConfig, embed_dim: int, *, training: bool = False) -> dict:
    """Forward FLOPs of one image, by part: stem, projections, scores, mlp, pool, projection.

    With `training`, patch dropout leaves out its share of the tokens.
    """
    c = config
    if c.resnet:
        return _resnet(c, embed_dim)
    if c.fastvit is not None:
        return _fastvit(c, embed_dim)
    grid = c.image_size // c.patch_size
    tokens = grid**2
    if c.stem == "conv":
        stem, size, channels = 0.0, c.image_size, 3
        for width in c.stem_widths:
            size //= 2
            stem += 2 * size**2 * 9 * channels * width
            channels = width
        stem += 2 * tokens * channels * c.width
    else:
        stem = 2 * tokens * c.patch_size**2 * 3 * c.width
    if training and c.patch_dropout:
        tokens = max(1, round(tokens * (1 - c.patch_dropout)))
    tokens += c.class_token or c.pool == "class"
    pooled = embed_dim if c.pool == "query" else c.width
    return {
        "stem": stem,
        **_blocks(c, tokens),
        "pool": _pool(c, tokens, embed_dim),
        "projection": _projection(c, pooled, embed_dim),
    }


def text_flops(config: TextConfig, embed_dim: int, *, masking: float = 0.0) -> dict:
    """Forward FLOPs of one text, by part: projections, scores, mlp, pool, projection.

    `masking` is the share of its places that training leaves out.
    """
    tokens = max(1, round(config.context_length * (1 - masking))) + (config.pool == "class")
    return {
        **_blocks(config, tokens),
        "pool": _pool(config, tokens, embed_dim),
        "projection": _projection(config, config.width, embed_dim),
    }


def encode_flops(config: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs of encoding one image and one text."""
    image = vision_flops(config.vision, config.embed_dim)
    text = text_flops(config.text, config.embed_dim)
    return sum(image.values()), sum(text.values())


def step_flops(experiment: Experiment) -> dict[str, PartFlops]:
    """FLOPs of one training step over the global batch: "vision/mlp", "text/pool", ..., "loss"."""
    e, batch = experiment, experiment.batch_size
    again = 1 if e.micro_batch_size not in (None, batch) else 0
    towers = {
        "vision": vision_flops(e.model.vision, e.model.embed_dim, training=True),
        "text": text_flops(e.model.text, e.model.embed_dim, masking=e.text_masking),
    }
    parts = {}
    for tower, forward in towers.items():
        for part, flops in forward.items():
            flops = batch * flops
            backward, recomputed = 2 * flops, again * flops
            vit = not (e.model.vision.resnet or e.model.vision.fastvit)
            if part == "stem" and e.model.vision.stem == "linear" and vit:
                backward = flops  # pixels need no gradient
            if e.lock == tower:
                backward = 0.0
            else:
                recomputed += RECOMPUTED[e.remat].get(part, 0.0) * flops
            parts[f"{tower}/{part}"] = PartFlops(flops, backward, recomputed)
    product = 2 * batch**2 * e.model.embed_dim
    # Tiles of the softmax loss are computed once for its sums and once for its gradient.
    extra = product if e.model.loss == "softmax" else 0.0
    parts["loss"] = PartFlops(product, 2 * product, extra)
    return {name: part for name, part in parts.items() if part.executed}


def model_flops(experiment: Experiment) -> float:
    """Model FLOPs of one training step over the global batch."""
    return sum(part.model for part in step_flops(experiment).values())


def executed_flops(experiment: Experiment) -> float:
    """FLOPs that one training step computes, recomputation included."""
    return sum(part.executed for part in step_flops(experiment).values())


def _blocks(config, tokens: int) -> dict[str, float]:
    """Of all blocks: `scores` are the two products without parameters in attention."""
    width = config.width
    return {
        "projections": config.depth * 2 * tokens * 4 * width**2,
        "scores": config.depth * 2 * 2 * tokens**2 * width,
        "mlp": config.depth * 2 * tokens * 2 * width * config.mlp_dim,
    }


def _pool(config, tokens: int, embed_dim: int) -> float:
    """Attention pooling: one query, a key and a value for each token, and what follows."""
    width = config.width
    if config.pool == "map":
        attention = 2 * (2 * width**2 + 2 * tokens * width**2 + 2 * tokens * width)
        return attention + 2 * 2 * width * config.mlp_dim
    if config.pool == "query":
        keys_and_values = 2 * tokens * width * embed_dim
        return 2 * (2 * embed_dim**2 + keys_and_values + 2 * tokens * embed_dim)
    return 0.0


def _projection(config, width: int, embed_dim: int) -> float:
    return 0.0 if config.projection == "none" else 2 * width * embed_dim


def _resnet(config: VisionConfig, embed_dim: int) -> dict[str, float]:
    """Convolutions of CLIP's ResNet (vlm/models/resnet.py) and its attention pooling."""
    half, size = config.width // 2, config.image_size // 2
    stem = 2 * size**2 * 9 * (3 * half + half**2 + half * config.width)
    size, inputs, stages = size // 2, config.width, 0.0
    for stage, depth in enumerate(config.resnet):
        width, outputs = config.width * 2**stage, config.width * 2**stage * 4
        for block in range(depth):
            before = size
            size //= 2 if stage > 0 and block == 0 else 1
            stages += 2 * before**2 * (inputs * width + 9 * width**2)
            stages += 2 * size**2 * width * outputs
            stages += 2 * size**2 * inputs * outputs if block == 0 else 0
            inputs = outputs
    tokens = size**2 + 1
    pool = 2 * (inputs**2 + 2 * tokens * inputs**2 + 2 * tokens * inputs + inputs * embed_dim)
    return {"stem": stem, "stages": stages, "pool": pool}


def _fastvit(config: VisionConfig, embed_dim: int) -> dict[str, float]:
    """Convolutions and attention of FastViT (vlm/models/fastvit.py), depthwise ones included."""
    parts, width = config.fastvit, config.fastvit.stem_width
    size = _half(config.image_size)
    stem = 2 * size**2 * 27 * width
    size = _half(size)
    stem += 2 * size**2 * (9 * width + width**2)
    stages = 0.0
    for s in parts.stages:
        if s.halve:
            size = _half(size)
            stages += 2 * size**2 * (49 * s.width + s.width**2) + 4 * s.width * s.squeeze
        places = size**2
        stages += 2 * places * 49 * s.width * s.position
        mixer = 2 * places * (4 * s.width**2 + 2 * places * s.width) if s.heads else 0.0
        mixer = mixer or 2 * places * 9 * s.width
        stages += s.depth * (mixer + 2 * places * (49 * s.width + 2 * s.width * s.mlp_dim))
    pool = 2 * size**2 * 9 * config.width + 4 * config.width * parts.squeeze
    return {
        "stem": stem,
        "stages": stages,
        "pool": pool,
        "projection": _projection(config, config.width, embed_dim),
    }


def _half(size: int) -> int:
    """What a padded stride of 2 leaves of a side."""
    return (size + 1) // 2
