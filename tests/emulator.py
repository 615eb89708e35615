"""CUDA kernels on the CPU: the same sources, compiled by g++ against tests/emulator, one fiber for each thread.

    kernel = EmulatedModule(Path("plugins/linear/kernel.cu"), {"WARPS": 8}).kernel("linear_decode")
    kernel.launch((grid, 1, 1), (256, 1, 1), [c_void_p(x), c_int(rows)], stream=0, shared=4096)

`launch` raises EmulatorError for a deadlock, an access to memory that is not there, a write past the dynamic shared
memory, a block whose threads do not all call wait_for_previous(), or a launch of which none does. Shared memory starts
as NaN in every block. Blocks run one after another, so a kernel whose blocks wait for each other does not end; the
rounding of __expf and of the tensor cores is not the GPU's to the last bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plugins.kernels import ROOT, CompileError, Dim

HERE = Path(__file__).parent / "emulator"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
NAME = re.compile(r"\b__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
DYNAMIC = re.compile(r"\bextern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?(\w+)\s+(\w+)\s*\[\s*\]\s*;")
ALIGN = r"(?:__align__|alignas)\s*\(\s*([^()]*?)\s*\)"
STATIC = re.compile(rf"(?:{ALIGN}\s*)?\b__shared__\s+(?:{ALIGN}\s*)?([^;=]*?)(\w+)\s*((?:\[[^\[\];=]*\]\s*)*);")
FUNCTION = re.compile(r"^(?:template\s*<[^>{}]*>\s*)?__device__ __forceinline__[^;{}]*\{", re.MULTILINE)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]')


class EmulatorError(AssertionError):
    """A kernel did what it must not: the message names kernel, block and thread."""


def _compile(command: Sequence[str], text: str, source: Path) -> str:
    result = subprocess.run(["g++", *command], input=text, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{source} for the emulator: {result.stderr}")
    return result.stdout


def _cached(suffix: str, flags: Sequence[str], text: str, source: Path, inputs: Sequence[Path] = ()) -> Path:
    """What g++ makes of a text, kept in a temporary folder by the hash of everything that goes in."""
    key = repr((suffix, flags, text, [path.name for path in inputs]))
    folder = Path(tempfile.gettempdir()) / f"tandem-emulator-{os.getuid()}"
    path = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.{suffix}"
    if not path.is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            output = Path(made) / path.name
            _compile([*flags, "-x", "c++", "-", "-x", "none", *map(str, inputs), "-o", str(output)], text, source)
            os.replace(output, path)
    return path


def _without_assembly(text: str) -> str:
    """The preprocessed source less the functions of common.cuh with inline assembly: the emulator has their twins."""
    kept, position = [], 0
    for match in FUNCTION.finditer(text):
        depth, end = 1, match.end()
        while depth:
            token = TOKEN.search(text, end)
            assert token is not None
            end = token.end()
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if match.start() >= position and re.search(r"\basm\b", text[match.start() : end]):
            kept += [text[position : match.start()], "\n" * text.count("\n", match.start(), end)]
            position = end
    return "".join([*kept, text[position:]])


def _shared_variable(match: re.Match[str]) -> str:
    """A declaration of static shared memory as a reference to memory that the emulator fills with NaN.

    Not a static variable: the emulator could not find those of templates. One variable in each declaration."""
    before, after, kind, name, dimensions = match.groups()
    align = before or after or f"alignof({kind})"
    return (
        f"typedef {kind} emulator_type_{name}{dimensions}; static EmulatorSlot emulator_slot_{name}; "
        f"emulator_type_{name}& {name} = *(emulator_type_{name}*)"
        f"emulator_static(&emulator_slot_{name}, sizeof(emulator_type_{name}), {align});"
    ) + "\n" * match.group().count("\n")


def _translate(source: Path, defines: Mapping[str, int | str]) -> tuple[str, list[str]]:
    """The source as C++ (runtime.h in front, a function `run_NAME` for each kernel behind), the kernels' names."""
    macros = [f"-D{name}={value}" for name, value in {"__CUDACC_RTC__": 1, "__CUDA_ARCH__": 900, **defines}.items()]
    text = _compile(["-std=c++17", "-E", *macros, f"-I{HERE}", f"-I{ROOT}", "-x", "c++", str(source)], "", source)
    names = list(dict.fromkeys(NAME.findall(text)))
    text = DYNAMIC.sub(r"static \1* const \2 = (\1*)emulator_dynamic;", _without_assembly(text))
    text = STATIC.sub(_shared_variable, text)
    if re.search(r"\basm\b", text):
        raise CompileError(f"{source} for the emulator: inline assembly belongs in plugins/common.cuh")
    ends = [
        f'extern "C" void run_{name}(void** args) {{ emulator_call({name}, args); }}\n'
        f'extern "C" const unsigned* sizes_{name}() {{ return emulator_sizes({name}); }}\n'
        for name in names
    ]
    # A namespace without a name: no function of one kernel's library is taken for that of another's.
    return f"{(HERE / 'runtime.h').read_text()}\nnamespace {{\n{text}\n}}\n{''.join(ends)}", names


class EmulatedModule:
    """The kernels of one source: as plugins.kernels.Module, but of a source and on CPU tensors."""

    _stacks: int | None = None  # of the process, which all libraries share

    def __init__(self, source: Path, defines: Mapping[str, int | str]) -> None:
        text, names = _translate(source, defines)
        runtime = HERE / "runtime.cpp"
        linked = _cached("o", ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-c"], runtime.read_text(), runtime)
        self._library = ctypes.CDLL(str(_cached("so", [*FLAGS, "-shared"], text, source, [linked])))
        stacks = self._library["emulator_stacks"]
        stacks.restype = ctypes.c_void_p
        EmulatedModule._stacks = stacks(ctypes.c_void_p(EmulatedModule._stacks))
        assert EmulatedModule._stacks, "no memory for the threads' stacks"
        self._kernels = {name: EmulatedKernel(self._library, name) for name in names}

    def kernel(self, name: str) -> EmulatedKernel:
        return self._kernels[name]


class EmulatedKernel:
    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._function = ctypes.cast(library[f"run_{name}"], ctypes.c_void_p)
        sizes = library[f"sizes_{name}"]
        sizes.restype = ctypes.POINTER(ctypes.c_uint)
        self._sizes: list[int] = []
        for size in sizes():
            if not size:
                break
            self._sizes.append(size)
        self._launch = library["emulator_launch"]
        self._launch.restype = ctypes.c_char_p

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        stream: int = 0,
        shared: int = 0,
        programmatic: bool = True,
    ) -> None:
        """As plugins.kernels.Kernel.launch; returns when all blocks have run. Raises EmulatorError."""
        sizes = [ctypes.sizeof(value) for value in args]
        if sizes != self._sizes:
            raise EmulatorError(f"kernel {self.name}: takes arguments of {self._sizes} bytes, got {sizes}")
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in args))
        geometry = (ctypes.c_uint * 6)(*grid, *block)
        name = self.name.encode()
        message = self._launch(name, self._function, pointers, geometry, ctypes.c_uint(shared), programmatic)
        if message:
            raise EmulatorError(message.decode())
