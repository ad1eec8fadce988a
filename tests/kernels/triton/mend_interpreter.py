"""What Triton's interpreter gets wrong, put right for the tests. Real compiles are not concerned.

With bfloat16 (3.6.0 and 3.9.0) `tl.dot` multiplies the bit patterns as integers, and casts from
float32 cut digits off instead of rounding. With numpy 2.4 and newer 3.6.0 cannot count in loops:
`int()` takes arrays of no dimension alone.

`python -m tests.kernels.triton.mend_interpreter MODULE ARGUMENTS` runs a module with all that.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor


def _as_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, *arguments: Any) -> Any:
    return _create_dot(self, _as_float32(a), _as_float32(b), accumulator, *arguments)


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return data.view(np.uint16).astype(np.uint32) << 16
    return _convert_float(data, source, target, rounding)


def _patch_tensor(tensor: Any, *scope: Any) -> None:
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())  # in its scope


def mend() -> None:
    """Patch the interpreter of this process."""
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = _patch_tensor


if __name__ == "__main__":
    mend()
    sys.argv[:] = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
