"""Transform of an example for training: decode and augment its image, choose a text."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm.config import DataConfig
from vlm.data import augmentations
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.examples import OPENED, PART, WHERE, Example, choose_caption
from vlm.data.faults import BadSample
from vlm.data.mixing import group_of
from vlm.data.randomness import key, uniforms
from vlm.data.storage import read_file
from vlm.data.transforms import DRAWS, Augment
from vlm.errors import DataError
from vlm.inputs.opening import Smallest
from vlm.inputs.preprocess import Preprocess
from vlm.nn.naflex import Patches

NUMBERS = DRAWS + 1  # uniform numbers per example; the last one chooses the caption


class ExampleTransform:
    """Transform of examples into rows of a training batch; thread-safe.

    With several configs, `PART` of an example is the index of its config.
    """

    def __init__(self, configs: Sequence[DataConfig], preprocess: Preprocess):
        self._configs, self._preprocess = list(configs), preprocess
        self.blank, self.image_bytes = preprocess.blank, preprocess.image_bytes
        augment = configs[0].augment
        self._augment = Augment(augment, preprocess)
        self._strong = augment if augmentations.is_on(augment) else None

    def draws(self, seed: int, positions: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b numbers"]:
        """Draw the uniform numbers of the transform at each of `positions`."""
        base = uniforms(seed, positions, NUMBERS)
        if self._strong is None:
            return base
        # From another seed, so that the base numbers do not depend on them.
        more = uniforms(key(seed, 6), positions, augmentations.DRAWS)
        return np.concatenate([base, more], axis=1)

    def group(self, example: Example) -> int:
        """Return a hash of the class or caption of an example, for the mixing of a batch."""
        return group_of(example, self._configs[example.get(PART, 0)])

    def __call__(
        self, example: Example, u: np.ndarray, images: np.ndarray | Patches, row: int, where: str
    ) -> str:
        """Write the augmented image to `row` of `images` (made by `blank`); return the text.

        `u` is a row of `draws`. `where` is the example's location for errors, if it has none.
        BadSample if there is no text, or the image cannot be opened.
        """
        config = self._configs[example.get(PART, 0)]
        text = choose_caption(example, config, u[DRAWS])
        sizes: list[tuple[int, int]] = []

        def smallest(width: int, height: int) -> tuple[int, int]:
            sizes.append((width, height))
            return self._augment.smallest(width, height, u[:DRAWS])

        image = open_image_of(example, config, self._preprocess, where, smallest)
        pixels = self._augment(image, u[:DRAWS], sizes[0] if sizes else None)
        if self._strong is not None:
            pixels = augmentations.augment(pixels, self._strong, u[NUMBERS:])
        self._preprocess.put(images, row, pixels)
        return text


def transforms_by_length(
    configs: Sequence[DataConfig], preprocess: Preprocess, schedule: BatchSchedule
) -> dict[int | None, ExampleTransform]:
    """Return the transform for each sequence length of a schedule; None: of `preprocess`."""
    lengths = {size.patches for size in schedule.sizes}
    return {n: ExampleTransform(configs, preprocess.at_length(n)) for n in lengths}


def open_image_of(
    example: Example,
    config: DataConfig,
    preprocess: Preprocess,
    where: str,
    smallest: Smallest | None = None,
) -> Image.Image:
    """Open the image of an example; `smallest` as in `open_image`. BadSample if it cannot."""
    where = example.get(WHERE, where)
    image = example.get(config.image)
    name = f"the image of {where}"
    if OPENED in example:
        assert isinstance(image, Image.Image)
        return image
    if image is None:
        raise BadSample("no image", where, f"{where} has no image")
    if isinstance(image, str | os.PathLike):
        where = name = os.fspath(image)
        try:
            image = read_file(name)
        except FileNotFoundError:
            why = f"there is no image {name}: check the path"
            raise BadSample("missing image", where, why) from None
        except OSError as error:
            why = f"{name} cannot be read ({error.strerror or error})"
            raise BadSample.failed_read(where, why, error) from None
    try:
        return preprocess.open(image, name, smallest)
    except DataError as error:
        raise BadSample("broken image", where, str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of any type
        why = f"{name} cannot be decoded ({error}): replace or remove it"
        raise BadSample("broken image", where, why) from None
