"""A small writer of ONNX graphs: nodes in order, named by where they are, constants stored once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastseg._version import __version__

Size = int | str  # a number, or the name of an axis of any size
Values = Mapping[str, tuple[Any, Sequence[Size]]]  # NumPy's dtype and the shape, by name


class OnnxGraph:
    """Nodes and constants of a graph in the making. Values are known by their names.

    Args:
        opset: of its operators.
        dtype: NumPy's, of weights and numbers.
    """

    def __init__(self, opset: int, dtype: Any = np.float32) -> None:
        self.opset = opset
        self.dtype = np.dtype(dtype)
        self.nodes: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], tuple[str, np.ndarray]] = {}
        self._names: set[str] = set()
        self._scope: list[str] = []

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names made inside the block begin with `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def _unique(self, name: str) -> str:
        name = ".".join([*self._scope, name])
        unique = name
        number = 1
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node of one result, and return the result's name.

        Args:
            kind: of ONNX's operators.
            inputs: names of values; "" for an optional one that is left out.
            output: the name of the result where others ask for it by name.
        """
        from onnx import helper

        name = self._unique(kind)
        if output is None:
            output = name
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def largest(self, x: str, axis: int) -> str:
        """Append an argmax along `axis`, the first of equal values; the axis stays, as 1.

        By TopK: with the upsampling before it OpenVINO takes 76 ms for 150 classes at 512x512, 193
        with ArgMax; ONNX Runtime takes 270 and 255.
        """
        from onnx import helper

        name = self._unique("TopK")
        outputs = [f"{name}.values", name]
        one = self.integers([1])
        self.nodes.append(helper.make_node("TopK", [x, one], outputs, name=name, axis=axis))
        return name

    def cast(self, x: str, dtype: Any, output: str | None = None) -> str:
        """`x` as another NumPy dtype."""
        from onnx import helper

        to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.op("Cast", x, output=output, to=to)

    def narrowed(self, x: str) -> str:
        """A float32 value as one of the graph's dtype."""
        return x if self.dtype == np.float32 else self.cast(x, self.dtype)

    def widened(self, x: str) -> str:
        """A value of the graph's dtype as float32."""
        return x if self.dtype == np.float32 else self.cast(x, np.float32)

    def output(self, x: str, name: str) -> str:
        """The value `x` of the last node as an output of the graph, in float32."""
        if self.dtype != np.float32:
            return self.cast(x, np.float32, name)
        self.nodes[-1].output[0] = name
        return name

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        """A constant, by the name `name`; equal ones are stored once, under the first's."""
        array = tensor.detach().cpu().contiguous().numpy()
        return self._constant(name, array.astype(self.dtype, copy=False))

    def integers(self, values: Sequence[int]) -> str:
        """A constant list of int64."""
        return self._constant("integers", np.array(values, dtype=np.int64))

    def number(self, value: float, dtype: Any = None) -> str:
        """A constant scalar, of the graph's dtype unless another is given."""
        return self._constant("number", np.array(value, dtype=dtype or self.dtype))

    def nothing(self) -> str:
        """A constant without elements, for an input that an old operator needs and ignores."""
        return self._constant("nothing", np.zeros(0, dtype=np.float32))

    def _constant(self, name: str, array: np.ndarray) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(array).data).digest()
        key = (array.dtype.str, array.shape, digest)
        if key not in self._constants:
            self._constants[key] = (self._unique(name), array)
        return self._constants[key][0]

    def model(
        self,
        inputs: Values,
        outputs: Values,
        properties: dict[str, str],
    ) -> Any:
        """The whole as an `onnx.ModelProto`.

        Args:
            inputs, outputs: NumPy dtype and shape of each, by name.
            properties: strings to go with the model.
        """
        from onnx import helper, numpy_helper

        graph = helper.make_graph(
            self.nodes,
            "fastseg",
            [_value(name, *kind) for name, kind in inputs.items()],
            [_value(name, *kind) for name, kind in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in self._constants.values()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="fastseg",
            producer_version=__version__,
        )
        helper.set_model_props(model, properties)
        return model


def _value(name: str, dtype: Any, shape: Sequence[Size]) -> Any:
    from onnx import helper

    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, list(shape))
