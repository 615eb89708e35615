"""How an op runs on a GPU as a plugin: which kernels it takes, how much workspace, and the launch itself.

A `Launch` stands in the op's folder (launch.py) and is what its TensorRT plugin enqueues; tests call it on any GPU, or
under the emulator, through the very same `Call`. It knows nothing of torch or TensorRT: addresses, shapes, a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

DECODE_ROWS = 8  # calls of up to so many rows take the decoding kernels, whose rows' bits do not depend on the others
ALIGNMENT = 256  # bytes, of a workspace's parts
# Of the largest output, what a launch may be off: activations of 16 bits or more, float32 sums; in calls of more rows
# activations enter or leave as float16, up to three times one after the other.
DECODE_RTOL, PREFILL_RTOL = 2e-5, 2e-3

Macros = Mapping[str, int | str]
Shapes = Mapping[str, tuple[int, ...]]


class Argument(NamedTuple):
    """A tensor of a call. address: on the device. dtype: as torch calls it; NVFP4 codes are uint8, two a byte, whatever
    an engine calls them, and their shape is that of the bytes."""

    address: int
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Device:
    """multiprocessors, and bytes of shared memory that one block may have."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Call:
    """inputs, outputs: by the op's formal names; an output that is written in place has its input's address.
    module: the compiled kernels of a source with these macros. workspace: an address, aligned to 256 bytes."""

    attributes: Mapping[str, Any]
    inputs: Mapping[str, Argument]
    outputs: Mapping[str, Argument]
    device: Device
    module: Callable[[Path, Macros], Any]
    workspace: int
    stream: int

    def addresses(self, *names: str) -> list[int]:
        return [self.inputs[name].address for name in names]


@dataclass(frozen=True)
class Launch:
    """kernels(attributes, shapes): (source, macros) of all kernels that calls of any number of rows may take, so that a
        build compiles them ahead. shapes: of the inputs, rows at their most. Raises UserError for sizes that there
        are no kernels for.
    workspace(attributes, shapes, device): bytes, for calls of up to these shapes.
    run(call): launches, on the call's stream, without waiting for anything.
    aliases: output name -> the input that it is written over."""

    kernels: Callable[[Mapping[str, Any], Shapes], list[tuple[Path, Macros]]]
    workspace: Callable[[Mapping[str, Any], Shapes, Device], int]
    run: Callable[[Call], None]
    aliases: Mapping[str, str]


def parts(workspace: int, *sizes: int) -> list[int]:
    """Addresses of parts of so many bytes."""
    addresses = []
    for size in sizes:
        addresses.append(workspace)
        workspace += -(-size // ALIGNMENT) * ALIGNMENT
    return addresses


def total(*sizes: int) -> int:
    """Bytes of a workspace of these parts."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
