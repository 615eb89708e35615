"""ONNX graphs -> serialized TensorRT engines that hold our ops as plugins and no weights. No GPU is needed for `sm_*`.

The graph on disk has its weights in the weights file and runs anywhere. For TensorRT they become network inputs under
the same names: NVFP4 codes as FP4, scales and FP8 matrices as FP8, other matrices as BF16, vectors as float32, which is
how engines.cuda_weights has them on the GPU, once for all engines.

    library = Library.of(("sm_120",))
    built = build_engine(library, Path("main.verify.onnx"), formats, capacity=4096)
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from engines.cuda_memory import PREFILL_CHUNK
from engines.cuda_weights import device_dtype
from engines.kernel_store import Kernels
from export.bindings import CACHE_BLOCK, GRAPHS
from export.errors import UserError
from plugins import DOMAIN, OPS
from plugins.launch import DECODE_ROWS, Device
from plugins.tensorrt import VERSION, register

RTX = ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")  # targets of TensorRT for RTX that Tandem has kernels for
WITH_FP4 = ("sm_120", "sm_121")
SHARED_BYTES = {"sm_80": 163 << 10}  # of a block; 99 KB on the others
MULTIPROCESSORS = 256  # more than any GPU of these targets has: workspaces are sized for it
ROWS = {graph: PREFILL_CHUNK if graph.endswith("prefill") else DECODE_ROWS for graph in GRAPHS}  # of one call, at most
RTX_VERSION = "1.7.1.116"

ONNX_TYPES = {
    "float4_e2m1": onnx.TensorProto.FLOAT4E2M1,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "int32": onnx.TensorProto.INT32,
}


LIBRARY, PARSER = "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so.1"


@functools.cache
def _links() -> Any:
    """A directory as long as the process."""
    return tempfile.TemporaryDirectory(prefix="tandem-tensorrt-")


@functools.cache
def _rtx() -> Any:
    """tensorrt_rtx. Its ONNX parser opens `libtensorrt_rtx.so`, of which the wheel ships `.so.1` alone, beside itself
    ($ORIGIN), and ends the process where that is not. `make setup` makes the link there; else the parser is loaded from
    a directory of links, which has to come before anything else that loads it."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None or importlib.util.find_spec("tensorrt_rtx") is None:
        raise UserError("targets sm_* need TensorRT for RTX, which is not installed; run `make setup`")
    libraries = Path(found.origin).parent
    try:
        if not (libraries / LIBRARY).exists():
            if "tensorrt_rtx_libs" in sys.modules:
                raise UserError(
                    f"{libraries / LIBRARY}: missing, a link to {LIBRARY}.1 that `make setup` makes; run it"
                )
            folder = Path(_links().name)
            (folder / LIBRARY).symlink_to(libraries / f"{LIBRARY}.1")
            (folder / PARSER).symlink_to(libraries / PARSER)
            ctypes.CDLL(str(folder / PARSER))
        trt = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise UserError(f"TensorRT for RTX cannot be loaded ({error}); install it again with `make setup`") from None
    if trt.__version__ != RTX_VERSION:
        raise UserError(
            f"TensorRT for RTX {trt.__version__} is installed, Tandem needs {RTX_VERSION}; run `make setup`"
        )
    return trt


@dataclass(frozen=True)
class Library:
    """One of the two TensorRTs, and what differs between them. targets: compute capabilities that TensorRT for RTX
    builds for, all in one engine; full TensorRT builds for the GPU that is present."""

    trt: Any
    targets: tuple[str, ...]

    @classmethod
    def of(cls, targets: tuple[str, ...]) -> Library:
        """Raises UserError: not installed."""
        if targets != ("tensorrt",):
            return cls(_rtx(), targets)
        if importlib.util.find_spec("tensorrt") is None:
            raise UserError("the tensorrt target needs TensorRT, which is not installed: pip install tensorrt")
        from engines.cuda_model import Gpu

        return cls(importlib.import_module("tensorrt"), (Gpu.current().arch,))

    @property
    def is_rtx(self) -> bool:
        return bool(self.trt.__name__ == "tensorrt_rtx")

    def configure(self, config: Any) -> None:
        trt = self.trt
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        if self.is_rtx:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # nothing is allocated while a round is captured
            config.num_compute_capabilities = len(self.targets)
            for i, target in enumerate(self.targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("sm_", "SM")), i)

    @property
    def words(self) -> bool:
        """Whether packed weights travel as int32: TensorRT has FP4 where the hardware has, and FP8 not everywhere."""
        return not set(self.targets) <= set(WITH_FP4)

    @property
    def device(self) -> Device:
        return Device(MULTIPROCESSORS, min(SHARED_BYTES.get(target, 99 << 10) for target in self.targets))


