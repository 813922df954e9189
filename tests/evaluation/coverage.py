"""Coverage of every 95% interval that vlm prints: python tests/evaluation/coverage.py

Prints metric, setting, n, coverage, mean width, and the width beside that of the plain mean's
interval where the value is no proportion. `--runs` draws of each (2000), `--only WORD` of a metric.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from vlm.evaluation.classification import (
    calibration_error,
    mean_average_precision,
    mean_per_class_recall,
)
from vlm.evaluation.few_shot_curve import over_draws
from vlm.evaluation.intervals import (
    Metric,
    clustered_proportion,
    mean,
    paired_difference,
    proportion,
)

SIZES, RATES = (200, 500, 2000), (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Case:
    """A metric in a setting.

    Attributes:
        draw: a sample's metric, and the width of a plain mean's interval (or None).
        truth: of the population; by default the mean of many draws of an unbiased value.
        few: fewer than 10 hits or misses are expected, where no interval covers less than 97%
            everywhere and 93% everywhere: only the lower bound is asked for.
    """

    metric: str
    setting: str
    n: int
    draw: Callable[[np.random.Generator], tuple[Metric, float | None]]
    truth: float
    few: bool = False


@dataclass(frozen=True)
class Found:
    case: Case
    coverage: float
    width: float
    relative: float | None  # to the plain mean's interval


def simulate(case: Case, runs: int, seed: int = 0) -> Found:
    rng = np.random.default_rng([seed, case.n, *map(ord, case.metric + case.setting)])
    inside, width, plain = 0, 0.0, 0.0
    for _ in range(runs):
        metric, reference = case.draw(rng)
        inside += metric.low - 1e-12 <= case.truth <= metric.high + 1e-12
        width += metric.high - metric.low
        plain += reference or 0.0
    return Found(case, inside / runs, width / runs, width / plain if plain else None)


# ------------------------------------------------------------------------------- proportions


def accuracies() -> Iterator[Case]:
    for n in SIZES:
        for p in (*RATES, 0.995):
            yield Case(
                "accuracy, selection", f"rate {p}", n,
                lambda rng, n=n, p=p: (proportion(int(rng.binomial(n, p)), n), None),
                p, few=n * (1 - p) < 10,
            )  # fmt: skip


def _cluster_rates(rng, count, p, rho):
    """Rates of clusters with this mean and this correlation of hits within a cluster."""
    strength = (1 - rho) / rho
    return rng.beta(p * strength, (1 - p) * strength, count)


def recalls() -> Iterator[Case]:
    def draw(rng, clusters, mean_size, p, rho, unequal):
        sizes = np.full(clusters, mean_size)
        if unequal:
            sizes = 1 + rng.geometric(1 / (mean_size - 1 + 1e-9), clusters) - 1
        rates = _cluster_rates(rng, clusters, p, rho)
        groups = np.repeat(np.arange(clusters), sizes)
        hits = rng.random(len(groups)) < rates[groups]
        return clustered_proportion(hits, groups), None

    for n in SIZES:
        for p in RATES:
            for clusters, rho, unequal in (
                (n // 5, 0.3, False), (n // 5, 0.7, False), (n // 5, 0.3, True),
                (20, 0.1, False), (20, 0.1, True),
            ):  # fmt: skip
                kind = "unequal" if unequal else "equal"
                worth = n / (1 + (n / clusters - 1) * rho)
                yield Case(
                    "retrieval recall", f"rate {p}, {clusters} {kind} clusters, rho {rho}", n,
                    lambda rng, c=clusters, s=n // clusters, p=p, r=rho, u=unequal: draw(
                        rng, c, s, p, r, u
                    ),
                    p, few=worth * (1 - p) < 10,
                )  # fmt: skip


def per_class() -> Iterator[Case]:
    def draw(rng, n, rates, shares):
        target = rng.choice(len(rates), n, p=shares)
        ranks = (rng.random(n) > rates[target]).astype(np.int64)
        return mean_per_class_recall(ranks, target), None

    for n in SIZES:
        for p in RATES:
            for m, unequal in ((10, False), (10, True), (50, False)):
                rng = np.random.default_rng(m)
                rates = _cluster_rates(rng, m, p, 0.1)
                shares = np.linspace(1, 5, m) if unequal else np.ones(m)
                shares /= shares.sum()
                kind = "unequal" if unequal else "equal"
                yield Case(
                    "mean recall per class", f"rate {p}, {m} {kind} classes", n,
                    lambda rng, n=n, r=rates, s=shares: draw(rng, n, r, s),
                    float(rates.mean()), few=n * (1 - p) < 10,
                )  # fmt: skip


# ------------------------------------------------------------------------ means, differences


def differences() -> Iterator[Case]:
    """Of `vlm compare`: paired, in clusters of captions or none."""

    def draw(rng, n, a, b, size):
        clusters = n // size
        shared = rng.standard_normal((clusters, 1)) * (size > 1)
        own = rng.standard_normal((clusters, size))
        scale = math.sqrt(1 + (size > 1))
        x = ((shared + own) / scale).ravel()
        y = 0.9 * x + math.sqrt(1 - 0.81) * rng.standard_normal(len(x))
        difference = (y < norm.ppf(b)).astype(np.float64) - (x < norm.ppf(a))
        groups = np.repeat(np.arange(clusters), size)
        return paired(difference, groups), None

    for n in SIZES:
        for a, b in ((0.5, 0.5), (0.5, 0.6), (0.9, 0.92), (0.99, 0.99), (0.95, 0.99)):
            for size in (1, 5):
                yield Case(
                    "difference of two models", f"{a} and {b}, clusters of {size}", n,
                    lambda rng, n=n, a=a, b=b, s=size: draw(rng, n, a, b, s),
                    b - a, few=n * (1 - a) < 10,
                )  # fmt: skip


def paired(difference, groups):
    return paired_difference(difference, groups)


def means() -> Iterator[Case]:
    for n in SIZES:
        for name, sigma in (("normal", 0.0), ("skewed", 1.0)):

            def draw(rng, n=n, sigma=sigma):
                x = rng.standard_normal(n)
                return mean(np.exp(sigma * x) if sigma else x), None

            yield Case("mean", name, n, draw, math.exp(sigma**2 / 2) if sigma else 0.0)


def few_shot_points() -> Iterator[Case]:
    """Of the few-shot curve: images in common to three draws of examples, which differ too."""

    def draw(rng, n, p, rounds, by_image, by_draw):
        logits = by_image * rng.standard_normal(n) + by_draw * rng.standard_normal((rounds, 1))
        noise = rng.standard_normal((rounds, n))
        spread = math.sqrt(1 + by_image**2 + by_draw**2)
        return over_draws((logits + noise) / spread < norm.ppf(p), np.arange(n)), None

    for n in SIZES:
        for p in (0.5, 0.9):
            for by_draw in (0.0, 0.05, 0.2):
                yield Case(
                    "few-shot curve", f"rate {p}, 3 draws, of spread {by_draw}", n,
                    lambda rng, n=n, p=p, b=by_draw: draw(rng, n, p, 3, 1.0, b), p,
                )  # fmt: skip


# ----------------------------------------------------------------------- precision, calibration


def precisions() -> Iterator[Case]:
    def sample(rng, n, m, share, signal):
        relevant = rng.random((n, m)) < share
        return rng.standard_normal((n, m)) + signal * relevant, relevant

    def exact(share, signal):
        t = np.linspace(-8, 12, 200_001)
        own, other = norm.sf(t - signal), norm.sf(t)
        precision = share * own / np.maximum(share * own + (1 - share) * other, 1e-300)
        return float(-np.trapezoid(precision, own))

    for n in SIZES:
        for share, signal in ((0.2, 1.0), (0.2, 3.0), (0.05, 1.0)):
            yield Case(
                "mean average precision", f"10 classes of {share:.0%}, signal {signal}", n,
                lambda rng, n=n, s=share, g=signal: (
                    mean_average_precision(*sample(rng, n, 10, s, g)), None),
                exact(share, signal),
            )  # fmt: skip


# Confidence of the predicted class (of a beta distribution), and accuracy at that confidence.
SURENESS = {"uniform": (1, 1), "sure": (8, 1), "very sure": (60, 1), "unsure": (2, 5)}
MISFITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "calibrated": lambda c: c,
    "overconfident": lambda c: 1 / (1 + np.exp(-0.6 * np.log(c / (1 - c)))),
    "underconfident": lambda c: 1 / (1 + np.exp(-1.6 * np.log(c / (1 - c)))),
    "a little off": lambda c: np.clip(c - 0.03, 0, 1),
    "far off": lambda c: 0.5 * c,
    "off in half of the bins": lambda c: np.where(np.floor(c * 15) % 2 == 0, 0.8 * c, c),
}


def calibrations() -> Iterator[Case]:
    grid = (np.arange(300_000) + 0.5) / 300_000
    from scipy.stats import beta

    for sureness, (a, b) in SURENESS.items():
        c = np.clip(beta.ppf(grid, a, b), 1e-6, 1 - 1e-6)
        at = np.clip(np.ceil(c * 15).astype(int) - 1, 0, 14)
        for misfit, accuracy in MISFITS.items():
            gaps = np.bincount(at, accuracy(c) - c, minlength=15) / len(c)
            truth = float(np.abs(gaps).sum())
            for n in SIZES:

                def draw(rng, n=n, a=a, b=b, accuracy=accuracy):
                    sure = np.clip(rng.beta(a, b, n), 1e-6, 1 - 1e-6)
                    right = rng.random(n) < accuracy(sure)
                    plain = proportion(int(right.sum()), n)
                    return calibration_error(sure, right), plain.high - plain.low

                yield Case("calibration error", f"{sureness}, {misfit}", n, draw, truth)


CASES = (
    accuracies,
    recalls,
    per_class,
    differences,
    means,
    few_shot_points,
    precisions,
    calibrations,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    print(f"{'metric':26} {'setting':52} {'n':>5} {'coverage':>8} {'width':>7} {'/ plain':>7}")
    for cases in CASES:
        for case in cases():
            if args.only not in case.metric:
                continue
            found = simulate(case, args.runs)
            relative = "" if found.relative is None else f"{found.relative:7.2f}"
            high = 1.0 if case.few or case.metric.startswith("calib") else 0.97
            mark = "" if 0.93 <= found.coverage <= high else "  <--"
            print(
                f"{case.metric:26} {case.setting:52} {case.n:5} {found.coverage:8.1%} "
                f"{found.width:7.4f} {relative}{mark}",
                flush=True,
            )


if __name__ == "__main__":
    main()
