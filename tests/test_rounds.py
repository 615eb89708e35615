"""Lossless: the tokens, the state and the bits do not depend on drafts.

pytest tests/test_rounds.py
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from export.errors import UserError
from runtime import rounds
from runtime.rounds import Decoder, generate
from runtime.sampling import Sampler, SamplingConfig
from tests.conftest import Build
from tests.reference import Reference
from tests.test_model import GREEDY, prompt_of, tokens_of

LIVELY = {"vocab_size": 24}  # few enough words that the random head is right now and then


@pytest.fixture(
    scope="module",
    params=[(True, 1, 4), (True, 2, 4), (False, 1, 4), (True, 1, 2)],
    ids=["expanded", "two-threads", "packed", "one-query-a-head"],
)
def engine(request, build_engine):  # type: ignore[no-untyped-def]
    expanded, threads, heads = request.param
    seed = 0 if heads == 4 else 2  # one of the seeds of which the random head is right now and then
    return build_engine("modelopt_mixed", expanded, seed=seed, num_attention_heads=heads, **LIVELY).engine(threads)


@given(
    prompt=st.lists(st.integers(0, 23), min_size=1, max_size=12),
    count=st.integers(1, 40),
    mtp_k=st.integers(1, 6) | st.just(16),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    filters=st.sampled_from(
        [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}]
    ),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_do_not_depend_on_k(engine, prompt, count, mtp_k, temperature, filters, seed) -> None:  # type: ignore[no-untyped-def]
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=seed, **filters))
    plain = tokens_of(engine, prompt, count, 0, sampler)
    assert len(plain) == count
    assert tokens_of(engine, prompt, count, mtp_k, sampler) == plain


def test_some_drafts_are_accepted_and_some_rejected(engine) -> None:  # type: ignore[no-untyped-def]
    """What the property above relies on, greedy and sampled."""
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingConfig(temperature=temperature, seed=5))
        seen = [r for r in generate(engine, [1, 2, 3], 120, 3, sampler) if len(r.drafts) == 3]
        assert {0, 1} <= {r.accepted for r in seen}
        assert any(r.accepted > 1 for r in seen)


def test_rejections_leave_no_trace(engine) -> None:  # type: ignore[no-untyped-def]
    """After any mix of acceptances the state is, bit for bit, that of a run without drafts."""
    prompt = torch.randint(0, 24, (9,)).tolist()
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=int(torch.randint(0, 99, ()))))
    results = []
    for mtp_k in (0, 1, 2, 4):
        decoder = Decoder(engine, len(prompt) + 60, mtp_k, sampler)
        decoder.prefill(prompt)
        while decoder.position < 40:
            decoder.round(min(mtp_k, 40 - decoder.position - 1))
        hidden, logits = engine.verify(np.array([decoder.last]), decoder.position, decoder.accepted)  # commits
        state = {name: tensor.copy() for name, tensor in engine.state().items() if not name.startswith("mtp.")}
        results.append((decoder.last, hidden.copy(), logits.copy(), state))
    for last, hidden, logits, state in results[1:]:
        assert last == results[0][0]
        np.testing.assert_array_equal(hidden, results[0][1])
        np.testing.assert_array_equal(logits, results[0][2])
        for name, tensor in state.items():
            want = results[0][3][name]
            if name.endswith("kv_cache"):  # slots past the position belong to the future
                tensor, want = tensor[:, :, :41], want[:, :, :41]
            np.testing.assert_array_equal(tensor, want, err_msg=name)


def test_bits_of_a_row_do_not_depend_on_the_other_rows(engine) -> None:  # type: ignore[no-untyped-def]
    tokens = torch.randint(0, 24, (70,)).numpy()
    seen = {}
    for rows in (1, 2, 3, 5):
        engine.start(128, window=rows)
        engine.prefill(tokens[:10], 0, 0)
        out = []
        for start in range(10, 70, rows):
            hidden, logits = engine.verify(tokens[start : start + rows], start, rows if start > 10 else 0)
            out.append(np.concatenate([hidden, logits], axis=1))
        seen[rows] = np.concatenate(out)
    for rows in (2, 3, 5):
        np.testing.assert_array_equal(seen[rows], seen[1])


def test_prefill_in_chunks_gives_the_same_text(build_engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_engine(**LIVELY)
    prompt = prompt_of(built, 150)
    expected = Reference(built.config, built.twin).greedy(prompt, 16)
    for chunk in (256, 150, 64, 7, 1):
        monkeypatch.setattr(rounds, "PREFILL_CHUNK", chunk)
        assert tokens_of(built.engine(), prompt, 16, mtp_k=2) == expected


def test_a_further_prompt_after_a_round_commits_the_accepted_rows(build_engine: Build) -> None:
    """main.prefill applies the accepted rows of the window too: a chat's next turn follows a round."""
    built = build_engine(**LIVELY)
    engine, prompt, more = built.engine(), prompt_of(built, 6), prompt_of(built, 5)
    decoder = Decoder(engine, 100, 3, GREEDY)
    text = [*prompt, decoder.prefill(prompt)]
    for _ in range(4):
        text += decoder.round(3)[1]
    _, logits = engine.prefill(np.array([decoder.last, *more]), decoder.position, decoder.accepted)
    _, want = Reference(built.config, built.twin).forward([*text, *more])
    assert np.abs(logits[0] - want[-1].numpy()).max() < 1e-4 * want.abs().max()


