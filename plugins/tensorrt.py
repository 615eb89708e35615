"""Every op with a `Launch` as a TensorRT plugin: IPluginV3 and its creator, written once.

The plugin of an op bears its name, version "1" and the empty namespace, which the ONNX parser needs to prefer it to the
function of the same name. An enqueue packs addresses and shapes into the op's own `Call`, so that what TensorRT runs is
what tests run without it.

    plugins = register(trt, OPS, device)      # into TensorRT's registry, before parsing or loading
    plugins.module = kernels.module           # where enqueue finds compiled kernels; a build needs none
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plugins.launch import Argument, Call, Device, Launch, Macros
from plugins.op import Op

VERSION = "1"


class Plugins:
    """The registered ops. module: the compiled kernels of a source. device: whose workspaces are asked for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.creators: dict[str, Any] = {}  # TensorRT keeps no reference of its own

    def module(self, source: Path, macros: Macros) -> Any:
        raise AssertionError("no compiled kernels: load an engine directory first")


_registered: dict[str, Plugins] = {}


def register(trt: Any, ops: Iterable[Op], device: Device) -> Plugins:
    """Makes the ops known to `trt`, which is tensorrt_rtx or tensorrt. Again: the device alone is new."""
    plugins = _registered.setdefault(trt.__name__, Plugins(device))
    plugins.device = device
    for op in ops:
        if op.launch and op.name not in plugins.creators:
            creator = _creator(trt, op, plugins)
            plugins.creators[op.name] = creator
            if not trt.get_plugin_registry().register_creator(creator, ""):
                raise RuntimeError(f"TensorRT does not register the plugin {op.name}")
    return plugins


class _Dim:
    """A dimension of TensorRT's shape expressions, with the arithmetic that an op's `infer` needs."""

    def __init__(self, trt: Any, builder: Any, value: Any) -> None:
        self.trt, self.builder, self.value = trt, builder, value

    def _with(self, operation: str, other: Any) -> _Dim:
        right = other.value if isinstance(other, _Dim) else self.builder.constant(other)
        made = self.builder.operation(getattr(self.trt.DimensionOperation, operation), self.value, right)
        return _Dim(self.trt, self.builder, made)

    def __floordiv__(self, other: Any) -> _Dim:
        return self._with("FLOOR_DIV", other)

    def __mul__(self, other: Any) -> _Dim:
        return self._with("PROD", other)

    def __add__(self, other: Any) -> _Dim:
        return self._with("SUM", other)


