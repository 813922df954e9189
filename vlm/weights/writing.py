"""A bundle as a folder that transformers or open_clip opens, with the same outputs.

What a format cannot say about a model is an error that names it: nothing is written then.
"""

from typing import Literal

from etils import epath

from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.new_folder import new_folder
from vlm.weights.writing_huggingface import write_huggingface
from vlm.weights.writing_open_clip import write_open_clip

Format = Literal["huggingface", "open_clip"]


def write_folder(
    folder: epath.PathLike,
    form: Format,
    model: DualEncoder,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
) -> None:
    """Write the model, its preprocessing and its tokenizer in a public format.

    Raises:
        CheckpointError: the folder exists already, or the format has no place for something.
    """
    writer = {"huggingface": write_huggingface, "open_clip": write_open_clip}[form]
    with new_folder(folder) as new:
        writer(new, model, preprocess, tokenizer)