def test_tokens_follow_the_models_distribution(build_engine: Build) -> None:
    """Temperature 1: the two tokens of the first round, over many seeds, against transformers' probabilities."""
    built = build_engine(vocab_size=6)
    reference, engine, prompt = Reference(built.config, built.twin), built.engine(), [1, 4, 2]
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        seen[tuple(tokens_of(engine, prompt, 4, 2, sampler)[1:3])] += 1

    def probabilities(*tokens: int) -> torch.Tensor:
        return reference.forward([*prompt, *tokens])[1][-1].softmax(-1)

    first = probabilities()
    expected = {(b, c): 0.0 for b in range(6) for c in range(6)}
    for a in range(6):
        second = probabilities(a)
        for b in range(6):
            third = probabilities(a, b)
            for c in range(6):
                expected[b, c] += float(first[a] * second[b] * third[c]) * 3000
    common = [pair for pair, count in expected.items() if count >= 5]
    rare = 3000 - sum(expected[pair] for pair in common)
    observed = [seen[pair] for pair in common] + [3000 - sum(seen[pair] for pair in common)]
    # The seeds are fixed, so this cannot flake; a wrong distribution gives a p-value of zero.
    assert chisquare(observed, [expected[pair] for pair in common] + [rare]).pvalue > 1e-3


def test_drafts_after_rounds_without_drafts(build_engine: Build) -> None:
    """K may change between rounds: rows that the head has not seen queue up for it."""
    built = build_engine(**LIVELY)
    reference, prompt = Reference(built.config, built.twin), prompt_of(built, 5)
    decoder = Decoder(built.engine(), 80, 3, GREEDY)
    text = [*prompt, decoder.prefill(prompt)]
    for count in (0, 2, 0, 0, 3, 1, 0, 2, 3):
        drafts, tokens = decoder.round(count)
        assert drafts == reference.drafts(text, reference.forward(text)[0], count)
        text += tokens


def test_stop_id_ends_the_text_inside_a_round(engine) -> None:  # type: ignore[no-untyped-def]
    plain = tokens_of(engine, [3, 1], 60, 0)
    for stop in set(plain):
        expected = plain[: plain.index(stop) + 1]
        for mtp_k in (0, 2, 4):
            seen = list(generate(engine, [3, 1], 60, mtp_k, GREEDY, {stop}))
            assert [token for r in seen for token in r.tokens] == expected
            assert all(r.accepted <= len(r.tokens) <= r.accepted + 1 for r in seen)


def test_requests_that_cannot_be_served(build_engine: Build) -> None:
    engine = build_engine(**LIVELY).engine()
    headless = build_engine(written={"mtp": "none"}, **LIVELY).engine()
    for bad, message in (
        ((engine, [24], 4, 0), "token id 24"),
        ((engine, [-1], 4, 0), "token id -1"),
        ((engine, [], 4, 0), "no tokens"),
        ((engine, [1] * 500, 13, 0), "exceeds the cache of 512"),
        ((engine, [1], 0, 0), "--max-new-tokens 0"),
        ((engine, [1], 4, -1), "--mtp-k -1"),
        ((headless, [1], 4, 1), "no MTP head"),
    ):
        with pytest.raises(UserError, match=message):
            next(generate(*bad, GREEDY))
    assert len(tokens_of(headless, [1], 4, 0)) == 4
