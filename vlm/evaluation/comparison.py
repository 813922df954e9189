"""Paired comparison of two evaluations of the same data, with significance tests."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table

from vlm._json import to_json
from vlm.errors import ConfigError
from vlm.evaluation.evidence import Samples
from vlm.evaluation.intervals import Z95, Metric, paired_difference
from vlm.evaluation.runner import Result

POWER = 0.8416212335729143  # the 80% quantile of the standard normal distribution
DIFFERENCES = 8  # listed queries that only one model gets right


@dataclass(frozen=True)
class Comparison:
    """Comparison of B with A on one task, by whether the first answer is correct.

    Attributes:
        task: its name, with the direction of retrieval.
        a, b: fractions of correct answers.
        difference: b - a, with its paired interval, by clusters.
        only_a, only_b: queries that only one of them gets right.
        p_value: of McNemar's exact test. It assumes independent queries, which the captions of one
            image are not: then use the interval.
        smallest: the difference that this set would show at 95% with a power of 80%.
        gained, lost: queries that B gets right and A does not, and the reverse; the first few.
    """

    task: str
    a: float
    b: float
    difference: Metric
    only_a: int
    only_b: int
    p_value: float
    smallest: float
    gained: tuple[int, ...]
    lost: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """Conclusion by the interval."""
        if self.difference.low > 0:
            return "B is better"
        if self.difference.high < 0:
            return "A is better"
        return f"no difference shown; differences under {self.smallest:.1%} are hardly detectable"


def compare(a: Result, b: Result) -> list[Comparison]:
    """Compare two results of one task, for retrieval in each direction.

    Raises:
        ConfigError: results of different tasks or data, or without samples.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> result = vlm.evaluation.evaluate(model, [task])[task.name]
        >>> [round(row.p_value, 1) for row in vlm.evaluation.compare(result, result)]
        [1.0, 1.0]
    """
    for what in ("data_hash", "texts_hash"):
        one, other = a.provenance.evidence.get(what), b.provenance.evidence.get(what)
        if one != other:
            raise ConfigError(
                f"{a.task!r} was measured on different {what.removesuffix('_hash')} "
                f"({one} and {other}): evaluate both models on the same"
            )
    of_a, of_b = a.samples, b.samples
    if of_a is None or of_b is None:
        raise ConfigError(f"{a.task!r} has no samples to compare: evaluate again with --out FOLDER")
    if "direction" not in of_a:
        return [_compare(a.task, of_a, of_b)]
    return [
        _compare(f"{a.task}, {name}", _of_direction(of_a, name), _of_direction(of_b, name))
        for name in dict.fromkeys(of_a["direction"].tolist())
    ]


def mcnemar(only_a: int, only_b: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test (1947, doi:10.1007/BF02295996)."""
    from scipy.stats import binomtest

    discordant = only_a + only_b
    return float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def smallest_difference(difference: np.ndarray, groups: np.ndarray) -> float:
    """Compute the smallest difference that is detectable at 95% with a power of 80%.

    It depends on the variance of the observed differences between clusters; if all queries agree,
    on that of one more cluster that disagrees.
    """
    _, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, difference - difference.mean())
    count, n = len(sums), len(difference)
    variance = count / max(count - 1, 1) * float((sums**2).sum())
    return (Z95 + POWER) * math.sqrt(max(variance, 1.0)) / n


def _of_direction(samples: Samples, direction: str) -> Samples:
    kept = samples["direction"] == direction
    return {name: column[kept] for name, column in samples.items()}


def _compare(name: str, a: Samples, b: Samples) -> Comparison:
    if not np.array_equal(a["query"], b["query"]):
        raise ConfigError(f"{name!r} has different queries in the two results: evaluate both again")
    right_a, right_b = a["rank"] == 0, b["rank"] == 0
    difference = right_b.astype(np.float64) - right_a
    gained, lost = right_b & ~right_a, right_a & ~right_b
    return Comparison(
        task=name,
        a=float(right_a.mean()),
        b=float(right_b.mean()),
        difference=paired_difference(difference, a["cluster"]),
        only_a=int(lost.sum()),
        only_b=int(gained.sum()),
        p_value=mcnemar(int(lost.sum()), int(gained.sum())),
        smallest=smallest_difference(difference, a["cluster"]),
        gained=tuple(a["query"][gained][:DIFFERENCES].tolist()),
        lost=tuple(a["query"][lost][:DIFFERENCES].tolist()),
    )


def as_json(comparisons: list[Comparison]) -> str:
    """Write comparisons as a JSON list."""
    return to_json([asdict(c) | {"verdict": c.verdict} for c in comparisons], indent=2)


def columns(c: Comparison) -> dict[str, str]:
    """Format a comparison for a table: cells by heading."""
    d = c.difference
    return {
        "task": c.task,
        "A": f"{c.a:.1%}",
        "B": f"{c.b:.1%}",
        "B - A, 95%": f"{d.value:+.1%} [{d.low:+.1%}, {d.high:+.1%}]",
        "only A / B": f"{c.only_a:,} / {c.only_b:,}",
        "McNemar p": f"{c.p_value:.2g}",
        "verdict": c.verdict,
        "smallest detectable": f"{c.smallest:.1%}",
        "only B right": ", ".join(map(str, c.gained)) or "none",
        "only A right": ", ".join(map(str, c.lost)) or "none",
    }


def as_table(comparisons: list[Comparison], a: str, b: str) -> Table:
    """Make a table of comparisons for the terminal, without the last three columns."""
    table = Table(title=f"A: {a}\nB: {b}", title_justify="left")
    rows = [columns(c) for c in comparisons]
    shown = list(rows[0])[:-3] if rows else []
    for heading in shown:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(row[heading] for heading in shown))
    return table
