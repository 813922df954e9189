"""Images of an evaluation set, whatever its captions or labels are named."""

import functools
from collections.abc import Callable, Iterator

from PIL import Image

from vlm.config import DataConfig
from vlm.data.example_reader import ExampleReader
from vlm.data.faults import BadSample
from vlm.data.transform_example import open_image_of
from vlm.errors import DataError
from vlm.inputs.folders import files_under, is_image_name
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path


def open_images(
    source: str, split: str, image: str, preprocess: Preprocess
) -> Iterator[Callable[[], Image.Image]]:
    """Yield a function for each image of an evaluation set, which opens it.

    Of a folder with image files all are read, also those of other splits.

    Args:
        source: as `DataConfig.source`.
        split: of the set.
        image: name of the feature with the image.

    Raises:
        DataError: there are no images. Opening a bad one raises it too, with its name.
    """
    paths = []
    if as_path(source).is_dir():
        paths = [path for path in files_under(source) if is_image_name(path)]
    for path in paths:
        yield functools.partial(preprocess.open, path)
    if paths:
        return
    config = DataConfig(
        source, train_split=split, eval_split=None, image=image, captions=(), label=image
    )
    count = 0
    for read in ExampleReader(config, split).read():
        if isinstance(read.example, BadSample):
            raise DataError(f"the evaluation set {source} has a bad sample ({read.example})")
        where = f"example {count} of the evaluation set {source}"
        yield functools.partial(open_image_of, read.example, config, preprocess, where)
        count += 1
    if not count:
        raise DataError(f"the evaluation set {source} has no images: check it, or name its split")
