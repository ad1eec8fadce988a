"""Whether threads each run a model on a CPU with an image of their own.

Threads inside of operators wait for each other at every small one; with an image each they meet
only at the end of a batch.
"""

from __future__ import annotations

from typing import Any

import torch


def worker_count(model: Any, images: int) -> int:
    """Into how many threads so many images are to be spread; 1 where the caller's runs them.

    What torch keeps by thread, as autocast and modes that see every operator, is not there in
    others, and graphs of torch.compile are not for several at a time.
    """
    if (
        images < 2
        or next(model.parameters()).device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or any(map(_is_compiled, model.modules()))
    ):
        return 1
    return min(images, torch.get_num_threads())


def _is_compiled(module: torch.nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
