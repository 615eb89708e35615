"""Launches kernel.cu: embedding rows, the head's inputs, penalties, sampling and acceptance, all on the device.

    kernels = SamplingKernels(Module(cached_kernels(SOURCE, "sm_90", defines(hidden_size))), vocab_size)
    scratch = torch.zeros(kernels.scratch_bytes(rows=3), dtype=torch.uint8, device="cuda")
    steering = SteeringArguments(occurrences=occurrences, params=params, bias=bias)  # optional: kernels.steer, .count
    kernels.steer(logits, 3, verify_tokens, 0, steering, steered, stream)
    kernels.sample(steered, 3, config, position, 1, seed, [tokens], error, scratch.data_ptr(), stream)
    kernels.accept(tokens, drafts, 2, seed, control, verify_tokens, head_tokens, out_tokens, stream)
    kernels.count(out_tokens, control, occurrences, stream)

Addresses are plain integers, of device memory. Positions, the seed, penalties, biases and masks lie there, so that a
captured graph of these launches serves every round of every sequence; the other sampling parameters are captured.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import Structure, c_double, c_float, c_int, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.sampling import SamplingConfig

SOURCE = Path(__file__).with_name("kernel.cu")
CONTROL_WORDS = 16  # int32, zero before the first round
POSITION, COMMIT, HEAD_ROWS, HEAD_POSITION, COUNT, ERROR, HEAD_LAST = range(7)  # enum Control
MAX_OUTPUTS, MAX_DRAFTS, MAX_VOCAB = 3, 31, 1 << 20
_THREADS = 256
ROW_BYTES = 64 + 12 * 2048  # struct Row


class Filters(Structure):
    _fields_ = [
        ("temperature", c_float),
        ("log_min_p", c_float),
        ("top_p", c_double),
        ("top_k", c_int),
        ("padding", c_int),
    ]


class SteeringArguments(Structure):
    """Addresses of what changes logits before they are sampled; V is at least the vocabulary of the call.

    occurrences: int32 [V], twice the times an entry stands in the answer so far, plus 1 if it stands in the prompt.
    params: float32 [3], the penalties: repetition (1: off), presence and frequency (0: off).
    bias: float32 [V]. occurrences and bias are aligned to 16 bytes.
    allowed: uint32 [T, allowed_stride], bit v % 32 of word v / 32 set where row t may take entry v; 0 or None: all.
    allowed_stride: words of a row of `allowed`.
    """

    _fields_ = [
        ("occurrences", c_void_p),
        ("params", c_void_p),
        ("bias", c_void_p),
        ("allowed", c_void_p),
        ("allowed_stride", c_int),
        ("padding", c_int),
    ]

    def unmasked(self) -> SteeringArguments:
        return SteeringArguments(self.occurrences, self.params, self.bias)


class Tokens(Structure):
    _fields_ = [("out", c_void_p * MAX_OUTPUTS)]

    @classmethod
    def of(cls, outputs: Sequence[int]) -> Tokens:
        """outputs: addresses of int32 [T], at most MAX_OUTPUTS."""
        assert len(outputs) <= MAX_OUTPUTS
        return cls((c_void_p * MAX_OUTPUTS)(*outputs))


def defines(hidden_size: int) -> dict[str, int | str]:
    return {"HIDDEN": hidden_size}


def seed_words(seed: int) -> tuple[int, int]:
    """The seed as int32 pair, as the kernels read it."""
    low, high = (ctypes.c_int32(word).value for word in (seed & 0xFFFFFFFF, seed >> 32))
    return low, high


class SamplingKernels:
    """Sizes of arrays are in brackets, T is `rows`. `stream` is last everywhere."""

    def __init__(self, module: Any, vocab_size: int) -> None:
        assert vocab_size <= MAX_VOCAB
        self.module, self.vocab_size = module, vocab_size

    def _launch(self, name: str, grid: tuple[int, int], threads: int, args: Sequence[Any], stream: int) -> None:
        self.module.kernel(name).launch((*grid, 1), (threads, 1, 1), args, stream)

    def embed(self, tokens: int, embedding: int, x: int, rows: int, stream: int) -> None:
        """tokens int32 [T], embedding bfloat16 [V, H] -> x float32 [T, H]."""
        args = [c_void_p(tokens), c_void_p(embedding), c_void_p(x)]
        self._launch("embed_rows", (rows, 1), _THREADS, args, stream)

    def mtp_inputs(
        self,
        tokens: int,
        embedding: int,
        embedding_norm: int,
        hidden: int,
        hidden_norm: int,
        out: int,
        rows: int,
        epsilon: float,
        stream: int,
    ) -> None:
        """out float32 [T, 2H] = norms of the tokens' embeddings and of hidden float32 [T, H]; norms float32 [H]."""
        addresses = (tokens, embedding, embedding_norm, hidden, hidden_norm, out)
        args = [*map(c_void_p, addresses), c_float(epsilon)]
        self._launch("mtp_inputs", (rows, 2), _THREADS, args, stream)

    def steer(
        self, logits: int, rows: int, tokens: int, first: int, steering: SteeringArguments, out: int, stream: int
    ) -> None:
        """logits float32 [T, V] -> out float32 [T, V], which is another buffer: the penalties for what row t comes
        after, then the bias; what `allowed` excludes is -1e30. All bits are those of the same steps in float32 on the
        host. tokens: int32 [first + T] of a verify: the last token of the answer, which occurrences already counts,
        then drafts, which it does not. Row t comes after tokens[1] to tokens[first + t]: first is 0 in a verify, i for
        the one row of draft i, from 0."""
        assert out != logits and first >= 0
        assert not steering.allowed or steering.allowed_stride * 32 >= self.vocab_size
        args = [c_void_p(logits), c_int(self.vocab_size), c_void_p(tokens), c_int(first), steering, c_void_p(out)]
        self._launch("steer_logits", self._tiles(rows, 1), _THREADS, args, stream)

    def count(self, out_tokens: int, control: int, occurrences: int, stream: int) -> None:
        """After `accept`: the round's control[COUNT] tokens into SteeringArguments.occurrences, int32 [V]."""
        args = [c_void_p(out_tokens), c_void_p(control), c_void_p(occurrences)]
        self._launch("count_tokens", (1, 1), MAX_DRAFTS + 1, args, stream)

    def scratch_bytes(self, rows: int) -> int:
        """Of `sample`, for up to that many rows. Zero before the first call; launches on one stream share it."""
        return rows * (ROW_BYTES + 8 * self.vocab_size)

    def _tiles(self, rows: int, groups: int) -> tuple[int, int]:
        return -(-self.vocab_size // (_THREADS * 4 * groups)), rows

    def sample(
        self,
        logits: int,
        rows: int,
        config: SamplingConfig,
        position: int,
        offset: int,
        seed: int,
        outputs: Sequence[int],
        error: int,
        scratch: int,
        stream: int,
    ) -> None:
        """logits float32 [T, V]; row t is sampled as runtime.sampling.Sampler does at position [1] + offset + t.
        seed: the address of two words; config.seed is not used. outputs: up to three int32 [T], each gets the tokens.
        A row that is not finite gives token 0 and sets error [1]."""
        kept, tokens, no_tokens = c_void_p(scratch), Tokens.of(outputs), Tokens.of([])
        where = [c_void_p(position), c_int(offset), c_void_p(seed)]
        given, vocab, grid = c_void_p(logits), c_int(self.vocab_size), self._tiles(rows, 2)
        is_cut = config.top_k > 0 or config.top_p < 1
        if config.temperature == 0:
            self._launch("argmax", grid, _THREADS, [given, vocab, kept, tokens, c_void_p(error)], stream)
            return
        if not is_cut and config.min_p == 0:
            args = [given, vocab, c_float(config.temperature), *where, kept, tokens, c_void_p(error)]
            self._launch("sample", grid, _THREADS, args, stream)
            return
        log_min_p = math.log(config.min_p) if config.min_p else -math.inf
        top_k = min(config.top_k, self.vocab_size)
        filters = Filters(temperature=config.temperature, log_min_p=log_min_p, top_p=config.top_p, top_k=top_k)
        self._launch("argmax", grid, _THREADS, [given, vocab, kept, no_tokens, c_void_p(error)], stream)
        if is_cut:
            self._launch("histogram", self._tiles(rows, 4), _THREADS, [given, vocab, filters, kept], stream)
        args = [given, vocab, filters, *where, kept, tokens, c_void_p(error)]
        self._launch("sample_filtered", grid, _THREADS, args, stream)

    def accept(
        self,
        sampled: int,
        drafts: int,
        draft_count: int,
        seed: int,
        control: int,
        verify_tokens: int,
        head_tokens: int,
        out_tokens: int,
        stream: int,
        simulate: float | None = None,
    ) -> None:
        """sampled int32 [K + 1] after each row of a verify, drafts int32 [K]: accepts the longest prefix on which they
        agree. control [CONTROL_WORDS] moves on; verify_tokens[0], head_tokens [K + 1] and out_tokens [K + 1] are as the
        kernel says. simulate: a benchmark's acceptance instead, the probability that a draft is taken for right."""
        assert 0 <= draft_count <= MAX_DRAFTS
        args = [
            *(c_void_p(sampled), c_void_p(drafts), c_int(draft_count)),
            *(c_float(-1.0 if simulate is None else simulate), c_void_p(seed), c_void_p(control)),
            *(c_void_p(verify_tokens), c_void_p(head_tokens), c_void_p(out_tokens)),
        ]
        self._launch("accept_drafts", (1, 1), 32, args, stream)
