"""ZeroCenteredRmsNorm as a plugin: one kernel for any number of rows, of any leading shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from ctypes import c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

from plugins.launch import Call, Device, Launch, Macros, Shapes

SOURCE = Path(__file__).parent / "kernel.cu"
THREADS = 256


def kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
    return [(SOURCE, {})]


def workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    return 0


def run(call: Call) -> None:
    *leading, size = call.inputs["x"].shape
    pointers = [*call.addresses("x", "weight"), call.outputs["y"].address]
    args = [*map(c_void_p, pointers), c_int(size), c_float(call.attributes["epsilon"])]
    kernel = call.module(SOURCE, {}).kernel("rms_norm")
    kernel.launch((math.prod(leading), 1, 1), (THREADS, 1, 1), args, call.stream)


RMS_NORM_LAUNCH = Launch(kernels, workspace, run, {})
