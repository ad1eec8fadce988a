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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseg.kernels.core.launch import Launch

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_KIB = 1024
# Shared memory that one CTA can have, bytes. sm_80 counts as the smaller chips of its generation
# (sm_86, sm_89), which use its configurations.
SHARED_LIMIT = {
    "sm_80": 99 * _KIB,
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,
    "sm_120": 99 * _KIB,
    "gfx942": 64 * _KIB,
}
# Registers and shared memory of one multiprocessor.
_REGISTERS = 65536
_SHARED_PER_SM = {
    "sm_80": 100 * _KIB,
    "sm_90": 228 * _KIB,
    "sm_100": 228 * _KIB,
    "sm_120": 100 * _KIB,
}


class Compiled(NamedTuple):
    """What a compiled kernel takes."""

    kernel: str
    target: str
    options: dict[str, Any]  # constexprs, num_warps, num_stages
    registers: int  # per thread
    spill_bytes: int  # per thread, of local memory
    shared_bytes: int  # per CTA
    tensor_core: str  # the matrix instruction: "wgmma", "tcgen05", "mma", "mfma" or "none"
    instructions: int  # of the machine code; 0 on AMD, and where they were not counted
    ctas_per_sm: int  # that registers and shared memory allow; 0 on AMD


def _target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The launch as Triton would specialise it, and its compile options."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    values.update(launch.options)
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        parameter = kernel.params[index]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            divisible = True  # torch's allocator aligns to 512 bytes
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            signature[name] = "fp32"
            divisible = False
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes), options


def key(launch: Launch) -> str:
    """Equal for launches that compile to the same kernel."""
    source, options = _source(launch)
    return f"{source.hash()}{sorted(options.items())}"


def ttir(launch: Launch, target: str) -> str:
    """The launch in Triton's intermediate language, in which offsets can be followed."""
    source, options = _source(launch)
    return str(triton.compile(source, target=_target(target), options=options).asm["ttir"])


def compile_launch(launch: Launch, target: str, count: bool = True) -> Compiled:
    """Compile for `target`: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".

    Args:
        count: the instructions, which takes the disassembler 0.4 s.
    """
    source, options = _source(launch)
    compiled = triton.compile(source, target=_target(target), options=options)
    common = {
        "kernel": launch.name,
        "target": target,
        "options": launch.options,
        "shared_bytes": compiled.metadata.shared,
    }
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        return Compiled(
            **common,
            registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
            spill_bytes=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
            tensor_core="mfma" if "v_mfma" in assembly else "none",
            instructions=0,
            ctas_per_sm=0,
        )
    cubin = compiled.asm["cubin"]
    usage = _read(cubin, "cuobjdump", "-res-usage")
    registers, spill_bytes = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    per_cta = (registers + 7) // 8 * 8 * options["num_warps"] * 32
    shared = compiled.metadata.shared + _KIB
    return Compiled(
        **common,
        registers=registers,
        spill_bytes=spill_bytes,
        tensor_core=_tensor_core(compiled.asm["ptx"]),
        instructions=_read(cubin, "nvdisasm", "-c").count(";") if count else 0,
        ctas_per_sm=min(_REGISTERS // per_cta, _SHARED_PER_SM[target] // shared, 32),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the disassembler's output has no {pattern}")
    return int(found[1])


def _tensor_core(ptx: str) -> str:
    for name, instruction in (
        ("wgmma", "wgmma.mma_async"),
        ("tcgen05", "tcgen05.mma"),
        ("mma", "mma.sync"),
    ):
        if instruction in ptx:
            return name
    return "none"


def _read(cubin: bytes, program: str, option: str) -> str:
    """What a program that ships inside triton says of machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tools / program), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
