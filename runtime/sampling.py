"""Sampling whose noise is a function of (seed, position) alone: argmax of filtered logits + Gumbel noise.

    token = argmax(filter(logits / temperature) + G(seed, position))        # temperature 0: argmax(logits)

Softmax sampling by the Gumbel-max trick. The noise of vocabulary entry v at a position comes from Philox4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key = seed, counter = (v // 4, position, 0,
0) and lane v % 4, so a position is sampled the same way whoever asks, in whatever order: decoding with drafts and
without gives the same tokens, and a draft drawn with the noise of its position agrees with the main model with
probability at least (1 - TV) / (1 + TV) (Daliri, Musco, Suresh 2024, arXiv:2408.07978).

    Sampler(SamplingConfig(temperature=0.8, top_p=0.95, seed=1)).sample(logits, position=17)

Penalties, biases and grammars change the logits before that, see runtime/steering.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.errors import UserError

Floats = NDArray[np.float32]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class SettingError(UserError):
    """A sampling parameter out of range. name: its field in SamplingConfig. expected: in words."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"--{name.replace('_', '-')} {value}: expected {expected}")
        self.name, self.expected = name, expected


@dataclass(frozen=True)
class SamplingConfig:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Filters apply in that order, after the
    temperature, as in transformers. seed: 0 to 2**64 - 1. What bears on logits before all of these, in this order:

    repetition_penalty: of tokens in the prompt or the answer, logits above 0 are divided by it, others multiplied
        (Keskar et al. 2019, arXiv:1909.05858); 1 is off.
    frequency_penalty, presence_penalty: taken off a token's logit for each time it stands in the answer, and once if it
        does, as OpenAI's API has them; 0 is off.
    logit_bias: (token id, what is added to its logit), each id once.

    Raises SettingError for a value out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        ids = [token for token, _ in self.logit_bias]
        for name, valid, expected in (
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "0, or 0.000001 to 1000000"),
            ("top_k", self.top_k >= 0, "an integer from 0 up"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("seed", 0 <= self.seed < 2**64, "an integer from 0 to 2**64 - 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "a number from 0.01 to 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "a number from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "a number from -2 to 2"),
            ("logit_bias", all(-100 <= bias <= 100 for _, bias in self.logit_bias), "biases from -100 to 100"),
            ("logit_bias", len(set(ids)) == len(ids), "each token id once"),
        ):
            if not valid:
                raise SettingError(name, getattr(self, name), expected)

    @property
    def steers(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10: counter [4, N] of 32-bit values (held in uint64) -> [4, N] of 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (high >> _HALF) ^ c1 ^ np.uint64(k0), high & _MASK
        c2, c3 = (low >> _HALF) ^ c3 ^ np.uint64(k1), low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def gumbel(seed: int, position: int, entries: NDArray[np.int64]) -> Floats:
    """Gumbel noise, float32, of these vocabulary entries at this position."""
    counter = np.zeros((4, len(entries)), np.uint64)
    counter[0], counter[1] = entries // 4, position
    return _to_gumbel(philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[entries % 4, np.arange(len(entries))])


@functools.lru_cache(maxsize=32)
def all_gumbel(seed: int, position: int, vocab_size: int) -> Floats:
    """The same for the whole vocabulary; kept, since a draft and its verification ask for the same."""
    counter = np.zeros((4, -(-vocab_size // 4)), np.uint64)
    counter[0], counter[1] = np.arange(counter.shape[1]), position
    return _to_gumbel(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).T.ravel()[:vocab_size])


def _to_gumbel(bits: NDArray[np.uint64]) -> Floats:
    # 23 bits, centred in their cell: exact in float32 and never 0 or 1, on any device.
    uniform = ((bits >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    return -np.log(-np.log(uniform))


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities by the model's own logits, before penalties, biases, temperature and filters:
    of the token that was emitted, and of the most likely ones, as (token, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob_of(logits: Floats, token: int, count: int) -> TokenLogprob:
    """logits float32 [V] that `token` was sampled from; count: how many of the most likely ones."""
    values = logits.astype(np.float64) - logits.max()
    values -= np.log(np.exp(values).sum())
    top = np.arange(len(values))[:count]
    if 0 < count < len(values):
        top = np.argpartition(-values, count)[:count]
    top = top[np.argsort(-values[top], kind="stable")]
    return TokenLogprob(token, float(values[token]), tuple((int(entry), float(values[entry])) for entry in top))


class Sampler:
    """`sample(logits, position)` is a pure function: calls may come in any order, and twice."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config

    def sample(self, logits: Floats, position: int) -> int:
        """logits float32 [V] of the token that will stand at `position` -> its id. Raises UserError: not finite."""
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise UserError("the logits are not finite: the checkpoint holds NaN or infinity; download it again")
        if self.config.temperature == 0:
            return best
        scaled = logits / np.float32(self.config.temperature)
        entries = self._survivors(scaled)
        if 4 * len(entries) < len(scaled):
            noise = gumbel(self.config.seed, position, entries)
        else:
            noise = all_gumbel(self.config.seed, position, len(scaled))[entries]
        return int(entries[(scaled[entries] + noise).argmax()])

    def _survivors(self, scaled: Floats) -> NDArray[np.int64]:
        """The vocabulary entries that the filters leave, in rising order."""
        config, entries = self.config, np.arange(len(scaled))
        if 0 < config.top_k < len(scaled):
            threshold = np.partition(scaled, -config.top_k)[-config.top_k]
            entries = np.flatnonzero(scaled >= threshold)
        if config.top_p < 1:
            order = entries[np.argsort(-scaled[entries], kind="stable")]
            p = np.exp(scaled[order].astype(np.float64) - scaled[order[0]])
            before = np.cumsum(p) - p  # mass of what is more likely
            entries = np.sort(order[before < config.top_p * p.sum()])
        if config.min_p > 0:
            entries = entries[scaled[entries] >= scaled.max() + math.log(config.min_p)]
        return entries
