"""Export to folders that transformers or open_clip opens, with the same outputs.

If a format does not support a model, nothing is written and the error lists the fields. Texts whose
token ids change are counted and logged.
"""

import logging
from typing import Literal

from etils import epath

from vlm.config import (
    Code,
    EncoderTextConfig,
    NoTextConfig,
    TextModuleConfig,
    VisionModuleConfig,
)
from vlm.errors import CheckpointError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.new_folder import new_folder
from vlm.weights.sample_texts import sample_texts
from vlm.weights.token_check import TokenCheck, check_tokens
from vlm.weights.writing_huggingface import write_huggingface
from vlm.weights.writing_open_clip import write_open_clip

Format = Literal["huggingface", "open_clip"]
SavedFormat = Literal["vlm", "huggingface", "open_clip"]  # of `Bundle.save`
TEXTS = 1_000  # to compare token ids of
_LOG = logging.getLogger(__name__)


def write_folder(
    folder: epath.PathLike,
    form: Format,
    model: DualEncoder,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    texts: int = TEXTS,
) -> TokenCheck:
    """Write the model, its preprocessing and its tokenizer in a public format.

    The token ids of that many `texts` are compared; a warning is logged if some differ.

    Raises:
        CheckpointError: the folder exists already, or the format does not support something.
    """
    if model.config.full_dim is not None:
        raise CheckpointError(
            f"{form} has no place for embeddings truncated to {model.config.embed_dim} dimensions: "
            "save the model as a vlm bundle"
        )
    for tower in (model.config.vision, model.config.text):
        if isinstance(tower, VisionModuleConfig | TextModuleConfig):
            raise CheckpointError(
                f"{form} has no place for {tower.module}, a tower of your own: save the model as a "
                "vlm bundle"
            )
        if isinstance(tower, EncoderTextConfig):
            raise CheckpointError(
                f"{form}: vlm reads ModernBERT and T5 text towers and does not write them: save "
                "the model as a vlm bundle"
            )
        activation = getattr(tower, "activation", None)
        if isinstance(activation, Code):
            raise CheckpointError(
                f"{form} has no name for the activation {activation}: save a vlm bundle"
            )
    writer = {"huggingface": write_huggingface, "open_clip": write_open_clip}[form]
    texts = 0 if isinstance(model.config.text, NoTextConfig) else texts
    with new_folder(folder) as new:
        writer(new, model, preprocess, tokenizer)
        check = check_tokens(new, tokenizer, sample_texts(texts))
    if check.differ:
        _LOG.warning("%s", check)
    return check
