"""Evaluation: metrics with confidence intervals, tasks, the runner and the report."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.evaluate import metrics as metrics
    from vlm.evaluate.comparison import compare as compare
    from vlm.evaluate.few_shot_curve import accuracy_by_shots as accuracy_by_shots
    from vlm.evaluate.runner import Report as Report
    from vlm.evaluate.runner import evaluate as evaluate
    from vlm.evaluate.tasks import DataInfo as DataInfo
    from vlm.evaluate.tasks import MultilabelTask as MultilabelTask
    from vlm.evaluate.tasks import RetrievalTask as RetrievalTask
    from vlm.evaluate.tasks import SelectionTask as SelectionTask
    from vlm.evaluate.tasks import ZeroShotTask as ZeroShotTask
