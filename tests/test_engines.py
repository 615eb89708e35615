"""TensorRT engines for sm_120, built here without a GPU, and all of their runtime but TensorRT itself.

Nothing here runs an engine: that takes a GeForce RTX. The launches inside are run by tests/test_launch.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engines import cuda_memory, tensorrt_build
from engines.build import build
from engines.cuda_model import Gpu
from engines.cuda_weights import DeviceWeights
from engines.kernel_store import KernelStore, file_name
from engines.manifest import WEIGHTS, Manifest
from engines.onnxruntime import OnnxRuntimeEngine
from engines.tensorrt import TensorRtEngine, TensorRtModel, TensorRtPrefill, check_built, check_library
from engines.tensorrt_build import Library, network_model, parse
from export.bindings import GRAPHS, input_specs, output_specs
from export.checkpoint import load_weights
from export.config import ModelConfig
from export.errors import UserError
from export.model import Graph
from export.weights import read_header
from plugins import DOMAIN, OPS, Op
from plugins.launch import Argument, Call, Device
from plugins.sampling import cuda as sampling
from runtime.graph import GraphDecoder
from runtime.rounds import Decoder
from runtime.sampling import Sampler, SamplingConfig
from runtime.tokenizer import Tokenizer
from tests.backends import Backend
from tests.checkpoints import random_state, tiny_config, write_checkpoint
from tests.emulator import EmulatedModule
from tests.test_cuda_model import ALL_EXPERTS, MOE, SIZES, StepwiseDecoder, assert_close_on_average, decode

ROOT = Path(__file__).parents[1]
TARGET, BIN = "sm_120", Path(sys.executable).parent
DTYPES = {"int32": "INT32", "float32": "FLOAT", "float16": "HALF"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint for cpu and for sm_120."""
    root = tmp_path_factory.mktemp("engines")
    build(ROOT / "demo/checkpoint", root / "cpu")
    build(ROOT / "demo/checkpoint", root / TARGET, TARGET, capacity=512)
    return root


@pytest.fixture
def altered(demo: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo / TARGET, tmp_path / TARGET)
    return tmp_path / TARGET


def rewrite(directory: Path, **changes: Any) -> None:
    """The manifest with other values, signed again."""
    manifest = Manifest.read(directory)
    values = {**manifest.__dict__, **changes}
    Manifest(**values).write(directory)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_every_op_is_a_plugin_layer(demo: Path) -> None:
    """Of the network that TensorRT parsed, by name: none was inlined, and none came twice."""
    manifest = Manifest.read(demo / TARGET)
    for graph in GRAPHS:
        model = onnx.load(demo / TARGET / f"{graph}.onnx", load_external_data=False)
        nodes = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
        parsed = parse(Library.of((TARGET,)), demo / TARGET / f"{graph}.onnx", manifest.formats, 576)
        layers = [parsed.network.get_layer(i) for i in range(parsed.network.num_layers)]
        plugins = [layer for layer in layers if str(layer.type) == "LayerType.PLUGIN_V3"]
        assert len(plugins) == sum(nodes.values()) > 0
        assert manifest.tensorrt["graphs"][graph]["plugins"] == dict(sorted(nodes.items()))
        # What is left is glue: nothing that multiplies, normalises, routes or attends.
        heavy = ("MATRIX_MULTIPLY", "CONVOLUTION", "TOPK", "SOFTMAX", "NORMALIZATION", "LOOP", "ATTENTION")
        assert not [layer.name for layer in layers if any(name in str(layer.type) for name in heavy)]
    assert {"Nvfp4Linear", "MoeRouting", "Nvfp4MoeExperts", "GatedDeltaNetRing", "GatedAttention"} <= set(
        manifest.tensorrt["graphs"]["main.verify"]["plugins"]
    )


