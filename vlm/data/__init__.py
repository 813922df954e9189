"""Where pairs come from and how they become batches."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.data.pipeline import eval_batches as eval_batches
    from vlm.data.pipeline import train_batches as train_batches
    from vlm.data.sources import open_source as open_source
