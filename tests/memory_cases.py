"""How large the tensors are that a block makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Mode that keeps the most elements of a tensor of its own memory that an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not func.is_view:  # views have no memory
                self.elements = max(self.elements, tensor.numel())
        return result


class Allocated:
    """Most bytes that torch's allocator for the CPU had given out in a block, over those before.

    Of the profiler's events: exact, and independent of what the allocator keeps.
    """

    def __enter__(self) -> Allocated:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        profiler: Any = self._profile.profiler
        events = [one for one in profiler.kineto_results.events() if one.name() == "[memory]"]
        total = self.peak = 0
        for event in sorted(events, key=lambda one: one.start_ns()):
            total += event.nbytes()
            self.peak = max(self.peak, total)
