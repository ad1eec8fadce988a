"""Launch plans: what an op's launcher did once is done again with other pointers.

At each call a launcher looks up configurations, computes grids and makes temporary tensors, and
Triton binds some twenty arguments a launch. All of that follows from the key of a call: shapes,
strides, dtypes, numbers, weights and a few settings. When a key comes for the second time a
`Recorder` notes what the launcher allocates and launches; from the third on, a `Plan` does that and
nothing else.

A plan is right by how it is made: each pointer of its launches is that of an input, of a weight, of
memory that was allocated uninitialised, or of semaphores. Where a launcher computes something by
operators of torch (the copy of a slice, sums that weights lack), there is no plan.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .configurations import is_tuning
from .launch import Launch, ceil_div, current_stream, is_recorded, noted_by
from .optional_triton import interpreting
from .semaphores import semaphores

# Operators of torch that start no kernel: they give memory, or no tensor at all. Views are known by
# their schema.
NO_KERNEL = (
    *("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    "promote_types",
)
_MOST_KEYS = 64  # of one op's weights: sizes of images are endless
_ALIGNMENT = 256  # bytes, of temporary tensors in their common memory
_POINTER_ALIGNMENT = 16  # bytes: Triton compiles wide loads for pointers that have it

_address = torch.Tensor.data_ptr
_requires_grad = operator.attrgetter("requires_grad")


class _Step(NamedTuple):
    """A launch: a compiled kernel bound to its grid, and what picks its arguments."""

    run: Callable[..., Any]
    pick: Callable[[list[Any]], tuple[Any, ...]]


class Plan(NamedTuple):
    """The launches of an op for one key.

    They pick their arguments from a list: the addresses of inputs and weights, of the output, of
    temporary tensors and of semaphores, then constants.
    """

    device: torch.device
    weights: list[int]  # addresses
    make_output: Callable[[], torch.Tensor]
    offsets: list[int]  # of the temporary tensors in their common memory
    make_scratch: Callable[[], torch.Tensor]  # that memory
    semaphores: list[int]  # counts
    constants: list[Any]
    steps: list[_Step]

    def run(self, inputs: list[int], weights: list[int]) -> torch.Tensor:
        """The op's output.

        Args:
            inputs, weights: addresses.
        """
        output = self.make_output()
        values: list[Any] = [*inputs, *weights, output.data_ptr()]
        if self.offsets:
            scratch = self.make_scratch()
            start = scratch.data_ptr()
            values += [start + offset for offset in self.offsets]
        for count in self.semaphores:
            values.append(semaphores(count, self.device).data_ptr())
        values += self.constants
        stream = current_stream(self.device)
        for run, pick in self.steps:
            run(*pick(values), stream=stream)
        return output


class Recorder(TorchDispatchMode):
    """Mode that notes what a launcher allocates and launches, and whether it computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[tuple[Any, Launch]] = []
        self._semaphores: list[torch.Tensor] = []
        self._made: list[torch.Tensor] = []  # held, so that no address comes twice
        self._computes = False

    def launched(self, compiled: Any, launch: Launch) -> None:
        """Note a launch; `compiled` is what Triton's JIT returns of it."""
        self._launches.append((compiled, launch))
        self._computes |= compiled is None  # a hook of Triton's has kept it

    def took(self, semaphores: torch.Tensor) -> None:
        """Note that a launch is to count in `semaphores`."""
        self._semaphores.append(semaphores)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._opname in NO_KERNEL:
            if isinstance(result, torch.Tensor) and not func.is_view:
                self._made.append(result)
        elif not func.is_view:
            self._computes = True
        return result

    def plan(
        self, inputs: list[torch.Tensor], weights: list[torch.Tensor], output: torch.Tensor
    ) -> Plan | None:
        """The plan of what was noted; None where there can be none."""
        is_output = [one.data_ptr() == output.data_ptr() for one in self._made]
        if self._computes or sum(is_output) != 1:
            return None
        temporary = [one for one, same in zip(self._made, is_output, strict=True) if not same]
        sizes = [one.untyped_storage().nbytes() for one in temporary]
        slots = [ceil_div(size, _ALIGNMENT) * _ALIGNMENT for size in sizes]
        tensors = [*inputs, *weights, output, *temporary, *self._semaphores]
        places = {tensor.data_ptr(): place for place, tensor in enumerate(tensors)}
        constants: list[Any] = []
        steps: list[_Step] = []
        for compiled, launch in self._launches:
            picked = []
            for value in launch.bound():
                if not isinstance(value, torch.Tensor):
                    picked.append(len(tensors) + len(constants))
                    constants.append(value)
                elif value.data_ptr() in places:
                    picked.append(places[value.data_ptr()])
                else:
                    return None
            grid = (*launch.grid, 1, 1)[:3]
            steps.append(_Step(compiled[grid], operator.itemgetter(*picked)))

        def memory(dtype: torch.dtype) -> dict[str, Any]:
            return {"dtype": dtype, "device": output.device}

        return Plan(
            device=output.device,
            weights=list(map(_address, weights)),
            make_output=functools.partial(
                torch.empty_strided, tuple(output.shape), output.stride(), **memory(output.dtype)
            ),
            offsets=[sum(slots[:index]) for index in range(len(slots))],
            make_scratch=functools.partial(torch.empty, sum(slots), **memory(torch.uint8)),
            semaphores=[one.numel() for one in self._semaphores],
            constants=constants,
            steps=steps,
        )


