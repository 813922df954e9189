"""Calibration: the fraction of its published rates that a chip reaches, with a range.

A step's time is the time of its arithmetic, its memory-bound work and its exposed communication,
each at a fraction of the published rate. The fractions are fitted to published throughputs
(tests/planning/published.py; `python tests/planning/fit.py` prints the fit). Chips without
published contrastive or ViT training use the fractions of another chip, as `evidence` states.
`vlm bench train --save FILE` measures a chip, and `vlm plan --calibration FILE` corrects
predictions with it.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vlm._json import to_json
from vlm.chips import CHIPS
from vlm.errors import ConfigError

WIDTH = 1.5  # high / low of a prediction from published figures
MEASURED_WIDTH = 1.2  # the same with measurements on the same chip
FORMAT = "vlm-calibration-1"


@dataclass(frozen=True)
class Range:
    """Interval in which a measurement is expected."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high)

    def scaled(self, factor: float) -> "Range":
        return Range(self.low * factor, self.high * factor)

    def inverse(self, numerator: float = 1.0) -> "Range":
        """Range of `numerator` divided by this quantity, such as examples/s from seconds."""
        return Range(numerator / self.high, numerator / self.low)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def as_values(figures: Any) -> dict[str, Any]:
    """Convert a dataclass of figures to JSON values, with ranges as [low, high]."""
    values = {field.name: getattr(figures, field.name) for field in fields(figures)}
    return {n: [v.low, v.high] if isinstance(v, Range) else v for n, v in values.items()}


@dataclass(frozen=True)
class Shares:
    """Fraction of a chip's published arithmetic rate that a training step reaches."""

    arithmetic: float
    evidence: str


@dataclass(frozen=True)
class Measurement:
    """Measured step time on a chip and its prediction, written by `vlm bench train --save`."""

    chip: str
    name: str
    devices: int
    batch_size: int
    remat: str
    measured: float  # seconds
    predicted: float  # seconds, the midpoint of the uncalibrated range
    versions: dict[str, str]

    @property
    def factor(self) -> float:
        return self.measured / self.predicted


@dataclass(frozen=True)
class Calibration:
    """Parameters that turn a roofline into a range of seconds for one chip."""

    shares: Shares
    factor: float = 1.0  # measured / predicted of the measurements
    width: float = WIDTH
    measurements: tuple[Measurement, ...] = ()

    @property
    def evidence(self) -> str:
        if not self.measurements:
            return self.shares.evidence
        names = ", ".join(f"{m.name} at batch {m.batch_size:,}" for m in self.measurements)
        return f"measured on this chip: {names}"

    def seconds(self, middle: float) -> Range:
        side = math.sqrt(self.width)
        return Range(middle * self.factor / side, middle * self.factor * side)


# Fraction for memory-bound work: published steps do not differ enough in it to fit it per chip.
# Exposed communication is counted at the full published rate, which fits best.
MEMORY = 0.5
LLM = "and the MFU of MaxText's own language models (v5e 56 to 67%, v5p 64 to 71%, v6e 39 to 50%)"
SHARES = {
    "v3": Shares(0.52, "5 published trainings of ViT on v3, 2020 and 2023"),
    "v4": Shares(0.57, "4 published trainings of SigLIP and SigLiT on v4, 2023"),
    "v5e": Shares(0.57, f"taken from v4 {LLM}"),
    "v5p": Shares(0.63, f"taken from v4 {LLM}"),
    "v6e": Shares(0.41, f"taken from v4 {LLM}"),
    "tpu7x": Shares(0.41, "taken from v6e"),
    "a100": Shares(0.44, "15 published trainings of ViT and CLIP on A100, 2023"),
    "a100-40": Shares(0.44, "15 published trainings of ViT and CLIP on A100, 2023"),
    "h100": Shares(0.22, "6 published trainings of ViT and CLIP on H100, 2023"),
    "h100-pcie": Shares(0.22, "taken from H100 SXM"),
    "h200": Shares(0.22, "taken from H100"),
    "gh200": Shares(0.22, "taken from H100"),
    "b200": Shares(0.22, "taken from H100"),
    "l4": Shares(0.44, "taken from A100"),
    "l40s": Shares(0.44, "taken from A100"),
}


def calibration_of(chip: str, file: str | Path | None = None) -> Calibration:
    """Return the calibration of a chip, corrected by a file of measurements.

    Raises:
        ConfigError: the file does not exist, is no calibration, or is for another chip.
    """
    shares = SHARES[chip]
    if file is None:
        return Calibration(shares)
    measurements = read_measurements(file)
    fitting = tuple(m for m in measurements if m.chip == chip)
    if not fitting:
        others = sorted({m.chip for m in measurements})
        raise ConfigError(
            f"calibration {file} was measured on {', '.join(others)} and the plan is for {chip}: "
            f"measure there with vlm bench train CONFIG --save FILE, or leave --calibration out"
        )
    factors = sorted(m.factor for m in fitting)
    factor = math.exp(sum(map(math.log, factors)) / len(factors))
    width = min(WIDTH, max(MEASURED_WIDTH, factors[-1] / factors[0]))
    return Calibration(shares, factor, width, fitting)


def read_measurements(file: str | Path) -> list[Measurement]:
    """Read the measurements that `vlm bench train --save` wrote.

    Raises:
        ConfigError: the file does not exist or is no calibration.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"there is no calibration file {file}: write one on the chip with "
            "vlm bench train CONFIG --save FILE"
        )
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        measurements = [Measurement(**entry) for entry in content["measurements"]]
        good = (m.chip in CHIPS and m.measured > 0 and m.predicted > 0 for m in measurements)
        if not measurements or not all(good):
            raise ValueError("it has no times of a known chip")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ConfigError(
            f"{file} is no calibration ({reason}): write one with "
            "vlm bench train CONFIG --save FILE"
        ) from None
    return measurements


def save_measurement(file: str | Path, measurement: Measurement) -> None:
    """Add a measurement to a file, replacing one of the same chip, config and batch.

    Raises:
        ConfigError: the file exists and is no calibration.
    """
    path = Path(file)
    kept: list[Measurement] = read_measurements(path) if path.exists() else []

    def same(m: Measurement) -> tuple[Any, ...]:
        return m.chip, m.name, m.devices, m.batch_size, m.remat

    kept = [m for m in kept if same(m) != same(measurement)]
    content = {"format": FORMAT, "measurements": [asdict(m) for m in (*kept, measurement)]}
    path.write_text(to_json(content, indent=1) + "\n")
