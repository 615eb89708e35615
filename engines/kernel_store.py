"""Compiled kernels as files of an engine directory, so that running needs no compiler.

A file's name says the architecture, the source and a hash of the macros: `sm_120-linear-decode-5f….cubin`.

    store(directory, "sm_120", [(SOURCE, {"HEAD_DIM": 256})])      # at build time
    KernelStore(directory, "sm_120").module(SOURCE, {"HEAD_DIM": 256})
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.errors import UserError
from plugins import kernels
from plugins.launch import Macros

SUFFIX = ".cubin"
Kernels = tuple[Path, Macros]


def file_name(arch: str, source: Path, macros: Macros) -> str:
    digest = hashlib.sha256(repr(sorted((name, str(value)) for name, value in macros.items())).encode()).hexdigest()
    return f"{arch}-{source.parent.name}-{source.stem}-{digest[:12]}{SUFFIX}"


def plugin_version() -> str:
    """A hash of all that a plugin is made of: sources of kernels and of their launches."""
    digest = hashlib.sha256()
    for path in sorted(p for p in kernels.ROOT.rglob("*") if p.suffix in (".py", ".cu", ".cuh")):
        digest.update(path.relative_to(kernels.ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def store(directory: Path, arch: str, wanted: Iterable[Kernels]) -> dict[str, dict[str, Any]]:
    """Compiles each of `wanted` once. -> file name -> source and macros."""
    files = {file_name(arch, *kernel): kernel for kernel in wanted}
    with ThreadPoolExecutor() as pool:  # NVRTC compiles outside Python's lock
        cubins = pool.map(lambda kernel: kernels.cached_kernels(kernel[0], arch, kernel[1]), files.values())
        for name, cubin in zip(files, cubins, strict=True):
            (directory / name).write_bytes(cubin)
    return {
        name: {"source": source.relative_to(kernels.ROOT).as_posix(), "macros": dict(macros)}
        for name, (source, macros) in files.items()
    }


class KernelStore:
    def __init__(self, directory: Path, arch: str) -> None:
        self.directory, self.arch = directory, arch
        self._modules: dict[str, Any] = {}

    def module(self, source: Path, macros: Macros) -> Any:
        """The loaded kernels. Raises UserError: the build did not compile them."""
        name = file_name(self.arch, source, macros)
        if name not in self._modules:
            path = self.directory / name
            if not path.is_file():
                raise UserError(f"{path}: no such kernel in the engine directory; build the engines again")
            self._modules[name] = kernels.Module(path.read_bytes())
        return self._modules[name]
