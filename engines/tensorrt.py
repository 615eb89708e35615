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
from engines.cuda import CudaEngine, loading
from engines.cuda_memory import RoundBuffers, State, floats, integers, octets
from engines.cuda_model import CudaModel, Gpu, Options
from engines.cuda_weights import DeviceWeights, device_dtype
from engines.kernel_store import KernelStore, plugin_version
from engines.manifest import WEIGHTS, Manifest
from engines.tensorrt_build import RTX, Library, log_of
from engines.tensorrt_files import engine_file
from export.bindings import input_specs, output_specs
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

MAX_CONTEXTS = 32  # of an engine: two capacities of a sequence, and every number of rows
ALIGNED = 256  # bytes, of what TensorRT is given
REBUILD = "build the engines again with `make engines`"


class Execution(Protocol):
    """An engine, ready to run."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Runs on the current stream. tensors: every binding; outputs are written in place."""


class EngineExecution:
    """A serialized engine. captured: its calls are recorded into CUDA graphs; then every shape has a context of its
    own, which a call before the capture has made ready. Raises UserError: TensorRT does not take it."""

    def __init__(self, trt: Any, path: Path, captured: bool) -> None:
        self.log = log_of(trt)
        self.runtime = trt.Runtime(self.log.logger)
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"{path}: TensorRT {trt.__version__} cannot load it on this GPU; {REBUILD}")
        self.trt, self.path, self.captured = trt, path, captured
        self.contexts: dict[tuple[tuple[int, ...], ...], Any] = {}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        given = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.dynamic = [n for n in given if -1 in tuple(self.engine.get_tensor_shape(n))]
        self.names = names

    def _create_context(self) -> Any:
        trt = self.trt
        if hasattr(self.engine, "create_runtime_config"):  # of TensorRT for RTX, which compiles for shapes as they come
            config = self.engine.create_runtime_config()
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.NONE  # no other kernels later on
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise UserError(f"{self.path}: the GPU's memory does not hold what it works in; close what uses it")
        return context

    def context(self, tensors: Mapping[str, Tensor]) -> Any:
        """The one for these shapes."""
        shapes = tuple(tuple(tensors[name].shape) for name in self.dynamic)
        if shapes not in self.contexts:
            reusable = None if self.captured else next(iter(self.contexts.values()), None)
            if reusable or len(self.contexts) == MAX_CONTEXTS:
                self.contexts.clear()
            context = reusable or self._create_context()
            for name, shape in zip(self.dynamic, shapes, strict=True):
                if not context.set_input_shape(name, shape):
                    raise UserError(f"{self.path}: {name} of shape {list(shape)} is outside what it was built for")
            self.contexts[shapes] = context
        return self.contexts[shapes]

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        context = self.context(tensors)
        for name in self.names:
            if not context.set_tensor_address(name, tensors[name].data_ptr()):
                raise RuntimeError(f"{self.path}: TensorRT does not take the address of {name}")
        stream = cuda_memory.stream()
        capturing = torch.cuda.is_current_stream_capturing()
        if self.captured and not capturing and not context.is_stream_capturable(stream):
            raise UserError(f"{self.path}: cannot be captured into a CUDA graph; {REBUILD}")
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"{self.path}: TensorRT did not run it ({self.log.reason})")


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
        self.scalars = integers(2 * ALIGNED).view(2, ALIGNED)  # position and accepted, aligned
        self.one = integers(1) + 1
        self.chained = self.buffers.head_hidden, floats(1, self.config.hidden_size)  # the head's own, in turn

    def execute(self, graph: str, **tensors: Tensor) -> None:
        """tensors: rows by binding name, `next_hidden` for next.hidden. States and weights are bound here."""
        bound = {name.replace("next_", "next."): tensor for name, tensor in tensors.items()}
        for name, place in zip(("position", "accepted"), self.scalars, strict=True):
            if name in bound:
                bound[name] = place[:1].copy_(bound[name])
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

    def word(self, word: int) -> Tensor:
        return self.buffers.control[word : word + 1]

    def verify(
        self, rows: int, sampling: SamplingConfig | None = None, steering: sampling_cuda.SteeringArguments | None = None
    ) -> None:
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
            self.sample(self.of_rows(sampling, steering), b.logits, rows)

    def draft(
        self,
        rows: int,
        index: int,
        sampling: SamplingConfig | None = None,
        steering: sampling_cuda.SteeringArguments | None = None,
    ) -> None:
        b, first = self.buffers, index == 0
        place = self.word(sampling_cuda.HEAD_POSITION if first else sampling_cuda.POSITION)
        self.execute(
            "mtp.draft",
            token_ids=b.head_tokens[:rows] if first else b.draft_token,
            hidden=b.hidden[:rows] if first else self.chained[(index - 1) % 2],
            position=place if first else place + (index - 1),
            accepted=self.word(sampling_cuda.HEAD_ROWS) if first else self.one,
            next_hidden=self.chained[index % 2],
            logits=b.draft_logits,
        )
        if sample := self.of_draft(index, sampling, steering):
            self.sample(sample, b.draft_logits, 1)

    def warm_up(self, drafts: int, head_rows: int, rows: int) -> None:
        """These calls once, outside a capture, where TensorRT may allocate and compile. Leaves no trace, wherever the
        sequence is: nothing is committed, what it writes into caches and rings the round writes again, and the hidden
        state and the control block are put back."""
        b = self.buffers
        kept = [(tensor, tensor.clone()) for tensor in (b.hidden, b.control)]
        b.control[sampling_cuda.COMMIT] = 0
        for index in range(drafts):
            self.draft(head_rows, index)
        if rows:
            self.verify(rows)
        for tensor, values in kept:
            tensor.copy_(values)


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
        hidden, position = b.hidden[first : first + rows], model.word(sampling_cuda.POSITION) + offset
        model.execute("mtp.prefill", token_ids=b.next_tokens[:rows], hidden=hidden, position=position)


