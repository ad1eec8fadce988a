"""Inputs, references and bounds that the kernel tests share."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fastseg
from fastseg.kernels.core import configurations
from fastseg.kernels.core.launch import record_launches
from tests.half_precision import HALF_FACTOR, sane_error

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETING

WIDTHS = (32, 64, 128, 160, 256, 320, 512)
GRIDS = ((1, 1), (7, 5), (16, 16), (33, 9))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)

# Relative RMS errors against float64 that stand for exact where the eager twin errs less: a quarter
# of a half-precision rounding; some ten roundings of float32.
FLOORS = {torch.float32: 1.6e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}


def randn(
    *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(device=device, dtype=dtype)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the error over that of the reference; NaN where the result has one."""
    reference = reference.double().cpu()
    error = (result.double().cpu() - reference).square().mean().sqrt()
    return (error / reference.square().mean().sqrt().clamp(min=1e-30)).item()


def set_config(monkeypatch: pytest.MonkeyPatch, kernel: str, config: dict[str, Any]) -> None:
    """Have all look-ups of `kernel` answer `config`, whatever the sizes."""
    answer = configurations.answer

    def chosen(query: configurations.Query, device: torch.device) -> dict[str, Any]:
        return dict(config) if query.kernel == kernel else answer(query, device)

    monkeypatch.setattr(configurations, "answer", chosen)


def wide(value: Any) -> Any:
    """`value` in float64, on the CPU: tensors, also in lists and dicts; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.double().cpu() if value.is_floating_point() else value.cpu()
    if isinstance(value, dict):
        return {name: wide(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(wide(item) for item in value)
    return value


def check_parity(op: Any, *arguments: Any, **keywords: Any) -> Any:
    """Run `op`'s kernels and compare with its eager twin in float64.

    A kernel may err by 1.25 times what the eager twin does in the same dtype, on a CPU that
    computes it right, or what `FLOORS` says. Proves that kernels ran by counting launches.

    Returns:
        the kernels' result.
    """
    with record_launches() as launches:
        result = op(*arguments, **keywords)
    assert launches, "no kernel ran"
    with fastseg.backend("eager"):
        reference = op(*wide(arguments), **wide(keywords))
        twin = op(*arguments, **keywords)
    for part, expected, eager in zip(*map(_tensors, (result, reference, twin)), strict=True):
        assert part.shape == expected.shape
        error = relative_error(part, expected)
        twin_error = relative_error(eager, expected)
        if part.dtype in HALF:
            twin_error = min(twin_error, sane_error(part.dtype))
        limit = HALF_FACTOR * max(twin_error, FLOORS[part.dtype])
        assert error <= limit, f"relative error {error:.2e}, bound {limit:.2e}"
    return result


def _tensors(result: Any) -> list[torch.Tensor]:
    items = result if isinstance(result, (list, tuple)) else [result]
    return [item for item in items if isinstance(item, torch.Tensor)]
