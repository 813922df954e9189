"""Training: the optimizer, the step, the loop, checkpoints and logs."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.training.checkpoint import Checkpoints as Checkpoints
    from vlm.training.loop import steps as steps
    from vlm.training.loop import train as train
    from vlm.training.optimizer import make_optimizer as make_optimizer
    from vlm.training.parameter_masks import parameter_mask as parameter_mask
    from vlm.training.result import TrainingResult as TrainingResult
    from vlm.training.step import Trainer as Trainer
    from vlm.training.step import TrainState as TrainState
