"""Evaluation: metrics with confidence intervals, tasks, the runner and the report."""
