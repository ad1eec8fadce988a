"""The ops: a record of each, made where it is defined, and their registration in torch.library.

Whatever has to know of ops reads `OPS`: the report, the tuner, benchmarks, the tests that all ops
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .checks import whole_in_graph
from .configurations import Candidates
from .dispatch import select_backend, use_triton
from .optional_triton import interpreting
from .weights import Weights

# Operators of torch that start no kernel: they give memory, or no tensor at all. Views are known by
# their schema.
_NO_KERNEL = (
    *("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    "promote_types",
)

# Registered by dispatch key and not by `custom_op`: a third of its cost at each call (measured:
# 2.7 us against 7.8 us).
_LIBRARY = torch.library.Library("fastseg", "FRAGMENT")


@dataclass(frozen=True, eq=False)
class Op:
    """An op of `torch.ops.fastseg`: Triton kernels and an eager twin, with one signature.

    Args:
        name: of the op.
        inputs: what comes before the weights, in torch.library's language.
        eager, fused: the twin and the launcher of kernels: (*inputs, weights) -> tensor, without
            `weights` where the op has none.
        fake: the same on fake tensors: empty, of the right shape, dtype and strides.
        supports: (*inputs, weights) -> the reason why kernels cannot take these, or None.
        example: (device, dtype) -> a small call, inputs and weights, for tests.
        weights: the class of the weights.
        candidates: of each configuration that only this op looks up, what the tuner tries.
        multiplies: whether its least work is that of matrix products, as the twin counts it.
        whole: whether graphs for a CPU take it whole, as `whole_in_graph` says.
    """

    name: str
    inputs: str
    eager: Callable[..., torch.Tensor]
    fused: Callable[..., torch.Tensor]
    fake: Callable[..., torch.Tensor]
    supports: Callable[..., str | None]
    example: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    weights: type[Weights] | None = None
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    multiplies: bool = True
    whole: bool = True

    def __call__(self, device: torch.device, *arguments: Any) -> torch.Tensor:
        """Run kernels, the twin, or the op whole in a graph, whichever is right here and now.

        Args:
            arguments: inputs and weights, checked.
        """
        kernels = select_backend(device)[0] == "triton"
        kernels = kernels and use_triton(self.name, device, self.supports(*arguments))
        if not kernels and not (self.whole and whole_in_graph(lambda: _tensors(arguments))):
            return self.eager(*arguments)
        registered_op = getattr(torch.ops.fastseg, self.name)
        if self.weights is None:
            return registered_op(*arguments)
        *inputs, weights = arguments
        return registered_op(*inputs, **weights.arguments())

    def declines(self, weights: Any) -> str | None:
        """Reason why kernels would not take these weights, whatever the input; or None."""
        return self.supports(*weights.least_input(), weights)

    def flat(self, form: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`form`, of this op, called as the registered op is: each weight an argument."""
        if self.weights is None:
            return form
        of = self.weights.of

        def call(*inputs: Any, **weights: Any) -> torch.Tensor:
            return form(*inputs, of(**weights))

        return call

    def schema(self) -> str:
        """The registered op in torch.library's language."""
        weights = "" if self.weights is None else f", *, {self.weights.schema()}"
        return f"{self.name}({self.inputs}{weights}) -> Tensor"


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Make `op` known: kernels on CUDA, the eager twin (or the interpreter) on a CPU."""
    if not _registers():
        return op
    OPS[op.name] = op
    _LIBRARY.define(op.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op.name, op.flat(op.fused), "CUDA")
    _LIBRARY.impl(op.name, op.flat(op.fused if interpreting() else op.eager), "CPU")
    torch.library.register_fake(f"fastseg::{op.name}", op.flat(op.fake), lib=_LIBRARY)
    return op


def register_plain(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op that `OPS` does not have, as those make up a forward.

    Args:
        schema: in torch.library's language.
        run: what it computes, on any device.
    """
    if not _registers():
        return
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseg::{name}", fake, lib=_LIBRARY)


def register_differentiable(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register an op as `register_plain` does, and its gradient."""
    register_plain(schema, run, fake)
    if _registers():
        name = schema.partition("(")[0]
        torch.library.register_autograd(
            f"fastseg::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


def _registers() -> bool:
    """Return whether this is the import that registers ops.

    At the top of a checkout kernels/ is also found by a library that looks for Hugging Face's
    `kernels`: transformers imports it once more under that name. Ops exist once.
    """
    return __name__.startswith("fastseg.")


def eager_twin(name: str) -> Callable[..., torch.Tensor]:
    """The eager twin of an op, called as the registered op is."""
    return OPS[name].flat(OPS[name].eager)


def launcher(name: str) -> Callable[..., torch.Tensor]:
    """The launcher of an op's kernels, called as the registered op is."""
    return OPS[name].flat(OPS[name].fused)


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """All tensors, those of the weights first: their dtype is the op's, pixels may be bytes."""
    found: list[torch.Tensor] = []
    for value in reversed(arguments):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, Weights):
            found.extend(value.tensors())
        elif isinstance(value, list | tuple):
            found.extend(value)
    return found


class RunsLaunchers(TorchDispatchMode):
    """Runs the launchers of fastseg's ops instead of their fakes, and notes torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastseg":
            with self:
                return launcher(func._opname)(*args, **kwargs)
        result = func(*args, **kwargs)
        if func._opname not in _NO_KERNEL:
            if not func.is_view:
                self.torch_operators.append(func._opname)
        elif isinstance(result, torch.Tensor) and not func.is_view:
            self.made(result)
        return result

    def made(self, tensor: torch.Tensor) -> None:
        """Memory was allocated."""
