"""What makes a resident key worth keeping, as numbers: all that a compiled table has to know of a policy (`store/fast_pool.py`).

A policy that declares it says the same twice: in Python, which is the definition, and here. Tests hold both against each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BY_RECENCY, BY_AGED_COUNT, BY_COUNT_OVER_DISTANCE, BY_COUNT_OVER_AGE, BY_PROFILE, BY_MIX, BY_LOGS = range(7)
NOTHING = np.zeros((1, 1))


class Ranking(NamedTuple):
    """Who leaves: the smallest worth, of equal ones the least recently used.

    | form | worth |
    |---|---|
    | BY_RECENCY | 0 |
    | BY_AGED_COUNT | the count of requests, halved every half_lives[0] steps |
    | BY_COUNT_OVER_DISTANCE | the count over the layers until the key's layer comes again |
    | BY_COUNT_OVER_AGE | the count over 1 + the steps since the last request |
    | BY_PROFILE | numbers[key, 0] |
    | BY_MIX | numbers[0] = w1..w4 and the weight from which a request is important: see `Hobbit` |
    | BY_LOGS | sum over h of numbers[layer, h] x log2(floor + the count with half_lives[h]) |

    weighs: a request counts as its routing weight, not as 1; renews: a request of a resident key makes it the most recent one.
    """

    form: int
    half_lives: tuple[float, float, float] = (1.0, 1.0, 1.0)
    numbers: NDArray[np.float64] = NOTHING
    floor: float = 0.0
    weighs: bool = False
    renews: bool = True
