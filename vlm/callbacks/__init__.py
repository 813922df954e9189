"""Callbacks of a run: a live display for notebooks, Weights & Biases, MLflow, TensorBoard."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.callbacks.base import Callback as Callback
    from vlm.callbacks.base import Divergence as Divergence
    from vlm.callbacks.base import RunInfo as RunInfo
    from vlm.callbacks.live import Live as Live
    from vlm.callbacks.tensorboard import TensorBoard as TensorBoard
    from vlm.callbacks.trackers import MLflow as MLflow
    from vlm.callbacks.trackers import WandB as WandB
    from vlm.display import in_notebook as in_notebook
