"""MobileCLIP's vision towers inside open_clip folders: timm's FastViT with fused branches.

In training, a block is a sum of convolutions, batch norms, skips and factors. All of them are
linear. `Fused` reads the one convolution that equals their sum (arXiv:2303.14189, section 3).
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from vlm.config import FastViTConfig, FastViTStage
from vlm.errors import CheckpointError
from vlm.weights.checkpoint import Computed, ComputedTensors
from vlm.weights.fields import list_names
from vlm.weights.files import Tensors, read_parameter
from vlm.weights.layers import conv, linear, norm, out, point, qkv
from vlm.weights.rules import Rule, Shape, Shapes, count_layers
from vlm.weights.timm import TRUNK

_NAME = re.compile(r"fastvit_mci([0-4])(\..*)?$")  # those that timm made for MobileCLIP
NAMES = {_NAME: {("avg", None)}}
READS = "fastvit_mci* with the mean of the image (avg) and no extra projection"
_HEAD_WIDTH = 32
_EPS = 1e-5  # of all their norms


def _large(name: str) -> bool:
    """Whether it is MobileCLIP2's S3 or S4: LayerNorm in attention, no scale branch in the stem."""
    match = _NAME.match(name)
    return match is not None and match[1] in "34"


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> FastViTConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    return FastViTConfig(
        image_size=image_size,
        stem_width=_kernel(shapes, f"{TRUNK}.stem.0", "conv_kxk.0.conv")[0],
        stages=tuple(_stages(name, shapes)),
        width=shapes[f"{TRUNK}.head.fc.weight"][1],
        squeeze=shapes[f"{TRUNK}.final_conv.se.fc1.weight"][0],
        norm_eps=_EPS,
    )


def _stages(name: str, shapes: Shapes):
    for number in range(count_layers(shapes, f"{TRUNK}.stages.{{}}.blocks.0.mlp.fc1.weight")):
        stage = f"{TRUNK}.stages.{number}"
        mlp_dim, width = shapes[f"{stage}.blocks.0.mlp.fc1.weight"][:2]
        attends = f"{stage}.blocks.0.token_mixer.qkv.weight" in shapes
        yield FastViTStage(
            depth=count_layers(shapes, f"{stage}.blocks.{{}}.mlp.fc1.weight"),
            width=width,
            mlp_dim=mlp_dim,
            heads=width // _HEAD_WIDTH if attends else 0,
            norm=attends and _large(name),
            halve=any(n.startswith(f"{stage}.downsample.") for n in shapes),
            squeeze=shapes.get(f"{stage}.downsample.proj.0.se.fc1.weight", (0,))[0],
            position=any(n.startswith(f"{stage}.pos_emb.") for n in shapes),
        )


def _kernel(shapes: Shapes, block: str, branch: str) -> Shape:
    """Shape of the fused kernel of a block, or of one branch if it is not fused."""
    fused = f"{block}.reparam_conv.weight"
    return shapes[fused] if fused in shapes else shapes[f"{block}.{branch}.weight"]