class TensorRtEngine(CudaEngine):
    """One engine directory on the current GPU. Raises UserError: no GPU, another one than it was built for, another
    TensorRT, other plugins, weights that do not fit the engines, too little memory."""

    def __init__(self, directory: Path, manifest: Manifest | None = None) -> None:
        self.manifest = manifest or Manifest.read(directory)
        check_built(directory, self.manifest)
        gpu = Gpu.current(f"engines for {self.manifest.target} need")
        targets = self.manifest.tensorrt["targets"]
        if gpu.arch not in targets:
            mend = f"{REBUILD} TARGET={gpu.arch if gpu.arch in RTX else 'cuda'}"
            raise UserError(f"{directory}: built for {', '.join(targets)}, this GPU is {gpu.arch}; {mend}")
        library = Library.of(tuple(self.manifest.target.split(",")))
        check_library(directory, self.manifest, library)
        room = library.device  # what workspaces were sized for
        shared, count = min(gpu.shared_bytes, room.shared_bytes), min(gpu.multiprocessors, room.multiprocessors)
        plugins = register(library.trt, OPS, Device(count, shared))
        store = KernelStore(directory, gpu.arch)
        plugins.module = store.module  # type: ignore[method-assign]
        config = self.manifest.config
        executions = {
            graph: EngineExecution(library.trt, directory / engine_file(graph), not graph.endswith("prefill"))
            for graph in self.manifest.tensorrt["graphs"]
        }
        with loading(directory) as update:
            weights = DeviceWeights.load(directory / WEIGHTS, self.manifest.formats, update)
            weights.tensors = {n: t.clone() if t.data_ptr() % ALIGNED else t for n, t in weights.tensors.items()}  # few
        self.model = TensorRtModel(config, weights, executions, store.module)

    cache_hint = ""

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