class _Shaped:
    """Stands for an input in `infer`."""

    def __init__(self, shape: Sequence[Any], dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = tuple(shape), dtype


def _torch_dtype(trt: Any, dtype: Any) -> torch.dtype:
    """FP4 codes are bytes here, two codes each."""
    t = trt.DataType
    return {
        t.FLOAT: torch.float32,
        t.HALF: torch.float16,
        t.BF16: torch.bfloat16,
        t.FP8: torch.float8_e4m3fn,
        t.FP4: torch.uint8,
        t.INT32: torch.int32,
        t.INT64: torch.int64,
    }[dtype]


def argument(trt: Any, dtype: Any, dims: Sequence[int], address: int) -> Argument:
    shape = tuple(dims)
    if dtype == trt.DataType.FP4:
        shape = (*shape[:-1], shape[-1] // 2)
    return Argument(address, shape, str(_torch_dtype(trt, dtype)).removeprefix("torch."))


def _fields(trt: Any, attributes: dict[str, Any]) -> list[Any]:
    fields = []
    for name, value in attributes.items():
        if isinstance(value, str):
            data, kind = np.frombuffer(value.encode(), np.int8), trt.PluginFieldType.CHAR
        elif isinstance(value, float):
            data, kind = np.array([value], np.float64), trt.PluginFieldType.FLOAT64
        else:
            data, kind = np.array([value], np.int64), trt.PluginFieldType.INT64
        fields.append(trt.PluginField(name, data, kind))
    return fields


def _attributes(trt: Any, fields: Iterable[Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for field in fields:
        data = field.data
        if field.type == trt.PluginFieldType.CHAR:
            text = data if isinstance(data, bytes | str) else np.asarray(data).tobytes()
            attributes[field.name] = (text.decode() if isinstance(text, bytes) else text).rstrip("\0")
        else:
            attributes[field.name] = np.asarray(data).reshape(-1)[0].item()
    return attributes


def _creator(trt: Any, op: Op, plugins: Plugins) -> Any:
    plugin = _plugin_class(trt, op, plugins)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op.name, VERSION, ""
            empty = [trt.PluginField(name, np.array([]), trt.PluginFieldType.UNKNOWN) for name in op.attributes]
            self.field_names = trt.PluginFieldCollection(empty)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return plugin(_attributes(trt, fields))

    return Creator()


def _plugin_class(trt: Any, op: Op, plugins: Plugins) -> Callable[[dict[str, Any]], Any]:
    assert op.launch
    launch: Launch = op.launch
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, attributes: dict[str, Any]) -> None:
            for base in bases:
                base.__init__(self)
            self.num_outputs = len(op.outputs)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, VERSION, ""
            self.attributes = attributes
            # Those of the engine that is being loaded: another one may be, later.
            self.device, self.module = plugins.device, plugins.module

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = Plugin(dict(self.attributes))
            copy.device, copy.module = self.device, self.module
            return copy

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(_fields(trt, self.attributes))

        # ---- shapes ----

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            of = {torch.float32: trt.float32, torch.int64: trt.int64, torch.float16: trt.float16}
            given = dict(zip(op.inputs, types, strict=True))
            # What an op computes has its dtype whatever the sizes; what it writes in place that of the input.
            shaped = [_Shaped([8] * 4) for _ in op.inputs]
            inferred = op.infer(*shaped, **self.attributes)
            return [
                given[launch.aliases[name]] if name in launch.aliases else of[dtype]
                for name, (dtype, _) in zip(op.outputs, inferred, strict=True)
            ]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
            shaped = [_Shaped([_Dim(trt, builder, dims[i]) for i in range(len(dims))]) for dims in inputs]
            by_name = dict(zip(op.inputs, inputs, strict=True))
            shapes = []
            for name, (_, shape) in zip(op.outputs, op.infer(*shaped, **self.attributes), strict=True):
                if name in launch.aliases:
                    shapes.append(trt.DimsExprs(by_name[launch.aliases[name]]))
                    continue
                dims = trt.DimsExprs(len(shape))
                for i, dim in enumerate(shape):
                    dims[i] = dim.value if isinstance(dim, _Dim) else builder.constant(dim)
                shapes.append(dims)
            return shapes

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            return bool(tensors[position].desc.format == trt.TensorFormat.LINEAR)

        def get_aliased_input(self, output: int) -> int:
            name = launch.aliases.get(op.outputs[output])
            return op.inputs.index(name) if name else -1

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            shapes = {
                name: argument(trt, tensor.desc.type, tensor.max, 0).shape
                for name, tensor in zip(op.inputs, inputs, strict=True)
            }
            return launch.workspace(self.attributes, shapes, self.device)

        # ---- running ----

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(
            self,
            input_descriptions: Sequence[Any],
            output_descriptions: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            def named(names: Sequence[str], descriptions: Sequence[Any], addresses: Sequence[int]) -> Any:
                return {
                    name: argument(trt, d.type, d.dims, address)
                    for name, d, address in zip(names, descriptions, addresses, strict=True)
                }

            given = named(op.inputs, input_descriptions, inputs)
            made = named(op.outputs, output_descriptions, outputs)
            for name, source in launch.aliases.items():
                if made[name].address != given[source].address:
                    raise RuntimeError(f"{op.name}: {name} is not written over {source}; bind both to one buffer")
            launch.run(Call(self.attributes, given, made, self.device, self.module, workspace, stream))

    return Plugin
