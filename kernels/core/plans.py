"""Launch plans: what a function of fastseg's ops launched once is launched again, and no more.

At each call launchers look up configurations, compute grids and make temporary tensors, and Triton
binds some twenty arguments a launch. All of that follows from the key of a call: shapes, strides,
dtypes and alignment of its tensors, numbers, and a few settings. When a key comes for the second
time a `Recorder` notes what is allocated and launched; from the third on a `Plan` makes outputs and
temporary memory, and launches the same kernels with the new addresses.

A plan is right by how it is made: each pointer of its launches is that of an input, of a tensor
that is known to stay, of memory that was allocated uninitialised, or of semaphores. Where anything
is computed by operators of torch (an op that runs eagerly, the copy of a slice), there is no plan.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .configurations import is_tuning
from .dispatch import requested_backend, select_backend
from .launch import Launch, ceil_div, current_stream, is_recorded, noted_by
from .optional_triton import interpreting
from .registry import RunsLaunchers
from .semaphores import semaphores

_MOST_KEYS = 64  # of one function: sizes of images are endless
_ALIGNMENT = 256  # bytes, of temporary tensors in their common memory
_POINTER_ALIGNMENT = 16  # bytes: Triton compiles wide loads for pointers that have it

_address = torch.Tensor.data_ptr


class _Step(NamedTuple):
    """A launch: a compiled kernel bound to its grid, and what picks its arguments."""

    run: Callable[..., Any]
    pick: Callable[[list[Any]], tuple[Any, ...]]


class Plan(NamedTuple):
    """The launches of a function for one key.

    They pick their arguments from a list: the addresses of inputs, outputs, semaphores and
    temporary tensors, then what is always the same.
    """

    device: torch.device
    make_outputs: list[Callable[[], torch.Tensor]]
    semaphores: int  # that a launch counts in at most; launches come one after the other
    make_scratch: Callable[[], torch.Tensor]  # the memory of temporary tensors
    offsets: list[int]  # of each of them in it
    constants: list[Any]
    held: list[torch.Tensor]  # of which the constants have addresses
    steps: list[_Step]

    def run(self, inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The function's outputs."""
        outputs = [make() for make in self.make_outputs]
        values: list[Any] = [*map(_address, inputs), *map(_address, outputs)]
        if self.semaphores:
            values.append(semaphores(self.semaphores, self.device).data_ptr())
        scratch = self.make_scratch()
        start = scratch.data_ptr()
        values += [start + offset for offset in self.offsets]
        values += self.constants
        stream = current_stream(self.device)
        for run, pick in self.steps:
            run(*pick(values), stream=stream)
        return outputs


