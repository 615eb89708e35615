"""K by itself: how many drafts the next round makes, from what rounds cost here and how often drafts are right.

    auto = AutoK(most=5)
    count = auto.choose()
    auto.record(drafted=count, accepted=1, seconds=0.004)

With a[i] the share of drafts at position i that are right, given that those before them were, a round of K drafts emits
1 + a[1] + a[1] a[2] + … tokens; the K with the most of them per second is taken. Both are running figures. Now and then
another K is tried, so that they stay true where the text or the machine changes. The text does not depend on any of it.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from operator import mul

MOST = 6  # drafts: beyond, what a further one adds is small wherever it was measured
MEMORY = 0.98  # of acceptance at a position, a draft there: half of it is gone after 34
FADING = 0.998  # the same, a round without a draft there
KEPT = 16  # rounds of each K that its cost is from
PROBE = 32  # rounds between two that try another K, a third of it where that was timed fewer than ENOUGH times
ENOUGH = 3
NEAR = 0.85  # of the best rate: what is tried, beside the next K on either side
PRIOR = 4.0  # rounds' worth of belief that a draft is right as often as the one before it
FIRST = 0.7  # what that belief begins with
GUESS = 0.2  # of a round without drafts, what each adds: until two numbers of drafts were timed


class AutoK:
    """most: the most drafts that a round may have. One may serve many sequences, one after another, on one engine."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds: list[deque[float]] = [deque(maxlen=KEPT) for _ in range(most + 1)]
        self.seen = [0] * (most + 1)  # rounds
        self.tried = [0] * (most + 1)  # the number of the last round of this K
        self.offered, self.right = [0.0] * most, [0.0] * most
        self.rounds = 0

    def choose(self) -> int:
        """The number of drafts for the next round."""
        rates = self.rates()
        best = max(range(self.most + 1), key=rates.__getitem__)
        others = [k for k, rate in enumerate(rates) if k != best and (rate > NEAR * rates[best] or abs(k - best) == 1)]
        if others:
            other = min(others, key=self.tried.__getitem__)
            every = PROBE if len(self.seconds[other]) >= ENOUGH else PROBE // 3
            if self.rounds - max(self.tried[k] for k in others) >= every:
                return other
        return best

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        self.rounds += 1
        self.tried[drafted] = self.rounds
        self.seen[drafted] += 1
        if self.seen[drafted] > 1:  # the first one prepares things
            self.seconds[drafted].append(max(seconds, 1e-9))
        for i in range(self.most):
            seen = i < min(drafted, accepted + 1)
            memory = MEMORY if seen else FADING
            self.offered[i] = memory * self.offered[i] + seen
            self.right[i] = memory * self.right[i] + (seen and i < accepted)

    def acceptance(self) -> list[float]:
        """By position, given that the drafts before were right."""
        shares, share = [], FIRST
        for offered, right in zip(self.offered, self.right, strict=True):
            share = (right + PRIOR * share) / (offered + PRIOR)
            shares.append(share)
        return shares

    def costs(self) -> list[float]:
        """Seconds of a round by K. Where none was timed, on the line through the nearest two that were."""
        # What disturbs a round makes it longer: of few figures the least is nearest, of more the first quarter's last.
        known = {k: sorted(times)[len(times) // 4] for k, times in enumerate(self.seconds) if times}
        if not known:
            return [1 + GUESS * k for k in range(self.most + 1)]
        if len(known) == 1:
            k, cost = next(iter(known.items()))
            known[k + 1] = cost * (1 + GUESS * (k + 1)) / (1 + GUESS * k)
        costs = []
        for k in range(self.most + 1):
            a, b = sorted(sorted(known, key=lambda other: abs(other - k))[:2])
            slope = max((known[b] - known[a]) / (b - a), 0)
            costs.append(known[k] if k in known else max(known[a] + (k - a) * slope, min(known.values()) / 2))
        return list(accumulate(reversed(costs), min))[::-1]  # fewer drafts never take longer

    def rates(self) -> list[float]:
        """Tokens per second by K, as far as is known."""
        tokens = accumulate(accumulate(self.acceptance(), mul), initial=1.0)
        return [count / cost for count, cost in zip(tokens, self.costs(), strict=True)]
