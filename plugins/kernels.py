"""CUDA kernels: compiled by NVRTC for one GPU architecture, launched on a stream with raw pointers.

No torch and no GPU needed to compile. A source is specialised by integer macros, such as a model's sizes.

    cubin = compile_kernels(Path("plugins/linear/kernel.cu"), "sm_90", {"WARPS": 8})    # bytes
    kernel = Module(cubin).kernel("linear_decode")
    kernel.launch((grid, 1, 1), (256, 1, 1), [c_void_p(x), c_int(rows)], stream, shared=4096)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.errors import UserError

ROOT = Path(__file__).parent
Dim = tuple[int, int, int]


class CompileError(AssertionError):
    """A kernel does not compile: NVRTC's log. Always a defect of Tandem's, or of a new compiler."""


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda.bindings, which returns (error, value...). Raises RuntimeError with its name."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if len(values) == 1 else tuple(values)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise UserError("the cuda target needs cuda-bindings and nvidia-cuda-nvrtc; run `make setup`") from None
    return nvrtc


def compiler_version() -> str:
    return ".".join(map(str, _check(_nvrtc().nvrtcVersion())))


def compile_kernels(source: Path, arch: str, defines: Mapping[str, int | str]) -> bytes:
    """The cubin of one source for an architecture such as "sm_90". Raises CompileError, UserError without NVRTC."""
    nvrtc = _nvrtc()
    flags = [f"-arch={arch}", "-std=c++17", "-default-device", f"-I{ROOT}", "-lineinfo"]
    options = [option.encode() for option in flags + [f"-D{name}={value}" for name, value in defines.items()]]
    program = _check(nvrtc.nvrtcCreateProgram(source.read_bytes(), str(source).encode(), 0, [], []))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(error):
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileError(f"{source} for {arch}: {log.decode()}")
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        _check(nvrtc.nvrtcDestroyProgram(program))


def cached_kernels(source: Path, arch: str, defines: Mapping[str, int | str]) -> bytes:
    """`compile_kernels`, kept under $XDG_CACHE_HOME/tandem by the hash of everything that goes in."""
    nvrtc = _nvrtc()
    texts = [path.read_text() for path in (*sorted(ROOT.rglob("*.cuh")), source)]
    key = repr((texts, arch, sorted(defines.items()), _check(nvrtc.nvrtcVersion())))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    path = folder / f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compile_kernels(source, arch, defines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            (Path(directory) / path.name).write_bytes(cubin)
            os.replace(Path(directory) / path.name, path)
    except OSError:
        pass  # a cache that cannot be written costs seconds at the next start, nothing else
    return cubin


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


class Module:
    """A loaded cubin. The primary context of a device must be current (torch makes it so)."""

    def __init__(self, cubin: bytes) -> None:
        self._module = _check(_driver().cuModuleLoadData(cubin))
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            driver = _driver()
            function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
            # All shared memory, whatever the kernel needs itself: the next one is to move in beside it.
            carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _check(driver.cuFuncSetAttribute(function, carveout, 100))
            self._kernels[name] = Kernel(function, name)
        return self._kernels[name]


class Kernel:
    launched = 0  # by this process, for benchmarks

    def __init__(self, function: Any, name: str) -> None:
        self.function, self.name, self._shared = function, name, 0

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        stream: int,
        shared: int = 0,
        programmatic: bool = True,
    ) -> None:
        """args: ctypes values (c_void_p, c_int, c_float, Structure), in the kernel's order. shared: dynamic bytes.
        programmatic: the kernel may start before the one before it on the stream has ended (see common.cuh)."""
        driver = _driver()
        if (
            shared > self._shared
        ):  # the limit that a kernel starts with is less than 48 KB where it declares some itself
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self.function, attribute, shared))
            self._shared = shared
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
        if programmatic:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        Kernel.launched += 1
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in args))
        _check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))