def test_an_op_without_a_plugin_fails_the_build(demo: Path, tmp_path: Path) -> None:
    model = onnx.load(demo / TARGET / "mtp.draft.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GatedAttention")
    node.op_type = "GatedAttentionOfTomorrow"
    (tmp_path / "mtp.draft.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"no TensorRT plugin for GatedAttentionOfTomorrow"):
        parse(Library.of((TARGET,)), tmp_path / "mtp.draft.onnx", {}, 576)


def test_bindings_are_those_of_the_graphs(demo: Path) -> None:
    """States and rows as export.bindings has them, in-place states by the plugins' aliases, the rest weights."""
    manifest = Manifest.read(demo / TARGET)
    for graph, described in manifest.tensorrt["graphs"].items():
        specs = {"inputs": input_specs, "outputs": output_specs}
        for kind, of in specs.items():
            for name, (dtype, shape) in of(graph, manifest.config, layout="device").items():
                dims = [dim if isinstance(dim, int) else -1 for dim in shape]
                if (graph, name) == ("main.prefill", "logits"):
                    dims[0] = -1  # a slice of the last row: one row, which TensorRT does not see
                assert described[kind][name] == {"dtype": DTYPES[dtype], "shape": dims}
        weights = set(described["inputs"]) - set(input_specs(graph, manifest.config, layout="device"))
        assert weights and weights <= set(load_weights(demo / TARGET / WEIGHTS))
        for name in described["outputs"]:
            state = name.removeprefix("next.")
            if "layers." in name:
                assert described["inputs"][state] == described["outputs"][name]
                op = next(op for op in OPS if op.launch and f"next_{state.rpartition('.')[2]}" in op.outputs)
                assert op.launch and op.launch.aliases[f"next_{state.rpartition('.')[2]}"] == state.rpartition(".")[2]
    kinds = {spec["dtype"] for spec in manifest.tensorrt["graphs"]["main.verify"]["inputs"].values()}
    assert {"FP4", "FP8", "BF16"} <= kinds


def test_the_network_is_the_file_with_its_weights_as_inputs(demo: Path) -> None:
    manifest = Manifest.read(demo / TARGET)
    path = demo / TARGET / "main.verify.onnx"
    file, network = onnx.load(path, load_external_data=False), network_model(path, manifest.formats, words=False)
    assert [n.SerializeToString() for n in file.graph.node] == [n.SerializeToString() for n in network.graph.node]
    assert [f.SerializeToString() for f in file.functions] == [f.SerializeToString() for f in network.functions]
    assert {t.name for t in file.graph.initializer} - {t.name for t in network.graph.initializer} == {
        v.name for v in network.graph.input
    } - {v.name for v in file.graph.input}


def test_engines_hold_no_weights(demo: Path) -> None:
    """TensorRT for RTX keeps its own kernels, which stand between ours, as source text with long preambles."""
    for graph in GRAPHS:
        plan = (demo / TARGET / f"{graph}.engine").read_bytes()
        kernels = sum(len(text) for text in re.findall(rb"[\t\n -~]{64,}", plan))
        assert len(plan) - kernels < 2 << 20
        assert len(zlib.compress(plan)) < 2 << 20  # weights would not shrink


def architecture(cubin: bytes) -> int:
    """From the ELF header: e_machine 190 is CUDA; the second byte of e_flags is the compute capability."""
    assert cubin[:4] == b"\x7fELF" and struct.unpack_from("<H", cubin, 18)[0] == 190
    return int(struct.unpack_from("<I", cubin, 48)[0] >> 8 & 0xFF)


def test_kernels_are_code_for_the_target(demo: Path) -> None:
    """NVFP4 codes are unpacked by integer instructions, as on other GPUs: no kernel chose the FP4 ones of sm_120."""
    manifest = Manifest.read(demo / TARGET)
    cubins = sorted((demo / TARGET).glob("*.cubin"))
    assert {path.name for path in cubins} == set(manifest.tensorrt["kernels"])
    assert len(cubins) >= 8 and all(architecture(path.read_bytes()) == 120 for path in cubins)
    for op in OPS:
        assert op.launch is not None or op.name in ("GatedDeltaNetVerify", "GatedDeltaNetPrefill"), op.name


def test_several_targets_share_engines(tmp_path: Path) -> None:
    manifest = build(ROOT / "demo/checkpoint", tmp_path / "both", "sm_89,sm_120", capacity=256)
    assert manifest.target == "sm_89,sm_120" and manifest.tensorrt["targets"] == ["sm_89", "sm_120"]
    found = {architecture((tmp_path / "both" / name).read_bytes()) for name in manifest.tensorrt["kernels"]}
    assert found == {89, 120}


# ---- the graphs, and rounds over them ----

PROMPT = (ROOT / "demo/prompt.txt").read_text()


def prompt_tokens(directory: Path) -> list[int]:
    return list(Tokenizer(directory).encode(PROMPT))[:40]


def test_the_graphs_give_the_demo_s_tokens(demo: Path) -> None:
    """The files that TensorRT was given, run by ONNX Runtime, against the cpu target's."""
    prompt, sampler = prompt_tokens(demo / "cpu"), Sampler(SamplingConfig())
    found = []
    for engine in (
        OnnxRuntimeEngine(demo / "cpu", threads=1),
        OnnxRuntimeEngine(demo / TARGET, threads=1, layout="device"),
    ):
        decoder = Decoder(engine, 128, 2, sampler)
        found.append(decode(decoder, prompt, 32, 2))
    assert found[0] == found[1]
    assert found[0][1] > 0


class TorchExecution:
    """Stands for an engine: the module behind its graph, which reads and writes the very buffers that are bound."""

    def __init__(self, graph: str, directory: Path, manifest: Manifest) -> None:
        self.graph, config = graph, manifest.config
        header = read_header(directory / WEIGHTS)
        module = Graph(graph, config, header, manifest.formats, device="cpu", layout="device")
        self.module = module.load(load_weights(directory / WEIGHTS))
        self.inputs, self.outputs = (of(graph, config, layout="device") for of in (input_specs, output_specs))
        self.weights = {name for name, _ in self.module.named_parameters()}

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert {*self.inputs, *self.outputs, *self.weights} <= set(tensors)
        outputs = self.module(*(tensors[name].clone() for name in self.inputs))
        for name, value in zip(self.outputs, outputs, strict=True):
            assert tensors[name].shape == value.shape and tensors[name].dtype == value.dtype, name
            tensors[name].copy_(value)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_memory, "DEVICE", "cpu")
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls, what="": Gpu("sm_120", 3, 99 << 10, 1 << 20)))
    yield


