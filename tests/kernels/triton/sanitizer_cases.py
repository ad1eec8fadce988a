"""One small forward to a label map per dtype and widths: what compute-sanitizer looks at."""

from __future__ import annotations

import sys

import torch

import fastseg
from fastseg.kernels import upsample_argmax, upsample_scores
from tests.kernels.triton.test_model import tiny_model


def main(device: str = "cuda") -> None:
    """On "cpu", which needs TRITON_INTERPRET=1, one small forward: to try the program."""
    torch.manual_seed(0)
    # Grids that no tile divides: all masks are at work.
    size = (101, 75) if device == "cuda" else (33, 43)
    with fastseg.backend("triton"), torch.no_grad():
        for widths in ("b0", "b1")[: 2 if device == "cuda" else 1]:
            for dtype in (torch.float32, torch.bfloat16)[: 2 if device == "cuda" else 1]:
                model = tiny_model(widths).to(device, dtype)
                image = torch.randn(2, 3, *size).to(device, dtype)
                logits = model(image).logits
                upsample_argmax(logits, (4 * logits.shape[2], 4 * logits.shape[3]))
                upsample_argmax(logits, size)
                upsample_scores(logits, size)
                if device == "cuda":
                    torch.cuda.synchronize()
    print("all forwards ended")


if __name__ == "__main__":
    main(*sys.argv[1:])
