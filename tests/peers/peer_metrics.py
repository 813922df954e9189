"""CLIP_benchmark's own evaluation of a folder in its layout."""

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

KS = (1, 5, 10)


def clip_benchmark_metrics(
    model: Any, transform: Any, tokenizer: Any, root: Path
) -> dict[str, float]:
    """The metrics of the data set at `root`, as CLIP_benchmark's command computes them."""
    import torch
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    kind = root / "dataset_type.txt"
    retrieval = kind.exists() and kind.read_text().strip() == "retrieval"
    task = "zeroshot_retrieval" if retrieval else "zeroshot_classification"
    # Its accuracy makes a number of an array of one element, which NumPy no longer allows.
    number = mock.patch.object(
        zeroshot_classification, "float", lambda x: float(np.asarray(x).item()), create=True
    )
    quiet = contextlib.redirect_stderr(io.StringIO())
    with number, quiet, contextlib.redirect_stdout(io.StringIO()):
        data = build_dataset(f"wds/{root.name}", root=str(root), transform=transform, task=task)
        loader = torch.utils.data.DataLoader(data.batched(64), batch_size=None)
        if retrieval:
            return zeroshot_retrieval.evaluate(
                model, loader, tokenizer, "cpu", amp=False, recall_k_list=list(KS)
            )
        return zeroshot_classification.evaluate(
            model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False
        )