def test_rounds_over_engines_equal_the_cpu_target(on_cpu: None, demo: Path) -> None:
    """All of the runtime but TensorRT: bindings by name, control block, sampling kernels, both kinds of prefill."""
    manifest = Manifest.read(demo / TARGET)
    executions = {graph: TorchExecution(graph, demo / TARGET, manifest) for graph in GRAPHS}
    weights = DeviceWeights(load_weights(demo / TARGET / WEIGHTS), manifest.formats)
    engine = TensorRtEngine.__new__(TensorRtEngine)
    engine.manifest = manifest
    engine.model = TensorRtModel(manifest.config, weights, executions, EmulatedModule)
    prompt, sampler = prompt_tokens(demo / "cpu"), Sampler(SamplingConfig())
    expected = decode(Decoder(OnnxRuntimeEngine(demo / "cpu", threads=1), 128, 0, sampler), prompt, 12, 0)[0]
    drafted = 0
    for mtp_k in (0, 1, 3):
        decoder = StepwiseDecoder(engine, 128, mtp_k, sampler)
        assert isinstance(engine.prefilled, TensorRtPrefill)
        tokens, accepted = [decoder.prefill(prompt)], 0
        while len(tokens) < 12:
            emitted = decoder.round(mtp_k)[1]
            tokens, accepted = tokens + emitted, accepted + len(emitted) - 1
        tokens = tokens[:12]
        assert tokens == expected
        drafted += accepted
    assert drafted > 0
    # Every new number of drafts is warmed up in the middle of the text, with rows that are not committed yet.
    sampler = Sampler(SamplingConfig(temperature=1.3, seed=5))
    plain, _ = decode(StepwiseDecoder(engine, 128, 0, sampler), prompt, 24, 0)
    changing = StepwiseDecoder(engine, 128, 3, sampler, in_flight=1)
    tokens = [changing.prefill(prompt)]
    for count in [3, 0, 2, 1, 3, 2] * 4:
        tokens += changing.round(count)[1]
    assert tokens[:24] == plain


