"""The TensorRT engines of an engine directory, decoding in the same rounds and CUDA graphs as the `cuda` target.

`TensorRtModel` is `CudaModel` with its graphs in place of its launches: buffers, sampling, acceptance and the control
block are the same, and engines bind them by name. Weights are loaded once and bound to every engine.

    engine = TensorRtEngine(Path("build/demo/sm_120"))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engines import cuda_memory
from engines.cuda import CudaEngine
from engines.cuda_memory import RoundBuffers, State, floats, integers, octets
from engines.cuda_model import CudaModel, Gpu, Options, Sample
from engines.cuda_weights import DeviceWeights, device_dtype
from engines.kernel_store import KernelStore, plugin_version
from engines.manifest import WEIGHTS, Manifest
from engines.tensorrt_build import Library
from engines.tensorrt_files import engine_file
from export.bindings import input_specs, output_specs
from export.cli import progress
from export.config import ModelConfig
from export.errors import UserError
from export.trace import ONNX_DTYPES
from export.weights import DTYPES, read_header
from plugins import OPS
from plugins.launch import DECODE_ROWS, Device
from plugins.sampling import cuda as sampling_cuda
from plugins.tensorrt import register

if TYPE_CHECKING:
    from runtime.sampling import SamplingConfig

REBUILD = "build the engines again with `make engines`"


class Execution(Protocol):
    """An engine, ready to run."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Runs on the current stream. tensors: every binding; outputs are written in place."""


class EngineExecution:
    """A serialized engine. Raises UserError: TensorRT does not take it."""

    def __init__(self, trt: Any, path: Path) -> None:
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"{path}: TensorRT {trt.__version__} cannot load it on this GPU; {REBUILD}")
        if hasattr(self.engine, "create_runtime_config"):  # of TensorRT for RTX, which compiles for shapes as they come
            config = self.engine.create_runtime_config()
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.NONE  # no other kernels later on
            self.context = self.engine.create_execution_context(config)
        else:
            self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        given = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.dynamic = [n for n in given if -1 in tuple(self.engine.get_tensor_shape(n))]
        self.names = names

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self.names:
            if name in self.dynamic:
                self.context.set_input_shape(name, tuple(tensors[name].shape))
            self.context.set_tensor_address(name, tensors[name].data_ptr())
        if not self.context.execute_async_v3(cuda_memory.stream()):
            raise RuntimeError("TensorRT did not run the engine; its own message is above")


class TensorRtModel(CudaModel):
    """The rounds of CudaModel over engines. executions: by graph. module: the compiled kernels of a source."""

    def __init__(
        self, config: ModelConfig, weights: DeviceWeights, executions: Mapping[str, Execution], module: Any
    ) -> None:
        self.config, self.weights, self.options, self.gpu = config, weights, Options(), Gpu.current()
        self.executions, self.draft_vocab = executions, config.vocab_size
        kernels = module(sampling_cuda.SOURCE, sampling_cuda.defines(config.hidden_size))
        self.sampling = self.draft_sampling = sampling_cuda.SamplingKernels(kernels, config.vocab_size)
        self.recorded = None

    @property
    def max_rows(self) -> int:
        return DECODE_ROWS

    def start(self, capacity: int, rows: int) -> None:
        self.__dict__.pop("state", None)  # its memory, before the next takes as much
        self.state = State(self.config, capacity, fp8_cache=False)
        self.buffers = RoundBuffers(self.config, rows, self.draft_vocab, head_parts=1)
        self.sampling_scratch = octets(self.sampling.scratch_bytes(rows))
        self.place, self.one = integers(1), integers(1) + 1
        self.chained = floats(2, 1, self.config.hidden_size)  # the head's own hidden states, in turn

    def execute(self, graph: str, **tensors: Tensor) -> None:
        """tensors: rows by binding name, `next_hidden` for next.hidden. States and weights are bound here."""
        bound = {name.replace("next_", "next."): tensor for name, tensor in tensors.items()}
        specs = {
            **input_specs(graph, self.config, layout="device"),
            **output_specs(graph, self.config, layout="device"),
        }
        for name in specs:
            if name in bound:
                continue
            layer, _, kind = name.removeprefix("next.").rpartition(".")
            if kind == "kv_cache":
                bound[name] = self.state.kv[layer]
            else:
                bound[name] = self.state.recurrent[layer][("recurrent_state", "ring").index(kind)]
        self.executions[graph]({**self.weights.tensors, **bound})

    @property
    def drafted(self) -> Tensor:
        return self.chained[0]

    def word(self, word: int) -> Tensor:
        return self.buffers.control[word : word + 1]

    def verify(self, rows: int, sampling: SamplingConfig | None = None) -> None:
        b = self.buffers
        self.execute(
            "main.verify",
            token_ids=b.verify_tokens[:rows],
            position=self.word(sampling_cuda.POSITION),
            accepted=self.word(sampling_cuda.COMMIT),
            hidden=b.hidden[:rows],
            logits=b.logits[:rows],
        )
        if sampling:
            self.sample(Sample(self.sampling, sampling, 1, [b.sampled.data_ptr()]), b.logits, rows)

    def draft(self, rows: int, index: int, sampling: SamplingConfig | None = None) -> None:
        b, first = self.buffers, index == 0
        if not first:
            torch.add(self.word(sampling_cuda.POSITION), index - 1, out=self.place)
        self.execute(
            "mtp.draft",
            token_ids=b.head_tokens[:rows] if first else b.draft_token,
            hidden=b.hidden[:rows] if first else self.chained[(index - 1) % 2],
            position=self.word(sampling_cuda.HEAD_POSITION) if first else self.place,
            accepted=self.word(sampling_cuda.HEAD_ROWS) if first else self.one,
            next_hidden=self.chained[index % 2],
            logits=b.draft_logits,
        )
        places = (b.drafts, index), (b.verify_tokens, index + 1), (b.draft_token, 0)
        outputs = [buffer.data_ptr() + 4 * at for buffer, at in places]
        if sampling:
            self.sample(Sample(self.draft_sampling, sampling, 1 + index, outputs), b.draft_logits, 1)

    def warm_up(self, mtp_k: int) -> None:
        """Every call of a round once, outside a capture, where TensorRT may allocate and compile. Leaves no trace: it
        writes rows that the round writes again, and the hidden state is put back."""
        hidden = self.buffers.hidden.clone()
        for index in range(mtp_k):
            self.draft(mtp_k + 1, index)
        self.verify(mtp_k + 1)
        self.buffers.hidden.copy_(hidden)


