"""Public checkpoints to our parameters and back: rules, files, one module per family."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.weights import catalogue as catalogue
    from vlm.weights.checkpoint import Checkpoint as Checkpoint
    from vlm.weights.registry import open_checkpoint as open_checkpoint
    from vlm.weights.rules import Rule as Rule