class LaunchExecution:
    """Stands for an engine too, by what its plugins enqueue: every op of the graph is its Launch, glue is torch."""

    def __init__(self, graph: str, config: ModelConfig, weights: DeviceWeights, header: Any, backend: Backend) -> None:
        self.config, self.graph, self.backend = config, graph, backend
        self.module = Graph(graph, config, header, weights.formats, device="meta", layout="device")
        for name, _ in list(self.module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            tensor = torch.nn.Parameter(weights.tensors[name], requires_grad=False)
            setattr(self.module.get_submodule(owner), leaf, tensor)

    def launched(self, op: Op, *inputs: torch.Tensor, **attributes: Any) -> Any:
        assert op.launch
        gpu = Gpu.current()
        device = Device(gpu.multiprocessors, gpu.shared_bytes)
        given = dict(zip(op.inputs, (tensor.contiguous() for tensor in inputs), strict=True))
        made = {}
        for name, (dtype, shape) in zip(op.outputs, op.infer(*inputs, **attributes), strict=True):
            alias = op.launch.aliases.get(name)
            made[name] = given[alias] if alias else torch.empty(tuple(shape), dtype=dtype, device=inputs[0].device)
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        size = op.launch.workspace(attributes, shapes, device)
        workspace = torch.empty(max(size, 1) + 256, dtype=torch.uint8, device=inputs[0].device)

        def arguments(tensors: dict[str, torch.Tensor]) -> dict[str, Argument]:
            kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
            return {name: Argument(t.data_ptr(), tuple(t.shape), kinds[name]) for name, t in tensors.items()}

        aligned = -(-workspace.data_ptr() // 256) * 256
        calls = (attributes, arguments(given), arguments(made), device)
        op.launch.run(Call(*calls, self.backend.module, aligned, cuda_memory.stream()))
        outputs = tuple(made.values())
        return outputs[0] if len(outputs) == 1 else outputs

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        inputs = (tensors[name] for name in input_specs(self.graph, self.config, layout="device"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Op, "__call__", lambda op, *given, **attributes: self.launched(op, *given, **attributes))
            outputs = self.module(*inputs)
        for name, value in zip(output_specs(self.graph, self.config, layout="device"), outputs, strict=True):
            if value.data_ptr() != tensors[name].data_ptr():  # states are written in place
                assert "layers." not in name
                tensors[name].copy_(value)


def launch_engine(directory: Path, backend: Backend) -> TensorRtEngine:
    manifest, header = Manifest.read(directory), read_header(directory / WEIGHTS)
    loaded = {name: tensor.to(backend.device) for name, tensor in load_weights(directory / WEIGHTS).items()}
    weights = DeviceWeights(loaded, manifest.formats)
    engine = TensorRtEngine.__new__(TensorRtEngine)
    engine.manifest = manifest
    executions = {g: LaunchExecution(g, manifest.config, weights, header, backend) for g in GRAPHS}
    engine.model = TensorRtModel(manifest.config, weights, executions, backend.module)
    return engine


def test_what_plugins_enqueue_decodes_as_the_cpu_target(on_cpu: None, tmp_path: Path) -> None:
    """A small model under the emulator: prefill by tensor cores, verify rows with rejected ones before, drafts."""
    sizes: dict[str, Any] = {**SIZES, **MOE, **ALL_EXPERTS}
    config = tiny_config(**sizes)
    write_checkpoint(tmp_path / "checkpoint", config, random_state(config, 0), "modelopt_mixed")
    build(tmp_path / "checkpoint", tmp_path / "cpu")
    build(tmp_path / "checkpoint", tmp_path / TARGET, TARGET, capacity=128)
    cpu = OnnxRuntimeEngine(tmp_path / "cpu", threads=1)
    engine = launch_engine(tmp_path / TARGET, Backend("emulator"))
    tokens = torch.randint(0, 24, (24,)).numpy()
    for one in (cpu, engine):
        one.start(64, 4)
    expected, found = (one.prefill(tokens[:11], 0, 0) for one in (cpu, engine))
    assert_close_on_average(found[1], expected[1])
    at, accepted = 11, 0
    for rows, then in ((3, 2), (4, 1), (1, 1)):
        expected, found = (one.verify(tokens[at : at + rows], at, accepted) for one in (cpu, engine))
        assert_close_on_average(found[0], expected[0])
        assert_close_on_average(found[1], expected[1])
        following = tokens[at + 1 : at + 1 + rows]
        drafts = [one.draft(following, expected[0], at, then) for one in (cpu, engine)]
        assert_close_on_average(drafts[1][1], drafts[0][1])
        at, accepted = at + then, then


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_plugins_enqueue_is_captured_and_lossless(tmp_path: Path) -> None:
    """On a GPU: the demo's rounds as CUDA graphs over the plugins' launches; tokens are those of the cpu target."""
    for target in ("cpu", "cuda"):  # of the second the weights alone: TensorRT need not be there
        build(ROOT / "demo/checkpoint", tmp_path / target, target)
    engine = launch_engine(tmp_path / "cuda", Backend("gpu"))
    prompt, sampler = prompt_tokens(tmp_path / "cpu"), Sampler(SamplingConfig())
    expected = decode(Decoder(OnnxRuntimeEngine(tmp_path / "cpu", threads=1), 256, 0, sampler), prompt, 96, 0)[0]
    for mtp_k in (0, 2, 4):
        assert decode(GraphDecoder(engine, 256, mtp_k, sampler), prompt, 96, mtp_k)[0] == expected


# ---- bad input ----


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert all(word in lines[-1] for word in words), lines[-1]


def test_bad_targets_are_one_line(tmp_path: Path) -> None:
    for target, *words in (
        ("sm_42", "sm_42", "unknown", "sm_120"),
        ("sm_120,cpu", "cpu", "alone"),
        ("sm_120,sm_90", "sm_90", "unknown"),
    ):
        arguments = ("--model", ROOT / "demo/checkpoint", "--target", target, "--out", tmp_path / "out")
        one_line(run("engines.build", *arguments), *words)
    arguments = ("--model", ROOT / "demo/qwen3.6-35b-a3b.json", "--weights", "none", "--out", tmp_path / "out")
    one_line(run("engines.build", *arguments), "--weights none")
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(demo: Path) -> None:
    one_line(run("runtime.decode", "--engines", demo / TARGET, "--prompt", "x"), "sm_120", "GPU", "none is here")


def test_another_gpu_is_refused(on_cpu: None, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls, what="": Gpu("sm_89", 3, 99 << 10, 1 << 20)))
    with pytest.raises(UserError, match=r"built for sm_120, this GPU is sm_89.*TARGET=sm_89"):
        TensorRtEngine(demo / TARGET)


def test_engines_of_other_versions_are_refused(altered: Path) -> None:
    built = Manifest.read(altered).tensorrt
    rewrite(altered, tensorrt={**built, "plugin_version": "0" * 64})
    one_line(run("runtime.decode", "--engines", altered, "--prompt", "x"), "other plugins", "make engines")
    rewrite(altered, tensorrt={**built, "version": "1.0.0.1"})
    with pytest.raises(UserError, match=r"built by tensorrt_rtx 1\.0\.0\.1, this is tensorrt_rtx"):
        check_library(altered, Manifest.read(altered), Library.of((TARGET,)))


def test_changed_weights_are_refused(altered: Path) -> None:
    with (altered / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    one_line(run("runtime.decode", "--engines", altered, "--prompt", "x"), WEIGHTS, "changed since the build")


def test_weights_of_other_shapes_are_refused(altered: Path) -> None:
    manifest = Manifest.read(altered)
    graphs = json.loads(json.dumps(manifest.tensorrt["graphs"]))
    graphs["main.verify"]["inputs"]["norm.weight"]["shape"] = [7]
    rewrite(altered, tensorrt={**manifest.tensorrt, "graphs": graphs})
    with pytest.raises(UserError, match=r"norm\.weight is \[\d+\], main\.verify was built for \[7\]"):
        check_built(altered, Manifest.read(altered))


def test_a_kernel_that_was_not_stored_is_named(demo: Path, tmp_path: Path) -> None:
    name = file_name(TARGET, sampling.SOURCE, {"HIDDEN": 1})
    with pytest.raises(UserError, match=name):
        KernelStore(tmp_path, TARGET).module(sampling.SOURCE, {"HIDDEN": 1})


@pytest.mark.parametrize("change", [{"tensorrt": {}}, {"tensorrt": {"targets": ["sm_120"]}}, {"files": None}])
def test_an_incomplete_manifest_is_one_line(altered: Path, change: dict[str, Any]) -> None:
    rewrite(altered, **change)
    with pytest.raises(UserError, match=r"not a manifest of this version.*make engines"):
        Manifest.read(altered)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim"),
        ({"moe_intermediate_size": 48}, "moe_intermediate_size: 48"),
        ({"hidden_size": 1 << 15}, "too wide for its 99 KB"),
    ],
    ids=["convolution", "experts", "width"],
)
def test_sizes_without_kernels_fail_the_build_at_once(tmp_path: Path, overrides: dict[str, Any], words: str) -> None:
    sizes: dict[str, Any] = {**SIZES, **MOE, **overrides}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**sizes)))
    with pytest.raises(UserError, match=words):
        build(tmp_path, tmp_path / "out", TARGET, weights=False)
    assert not (tmp_path / "out").exists()