class Fused(ComputedTensors):
    """Tensors of a FastViT with one convolution per block, `reparam_conv` as in timm.

    Blocks that are fused already are read as they are. Sums are taken in float64.

    Raises:
        CheckpointError: lists every branch that is missing or of another shape.
    """

    def __init__(self, tensors: Tensors, config: FastViTConfig, name: str):
        self.where = tensors.where
        self._tensors = tensors
        self._needed: dict[str, Shape] = {}
        self._made: dict[str, Computed] = {}
        self._stem(config.stem_width, scale=not _large(name))
        inputs = config.stem_width
        for number, stage in enumerate(config.stages):
            self._stage(f"{TRUNK}.stages.{number}", stage, inputs)
            inputs = stage.width
        self._block(f"{TRUNK}.final_conv", inputs, config.width, 3)
        self._check()
        super().__init__(tensors, self._made, self._needed)

    def _check(self) -> None:
        have = self._tensors.shapes
        faults = [
            f"{name} is missing"
            if name not in have
            else f"{name} has the shape {tuple(have[name])} and not {shape}"
            for name, shape in self._needed.items()
            if tuple(have.get(name, ())) != shape
        ]
        if faults:
            raise CheckpointError(
                f"{self.where} does not hold every branch of its FastViT: {list_names(faults)}"
            )

    def _stem(self, width: int, *, scale: bool) -> None:
        stem = f"{TRUNK}.stem"
        self._block(f"{stem}.0", 3, width, 3, depthwise=False, scale=scale)
        self._block(f"{stem}.1", width, width, 3, scale=scale)
        self._block(f"{stem}.2", width, width, 1, depthwise=False, identity=True)

    def _stage(self, stage: str, s: FastViTStage, inputs: int) -> None:
        if s.halve:
            self._block(f"{stage}.downsample.proj.0", inputs, s.width, 7, large=True)
            project = f"{stage}.downsample.proj.1"
            self._block(project, s.width, s.width, 1, depthwise=False, identity=True)
        if s.position:
            self._position(f"{stage}.pos_emb", s.width)
        for number in range(s.depth):
            block = f"{stage}.blocks.{number}"
            if s.heads:
                self._attention(block, s)
            else:
                self._mixer(f"{block}.token_mixer", s.width)
            parts = self._conv(f"{block}.mlp.conv", s.width, 1, 7)
            self._put(f"{block}.mlp.conv", (s.width, 1, 7, 7), lambda parts=parts: parts(7))
            gamma = f"{block}.layer_scale{'_2' if s.heads else ''}.gamma"
            self._scaled(f"{block}.mlp.fc2", gamma, (s.width, s.mlp_dim, 1, 1))

    def _block(
        self,
        block: str,
        inputs: int,
        outputs: int,
        size: int,
        *,
        depthwise: bool = True,
        scale: bool = True,
        identity: bool = False,
        large: bool = False,
    ) -> None:
        """Fuse a downsampling block (`large`), or one of MobileOne (arXiv:2206.04040)."""
        if self._is_fused(block):
            return
        groups = 1 if depthwise else inputs
        if large:
            names = [(f"{block}.large_conv", size), (f"{block}.small_conv", 3)]
        else:
            names = [(f"{block}.conv_kxk.0", size)]
            names += [(f"{block}.conv_scale", 1)] if scale and size > 1 else []
        branches = [self._conv(name, outputs, groups, own) for name, own in names]
        if identity:
            branches.append(self._identity(f"{block}.identity", outputs, groups))
        self._put(block, (outputs, groups, size, size), lambda: _sum(b(size) for b in branches))

    def _mixer(self, mixer: str, width: int) -> None:
        """Fuse x + scale * (mixer(x) - norm(x))."""
        if self._is_fused(mixer):
            return
        branches = [
            self._conv(f"{mixer}.mixer.conv_kxk.0", width, 1, 3),
            self._conv(f"{mixer}.mixer.conv_scale", width, 1, 1),
            self._identity(f"{mixer}.mixer.identity", width, 1),
        ]
        normed = self._identity(f"{mixer}.norm.identity", width, 1)
        gamma = self._need(f"{mixer}.layer_scale.gamma", (width, 1, 1))

        def make():
            kernel, bias = _sum(branch(3) for branch in branches)
            norm_kernel, norm_bias = normed(3)
            scale = self._wide(gamma).reshape(-1)
            kernel = _skip(width, 1, 3) + scale[:, None, None, None] * (kernel - norm_kernel)
            return kernel, scale * (bias - norm_bias)

        self._put(mixer, (width, 1, 3, 3), make)

    def _position(self, position: str, width: int) -> None:
        if self._is_fused(position):
            return
        weight = self._need(f"{position}.pos_enc.weight", (width, 1, 7, 7))
        bias = self._need(f"{position}.pos_enc.bias", (width,))
        self._put(
            position,
            (width, 1, 7, 7),
            lambda: (self._wide(weight) + _skip(width, 1, 7), self._wide(bias)),
        )

    def _attention(self, block: str, s: FastViTStage) -> None:
        """Fuse the batch norm before it and the factors after it into its matrices."""
        qkv, shape = f"{block}.token_mixer.qkv", (3 * s.width, s.width)
        matrix = self._need(f"{qkv}.weight", shape)
        if s.norm:
            self._compute(matrix, shape, lambda: self._wide(matrix))
            self._compute(f"{qkv}.bias", shape[:1], lambda: np.zeros(shape[0]))
        else:
            affine = self._batch_norm(f"{block}.norm", s.width)
            self._compute(matrix, shape, lambda: self._wide(matrix) * affine()[0])
            self._compute(f"{qkv}.bias", shape[:1], lambda: self._wide(matrix) @ affine()[1])
        gamma = f"{block}.layer_scale_1.gamma"
        self._scaled(f"{block}.token_mixer.proj", gamma, (s.width, s.width))

    def _scaled(self, layer: str, gamma: str, shape: Shape) -> None:
        """Fuse a layer and the factors of its outputs."""
        self._need(gamma, (shape[0], 1, 1))
        for end, full in (("weight", shape), ("bias", shape[:1])):
            name = self._need(f"{layer}.{end}", full)
            column = (-1,) + (1,) * (len(full) - 1)
            self._compute(name, full, functools.partial(self._product, name, gamma, column))

    def _product(self, name: str, gamma: str, column: Shape) -> np.ndarray:
        return self._wide(name) * self._wide(gamma).reshape(column)

    # A branch is a function from the size of the block's kernel to its own kernel and bias.

    def _conv(self, branch: str, outputs: int, groups: int, size: int):
        """Branch of a convolution and the batch norm after it."""
        weight = self._need(f"{branch}.conv.weight", (outputs, groups, size, size))
        affine = self._batch_norm(f"{branch}.bn", outputs)

        def make(full: int):
            scale, shift = affine()
            edge = (full - size) // 2
            kernel = self._wide(weight) * scale[:, None, None, None]
            return np.pad(kernel, ((0, 0), (0, 0), (edge, edge), (edge, edge))), shift

        return make

    def _identity(self, branch: str, width: int, groups: int):
        """Branch of a batch norm of the block's input."""
        affine = self._batch_norm(branch, width)

        def make(full: int):
            scale, shift = affine()
            return _skip(width, groups, full) * scale[:, None, None, None], shift

        return make

    def _batch_norm(self, name: str, width: int):
        """Its factors and summands at inference."""
        ends = ("weight", "bias", "running_mean", "running_var")
        names = [self._need(f"{name}.{end}", (width,)) for end in ends]

        def make():
            scale, shift, mean, var = map(self._wide, names)
            scale = scale / np.sqrt(var + _EPS)
            return scale, shift - mean * scale

        return make

    def _is_fused(self, block: str) -> bool:
        return f"{block}.reparam_conv.weight" in self._tensors.shapes

    def _put(self, block: str, shape: Shape, make) -> None:
        self._compute(f"{block}.reparam_conv.weight", shape, lambda: make()[0])
        self._compute(f"{block}.reparam_conv.bias", shape[:1], lambda: make()[1])

    def _compute(self, name: str, shape: Shape, make: Callable[[], np.ndarray]) -> None:
        self._made[name] = shape, lambda start, stop: make()[start:stop]

    def _need(self, name: str, shape: Shape) -> str:
        self._needed[name] = shape
        return name

    def _wide(self, name: str) -> np.ndarray:
        return read_parameter(self._tensors, name).astype(np.float64)


