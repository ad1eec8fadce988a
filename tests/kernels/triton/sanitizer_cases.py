"""One small forward to a label map per dtype and widths: what compute-sanitizer looks at."""

from __future__ import annotations

import torch

import fastseg
from fastseg.kernels import upsample_argmax
from tests.kernels.triton.test_model import tiny_model


def main() -> None:
    torch.manual_seed(0)
    with fastseg.backend("triton"), torch.no_grad():
        for widths in ("b0", "b1"):
            for dtype in (torch.bfloat16, torch.float32):
                model = tiny_model(widths).to("cuda", dtype)
                # Grids that no tile divides: all masks are at work.
                image = torch.randn(2, 3, 101, 75).to("cuda", dtype)
                logits = model(image).logits
                upsample_argmax(logits, (4 * logits.shape[2], 4 * logits.shape[3]))
                upsample_argmax(logits, (101, 75))
                torch.cuda.synchronize()


if __name__ == "__main__":
    main()
