"""Image resizing, bit-exact to the reference code of each model family.

There are four backends. `pillow` equals torchvision and transformers on PIL images. `tensor`
equals them on uint8 tensors (the default of transformers 5). `tensorflow` equals big_vision.
These two are implemented here in NumPy. `scipy` equals OWLv2's processor, rounded to 8 bits.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

PILLOW_KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def resize_tensor(
    array: UInt8[np.ndarray, "h w c"], height: int, width: int, kernel: str, *, antialias: bool
) -> UInt8[np.ndarray, "height width c"]:
    """Resize as PyTorch's `interpolate` on uint8 tensors: columns, then rows, rounded after each.

    The weights are 16-bit integers with a common exponent, so results differ from Pillow's.
    """
    if array.shape[1] != width:
        weights, bits = _fixed_point(resize_matrix(array.shape[1], width, kernel, antialias))
        array = _shift(np.einsum("xw,hwc->hxc", weights, array, optimize=True), bits)
    if array.shape[0] != height:
        weights, bits = _fixed_point(resize_matrix(array.shape[0], height, kernel, antialias))
        array = _shift(np.einsum("yh,hxc->yxc", weights, array, optimize=True), bits)
    return array


def resize_tensorflow(
    array: UInt8[np.ndarray, "h w c"], height: int, width: int
) -> UInt8[np.ndarray, "height width c"]:
    """Resize as big_vision: TensorFlow's bilinear interpolation, truncated to integers.

    Equal to `tf.image.resize(image, size, "bilinear", antialias=False)` and a cast to uint8. The
    cast truncates, so float32 and the order of operations matter.
    """
    left, right, across = _neighbours(array.shape[1], width)
    top, bottom, down = _neighbours(array.shape[0], height)
    wide = array.astype(np.float32)
    wide = wide[:, left] + (wide[:, right] - wide[:, left]) * across[:, None]
    return (wide[top] + (wide[bottom] - wide[top]) * down[:, None, None]).astype(np.uint8)


def resize_scipy(array: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """Pad with black at the right and bottom to a square, and resize as scikit-image does.

    An image that shrinks is blurred first; both steps mirror the square at its edges.
    """
    from scipy import ndimage

    height, width = array.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, array.shape[2]), np.float32)
    square[:height, :width] = array
    blur = max(0.0, (side / size - 1) / 2)
    filtered = ndimage.gaussian_filter(square, (blur, blur, 0), mode="mirror")
    factors = (size / side, size / side, 1)
    zoomed = np.asarray(ndimage.zoom(filtered, factors, order=1, mode="mirror", grid_mode=True))
    return np.round(np.clip(zoomed, square.min(), square.max())).astype(np.uint8)


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two source pixels around each target pixel, and its fraction between them."""
    half, scale = np.float32(0.5), np.float32(source) / np.float32(target)
    at = (np.arange(target, dtype=np.float32) + half) * scale - half
    low = np.floor(at)
    before, after = np.maximum(low, 0), np.minimum(np.ceil(at), source - 1)
    return before.astype(int), after.astype(int), at - low


def _fixed_point(matrix: Float[np.ndarray, "n m"]) -> tuple[Float[np.ndarray, "n m"], int]:
    """Return integer weights (as float64: exact and fast products) and their exponent."""
    bits = 0
    while bits < 22 and int(0.5 + matrix.max() * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return np.trunc(matrix * 2.0**bits + np.where(matrix < 0, -0.5, 0.5)), bits


def _shift(sums: Float[np.ndarray, "*n"], bits: int) -> UInt8[np.ndarray, "*n"]:
    return np.clip(np.floor((sums + 2.0 ** (bits - 1)) * 2.0**-bits), 0, 255).astype(np.uint8)


def resize_matrix(
    source: int, target: int, kernel: str, antialias: bool
) -> Float[np.ndarray, "target source"]:
    """Compute the weights from `source` to `target` pixels, as PyTorch's `interpolate`.

    Half-pixel centres (align_corners=False). With antialias the kernel widens when shrinking and
    bicubic has a = -0.5; without, a = -0.75 and the border pixel repeats.
    """
    scale = source / target
    if kernel == "nearest":
        taken = np.minimum((np.arange(target) * scale).astype(int), source - 1)
        return np.eye(source)[taken]
    center = (np.arange(target) + 0.5) * scale
    weights = np.zeros((target, source))
    if antialias:
        stretch = max(scale, 1.0)
        reach = _SUPPORT[kernel] * stretch
        for row, c in zip(weights, center, strict=True):
            first, last = max(int(c - reach + 0.5), 0), min(int(c + reach + 0.5), source)
            values = _kernel(kernel, (np.arange(first, last) - c + 0.5) / stretch, cubic=-0.5)
            row[first:last] = values / values.sum()
        return weights
    reach = _SUPPORT[kernel]
    for row, c in zip(weights, center - 0.5, strict=True):
        near = np.arange(int(np.floor(c)) - reach + 1, int(np.floor(c)) + reach + 1)
        np.add.at(row, np.clip(near, 0, source - 1), _kernel(kernel, near - c, cubic=-0.75))
    return weights


_SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}


def _kernel(name: str, x: np.ndarray, cubic: float) -> np.ndarray:
    x = np.abs(x)
    if name == "bilinear":
        return np.maximum(1 - x, 0)
    if name == "lanczos":
        return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    near = ((cubic + 2) * x - (cubic + 3)) * x * x + 1  # Keys (1981)
    far = (((x - 5) * x + 8) * x - 4) * cubic
    return np.where(x < 1, near, np.where(x < 2, far, 0))
