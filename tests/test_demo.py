"""The demo checkpoint is what its page says: small, exact, worth drafting for.

pytest tests/test_demo.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.evaluate import check
from engines.build import build
from engines.onnxruntime import OnnxRuntimeEngine
from runtime.bench import GREEDY, HELD_OUT, Bench, Transformers, load_prompts
from runtime.sampling import SamplingConfig
from runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "demo"
SAMPLED = SamplingConfig(temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("demo") / "engines"
    build(DEMO / "checkpoint", directory)
    engine = OnnxRuntimeEngine(directory, threads=1)
    return Bench(engine, load_prompts(DEMO / "prompts.json", Tokenizer(directory)), count=64)


def test_size() -> None:
    assert sum(path.stat().st_size for path in (DEMO / "checkpoint").iterdir()) <= 16_000_000


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SamplingConfig(0.8, top_k=20, top_p=0.95, seed=9)])
def test_the_text_does_not_depend_on_drafts(bench: Bench, sampling: SamplingConfig) -> None:
    plain = bench.decode(0, sampling)["token_ids"]
    assert sum(map(len, plain)) > 500
    for mtp_k in (1, 2, 3, 4):
        assert bench.decode(mtp_k, sampling)["token_ids"] == plain


def test_drafts_are_worth_their_while(bench: Bench) -> None:
    greedy = bench.decode(2, GREEDY)["acceptance"]
    assert greedy[0] >= 0.6 and greedy[1] >= 0.4
    shared = bench.decode(2, SAMPLED)["acceptance"]
    unshared = bench.decode(2, SAMPLED, drafting=GREEDY)["acceptance"]
    assert shared[0] > unshared[0] and shared[1] > unshared[1]


def test_drafts_on_held_out_text(bench: Bench) -> None:
    """With the text as context at every position: no loops of greedy decoding flatter the head."""
    first, second = bench.text_as_context(HELD_OUT[3:], count=150)
    assert first >= 0.6 and second >= 0.4


def test_the_text_is_that_of_transformers(bench: Bench) -> None:
    other = Transformers(DEMO / "checkpoint", bench.engine, threads=1)
    some = Bench(bench.engine, bench.prompts[:3], count=32)
    _, tokens = other.decode(some.prompts, some.count, some.stop_ids)
    assert some.decode(2, GREEDY)["token_ids"] == tokens


def pieces(directory: Path) -> Iterator[tuple[Tokenizer, str]]:
    tokenizer = Tokenizer(directory)
    for text in ("def f(x):\n    return 'naïve ☃ 漢字 🙂'", "", "\n\n    \t", "<|im_start|>user\nhi<|im_end|>\n"):
        yield tokenizer, text


def test_tokenizer_round_trip_and_whole_characters() -> None:
    for tokenizer, text in pieces(DEMO / "checkpoint"):
        ids = tokenizer.encode(text)
        streamed = list(tokenizer.stream([], ids))
        assert "\ufffd" not in "".join(streamed)
        assert "".join(streamed) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_a_character_cut_by_the_prompt_or_by_the_end() -> None:
    tokenizer = Tokenizer(DEMO / "checkpoint")
    ids = tokenizer.encode("a = '🙂' + ''")
    cut = next(n for n in range(1, len(ids)) if "".join(tokenizer.stream([], ids[:n])).endswith("\ufffd"))
    assert "".join(tokenizer.stream(ids[:cut], ids[cut:])) == "🙂' + ''"
    assert "".join(tokenizer.stream([], ids[:cut])) == "a = '\ufffd"


def test_training_model_equals_transformers() -> None:
    check()
