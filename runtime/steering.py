"""What of the tokens so far bears on the next one: penalties, biases, a grammar. All that sampling knows beside logits,
seed and position.

    steering = Steering(config, vocab_size, prompt, grammar)
    token = sampler.sample(steering.apply(logits), position)
    steering.push(token)

The token at a position is then a function of the logits, the seed, the position and the tokens before it. A row of a
verify is sampled with the drafts before it pushed, and counts only if they were right: drafts change no token. The
kernels in plugins/sampling do the same arithmetic, operation by operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.errors import UserError
from runtime.sampling import Floats, SamplingConfig

if TYPE_CHECKING:
    from runtime.grammar import Grammar


class GrammarError(UserError):
    """A grammar that cannot be made, or cannot go on."""


MASKED = np.float32(-1e30)  # finite, at the lowest temperature too


class Steering:
    """Of one answer. prompt: all tokens before it."""

    def __init__(
        self, config: SamplingConfig, vocab_size: int, prompt: Sequence[int], grammar: Grammar | None = None
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.state = grammar.start() if grammar else None
        self.in_prompt = np.zeros(vocab_size, bool)
        self.in_prompt[list(prompt)] = True
        self.counts = np.zeros(vocab_size, np.int32)
        self.bias = np.zeros(vocab_size, np.float32)
        for token, bias in config.logit_bias:
            self.bias[token] = bias

    @property
    def occurrences(self) -> NDArray[np.int32]:
        """int32 [V], as the kernels take them: twice the count in the answer, and 1 for what the prompt has."""
        return 2 * self.counts + self.in_prompt

    def apply(self, logits: Floats) -> Floats:
        """logits float32 [V'] of the next token -> what is sampled from. V': the vocabulary, or its first part."""
        c, size = self.config, len(logits)
        if c.steers:
            counts = self.counts[:size]
            repetition, frequency, presence = map(
                np.float32, (c.repetition_penalty, c.frequency_penalty, c.presence_penalty)
            )
            penalized = np.where(logits > 0, logits / repetition, logits * repetition)
            logits = np.where(self.in_prompt[:size] | (counts > 0), penalized, logits)
            logits = logits - frequency * counts.astype(np.float32)
            logits = np.where(counts > 0, logits - presence, logits) + self.bias[:size]
        allowed = self.state.allowed() if self.state else None
        if allowed is not None:
            bits = np.unpackbits(allowed.view(np.uint8), count=size, bitorder="little").view(bool)
            logits = np.where(bits, logits, MASKED)
        return logits

    def push(self, token: int) -> None:
        """A token of the answer, one that `apply` left possible."""
        self.counts[token] += 1
        if self.state:
            went = self.state.push(token)
            assert went, "a token against the grammar"

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """What is pushed in this block is taken back at its end."""
        counts, state = self.counts, self.state
        self.counts, self.state = counts.copy(), state.copy() if state else None
        try:
            yield
        finally:
            self.counts, self.state = counts, state