def test_float32_checkpoints_build(tmp_path: Path) -> None:
    """Their embedding is bfloat16 on the GPU: its rows become float32 again."""
    sizes: dict[str, Any] = {**SIZES, **MOE}
    config = tiny_config(**sizes)
    write_checkpoint(tmp_path / "checkpoint", config, random_state(config, 0), "float", dtype="F32")
    manifest = build(tmp_path / "checkpoint", tmp_path / "out", TARGET, capacity=128)
    assert manifest.tensorrt["graphs"]["main.verify"]["inputs"]["embed_tokens.weight"]["dtype"] == "BF16"
    (tmp_path / "out" / "__pycache__").mkdir()  # Polygraphy imports the directory's network.py
    build(tmp_path / "checkpoint", tmp_path / "out", TARGET, capacity=128)


def test_no_gpu_needs_more_workspace_than_was_reserved() -> None:
    """Engines reserve for more multiprocessors than there are; the runtime passes no more shared memory than then."""
    op = next(op for op in OPS if op.name == "GatedAttention")
    attributes = {"num_heads": 16, "num_kv_heads": 2, "head_dim": 256, "rotary_dim": 64, "cache_dtype": "float16"}
    shapes = {"q_gate": (8, 8192), "kv_cache": (2, 2, 262208, 256)}
    for targets in (("sm_80",), ("sm_80", "sm_86"), ("sm_120",)):
        room = Library(None, targets).device
        assert op.launch
        reserved = op.launch.workspace(attributes, shapes, room)
        for multiprocessors in (20, 82, 108, 132, 170, 192):
            real = Device(multiprocessors, room.shared_bytes)
            assert op.launch.workspace(attributes, shapes, real) <= reserved


