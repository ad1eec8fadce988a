"""Compile a recorded kernel launch for a GPU that is not there, and read what it takes.

Registers, spills and instruction counts come from the disassembler that ships inside triton.
Static figures: nothing here has run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

from fastseg.kernels.core.launch import Launch
from fastseg.kernels.tune.precompile import gpu_target, source_of

_KIB = 1024
# Shared memory that one CTA can have, bytes. sm_80 counts as the smaller chips of its generation
# (sm_86, sm_89), which use its configurations. Of a multiprocessor it is 1 KiB more.
SHARED_LIMIT = {
    **{"sm_80": 99 * _KIB, "sm_90": 227 * _KIB, "sm_100": 227 * _KIB, "sm_120": 99 * _KIB},
    "gfx942": 64 * _KIB,
}
_REGISTERS = 65536  # of one multiprocessor


class Compiled(NamedTuple):
    """What a compiled kernel takes."""

    kernel: str
    target: str
    options: dict[str, Any]  # constexprs, num_warps, num_stages
    registers: int  # per thread
    spill_bytes: int  # per thread, of local memory
    shared_bytes: int  # per CTA
    tensor_core: str  # the matrix instruction: "wgmma", "tcgen05", "mma", "mfma" or "none"
    instructions: int = 0  # of the machine code; 0 on AMD, and where they were not counted
    ctas_per_sm: int = 0  # that registers and shared memory allow; 0 on AMD


def text_of(launch: Launch, target: str, language: str) -> str:
    """The launch in "ttir", Triton's own language, in which offsets can be followed, or "ptx"."""
    source, options = source_of(launch)
    return str(triton.compile(source, target=gpu_target(target), options=options).asm[language])


def compile_launch(launch: Launch, target: str, count: bool = True) -> Compiled:
    """Compile for `target`: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".

    `count`: the instructions too, which takes the disassembler 0.4 s.
    """
    source, options = source_of(launch)
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    known, shared = (launch.name, target, launch.options), compiled.metadata.shared
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spill_bytes = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        matrix = "mfma" if "v_mfma" in assembly else "none"
        return Compiled(*known, registers, spill_bytes, shared, matrix)
    cubin = compiled.asm["cubin"]
    usage = _read(cubin, "cuobjdump", "-res-usage")
    registers, spill_bytes = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    instructions = _read(cubin, "nvdisasm", "-c").count(";") if count else 0
    per_cta = (registers + 7) // 8 * 8 * options["num_warps"] * 32
    shared_ctas = (SHARED_LIMIT[target] + _KIB) // (shared + _KIB)
    ctas = min(_REGISTERS // per_cta, shared_ctas, 32)
    matrix = _tensor_core(compiled.asm["ptx"])
    return Compiled(*known, registers, spill_bytes, shared, matrix, instructions, ctas)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the disassembler's output has no {pattern}")
    return int(found[1])


def _tensor_core(ptx: str) -> str:
    instructions = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return next((name for name, words in instructions.items() if words in ptx), "none")


def _read(cubin: bytes, program: str, option: str) -> str:
    """What a program that ships inside triton says of machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / program), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
