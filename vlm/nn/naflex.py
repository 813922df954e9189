"""NaFlex batches of images of different shapes; importable without JAX."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, UInt8


class Patches(NamedTuple):
    """Batch of images of different shapes, padded to the same number of patches (NaFlex).

    Position embeddings are a square grid of g x g, resized to each image. That is linear, so each
    patch carries its weights over the rows and columns of the grid (SigLIP 2, arXiv:2502.14786).

    Example:
        >>> from vlm.inputs import Preprocess
        >>> config = vlm.PreprocessConfig(
        ...     resize="naflex", image_size=32, patch_size=8, max_patches=16
        ... )
        >>> pixels, rows, columns, mask = Preprocess(config)(pictures)
        >>> mask.sum(axis=1).tolist()  # patches of each image
        [16, 16, 16]
    """

    pixels: Float[Array, "b n pp 3"] | UInt8[Array, "b n pp 3"]  # pp = patch_size ** 2, row-major
    rows: Float[Array, "b n g"]  # each patch's weights over the rows of the g x g position grid
    columns: Float[Array, "b n g"]
    mask: Bool[Array, "b n"]  # true for real patches, then false for padding
