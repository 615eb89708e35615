"""The TensorRT part of an engine directory: engines, kernels, and what the manifest says of them.

fill(directory, Library.of(("sm_120",)), config, formats, capacity)    # beside the graphs; -> for the manifest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.cuda_memory import slots
from engines.kernel_store import Kernels, plugin_version, store
from engines.network import SCRIPT
from engines.tensorrt_build import ROWS, Library, build_engine, describe_bindings, parse
from export.bindings import input_specs, output_specs
from export.config import ModelConfig
from export.errors import UserError
from plugins.kernels import compiler_version
from plugins.sampling import cuda as sampling


def engine_file(graph: str) -> str:
    return f"{graph}.engine"


def runtime_kernels(config: ModelConfig) -> list[Kernels]:
    """What rounds launch between engines."""
    return [(sampling.SOURCE, sampling.defines(config.hidden_size))]


def fill(
    directory: Path,
    library: Library,
    config: ModelConfig,
    formats: Mapping[str, str],
    capacity: int,
    update: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Builds an engine for every graph of the directory, and the kernels of their plugins for every target.

    Raises UserError: TensorRT refuses, an op without a plugin, sizes without kernels."""
    graphs = [graph for graph in ROWS if (directory / f"{graph}.onnx").is_file()]
    described: dict[str, Any] = {}
    kernels = runtime_kernels(config)
    for i, graph in enumerate(graphs):
        update(i, len(graphs) + len(library.targets))
        parsed = parse(library, directory / f"{graph}.onnx", formats, slots(capacity))
        bindings = describe_bindings(parsed)
        check_bindings(graph, config, bindings)
        plan = build_engine(library, directory / f"{graph}.onnx", parsed, slots(capacity))
        (directory / engine_file(graph)).write_bytes(plan)
        kernels += parsed.kernels
        described[graph] = {"plugins": parsed.counts, "rows": ROWS[graph], **bindings}
    (directory / "network.py").write_text(SCRIPT)
    files: dict[str, Any] = {}
    for i, target in enumerate(library.targets):
        update(len(graphs) + i, len(graphs) + len(library.targets))
        files |= store(directory, target, kernels)
    return {
        "package": library.trt.__name__,
        "version": library.trt.__version__,
        "compiler": f"NVRTC {compiler_version()}",
        "targets": list(library.targets),
        "words": library.words,
        "plugin_version": plugin_version(),
        "graphs": described,
        "kernels": files,
    }


DTYPES = {"int32": "INT32", "float32": "FLOAT", "float16": "HALF"}


def check_bindings(graph: str, config: ModelConfig, found: dict[str, dict[str, Any]]) -> None:
    """Engine and graph agree by name, dtype and shape; what is left among the inputs is weights. TensorRT cannot see
    that a slice of the last row is one row: a dimension of an output may be dynamic to it."""
    for kind, specs in (("inputs", input_specs), ("outputs", output_specs)):
        for name, (dtype, shape) in specs(graph, config, layout="device").items():
            dims, there = [dim if isinstance(dim, int) else -1 for dim in shape], found[kind][name]
            if kind == "outputs":
                dims = [-1 if seen == -1 else dim for dim, seen in zip(dims, there["shape"], strict=True)]
            wanted = {"dtype": DTYPES[dtype], "shape": dims}
            if there != wanted:
                raise UserError(f"{graph}: TensorRT made {name} {there}, not {wanted}; report this")
