"""The linear probe beside scikit-learn's, by the objective: python -m pytest -s to see the gaps."""

import importlib
import pathlib
import sys
import warnings

import numpy as np
import pytest

from vlm.heads.linear_probe import fit_linear

pytestmark = pytest.mark.peers

sys.path.append(str(pathlib.Path(__file__).parents[1] / "heads"))
cases = importlib.import_module("probe_cases")


@pytest.mark.parametrize("name", cases.CASES)
def test_no_more_than_a_thousandth_above_scikit_learn(name):
    linear_model = pytest.importorskip("sklearn.linear_model")
    z, target, l2 = cases.data(name)
    scale = np.sqrt(z.shape[1])
    peer = linear_model.LogisticRegression(C=1 / l2, solver="newton-cg", tol=1e-10, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # badly scaled features are too hard for it
        peer.fit(z.astype(np.float64) * scale, target)
    theirs = cases.objective(z, target, peer.coef_.T * scale, peer.intercept_, l2)
    ours = cases.objective(z, target, *fit_linear(z, target, l2), l2)
    print(f"{name}: {theirs:.10g} of scikit-learn, ours {ours / theirs - 1:+.1e}")
    assert ours <= 1.001 * theirs
