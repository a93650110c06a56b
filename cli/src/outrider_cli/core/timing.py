"""Percentiles of times, and the summary of a ping."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

#: The percentiles that are shown.
SHOWN: Final = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the least value that so many percent do not exceed.

    Args:
        ordered: Values in ascending order, at least one.
        percent: More than 0, at most 100.

    Raises:
        ValueError: There is no value, or no such percentile.
    """
    if not ordered or not 0 < percent <= 100:
        raise ValueError(f"no percentile {percent} of {len(ordered)} values")
    return ordered[math.ceil(percent * len(ordered) / 100) - 1]


@dataclass(frozen=True)
class Summary:
    """Least, percentiles by their number, and most, in the unit of the values."""

    count: int
    least: float
    percentiles: Mapping[int, float]
    most: float


def summary(values: Sequence[float]) -> Summary | None:
    """What there is to say of some times; None of no times."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Summary(
        len(ordered),
        ordered[0],
        {percent: percentile(ordered, percent) for percent in SHOWN},
        ordered[-1],
    )