class PrefillRows:
    """Buffers of prefill calls, which cuda.Prefill calls the same."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        self.rows = rows
        self.tokens, self.next_tokens = integers(rows), integers(rows)
        self.hidden = floats(rows + 1, config.hidden_size)


class TensorRtPrefill:
    """As engines.cuda_prefill.Prefill."""

    def __init__(self, model: TensorRtModel, rows: int) -> None:
        self.model, self.buffers = model, PrefillRows(model.config, rows)

    def main(self, rows: int) -> None:
        model, b = self.model, self.buffers
        model.execute(
            "main.prefill",
            token_ids=b.tokens[:rows],
            position=model.word(sampling_cuda.POSITION),
            accepted=model.word(sampling_cuda.COMMIT),
            hidden=b.hidden[1 : rows + 1],
            logits=model.buffers.logits[:1],
        )

    def head(self, rows: int, first: int, offset: int) -> None:
        model, b = self.model, self.buffers
        torch.add(model.word(sampling_cuda.POSITION), offset, out=model.place)
        hidden = b.hidden[first : first + rows]
        model.execute("mtp.prefill", token_ids=b.next_tokens[:rows], hidden=hidden, position=model.place)


class TensorRtEngine(CudaEngine):
    """One engine directory on the current GPU. Raises UserError: no GPU, another one than it was built for, another
    TensorRT, other plugins, weights that do not fit the engines, too little memory."""

    def __init__(self, directory: Path, manifest: Manifest | None = None) -> None:
        self.manifest = manifest or Manifest.read(directory)
        check_built(directory, self.manifest)
        gpu = Gpu.current(f"engines for {self.manifest.target}")
        targets = self.manifest.tensorrt["targets"]
        if gpu.arch not in targets:
            raise UserError(
                f"{directory}: built for {', '.join(targets)}, this GPU is {gpu.arch}; {REBUILD} TARGET={gpu.arch}"
            )
        library = Library.of(("tensorrt",) if self.manifest.target == "tensorrt" else tuple(targets))
        check_library(directory, self.manifest, library)
        plugins = register(library.trt, OPS, Device(gpu.multiprocessors, gpu.shared_bytes))
        store = KernelStore(directory, gpu.arch)
        plugins.module = store.module  # type: ignore[method-assign]
        config = self.manifest.config
        executions = {
            graph: EngineExecution(library.trt, directory / engine_file(graph))
            for graph in self.manifest.tensorrt["graphs"]
        }
        try:
            with progress("loading the weights") as update:
                weights = DeviceWeights.load(directory / WEIGHTS, self.manifest.formats, update)
        except torch.OutOfMemoryError:
            raise UserError(f"{directory}: the GPU's memory does not hold the weights; close what uses it") from None
        self.model = TensorRtModel(config, weights, executions, store.module)

    def make_prefill(self, rows: int) -> Any:
        assert isinstance(self.model, TensorRtModel)
        return TensorRtPrefill(self.model, rows)


def check_built(directory: Path, manifest: Manifest) -> None:
    """Raises UserError: no weights, other plugins, weights that the engines were not built for."""
    if not manifest.has_weights:
        raise UserError(f"{directory}: built without weights; give `make engines` a checkpoint as MODEL")
    if manifest.tensorrt["plugin_version"] != plugin_version():
        raise UserError(f"{directory}: built with other plugins than this version's; {REBUILD}")
    header = read_header(directory / WEIGHTS)
    for graph, described in manifest.tensorrt["graphs"].items():
        states = input_specs(graph, manifest.config, layout="device")
        for name, wanted in described["inputs"].items():
            if name in states:
                continue
            if name not in header:
                raise UserError(f"{directory / WEIGHTS}: holds no {name}, which {graph} needs; {REBUILD}")
            entry = header[name]
            onnx_name = ONNX_DTYPES[DTYPES[entry.dtype][1]].name
            _, shape = device_dtype(name, onnx_name, entry.shape, manifest.formats, manifest.tensorrt["words"])
            if list(shape) != wanted["shape"]:
                raise UserError(
                    f"{directory / WEIGHTS}: {name} is {list(shape)}, {graph} was built for {wanted['shape']}; "
                    f"{REBUILD}"
                )


def check_library(directory: Path, manifest: Manifest, library: Library) -> None:
    """Raises UserError: another TensorRT."""
    built, here = manifest.tensorrt, library.trt
    if (built["package"], built["version"]) != (here.__name__, here.__version__):
        raise UserError(
            f"{directory}: built by {built['package']} {built['version']}, this is {here.__name__} {here.__version__}; "
            f"{REBUILD}"
        )
