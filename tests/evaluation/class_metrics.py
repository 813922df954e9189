"""CLIP_benchmark's `acc1`, `acc5` and `mean_per_class_recall` from scores, with ties as misses."""

from vlm.evaluation.classification import mean_per_class_recall, target_ranks
from vlm.evaluation.intervals import hit_rate


def classification_metrics(scores, target, ks=(1, 5)):
    ranks = target_ranks(scores, target)
    found = {f"top{k}": hit_rate(ranks, k) for k in ks if k == 1 or k <= scores.shape[1]}
    return found | {"mean_per_class_recall": mean_per_class_recall(ranks, target)}
