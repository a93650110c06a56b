"""How long to wait before the next try: exponential with full jitter, without an end.

The waiting itself is the caller's.
"""

import random


class Backoff:
    """Waits drawn from 0 to a bound that doubles from `base` to `cap` seconds.

    Full jitter spreads many clients that failed at once better than any other simple rule:
    Marc Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).
    """

    def __init__(self, base: float, cap: float, rng: random.Random | None = None) -> None:
        self._base = base
        self._cap = cap
        self._rng = rng or random.Random()
        self.failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        # 2**63 is beyond any cap; the exponent must not grow for ever.
        bound = min(self._cap, self._base * 2 ** min(self.failures, 63))
        self.failures += 1
        return self._rng.uniform(0, bound)

    def reset(self) -> None:
        """Begin anew after a success."""
        self.failures = 0
