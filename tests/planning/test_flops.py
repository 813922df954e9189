"""The analytic FLOPs are those of the program: counted in its jaxpr, and by XLA itself."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small import experiment, taught

import vlm.planning
from vlm.config import (
    ConvNeXtConfig,
    EfficientNetConfig,
    EfficientNetStage,
    EncoderTextConfig,
    FastViTConfig,
    FastViTStage,
    GroupViTConfig,
    MeshConfig,
    QFormerConfig,
    ResNetV1Config,
    SwinConfig,
    ViTaminConfig,
    ViTConfig,
)
from vlm.models.dual_encoder import DualEncoder
from vlm.models.flops import (
    encode_flops,
    model_flops,
    step_flops,
)
from vlm.models.towers import text_flops, text_tower, vision_flops, vision_tower
from vlm.nn.transformer import Execution
from vlm.planning.compile import batch_of, planned_supervision
from vlm.sharding import make_mesh
from vlm.training.step import Trainer


def counted(jaxpr) -> float:
    """Operations of all products in a jaxpr, loops multiplied out."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, times = eqn.primitive.name, 1
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
            )
        if name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[numbers.rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs
        if name == "scan":
            times = eqn.params["length"]
        if name == "while":
            raise AssertionError("a loop of unknown length")
        inner = [counted(j) for j in inner_jaxprs(eqn.params)]
        # The forms of attention for each platform compute the same products.
        total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def inner_jaxprs(parameters):
    """The jaxprs among an equation's parameters, closed or open, alone or in a tuple."""
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def executed(e) -> float:
    return sum(part.executed for part in step_flops(e, planned_supervision(e).supervision).values())


def step_products(e) -> float:
    mesh, extra = make_mesh(MeshConfig(), jax.devices()[:1]), planned_supervision(e)
    trainer = Trainer(e, mesh, classes=extra.classes, teacher=extra.teacher)
    step = counted(trainer.step.trace(trainer.abstract_state, batch_of(e)).jaxpr.jaxpr)
    return step + (counted(extra.embedding.trace(mesh).jaxpr.jaxpr) if extra.embedding else 0)


CASES = {
    "products kept": {"remat": "dots"},
    "all again": {"remat": "full", "micro_batch_size": 16},
    "SigLIP, FLIP": {
        "loss": "sigmoid",
        "remat": "dots_no_batch",
        "vision": {"patch_dropout": 0.5},
        "text": {"pool": "map"},
        "text_masking": 0.25,
    },
    "LiT": {
        "lock": "vision",
        "init_from": "model",
        "vision": {"pool": "class", "projection": "linear"},
    },
    "NaFlex": {
        "vision": {"max_patches": 24, "patch_dropout": 0.25},
        "preprocess": {"resize": "naflex", "patch_size": 8, "max_patches": 24},
    },
    "CoCa": {"vision": {"pool": "query", "projection": "linear"}, "text": {"pool": "class"}},
}


@pytest.mark.parametrize("case", [*CASES, "classification", "distillation", "selection"])
def test_executed_flops_are_the_products_of_the_step(case):
    e = experiment(**(CASES[case] if case in CASES else taught(case)))
    # What the jaxpr holds beyond: gradients of the pixels and of unused halves of tiles.
    assert executed(e) == pytest.approx(step_products(e), rel=0.02)


def test_forward_flops_are_those_that_xla_counts():
    """XLA counts every elementwise operation too: at this width they are less than a tenth."""
    config = experiment().model
    model = nnx.eval_shape(
        lambda: DualEncoder(config, execution=Execution(scan=False), rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    run = jax.jit(lambda state, i, t: nnx.merge(graph, state)(i, t))
    cost = run.lower(state, images, tokens).cost_analysis()
    ours = 4 * sum(encode_flops(config))
    assert ours <= cost["flops"] <= 1.12 * ours


def test_mathematics_asks_for_no_more_whatever_is_computed_again():
    plain = model_flops(experiment())
    assert model_flops(experiment(remat="full")) == plain
    assert model_flops(experiment(micro_batch_size=16)) == plain
    assert executed(experiment(remat="full")) > executed(experiment(remat="dots"))
    assert model_flops(experiment(lock="vision", init_from="model")) < plain


def test_flops_grow_with_the_batch_and_those_of_the_loss_with_its_square():
    one, two = step_flops(experiment(batch_size=64)), step_flops(experiment(batch_size=128))
    for name in one:
        assert two[name].model == (4 if name == "loss" else 2) * one[name].model


STAGES = (FastViTStage(1, 8, 12, halve=False), FastViTStage(2, 32, 40, 2, True, True, 4, True))
EFFICIENT = (EfficientNetStage(1, 8, 1), EfficientNetStage(2, 12, 3, 5, halve=True, symmetric=True))
TOWERS = [
    EfficientNetConfig(30, 16, EFFICIENT),
    EfficientNetConfig(30, 16, EFFICIENT, head_width=64, symmetric=True, pool="attention"),
    SwinConfig(44, (2, 2), (8, 16), (2, 4), (16, 20), window=3, projection="mlp_bias"),
    ResNetV1Config(44, (1, 2), stem_width=8),
    ResNetV1Config(44, (2, 1), stem_width=32, bottleneck=False, pool="rotary_attention"),
    FastViTConfig(8, STAGES, width=64, squeeze=4, image_size=30),
    ConvNeXtConfig(44, (1, 2, 1), (8, 16, 24), (16, 20, 40), projection="mlp"),
    ViTaminConfig(48, 8, (8, 16), (2, 1), width=24, depth=2, heads=3, mlp_dim=20),
    ViTConfig(32, 8, 24, 2, 3, 40, stem="nested", stem_widths=(8, 12), pool="class", mlp="swiglu",
              projection="linear"),
    ViTConfig(32, 8, 24, 2, 3, 40, pool="map", pool_mlp_dim=100, projection="linear"),
    ViTConfig(32, 8, 24, 2, 3, 40, pool="probe", projection="linear", mlp="swiglu_plain"),
    ViTConfig(32, 8, 24, 2, 3, 40, pool="qformer", projection="linear_bias",
              qformer=QFormerConfig(5, 30, 3, 3, 20)),
    ViTConfig(32, 8, 24, 2, 3, 40, pool="class_mean", projection="linear", head_depth=2,
              head_mlp_dim=30),
    GroupViTConfig(32, 8, 24, (2, 1, 1), (5, 3, 0), 3, 40, 10, 30, projection_dim=28),
]  # fmt: skip


@pytest.mark.parametrize("vision", TOWERS, ids=lambda v: getattr(v, "stem", v.kind))
def test_flops_of_a_tower_are_those_of_its_program(vision):
    execution, size = Execution(remat="none"), vision.image_size
    tower = vision_tower(vision, 20, execution=execution, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(tower)(jnp.zeros((1, size, size, 3))).jaxpr
    assert sum(vision_flops(vision, 20).values()) == counted(jaxpr)


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_flops_of_a_text_encoder_are_those_of_its_program(positions):
    text = EncoderTextConfig(48, 8, 24, 2, 3, 6, 20, positions, projection="mlp")
    tower = text_tower(text, 20, execution=Execution(remat="none"), rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(tower)(jnp.ones((1, 8), jnp.int32)).jaxpr
    assert sum(text_flops(text, 20).values()) == counted(jaxpr)


def test_flops_of_naflex_are_of_as_many_patches_as_it_takes():
    square = ViTConfig(64, 16, 24, 2, 3, 40, pool="map", projection="linear")
    long = dataclasses.replace(square, max_patches=48)
    ours, theirs = vision_flops(long, 20), vision_flops(square, 20)
    assert (ours["mlp"], ours["scores"]) == (3 * theirs["mlp"], 9 * theirs["scores"])
    assert ours["pool"] > 2 * theirs["pool"]


def test_a_plan_counts_the_scoring_of_a_super_batch():
    """Forward passes of learner and reference over it, and its examples."""
    plain, chosen = experiment(examples=2**20), experiment(examples=2**20, **taught("selection"))
    before = vlm.planning.plan(plain, "h100:8", compiled=False)
    after = vlm.planning.plan(chosen, "h100:8", compiled=False)
    forward = sum(encode_flops(chosen.model))
    scoring = sum(after.flops[f"selection/{tower}"].forward for tower in ("vision", "text"))
    assert scoring == 128 * forward
    teacher = planned_supervision(chosen).supervision.teacher
    assert teacher is not None
    found = sum(after.flops[f"teacher/{tower}"].forward for tower in ("vision", "text"))
    assert found == 128 * sum(encode_flops(teacher))
    one, other = before.needs(), after.needs()
    assert one is not None
    assert other is not None
    assert one.examples == other.examples == 2**20
    assert after.sent["selection of pairs"] == 64 * 32 * 32 * 3 * 7 / 8
