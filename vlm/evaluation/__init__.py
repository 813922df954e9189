"""Evaluation: metrics with confidence intervals, tasks, the runner and the report."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.evaluation import metrics as metrics
    from vlm.evaluation import presets as presets
    from vlm.evaluation.classification import calibration_error as calibration_error
    from vlm.evaluation.classification import reliability as reliability
    from vlm.evaluation.comparison import compare as compare
    from vlm.evaluation.few_shot_curve import accuracy_by_shots as accuracy_by_shots
    from vlm.evaluation.intervals import proportion as proportion
    from vlm.evaluation.runner import Report as Report
    from vlm.evaluation.runner import evaluate as evaluate
    from vlm.evaluation.tasks import DataInfo as DataInfo
    from vlm.evaluation.tasks import MultilabelTask as MultilabelTask
    from vlm.evaluation.tasks import RetrievalTask as RetrievalTask
    from vlm.evaluation.tasks import SelectionTask as SelectionTask
    from vlm.evaluation.tasks import ZeroShotTask as ZeroShotTask
