"""What the benchmarks count: drafts by kind of text, and the bytes of every kind of launch.

pytest tests/test_bench.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import cuda_memory
from engines.cuda_model import CudaModel, Gpu, Options
from engines.cuda_weights import DeviceWeights, synthetic_modules, synthetic_vectors
from export.config import ModelConfig
from export.errors import UserError
from runtime import bench as benchmark
from runtime.bench import Bench, bench_cpu, load_chats, load_prompts, write
from runtime.bench_cuda import Bytes
from runtime.bench_kinds import MTP_K, PROSE, kinds
from runtime.rounds import Decoder
from runtime.sampling import Sampler
from tests.checkpoints import tiny_config
from tests.conftest import Build

MIXTURE: dict[str, Any] = {"num_experts": 16, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
FULL_SIZE = Path(__file__).parents[1] / "demo/qwen3.6-35b-a3b.json"


class Letters:
    """A tokenizer of tiny engines, which have none."""

    def __init__(self, directory: Path) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 64 for letter in text]


def test_acceptance_by_kind_of_text(build_engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "Tokenizer", Letters)
    bench = Bench(build_engine().engine(), [[1, 2, 3], [9, 8]], count=12)
    found = kinds(bench, [[5, 6, 7, 8]], ("queue", "csv"), PROSE[:2], count=10)
    assert len({entry["kind"] for entry in found}) == len(found) == 6
    assert len(kinds(bench, [], ("queue",), PROSE[:1], count=5)) == 5  # no chats
    for entry in found:
        shares = entry["acceptance"]
        assert len(shares) == MTP_K and all(0 <= share <= 1 for share in shares)
        if "context" in entry["kind"]:  # from the same samples at every position, so they can only fall
            assert shares == sorted(shares, reverse=True)
    assert any(entry["acceptance"][0] > 0 for entry in found), "no draft was right: the test shows little"


def test_a_text_as_context_is_followed(build_engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position as from a prefill of its own of what stands before it."""
    monkeypatch.setattr(benchmark, "Tokenizer", Letters)
    engine, text, right = build_engine().engine(), "how often is a draft right here?", [0, 0, 0]
    tokens = Letters(Path()).encode(text)
    for position in range(1, len(tokens)):
        decoder = Decoder(engine, 64, 3, Sampler(benchmark.GREEDY))
        decoder.prefill(tokens[:position])
        decoder.last, decoder.head_tokens = tokens[position], [tokens[position]]
        drafts, chosen = decoder.round(3)
        assert chosen[:-1] == drafts[: len(chosen) - 1]
        right = [count + (len(chosen) - 1 > i) for i, count in enumerate(right)]
    assert sum(right) > 0, "no draft was right: the test shows nothing"
    shares = Bench(engine, [], 0).as_context([text + text], 3, count=len(tokens))
    assert shares == [count / (len(tokens) - 1) for count in right]


def test_prompts_and_chats(tmp_path: Path) -> None:
    class Template:
        def render(self, messages: list[dict[str, str]]) -> str:
            return f"<{messages[0]['role']}>{messages[0]['content']}"

    file, template, tokenizer = tmp_path / "prompts.json", Template(), Letters(Path())
    file.write_text(json.dumps({"completions": ["ab"], "chats": ["hi"]}))
    assert load_prompts(file, tokenizer) == [[ord("a") % 64, ord("b") % 64]]  # type: ignore[arg-type]
    assert load_chats(file, tokenizer, template) == [tokenizer.encode("<user>hi")]  # type: ignore[arg-type]
    file.write_text(json.dumps({"completions": []}))
    assert load_chats(file, tokenizer, template) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"prompts.json: `completions`"):
        load_prompts(file, tokenizer)  # type: ignore[arg-type]
    file.write_text(json.dumps({"completions": ["ab"], "chats": [1]}))
    with pytest.raises(UserError, match=r"prompts.json: `chats`: expected a list of texts"):
        load_chats(file, tokenizer, template)  # type: ignore[arg-type]


