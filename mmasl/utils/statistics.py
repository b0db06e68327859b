"""Means with confidence intervals."""
from collections.abc import Sequence

import numpy as np
from scipy.stats import t


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval (Student's t; NaN for a single value)."""
    x, count = np.asarray(values, float), len(values)
    return x.mean(), t.ppf(0.975, count - 1) * x.std(ddof=1) / count**0.5 if count > 1 else np.nan