class Call(NamedTuple):
    """A call of an op: its key, and the tensors among its arguments that are no weights."""

    key: Hashable
    inputs: list[torch.Tensor]


class Plans:
    """The plans of an op, of one set of weights, by key.

    Args:
        weights: their tensors.
    """

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self._weights = weights
        # A plan; None after the first call; False where there can be no plan.
        self._plans: dict[Hashable, Plan | bool | None] = {}

    def read(self, arguments: Sequence[Any]) -> Call | None:
        """The call with these arguments of the launcher; None for one that no plan can serve."""
        inputs: list[torch.Tensor] = []
        # What launchers ask for beside their arguments.
        precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
        key: list[Hashable] = [precision, os.environ.get("FASTSEG_CONFIGS")]
        for value in arguments:
            key.append(_describe(value, inputs))
        if torch.is_grad_enabled() and any(map(_requires_grad, (*inputs, *self._weights))):
            return None
        return Call(tuple(key), inputs)

    def run(self, call: Call) -> torch.Tensor | None:
        """The op's output by a plan, if there is one."""
        plan = self._plans.get(call.key)
        if not isinstance(plan, Plan):
            return None
        weights = list(map(_address, self._weights))
        if weights != plan.weights:
            self._plans.pop(call.key, None)
            return None
        return plan.run(list(map(_address, call.inputs)), weights)

    def launch(
        self, call: Call, launcher: Callable[..., torch.Tensor], arguments: Sequence[Any]
    ) -> torch.Tensor:
        """The op's output by its launcher, whose work is noted where the call is a second one."""
        known = self._plans.get(call.key, True)
        if known is None:
            recorder = Recorder()
            with noted_by(recorder), recorder:
                output = launcher(*arguments)
            self._plans[call.key] = recorder.plan(call.inputs, self._weights, output) or False
            return output
        if known:
            self._plans[call.key] = None
            if len(self._plans) > _MOST_KEYS:
                self._plans.pop(next(iter(self._plans)), None)
        return launcher(*arguments)


def may_plan(device: torch.device) -> bool:
    """Return whether a call now, for kernels on `device`, may be run by a plan."""
    return not (
        torch.compiler.is_compiling()
        or interpreting()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_any_autocast_enabled()
        or is_recorded()
        or is_tuning()
        or (device.type == "cuda" and device.index != torch.cuda.current_device())
    )


def _describe(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """An argument's part of the key; appends the tensors in it to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        past = value.data_ptr() % _POINTER_ALIGNMENT
        return value.shape, value.stride(), value.dtype, past == 0, value.device, type(value)
    if isinstance(value, list | tuple):
        return tuple([_describe(item, tensors) for item in value])
    return value
