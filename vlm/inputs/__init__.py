"""Image preprocessing and tokenization."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.inputs.opening import ImageLike as ImageLike
    from vlm.inputs.opening import open_image as open_image
    from vlm.inputs.preprocess import Preprocess as Preprocess
    from vlm.inputs.tokenizer import Tokenizer as Tokenizer
    from vlm.inputs.tokenizer import train_bpe as train_bpe
