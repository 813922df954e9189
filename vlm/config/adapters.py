"""What is trained beside a frozen model."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Low-rank adapters of a model's linear layers, which alone are trained.

    Args:
        rank: Number of columns of the first factor, and of rows of the second.
        alpha: The product of the factors is multiplied by alpha / rank.
        targets: The layers that get one, as patterns of their names, such as "text.*" or
            "*.attention.query". Empty: every projection of attention and every layer of an MLP.
        dora: Train the length of each column of the adapted kernels too (DoRA).
        quantize: How the frozen kernels are kept. int8: in a quarter of the memory, as whole
            numbers with a factor for each output.

    Example:
        >>> from vlm.config import AdapterConfig
        >>> AdapterConfig(rank=8, alpha=16.0).scale
        2.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dora: bool = False
    quantize: Literal["none", "int8"] = "none"

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0
