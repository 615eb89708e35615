"""Traced graphs: a `Graph` module becomes an ONNX file whose weights stay in the weights file.

The file holds nodes of the domain `tandem` with their function bodies and no weights: every initializer points into
the weights file beside it by offset, so four-bit weights stay four-bit and nothing is copied.

    trace("main.verify", config, tensors, formats, directory / "weights.safetensors", expanded=True)
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from export.bindings import Spec, input_specs, output_specs, sized
from export.checkpoint import read_header
from export.config import ModelConfig
from export.model import Graph
from plugins import DOMAIN, OPS
from plugins.op import IMPORTS

SAMPLE = {"T": 3, "W": 4, "S": 192}  # sizes to trace at; all of them stay dynamic
ONNX_DTYPES = {
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
    torch.float32: ir.DataType.FLOAT,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.uint8: ir.DataType.UINT8,
}


def trace(
    name: str,
    config: ModelConfig,
    tensors: Mapping[str, Any],
    formats: Mapping[str, str],
    weights_file: Path,
    expanded: bool,
    layout: str = "host",
) -> ir.Model:
    """The ONNX model of the graph `name`; save it into the directory of `weights_file`."""
    inputs = input_specs(name, config, layout)
    with FakeTensorMode():  # no memory behind the weights, nor behind the samples
        graph = Graph(name, config, tensors, formats, device="cpu", layout=layout)
        samples = [torch.empty(sized(shape, SAMPLE), dtype=getattr(torch, dtype)) for dtype, shape in inputs.values()]
    dims = {letter: torch.export.Dim(letter, min=1, max=2**31 - 1) for letter in SAMPLE}
    shapes = [{i: dims[d] for i, d in enumerate(shape) if isinstance(d, str)} for _, shape in inputs.values()]
    with _quiet():
        program = torch.onnx.export(
            graph, tuple(samples), dynamo=True, optimize=False, dynamic_shapes=(tuple(shapes),), verbose=False
        )
    assert program is not None
    model = program.model
    _name(model.graph.inputs, inputs)
    _name(model.graph.outputs, output_specs(name, config, layout))
    _point_into(model.graph, graph, weights_file)
    _attach_bodies(model, expanded)
    model.graph.name = name
    model.producer_name, model.producer_version = "tandem", ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on stdout and through warnings what is no concern of the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _name(values: Sequence[ir.Value], specs: dict[str, Spec]) -> None:
    assert len(values) == len(specs), f"the graph has {len(values)} bindings, export.bindings {len(specs)}"
    for value, (name, (_, shape)) in zip(values, specs.items(), strict=True):
        value.name = name
        value.shape = ir.Shape(shape)


def _point_into(graph: ir.Graph, module: Graph, weights_file: Path) -> None:
    """Every parameter becomes an initializer that lives in the weights file."""
    header = read_header(weights_file)
    parameters = dict(module.named_parameters())
    for name, value in list(graph.initializers.items()):
        if name not in parameters:
            continue  # a constant of the trace
        _, shape, offset, length = header[name]
        dtype = ONNX_DTYPES[parameters[name].dtype]
        value.const_value = ir.ExternalTensor(
            weights_file.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=weights_file.parent
        )
        value.dtype = dtype
    missing = sorted(set(parameters) - set(graph.initializers))
    assert not missing, f"the trace of {module.graph_name} lost the weight {missing[0]}"


def _attach_bodies(model: ir.Model, expanded: bool) -> None:
    """One function per op that the graph uses, for the attribute values that it uses it with."""
    ops = {op.name: op for op in OPS}
    used: dict[str, dict[str, object]] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert used.setdefault(node.op_type, attributes) == attributes, f"two kinds of {node.op_type} in one graph"
    for name, attributes in used.items():
        function = ir.serde.deserialize_function(ops[name].function(attributes, expanded))
        model.functions[function.identifier()] = function
    model.graph.opset_imports.update({**IMPORTS, DOMAIN: 1})
    model.ir_version = 10
