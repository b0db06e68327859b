"""mmasl.utils.statistics."""
import numpy as np
import pytest
from scipy.stats import t

from mmasl.utils.statistics import interval


def test_interval():
    values = [1., 2., 4.]
    mean, half = interval(values)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(t.interval(0.95, 2, scale=np.std(values, ddof=1) / 3**0.5)[1])
    assert np.isnan(interval([1.])[1])