class Recorder(RunsLaunchers):
    """Mode that notes what is allocated and launched, and whether torch computes anything."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[tuple[Any, Launch]] = []
        self._semaphores: list[torch.Tensor] = []
        self._made: list[torch.Tensor] = []  # held, so that no address comes twice

    def launched(self, compiled: Any, launch: Launch) -> None:
        """Note a launch; `compiled` is what Triton's JIT returns of it."""
        self._launches.append((compiled, launch))

    def took(self, semaphores: torch.Tensor) -> None:
        """Note that a launch is to count in `semaphores`."""
        self._semaphores.append(semaphores)

    def made(self, tensor: torch.Tensor) -> None:
        """Note memory that was allocated."""
        self._made.append(tensor)

    def plan(
        self,
        inputs: Sequence[torch.Tensor],
        held: Iterable[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> Plan | None:
        """The plan of what was noted; None where there can be none."""
        if self.torch_operators or any(compiled is None for compiled, _ in self._launches):
            return None  # None: a hook of Triton's has kept the kernel
        are_outputs = set(map(_address, outputs))
        temporary = [one for one in self._made if one.data_ptr() not in are_outputs]
        if len(self._made) - len(temporary) != len(outputs):
            return None  # an input is given back, or a part of something
        uses: dict[int, list[int]] = {}  # the steps that use an address
        stay = {tensor.data_ptr(): tensor for tensor in held}
        tensors = [*inputs, *outputs, *self._semaphores[:1], *temporary]
        places = {tensor.data_ptr(): place for place, tensor in enumerate(tensors)}
        places |= {one.data_ptr(): len(inputs) + len(outputs) for one in self._semaphores}
        constants: list[Any] = []
        steps: list[_Step] = []
        for number, (compiled, launch) in enumerate(self._launches):
            picked = []
            for value in launch.bound():
                address = value.data_ptr() if isinstance(value, torch.Tensor) else None
                if address in places:
                    picked.append(places[address])
                    uses.setdefault(address, []).append(number)
                elif address is None or address in stay:
                    picked.append(len(tensors) + len(constants))
                    constants.append(value if address is None else address)
                else:
                    return None
            grid = (*launch.grid, 1, 1)[:3]
            steps.append(_Step(compiled[grid], operator.itemgetter(*picked)))
        device = outputs[0].device
        spans = [uses.get(one.data_ptr(), [0]) for one in temporary]
        offsets, size = _share([one.untyped_storage().nbytes() for one in temporary], spans)
        return Plan(
            device=device,
            make_outputs=[
                functools.partial(
                    torch.empty_strided,
                    *(tuple(one.shape), one.stride()),
                    dtype=one.dtype,
                    device=device,
                )
                for one in outputs
            ],
            semaphores=max((one.numel() for one in self._semaphores), default=0),
            make_scratch=functools.partial(torch.empty, size, dtype=torch.uint8, device=device),
            offsets=offsets,
            constants=constants,
            held=list(stay.values()),
            steps=steps,
        )


def _share(sizes: list[int], uses: list[list[int]]) -> tuple[list[int], int]:
    """Offsets of blocks in common memory, where those that are never in use at once may overlap.

    Args:
        sizes: bytes of the blocks, in the order of their first use.
        uses: numbers of the steps that use them, in order.

    Returns:
        the offsets, and the bytes of the memory.
    """
    placed: list[tuple[int, int, int]] = []  # offset, end, last use
    for size, steps in zip(sizes, uses, strict=True):
        offset = 0
        for start, end, last in sorted(placed):
            if last >= steps[0] and start < offset + size and end > offset:
                offset = end
        placed.append((offset, offset + ceil_div(size, _ALIGNMENT) * _ALIGNMENT, steps[-1]))
    return [offset for offset, _, _ in placed], max((end for _, end, _ in placed), default=0)


class LaunchPlans:
    """The plans of one function of fastseg's ops.

    Args:
        held: gives the tensors that the function reads beside its arguments. They stay where they
            are until `clear`.
    """

    def __init__(self, held: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._held = held
        # By key: a plan; None after a first call; False where there can be no plan.
        self._plans: dict[Hashable, Plan | bool | None] = {}

    def clear(self) -> None:
        """Forget all plans."""
        self._plans = {}

    def call(
        self, function: Callable[..., list[torch.Tensor]], *arguments: Any
    ) -> list[torch.Tensor]:
        """What `function` gives for `arguments`, without gradients, by a plan where there is one.

        Args:
            arguments: tensors, lists of them, and what can be hashed.
        """
        if not _may_plan():
            return function(*arguments)
        inputs: list[torch.Tensor] = []
        # What launchers ask for beside their arguments.
        precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
        settings = (precision, requested_backend(), os.environ.get("FASTSEG_CONFIGS"))
        key = (settings, *(_describe(value, inputs) for value in arguments))
        plan = self._plans.get(key, True)
        device = inputs[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            return function(*arguments)
        if isinstance(plan, Plan):
            return plan.run(inputs)
        if plan is None and select_backend(device)[0] == "triton":
            recorder = Recorder()
            with noted_by(recorder), recorder:
                outputs = function(*arguments)
            self._plans[key] = recorder.plan(inputs, self._held(), outputs) or False
            return outputs
        if plan is True:
            self._plans[key] = None
            if len(self._plans) > _MOST_KEYS:
                self._plans.pop(next(iter(self._plans)), None)
        return function(*arguments)


def _may_plan() -> bool:
    """Return whether a call now may be run by a plan, or noted for one."""
    return not (
        torch.compiler.is_compiling()
        or interpreting()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_any_autocast_enabled()
        or is_recorded()
        or is_tuning()
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
