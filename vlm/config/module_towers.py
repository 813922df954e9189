"""Configs of towers that are a user's own `flax.nnx.Module`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlm.config.base import Config, VisionTower, kept_tokens
from vlm.config.code import ImportPath
from vlm.config.optimizer import check_pattern
from vlm.errors import ConfigError

# Mesh axes that a dimension of a parameter can be sharded over.
MeshAxis = Literal["data", "fsdp", "tensor"]
# Types of the fields that take mappings too. They hold pairs; a type checker lets users pass both.
if TYPE_CHECKING:
    Options = Any
    Partition = Any
else:
    Options = tuple[tuple[str, Any], ...]
    Partition = tuple[tuple[str, tuple[MeshAxis | None, ...]], ...]
# Arguments of a module's constructor that vlm passes.
GIVEN = ("embed_dim", "rngs", "execution")


class ModuleTower:
    """Checks that both kinds of module towers share."""

    module: ImportPath
    options: Options
    partition: Partition

    def check_module(self) -> None:
        """Raise a ConfigError if module, options or partition are wrong in themselves."""
        where = type(self).__name__
        if self.module.endswith(")"):
            raise ConfigError(
                f"{where}.module is {str(self.module)!r}: name the class alone, and give its "
                "arguments in options"
            )
        names = [name for name, _ in self.options]
        for name in names:
            if name in GIVEN:
                raise ConfigError(f"{where}.options has {name!r}, which vlm passes: leave it out")
            if names.count(name) > 1:
                raise ConfigError(f"{where}.options has {name!r} twice: give it once")
        for pattern, axes in self.partition:
            check_pattern(pattern, f"{where}.partition")
            for axis in axes:
                if axis is not None and axes.count(axis) > 1:
                    raise ConfigError(
                        f"{where}.partition of {pattern!r} has the mesh axis {axis!r} twice: shard "
                        "one dimension over it"
                    )


@dataclass(frozen=True)
class VisionModuleConfig(ModuleTower, VisionTower):
    """A vision tower of your own: any `flax.nnx.Module` with the interface of a tower.

    `module(embed_dim, rngs=rngs, **options)` maps normalised images (b, h, w, 3) in float32 to
    embeddings (b, embed_dim).

    Args:
        module: Class of the tower, or its import path, such as "my_parts:MyTower".
        options: Keyword arguments of its constructor: numbers, texts, booleans, None, and lists of
            them, which arrive as tuples.
        image_size: Side of the square image, in pixels.
        partition: Mesh axes of the dimensions of a parameter, by a regular expression of its whole
            name in the tower, such as {"mlp/.*/kernel": (None, "tensor")}. The first that matches
            applies. Other parameters are sharded by the rules of `vlm.sharding`.
        width: Width of its layers. It only affects the default learning rate of fine-tuning.

    Example:
        >>> config = vlm.VisionModuleConfig("my_parts:ConvNet", (("depth", 3),))
        >>> config.module, config.options
        ('my_parts:ConvNet', (('depth', 3),))
    """

    kind: ClassVar[str] = "module"

    module: ImportPath
    options: Options = ()
    image_size: int = 224
    partition: Partition = ()
    width: int = 768

    def check(self):
        self.check_module()
        super().check()

    @property
    def patch_size(self) -> int:
        """The image size: the tower may have any layout inside."""
        return self.image_size

    @property
    def one_size(self) -> str:
        return "tower of your own"

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """One: an image counts as one token."""
        return 1


@dataclass(frozen=True)
class TextModuleConfig(ModuleTower, Config):
    """A text tower of your own: any `flax.nnx.Module` with the interface of a tower.

    `module(embed_dim, rngs=rngs, **options)` maps token ids (b, n) in int32 to embeddings
    (b, embed_dim); n is `context_length`.

    Args:
        module: Class of the tower, or its import path, such as "my_parts:MyTower".
        options: Keyword arguments of its constructor: numbers, texts, booleans, None, and lists of
            them, which arrive as tuples.
        vocab_size: Number of tokens in the vocabulary. Ids are below it.
        context_length: Number of tokens in a text.
        partition: Mesh axes of the dimensions of a parameter, by a regular expression of its whole
            name in the tower, such as {"embedding": ("tensor", None)}. The first that matches
            applies. Other parameters are sharded by the rules of `vlm.sharding`.
        width: Width of its layers. It only affects the default learning rate of fine-tuning.

    Example:
        >>> config = vlm.TextModuleConfig("my_parts:Lstm", vocab_size=256)
        >>> config.tokens()
        64
    """

    kind: ClassVar[str] = "module"

    module: ImportPath
    options: Options = ()
    vocab_size: int = 32_000
    context_length: int = 64
    partition: Partition = ()
    width: int = 768

    def check(self):
        self.check_module()

    def tokens(self, *, masking: float = 0.0) -> int:
        """Number of tokens of a text; `masking` is the dropped fraction."""
        return kept_tokens(self.context_length, masking)

    def check_space(self, embed_dim: int) -> None:
        """Do nothing: the module embeds into any number of dimensions, which it is given."""
