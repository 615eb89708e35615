"""The whole model against transformers in float32, and the head against a head of transformers' parts.

pytest tests/test_model.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engines import Engine
from engines.manifest import WEIGHTS
from engines.torch import TorchEngine
from export.dequantize import dequantize
from runtime import rounds
from runtime.rounds import generate
from runtime.sampling import Sampler, SamplingConfig
from tests.checkpoints import LAYOUTS, Layout
from tests.conftest import Build, Built
from tests.reference import Reference

GREEDY = Sampler(SamplingConfig())
SHAPES: dict[str, dict[str, Any]] = {  # seed: of the weights, where others make the random head wrong too often
    "moe": {"vocab_size": 24},
    "moe-wide": {
        "vocab_size": 33,
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "linear_value_head_dim": 32,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "full_attention_interval": 2,
    },
    "dense": {"num_experts": 0, "vocab_size": 24, "seed": 1},
    "tied": {"tie_word_embeddings": True, "vocab_size": 24, "linear_num_key_heads": 4},
    "next": {"family": "qwen3_next", "vocab_size": 24, "seed": 3},
}


def prompt_of(built: Built, length: int) -> list[int]:
    config = built.config.get("text_config", built.config)
    return torch.randint(0, config["vocab_size"], (length,)).tolist()


def tokens_of(engine: Engine, prompt: list[int], count: int, mtp_k: int, sampler: Sampler = GREEDY) -> list[int]:
    return [token for r in generate(engine, prompt, count, mtp_k, sampler) for token in r.tokens]


def relative(actual: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.abs(actual - expected.numpy()).max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_logits_equal_transformers(shape: str, build_engine: Build) -> None:
    built = build_engine(**SHAPES[shape])
    reference, engine = Reference(built.config, built.twin), built.engine()
    for length in (1, 13):
        prompt = prompt_of(built, length)
        expected = reference.greedy(prompt, 64)
        assert tokens_of(engine, prompt, 64, mtp_k=0) == expected
        engine.start(128, window=3)
        hidden, logits = engine.prefill(np.array(prompt), 0, 0)
        want_hidden, want_logits = reference.forward([*prompt, *expected])
        assert relative(hidden, want_hidden[:length]) < 1e-4
        assert relative(logits[0], want_logits[length - 1]) < 1e-4
        for start in range(0, 60, 3):  # true rows only: each call commits the three of the one before
            hidden, logits = engine.verify(np.array(expected[start : start + 3]), length + start, 3 if start else 0)
            rows = slice(length + start, length + start + 3)
            assert relative(logits, want_logits[rows]) < 1e-4
            assert relative(hidden, want_hidden[rows]) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_equal_the_reference_head(shape: str, build_engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PREFILL_CHUNK", 5)  # the head lags by one row across chunks too
    built = build_engine(**SHAPES[shape])
    reference, engine = Reference(built.config, built.twin), built.engine()
    outcomes = set()
    for mtp_k in (1, 2, 3, 4):
        prompt = prompt_of(built, int(torch.randint(1, 14, ())))
        expected = reference.rounds(prompt, 40, mtp_k)
        actual = [(list(r.drafts), r.accepted) for r in generate(engine, prompt, 40, mtp_k, GREEDY)][1:]
        assert actual == expected
        outcomes |= {right > 0 for drafts, right in actual if drafts}
    assert outcomes == {True, False}, "the random head should be right now and then, and wrong now and then"


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_its_dequantized_twin(layout: Layout, expanded: bool, build_engine: Build) -> None:
    built = build_engine(layout, expanded, vocab_size=24)
    reference = Reference(built.config, built.twin)
    prompt = prompt_of(built, 7)
    assert tokens_of(built.engine(), prompt, 48, mtp_k=0) == reference.greedy(prompt, 48)
    actual = [(list(r.drafts), r.accepted) for r in generate(built.engine(), prompt, 30, 2, GREEDY)][1:]
    assert actual == reference.rounds(prompt, 30, 2)


@pytest.mark.parametrize("shape", ["moe-wide", "dense", "tied", "next"])
def test_quantized_members_of_the_family(shape: str, build_engine: Build) -> None:
    sizes = {"hidden_size": 32} if shape == "moe-wide" else {}
    built = build_engine("modelopt_mixed", False, **{**SHAPES[shape], **sizes})
    prompt = prompt_of(built, 7)
    actual = [(list(r.drafts), r.accepted) for r in generate(built.engine(), prompt, 30, 2, GREEDY)][1:]
    assert actual == Reference(built.config, built.twin).rounds(prompt, 30, 2)


def test_eager_torch_gives_the_same_tokens(build_engine: Build) -> None:
    built = build_engine("modelopt_mixed", True, vocab_size=24)
    prompt = prompt_of(built, 9)
    eager = TorchEngine(built.directory)
    assert tokens_of(eager, prompt, 24, mtp_k=2) == tokens_of(built.engine(), prompt, 24, mtp_k=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantized_weights_equal_the_twin(layout: Layout, build_engine: Build) -> None:
    built = build_engine(layout, True, vocab_size=24)
    state = dequantize(built.directory / WEIGHTS, built.engine().manifest.formats)
    assert state.keys() == built.twin.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, built.twin[name], rtol=3e-7, atol=0, msg=name)