def _sum(branches):
    kernels, biases = zip(*branches, strict=True)
    return sum(kernels), sum(biases)


def _skip(width: int, groups: int, size: int) -> np.ndarray:
    """Kernel of the identity."""
    kernel = np.zeros((width, groups, size, size))
    kernel[np.arange(width), np.arange(width) % groups, size // 2, size // 2] = 1
    return kernel


def rules(c: FastViTConfig) -> list[Rule]:
    """Rules of a tower whose tensors are `Fused`."""
    stem, last = f"{TRUNK}.stem", f"{TRUNK}.final_conv"
    table = [
        *conv(f"{stem}.0.reparam_conv", "vision.stem"),
        *conv(f"{stem}.1.reparam_conv", "vision.stem_halve"),
        *point(f"{stem}.2.reparam_conv", "vision.stem_project"),
    ]
    for number, stage in enumerate(c.stages):
        table += _stage_rules(f"{TRUNK}.stages.{number}", f"vision.stages.{number}", stage)
    return [
        *table,
        *conv(f"{last}.reparam_conv", "vision.last"),
        *_squeeze(f"{last}.se", "vision.squeeze"),
        *linear(f"{TRUNK}.head.fc", "vision.projection"),
    ]


def _stage_rules(theirs: str, ours: str, stage: FastViTStage) -> list[Rule]:
    table = []
    if stage.halve:
        down = f"{theirs}.downsample.proj"
        table += conv(f"{down}.0.reparam_conv", f"{ours}.halve.conv")
        if stage.squeeze:
            table += _squeeze(f"{down}.0.se", f"{ours}.halve.squeeze")
        table += point(f"{down}.1.reparam_conv", f"{ours}.halve.project")
    if stage.position:
        table += conv(f"{theirs}.pos_emb.reparam_conv", f"{ours}.position")
    for number in range(stage.depth):
        block, layer = f"{theirs}.blocks.{number}", f"{ours}.layers.{number}"
        if stage.heads:
            table += qkv(f"{block}.token_mixer.qkv.", f"{layer}.attention.qkv")
            table += out(f"{block}.token_mixer.proj", f"{layer}.attention.out")
        else:
            table += conv(f"{block}.token_mixer.reparam_conv", f"{layer}.mixer")
        if stage.norm:
            table += norm(f"{block}.norm", f"{layer}.norm")
        table += conv(f"{block}.mlp.conv.reparam_conv", f"{layer}.conv")
        table += point(f"{block}.mlp.fc1", f"{layer}.mlp.up")
        table += point(f"{block}.mlp.fc2", f"{layer}.mlp.down")
    return table


def _squeeze(theirs: str, ours: str) -> list[Rule]:
    return [*point(f"{theirs}.fc1", f"{ours}.down"), *point(f"{theirs}.fc2", f"{ours}.up")]
