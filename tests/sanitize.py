"""compute-sanitizer over the GPU tests of every kernel, at small shapes: python -m tests.sanitize [memcheck racecheck]

First each tool must find what is planted here, a race or a write out of bounds, with the options of the tests: one
that looks at no kernel finds nothing either. Exits with 1 where anything is found, missed, or not run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_void_p
from pathlib import Path

TESTS = {  # file: expressions of -k, one process each
    "attention": ["test_decode and 8-1 or e4m3", "query_row or test_decode and not 8-1", "prefill_in"],
    "gdn": ["rounds and 1-gpu", "rounds and 3-gpu", "not rounds and not 16x32x128x128"],
    "sampling": [
        "acceptance or embedding or noise or equal_logits or random_settings or passes",
        *("finite or counted", "steered and not test_steered_logits"),
    ],
    "decode": ["largest or mixture and 64-64", "a_product or head_in_front"],
    "prefill": ["test_a_product or every_code", "test_experts or grouping or row_does or mixed or norm_and"],
}
OURS = ["attention_", "gdn_", "linear_", "experts_", "sample", "argmax", "histogram", "noise_values", "accept_drafts"]
OURS += ["embed_rows", "mtp_inputs", "moe_", "rms_norm_rows", "planted_", "steer_logits", "count_tokens"]
PLANTED = {
    "racecheck": "__shared__ float s[64]; s[threadIdx.x] = *x; x[threadIdx.x] = s[(threadIdx.x + 33) % 64];",
    "memcheck": "x[threadIdx.x + (1 << 28)] = 1;",
}


def sanitizer(tool: str, command: list[str]) -> tuple[int, str]:
    # Without the filter every kernel of torch is looked at too, for minutes.
    names = [option for name in OURS for option in ("--kernel-name", f"kernel_substring={name}")]
    options = ["--tool", tool, "--error-exitcode", "3", "--report-api-errors", "no", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["compute-sanitizer", *options, sys.executable, *command], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def plant(tool: str) -> None:
    import torch

    from plugins.kernels import Module, compile_kernels

    major, minor = torch.cuda.get_device_capability()
    x = torch.zeros(64, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "planted.cu"
        source.write_text(f'extern "C" __global__ void planted_fault(float* x, int) {{ {PLANTED[tool]} }}')
        kernel = Module(compile_kernels(source, f"sm_{major}{minor}", {})).kernel("planted_fault")
    stream = torch.cuda.current_stream().cuda_stream
    kernel.launch((1, 1, 1), (64, 1, 1), [c_void_p(x.data_ptr()), c_int(0)], stream)
    torch.cuda.synchronize()


def main() -> int:
    if sys.argv[1:2] == ["--plant"]:
        plant(sys.argv[2])
        return 0
    tools, failed = sys.argv[1:] or list(PLANTED), False
    for tool in tools:
        code, text = sanitizer(tool, ["-m", "tests.sanitize", "--plant", tool])
        if code != 3:
            print(f"{tool} does not find what is planted (exit status {code}):\n{text}")
            return 1
    runs = [(tool, file, expression) for tool in tools for file, all in TESTS.items() for expression in all]

    def run(tool: str, file: str, expression: str) -> tuple[int, str]:
        path = f"tests/test_cuda_{file}.py"
        return sanitizer(tool, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", path, "-k", expression])

    with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)), 1)) as pool:
        for (tool, file, expression), (code, text) in zip(runs, pool.map(lambda r: run(*r), runs), strict=True):
            summary = [line for line in text.splitlines() if " passed" in line or "SUMMARY" in line]
            print(f"{'FAILED ' * bool(code)}{tool} {file} -k '{expression}': {'; '.join(summary)}", flush=True)
            if code:
                print(text)
                failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