def network_model(path: Path, formats: Mapping[str, str], words: bool) -> onnx.ModelProto:
    """The graph of the file with its weights as inputs, as they are on the GPU. Nothing else is changed, but for a
    float32 embedding, which is bfloat16 there: its rows become float32 again."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for weight in graph.initializer:
        if weight.data_location != onnx.TensorProto.EXTERNAL:
            continue
        kind = onnx.TensorProto.DataType.Name(weight.data_type)
        dtype, shape = device_dtype(weight.name, kind, weight.dims, formats, words)
        graph.input.append(onnx.helper.make_tensor_value_info(weight.name, ONNX_TYPES[dtype], shape))
        if (kind, dtype) == ("FLOAT", "bfloat16"):
            _cast_rows(graph, weight.name)
    del graph.initializer[:]
    graph.initializer.extend(inside)
    return model


def _cast_rows(graph: onnx.GraphProto, weight: str) -> None:
    """What is gathered from the weight: float32, as before."""
    for i, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Gather" and node.input[0] == weight:
            name = f"{node.output[0]}.stored"
            cast = onnx.helper.make_node("Cast", [name], [node.output[0]], to=onnx.TensorProto.FLOAT)
            node.output[0] = name
            graph.node.insert(i + 1, cast)


@functools.cache
def log_of(trt: Any) -> Log:
    """TensorRT keeps the first logger that it sees: there is one, as long as the process."""
    return Log(trt)


class Log:
    """TensorRT's messages: errors are kept for the exception, the rest is dropped."""

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []
        self.errors = errors

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    errors.append(message)

        self.logger = Logger()

    @property
    def reason(self) -> str:
        return self.errors[-1].split("\n")[0] if self.errors else "it does not say why"


@dataclass(frozen=True)
class Network:
    """A parsed graph, and all that must live as long as it. counts: op -> its nodes, all of which are plugin layers."""

    builder: Any
    network: Any
    parser: Any
    log: Any
    counts: dict[str, int]
    kernels: list[Kernels]


def parse(library: Library, path: Path, formats: Mapping[str, str], capacity: int) -> Network:
    """Raises UserError: an op without a registered plugin, one that became no plugin layer, a graph that TensorRT
    cannot read, sizes without kernels."""
    trt, graph = library.trt, path.name.removesuffix(".onnx")
    log = log_of(trt)
    log.errors.clear()
    register(trt, OPS, library.device)
    model = network_model(path, formats, library.words)
    nodes = {node.name: node for node in model.graph.node if node.domain == DOMAIN}
    for op in sorted({node.op_type for node in nodes.values()}):
        if trt.get_plugin_registry().get_creator(op, VERSION, "") is None:
            raise UserError(f"{path}: no TensorRT plugin for {op}; give it a `launch` in plugins/ and list it in OPS")
    builder = trt.Builder(log.logger)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, log.logger)
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise UserError(f"{path}: TensorRT cannot read it ({errors[0] if errors else log.reason})")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = {layer.name: layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3}
    if lost := sorted(set(nodes) - set(plugins)):
        raise UserError(
            f"{path}: {nodes[lost[0]].op_type} ({lost[0]}) became no plugin layer; build with Tandem's plugins"
        )
    sizes = {"T": ROWS[graph], "S": capacity}
    kernels = [k for name, node in nodes.items() for k in _kernels(node, plugins[name], sizes)]
    counts = dict(sorted(Counter(node.op_type for node in nodes.values()).items()))
    return Network(builder, network, parser, log, counts, kernels)


def _kernels(node: onnx.NodeProto, layer: Any, sizes: Mapping[str, int]) -> list[Kernels]:
    op = next(op for op in OPS if op.name == node.op_type)
    assert op.launch
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    shapes = {}
    for i, name in enumerate(op.inputs):
        largest = sizes["S"] if name == "kv_cache" else sizes["T"]
        shapes[name] = tuple(largest if dim < 0 else dim for dim in layer.get_input(i).shape)
    return op.launch.kernels(attributes, shapes)


def build_engine(library: Library, path: Path, parsed: Network, capacity: int) -> bytes:
    """The serialized engine. capacity: cache slots that it can take at most. Raises UserError: TensorRT cannot."""
    graph = path.name.removesuffix(".onnx")
    config = parsed.builder.create_builder_config()
    library.configure(config)
    profile = parsed.builder.create_optimization_profile()
    rows = ROWS[graph]
    ranges = {
        "T": (1, 512 if rows == PREFILL_CHUNK else 3, rows),
        "S": (CACHE_BLOCK, min(4096, capacity), capacity),
    }
    for i in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(i)
        if -1 in tuple(tensor.shape):
            letter = "S" if tensor.name.endswith("kv_cache") else "T"
            shapes = [tuple(size if d < 0 else d for d in tensor.shape) for size in ranges[letter]]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise UserError(f"{path}: TensorRT cannot build it for {', '.join(library.targets)} ({parsed.log.reason})")
    return bytes(plan)


def describe_bindings(parsed: Network) -> dict[str, dict[str, Any]]:
    """inputs and outputs: name -> dtype and shape, -1 where a dimension is dynamic."""

    def described(count: int, get: Any) -> dict[str, Any]:
        tensors = (get(i) for i in range(count))
        return {t.name: {"dtype": str(t.dtype).removeprefix("DataType."), "shape": list(t.shape)} for t in tensors}

    n = parsed.network
    return {"inputs": described(n.num_inputs, n.get_input), "outputs": described(n.num_outputs, n.get_output)}
