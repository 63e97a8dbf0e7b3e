"""How far a difference between two things, seen on the same rows, may be chance."""

import numpy as np
from numpy.typing import NDArray


def error_of_sum(differences: NDArray[np.float64]) -> float:
    """Standard error of the sum of differences, (rows,), over the rows; 0 of a single row, which says nothing of it."""
    rows = len(differences)
    return float(differences.std(ddof=1)) * rows**0.5 if rows > 1 else 0.0
