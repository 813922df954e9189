"""Analytic FLOPs of a model and of a training step, by part.

Matrix products and convolutions count, with two FLOPs per multiply-add. Normalisations, activations
and softmaxes are excluded, since they are memory-bound. Attention counts the full n x n matrix,
causal or not, as the dense implementation computes it.

**Model FLOPs** are those that the mathematics asks for: forward once, backward twice. **Executed
FLOPs** add what is computed again to save memory: rematerialised blocks, the second forward pass
of micro-batches, and the logits of the softmax loss, which nobody stores. MFU, the model FLOPs
utilisation (Chowdhery et al., 2022, arXiv:2204.02311, appendix B), counts the former.

The compiler's own count is of no use here: it sees the body of a loop over layers once.
"""

import functools
from dataclasses import dataclass

from flax import nnx

from vlm.config import AdapterConfig, DistillConfig, Experiment, ModelConfig, SelectionConfig
from vlm.models import adapters
from vlm.models.dual_encoder import DualEncoder
from vlm.models.modules import constants
from vlm.models.towers import text_flops, vision_flops
from vlm.models.trained import is_trained
from vlm.nn.remat import recomputed_share


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part in one step over the global batch."""

    forward: float
    backward: float
    recomputed: float = 0.0  # by rematerialisation

    @property
    def model(self) -> float:
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.model + self.recomputed


@dataclass(frozen=True)
class Supervision:
    """Sizes of the extra supervision of a run, for its FLOPs.

    Attributes:
        classes: number of classes of a classification head.
        width: width of a teacher's embeddings.
        teacher: what embeds every batch; None where the embeddings are stored.
    """

    classes: int = 0
    width: int = 0
    teacher: ModelConfig | None = None


PAIRS_ALONE = Supervision()


def encode_flops(config: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs of encoding one image and one text."""
    image = vision_flops(config.vision, config.tower_dim)
    text = text_flops(config.text, config.tower_dim)
    return sum(image.values()), sum(text.values())


def step_flops(
    experiment: Experiment, supervision: Supervision = PAIRS_ALONE
) -> dict[str, PartFlops]:
    """FLOPs of one training step over the global batch: "vision/mlp", "text/pool", ..., "loss"."""
    e, batch = experiment, experiment.batch_size
    again = 1 if e.in_parts else 0
    towers = {"vision": vision_flops(e.model.vision, e.model.tower_dim, training=True)}
    if e.objective != "classification":  # its texts are encoded once, at the start
        towers["text"] = text_flops(e.model.text, e.model.tower_dim, masking=e.text_masking)
    parts = {}
    for tower, forward in towers.items():
        for part, flops in forward.items():
            flops = batch * flops
            passes, recomputed = _backward_passes(e, tower, part), again * flops
            backward = passes * flops
            if passes:
                recomputed += recomputed_share(e.remat, part) * flops
            parts[f"{tower}/{part}"] = PartFlops(flops, backward, recomputed)
    parts |= _loss_flops(e, supervision.classes)
    if supervision.teacher is not None:
        for tower, flops in zip(("vision", "text"), encode_flops(supervision.teacher), strict=True):
            parts[f"teacher/{tower}"] = PartFlops(e.super_batch_size * flops, 0.0)
    if e.distill is not None:
        parts |= _distillation_flops(e, e.distill, supervision.width)
    if e.selection is not None:
        parts |= _selection_flops(e, e.selection, supervision.width)
    return {name: part for name, part in parts.items() if part.executed}


def _loss_flops(e: Experiment, classes: int) -> dict[str, PartFlops]:
    if e.objective == "classification":
        product = 2 * e.batch_size * classes * e.model.embed_dim
        return {"head": PartFlops(product, 2 * product)}
    product = 2 * e.batch_size**2 * e.model.embed_dim
    # Tiles of the softmax loss are computed once for its sums and once for its gradient.
    extra = product if e.model.loss == "softmax" else 0.0
    return {"loss": PartFlops(product, 2 * product, extra)}


def _distillation_flops(e: Experiment, config: DistillConfig, width: int) -> dict[str, PartFlops]:
    """FLOPs of the distillation losses, for teacher embeddings of `width`."""
    parts, ours = {}, 2 * e.batch_size**2 * e.model.embed_dim
    if config.relations:
        both = ours + 2 * e.batch_size**2 * width
        parts["relations"] = PartFlops(both, 2 * ours, both)
    if config.projection:
        product = 2 * 2 * e.batch_size * e.model.embed_dim * width
        parts["projection"] = PartFlops(product, 2 * product)
    return parts


def _selection_flops(e: Experiment, config: SelectionConfig, width: int) -> dict[str, PartFlops]:
    """FLOPs of the learner's scoring of a super-batch, and of the comparison of its pairs."""
    total, widths = e.super_batch_size, []
    parts = {}
    if config.score != "easy_reference":
        widths.append(e.model.embed_dim)
        for tower, flops in zip(("vision", "text"), encode_flops(e.model), strict=True):
            parts[f"selection/{tower}"] = PartFlops(total * flops, 0.0)
    if config.score != "hard_learner":
        widths.append(width)
    # Of all pairs with the chosen ones, in both directions; losses of batches for the log.
    passes = 2 * (1 + config.chunks if e.model.loss == "softmax" else 1) + 1
    compared = passes * total * e.batch_size + e.batch_size**2
    parts["selection/pairs"] = PartFlops(2.0 * compared * sum(widths), 0.0)
    return parts


def has_backward(experiment: Experiment, tower: str) -> bool:
    """Whether the backward pass of a step enters a tower: it has trained parameters.

    It has none if it is locked, if `freeze` names all of them, or if an adapter is elsewhere.
    """
    e = experiment
    if e.lock == tower:
        return False
    if not e.freeze and e.adapter is None:
        return True
    paths, fixed = _paths(e.model, e.adapter)
    return any(path[0] == tower and is_trained(e, path, fixed) for path in paths)


@functools.lru_cache(maxsize=32)
def _paths(
    model: ModelConfig, adapter: AdapterConfig | None
) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Return the paths of a model's variables with its adapter, and those of its constants."""

    def build() -> DualEncoder:
        encoder = DualEncoder(model, rngs=nnx.Rngs(0))
        return encoder if adapter is None else adapters.prepared(encoder, adapter, 0)

    encoder = nnx.eval_shape(build)
    paths = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(encoder))}
    return paths, constants(encoder)


def _backward_passes(e: Experiment, tower: str, part: str) -> int:
    """Ratio of a part's backward to forward FLOPs: 1 for inputs plus 1 for kernels.

    A tower that `freeze` names in part counts like one that is trained: an upper bound.
    """
    if not has_backward(e, tower):
        return 0
    passes = 2
    if part == "stem" and getattr(e.model.vision, "stem", None) == "linear":
        passes = 1  # pixels need no gradient
    # With an adapter, kernels need none; LoRA factors add about a percent, which is ignored.
    return passes if e.adapter is None else passes - 1


def model_flops(experiment: Experiment, supervision: Supervision = PAIRS_ALONE) -> float:
    """Model FLOPs of one training step over the global batch."""
    return sum(part.model for part in step_flops(experiment, supervision).values())
