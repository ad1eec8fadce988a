"""torch's own exporters on models that run folded: what they write, and what they refuse."""

from __future__ import annotations

import collections
import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

import fastseg
from tests.models.hosts.host_models import randomize, segformer_config


def transformers_model():
    config = transformers.SegformerConfig(**segformer_config(depths=(1, 1, 1, 1)))
    model = transformers.SegformerForSemanticSegmentation(config)
    return fastseg.accelerate(model)


def own_model():
    config = fastseg.SegformerConfig(**segformer_config(depths=(1, 1, 1, 1)))
    return fastseg.SegformerForSemanticSegmentation(config)


class Logits(torch.nn.Module):
    """An output that all exporters take."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torch_onnx_export_writes_the_plain_graph(dynamo, tmp_path):
    """As without fastseg, with a warning that says where the folded graph is to be had."""
    torch.manual_seed(0)
    model = transformers_model()
    randomize(model)
    fast = Logits(model).eval()
    plain = Logits(fastseg.restore(copy.deepcopy(model))).eval()
    pixels = torch.randn(1, 3, 64, 96)
    operators = {}
    for name, module in (("plain", plain), ("accelerated", fast)):
        path = tmp_path / f"{name}.onnx"
        options = {"dynamo": dynamo, "input_names": ["pixels"], "opset_version": 18}
        with torch.no_grad():
            if name == "plain":
                torch.onnx.export(module, (pixels,), path, **options)
            else:
                with pytest.warns(UserWarning, match=r"fastseg\.export writes the folded"):
                    torch.onnx.export(module, (pixels,), path, **options)
        graph = onnx.load(path).graph
        operators[name] = collections.Counter(node.op_type for node in graph.node)
    assert operators["accelerated"] == operators["plain"]
    session = onnxruntime.InferenceSession(str(tmp_path / "accelerated.onnx"))
    (result,) = session.run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        expected = plain.double()(pixels.double()).numpy()
    assert np.sqrt(np.square(result - expected).mean() / np.square(expected).mean()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("build", "mend"),
    [(transformers_model, "fastseg.restore"), (own_model, "fastseg.export writes")],
)
def test_torch_jit_script_says_what_to_do(build, mend):
    with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile .*{mend}"):
        torch.jit.script(build().eval())