def test_the_readme_s_conversion_builds_an_engine(demo: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    command = readme[readme.index("    GRAPH=mtp.draft") :].split("\n\n")[0]
    command = command.replace("\\\n", " ").replace("build/demo/sm_120", str(demo / TARGET))
    command = command.replace("build/mtp.draft.engine", str(tmp_path / "x.engine")).replace(".venv/bin/", f"{BIN}/")
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (tmp_path / "x.engine").stat().st_size > 1 << 16


# ---- full size ----


def full_size_config(path: Path, layers: int) -> Path:
    config = json.loads((ROOT / "demo/qwen3.6-35b-a3b.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    path.write_text(json.dumps(config))
    return path


def test_full_size_from_a_config_alone(tmp_path: Path) -> None:
    """Four of the 40 layers; `make full-size` builds all. 15 minutes, 8 GB and 200 MB are the whole model's limits."""
    config = full_size_config(tmp_path / "qwen.json", 4)
    arguments = ("--model", config, "--target", TARGET, "--weights", "none", "--out", tmp_path / "out")
    result = run("engines.build", *arguments)
    assert result.returncode == 0, result.stderr
    said = re.fullmatch(r"(\d+) s, ([\d.]+) GB of memory at most, .*", result.stderr.strip().splitlines()[-1])
    assert said and float(said[1]) < 900 and float(said[2]) < 8
    manifest = Manifest.read(tmp_path / "out")
    assert not manifest.has_weights and not (tmp_path / "out" / WEIGHTS).exists()
    experts = manifest.tensorrt["graphs"]["main.verify"]["inputs"]["layers.0.mlp.experts.gate_up_proj.weight"]
    assert experts == {"dtype": "FP4", "shape": [256, 1024, 2048]}
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert size < 200 << 20
    one_line(run("runtime.decode", "--engines", tmp_path / "out", "--token-ids", "1"), "without weights")


def test_the_library_s_version_is_pinned() -> None:
    pinned = (ROOT / "requirements.txt").read_text()
    assert f"tensorrt-rtx=={tensorrt_build.RTX_VERSION}" in pinned
