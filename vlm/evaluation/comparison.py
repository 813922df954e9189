"""Two evaluations of the same data, query by query: which model is better, and how sure is that."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool
from rich.table import Table

from vlm._json import to_json
from vlm.errors import ConfigError
from vlm.evaluation.evidence import Samples
from vlm.evaluation.intervals import Z95, Metric, paired_difference
from vlm.evaluation.runner import Result

POWER = 0.8416212335729143  # the 80% quantile of the standard normal distribution
DIFFERENCES = 8  # queries shown that only one of the two gets right


@dataclass(frozen=True)
class Comparison:
    """B against A on one task, by whether the first answer is right.

    Attributes:
        task: its name, with the direction of retrieval.
        a, b: the shares of right answers.
        difference: b - a, with its paired interval, by clusters.
        only_a, only_b: how many queries one of them alone gets right.
        p_value: of McNemar's exact test that neither is better. It takes queries as independent,
            which the captions of one image are not: then the interval decides.
        smallest: the difference that this set would show at 95% in four of five trials.
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
        """What follows, in words."""
        if self.difference.low > 0:
            return "B is better"
        if self.difference.high < 0:
            return "A is better"
        return f"no difference shown; under {self.smallest:.1%} it could hardly be"


def compare(a: Result, b: Result) -> list[Comparison]:
    """Compare two results of one task, query by query; of retrieval, each direction.

    Raises:
        ConfigError: results of different tasks or data, or without samples.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> result = vlm.evaluation.evaluate(model, [task])[task.name]
        >>> [round(found.p_value, 1) for found in vlm.evaluation.compare(result, result)]
        [1.0, 1.0]
    """
    for what in ("data_hash", "texts_hash"):
        one, other = a.provenance.evidence.get(what), b.provenance.evidence.get(what)
        if one != other:
            raise ConfigError(
                f"{a.task!r} was measured on different {'data' if what[0] == 'd' else 'texts'} "
                f"({one} and {other}): evaluate both models on the same"
            )
    if a.samples is None or b.samples is None:
        raise ConfigError(f"{a.task!r} has no samples to compare: evaluate again with --out FOLDER")
    parts = []
    ways = a.samples.get("direction")
    for way in [None] if ways is None else list(dict.fromkeys(ways.tolist())):
        name = a.task if way is None else f"{a.task}, {way}"
        parts.append(_compare(name, _rows(a.samples, way), _rows(b.samples, way)))
    return parts


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947, doi:10.1007/BF02295996)."""
    from scipy.stats import binomtest

    discordant = only_a + only_b
    return float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def smallest_difference(difference: np.ndarray, groups: np.ndarray) -> float:
    """The difference of shares that would be shown at 95% with a power of 80%.

    By the variance between clusters of the differences seen; if all queries agree, by that of one
    more cluster that does not.
    """
    _, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, difference - difference.mean())
    count, n = len(sums), len(difference)
    variance = count / max(count - 1, 1) * float((sums**2).sum())
    return (Z95 + POWER) * math.sqrt(max(variance, 1.0)) / n


def _rows(samples: Samples, way: str | None) -> Samples:
    if way is None:
        return samples
    kept = samples["direction"] == way
    return {name: column[kept] for name, column in samples.items()}


def _compare(name: str, a: Samples, b: Samples) -> Comparison:
    if not np.array_equal(a["query"], b["query"]):
        raise ConfigError(f"{name!r} has other queries in the two results: evaluate both again")
    right_a, right_b = a["rank"] == 0, b["rank"] == 0
    difference = right_b.astype(np.float64) - right_a
    gained, lost = right_b & ~right_a, right_a & ~right_b
    return Comparison(
        name,
        float(right_a.mean()),
        float(right_b.mean()),
        paired_difference(difference, a["cluster"]),
        int(lost.sum()),
        int(gained.sum()),
        mcnemar(int(lost.sum()), int(gained.sum())),
        smallest_difference(difference, a["cluster"]),
        _first(gained, a["query"]),
        _first(lost, a["query"]),
    )


def _first(kept: Bool[np.ndarray, " n"], queries: np.ndarray) -> tuple[int, ...]:
    return tuple(int(q) for q in queries[kept][:DIFFERENCES])


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
