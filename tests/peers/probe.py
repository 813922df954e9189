"""The linear probe beside scikit-learn's, and accuracy against shots: python tests/peers/probe.py

10,000 x 512, 100 classes, several penalties, in turns, scikit-learn at several tolerances; then the
heads at 1 to 16 shots on data sets that scikit-learn brings along. Their zero-shot weights are the
class means of images (or rows) that were changed: moved by a pixel, turned and blurred, or noisy.
"""

import time

import numpy as np
from scipy.ndimage import gaussian_filter, rotate, shift
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression

from vlm.evaluation.few_shot_curve import accuracy_by_shots
from vlm.heads.linear_probe import fit_linear


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def beside_scikit_learn(n=10_000, d=512, m=100):
    rng = np.random.default_rng(0)
    centres, spread = rng.standard_normal((m, d)), np.linspace(0.2, 2, d)
    target, held = rng.integers(0, m, n), rng.integers(0, m, 5000)
    z, z_held = (
        unit((0.3 * centres[t] + 1.2 * rng.standard_normal((len(t), d))) * spread + 0.5)
        for t in (target, held)
    )
    x, x_held = (np.sqrt(d).astype(np.float32) * rows for rows in (z, z_held))
    for l2 in (1.0, 10.0, 100.0):
        fits = {"ours": lambda l2=l2: fit_linear(z, target, l2)}
        for tol in (1e-4, 1e-5, 1e-6):  # its default stops far from the optimum where l2 is small
            fits[f"tol {tol:g}"] = LogisticRegression(C=1 / l2, max_iter=5000, tol=tol)
        best = dict.fromkeys(fits, float("inf"))
        for _ in range(3):
            for name, fit in fits.items():
                began = time.perf_counter()
                found = fit() if name == "ours" else fit.fit(x, target)
                best[name] = min(best[name], time.perf_counter() - began)
                if name == "ours":
                    weight, bias = found
        mine = ((z_held @ weight + bias).argmax(1) == held).mean()
        print(f"l2 {l2:5g}: {best['ours']:.2f} s, {mine:.2%}; scikit-learn:")
        for name, peer in list(fits.items())[1:]:
            print(
                f"    {name}: {best[name]:.2f} s, {peer.score(x_held, held):.2%} "
                f"({peer.n_iter_[0]} steps): {best[name] / best['ours']:.1f}x"
            )


def data_sets():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    mean = x.mean(0)
    changes = {
        "digits, turned and blurred": lambda i: gaussian_filter(rotate(i, 12, reshape=False), 0.7),
        "digits, moved": lambda i: shift(i, (0, 1)),
    }
    for name, change in changes.items():
        other = np.stack([change(row.reshape(8, 8)).ravel() for row in x[:300]]) - mean
        classes = unit(np.stack([other[y[:300] == c].mean(0) for c in range(10)]))
        yield name, unit(x[300:] - mean), y[300:], classes
    rng = np.random.default_rng(1)
    for name, load in (("wine", load_wine), ("breast cancer", load_breast_cancer)):
        x, y = load(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        means = np.stack([x[y == c].mean(0) for c in range(y.max() + 1)])
        yield name, unit(x), y, unit(means + 0.9 * rng.standard_normal(means.shape))


def main():
    beside_scikit_learn()
    for name, z, y, classes in data_sets():
        curve = accuracy_by_shots(z, y, 50 * classes.T, scale=50.0, rounds=4)
        print(f"{name}: zero-shot {curve.zero_shot}")
        for method, points in curve.points.items():
            print(f"  {method:12}", *(f"{k}: {m.value:.1%}" for k, m in points.items()))


if __name__ == "__main__":
    main()
