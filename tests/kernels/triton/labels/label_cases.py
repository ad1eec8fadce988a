"""Labels of a kernel against interpolate + argmax in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastseg.kernels import upsample_argmax
from fastseg.kernels.core.launch import record_launches


def resize(logits, size):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def check(logits, size, kernel="upsample_argmax_kernel", **options):
    """One launch, and every pixel equals a float64 run's but where its two best classes tie."""
    with record_launches() as launches:
        labels = upsample_argmax(logits, size, **options)
    assert [launch.name for launch in launches] == [kernel]
    assert labels.dtype == options.get("dtype", torch.int64)
    assert labels.shape == (logits.shape[0], *size)
    resized = resize(logits.double(), size)
    best = resized.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5 * best[:, 0].abs().clamp(min=1)
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear].long(), resized.argmax(1)[clear])
    return labels