def test_a_document_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    write({"n": 1}, file)
    with pytest.raises(TypeError):
        write({"n": object()}, file)
    assert json.loads(file.read_text()) == {"n": 1} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("flag", "repeats", "count"), [("--repeats 0", 0, 9), ("--max-new-tokens 1", 1, 1)])
def test_too_little_to_measure(flag: str, repeats: int, count: int) -> None:
    with pytest.raises(UserError, match=flag):
        bench_cpu(argparse.Namespace(repeats=repeats, max_new_tokens=count))


class Listed(CudaModel):
    """A model without memory that only notes what it would launch."""

    def __init__(self, config: ModelConfig, options: Options | None = None) -> None:
        self.launched: Counter[str] = Counter()
        super().__init__(config, weights(config), options or Options())

    def module(self, source: Path, macros: Any) -> Any:
        return None

    def launch(self, name: str, function: Any, *args: Any, **options: Any) -> None:
        self.launched[name] += 1


def weights(config: ModelConfig) -> DeviceWeights:
    """Of NVIDIA's mixed layout, on no device."""
    tensors: dict[str, torch.Tensor] = {}
    formats = {}

    def put(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensors[name] = torch.empty(shape, dtype=dtype, device="meta")

    for module, format, shape in synthetic_modules(config):
        formats[module.rpartition(".")[0] if ".experts." in module else module] = format
        *lead, k = shape
        if format == "nvfp4":
            put(f"{module}.weight", (*lead, k // 2), torch.uint8)
            put(f"{module}.weight_scale", (*lead, k // 16), torch.uint8)
        else:
            put(f"{module}.weight", shape, torch.bfloat16 if format == "float" else torch.uint8)
    for name, vector in synthetic_vectors(config):
        put(name, vector, torch.float32)
    for name in [name for name in tensors if name.endswith(".weight")]:  # whatever has a scale of its own
        put(f"{name}_scale_2", (1,), torch.float32)
        tensors.setdefault(f"{name}_scale", torch.empty((1,), device="meta"))
    return DeviceWeights(tensors, formats)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "DEVICE", "meta")
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls: Gpu("sm_90", 132, 227 << 10, 50 << 20)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fp8_cache", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_bytes_by_launch_sum_up_to_those_of_a_verify(no_device: None, rows: int, fp8_cache: bool, dense: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 512, "head_dim": 64}
    config = tiny_config(**sizes, **({"num_experts": 0, "intermediate_size": 192} if dense else MIXTURE))
    model = Listed(ModelConfig.from_hf(config), Options(fp8_cache=fp8_cache))
    model.start(capacity=512, rows=rows)
    model.verify(rows)
    moved, total = Bytes(model).launches(rows, 300), Bytes(model).verify(rows, 300)
    assert set(moved) == set(model.launched)
    small = rows * 2 * 256 + model.weights.tensors["norm.weight"].nbytes  # the embeddings, in two bytes, and a norm
    small += model.weights.tensors["norm.weight_scale"].nbytes + model.weights.tensors["norm.weight_scale_2"].nbytes
    assert sum(moved.values()) == pytest.approx(total + small, rel=1e-3)


def test_bytes_of_the_full_size(no_device: None) -> None:
    """Those of docs/kernels.md, in MB a launch and, for three rows, with 23.3 of 256 experts in place of 8."""
    model = Listed(ModelConfig.from_hf(FULL_SIZE))
    model.start(capacity=256, rows=3)
    model.verify(3)
    one, three = ({n: b / 1e6 / model.launched[n] for n, b in Bytes(model).launches(r, 128).items()} for r in (1, 3))
    expected = {"GDN in": 25.4, "GDN out": 8.4, "attention in": 18.9, "attention": 0.26, "attention out": 8.4}
    expected |= {"router, shared up": 2.2, "experts up": 9.4, "experts down": 5.3, "lm_head": 286, "GDN mixer": 4.3}
    assert {name: one[name] for name in expected} == pytest.approx(expected, rel=0.02)
    assert three["experts up"] / one["experts up"] == pytest.approx(23.3 / 8, rel=0.005)
    assert three["GDN in"] == one["GDN in"]
    assert Bytes(model).verify(1, 128) / 1e6 == pytest.approx(2385, abs=1)
