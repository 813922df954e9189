"""Training: the optimizer, the step, the loop, checkpoints and logs."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.train.checkpoint import Checkpoints as Checkpoints
    from vlm.train.loop import train as train
    from vlm.train.optimizer import make_optimizer as make_optimizer
    from vlm.train.step import Trainer as Trainer
    from vlm.train.step import TrainState as TrainState
