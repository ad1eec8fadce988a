"""Models that bitsandbytes and torchao have quantised: floats again with dequantize=True."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.folding.quantized import float_weight
from tests.checkpoints.quantized_cases import eight_bit_weights, load_quantized, write_checkpoint

from .checks import FP32_BOUND, relative_error
from .host_models import HOSTS

transformers = pytest.importorskip("transformers")  # this file is collected where it is there

EIGHT_BITS = {"load_in_8bit": True}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED = {**FOUR_BITS, "bnb_4bit_use_double_quant": True}
QUERY, FFN = HOSTS["transformers"].query, HOSTS["transformers"].ffn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def eight_bits(checkpoint):
    return load_quantized(checkpoint, **EIGHT_BITS)


@torch.no_grad()
def logits(model, pixels):
    return model(pixels).logits


def assert_same_state(model, state):
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("options", "has_run"),
    [(EIGHT_BITS, False), (EIGHT_BITS, True), (FOUR_BITS, True), (NESTED, False)],
    ids=["8", "8-has_run", "4-has_run", "4-nested"],
)
def test_as_dequantized_by_transformers(checkpoint, pixels, calls, options, has_run):
    model = load_quantized(checkpoint, **options)
    reference = copy.deepcopy(model)
    reference.dequantize()
    if options is FOUR_BITS and importlib.import_module("bitsandbytes").functional.has_avx512bf16():
        has_run = False  # it packs weights there, and fails on widths that are no multiple of 32
    if has_run:
        before = logits(model, pixels)
    kinds = type(model.get_submodule(QUERY)), type(model.get_submodule(QUERY).weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert fastseg.accelerate(model, dequantize=True, strict=True) is model
    expected = logits(reference.double(), pixels.double())
    assert relative_error(logits(model, pixels), expected) <= FP32_BOUND
    assert calls.count_and_clear() == HOSTS["transformers"].calls()
    with fastseg.plain_path():
        assert relative_error(logits(model, pixels), expected) <= FP32_BOUND
    assert isinstance(model.get_submodule(QUERY), kinds[0])
    assert_same_state(model, state)
    assert torch.equal(logits(copy.deepcopy(model), pixels), logits(model, pixels))

    fastseg.restore(model)
    assert (type(model.get_submodule(QUERY)), type(model.get_submodule(QUERY).weight)) == kinds
    assert_same_state(model, state)
    if has_run:
        assert torch.equal(logits(model, pixels), before)


def test_example_of_the_documentation(checkpoint, pixels, calls):
    """transformers' example, as docs/accelerate.md has it, on a checkpoint that is here."""
    text = (Path(__file__).parents[3] / "docs" / "accelerate.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "8bit" in block)
    hub_id = "nvidia/segformer-b0-finetuned-ade-512-512"
    assert hub_id in code
    names = {"fastseg": fastseg}
    exec(code.replace(hub_id, str(checkpoint)), names)
    calls.clear()
    assert logits(names["model"], pixels).isfinite().all()
    assert calls.count_and_clear() == HOSTS["transformers"].calls()
    assert "bitsandbytes" in fastseg.report(names["model"])


def test_nearer_to_the_floats_than_eight_bit_products(checkpoint, eight_bits, pixels):
    floats = transformers.SegformerForSemanticSegmentation.from_pretrained(checkpoint).double()
    expected = logits(floats, pixels.double())
    host = relative_error(logits(eight_bits, pixels), expected)
    fastseg.accelerate(eight_bits, dequantize=True)
    ours = relative_error(logits(eight_bits, pixels), expected)
    fastseg.restore(eight_bits)
    assert FP32_BOUND < ours < host


def test_left_alone_with_a_reason(eight_bits, pixels):
    before = logits(eight_bits, pixels)
    with pytest.raises(ValueError) as refused:
        fastseg.accelerate(eight_bits, strict=True)
    fastseg.accelerate(eight_bits)
    assert torch.equal(logits(eight_bits, pixels), before)
    for text in (str(refused.value), fastseg.report(eight_bits)):
        assert re.search(
            r"0\.attention\.(q_proj|self\.query) and \d+ more layers have 8-bit weights "
            r"\(bitsandbytes\): pass dequantize=True, or call model\.dequantize\(\) first",
            text,
        )
        assert "AttributeError" not in text
    fastseg.restore(eight_bits)


def test_report_and_later_calls(eight_bits, pixels):
    """A later call leaves the floats; new 8-bit weights become floats as they are loaded."""
    fastseg.accelerate(eight_bits, dequantize=True)
    fastseg.accelerate(eight_bits, strict=True)
    assert "34 layers compute with floats of their 8-bit weights (bitsandbytes)" in fastseg.report(
        eight_bits
    )
    layer = eight_bits.get_submodule(QUERY)
    scale = layer._fastseg_quantized.SCB
    if scale is None:
        scale = layer.state.SCB
    floats = layer._fastseg_quantized.double() * scale[:, None] / 127
    assert torch.equal(layer.weight, floats.float())
    fastseg.restore(eight_bits)


def test_loads_eight_bit_weights(checkpoint, pixels):
    model = load_quantized(checkpoint, **EIGHT_BITS)
    other = copy.deepcopy(model)
    state = {
        name: tensor.flip(0) if name.endswith(("q_proj.weight", "query.weight")) else tensor
        for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(state)
    other.dequantize()
    expected = logits(other.double(), pixels.double())
    fastseg.accelerate(model, dequantize=True)
    assert relative_error(logits(model, pixels), expected) > 1e-3
    model.load_state_dict(state)
    assert relative_error(logits(model, pixels), expected) <= FP32_BOUND


def test_files_are_as_before(checkpoint, eight_bits, tmp_path):
    """What is saved while it is accelerated has the 8-bit weights, and loads here as floats."""
    weights = eight_bit_weights(eight_bits.state_dict())
    fastseg.accelerate(eight_bits, dequantize=True)
    eight_bits.save_pretrained(tmp_path)
    fastseg.restore(eight_bits)
    model = fastseg.from_pretrained(tmp_path)
    saved = {tensor.numpy().tobytes() for tensor in weights.values()}
    assert saved <= {tensor.numpy().tobytes() for tensor in model.state_dict().values()}


def test_packed_for_a_cpu_with_bfloat16(checkpoint):
    """As bitsandbytes packs 4-bit weights where a CPU has AVX512-BF16, with rounded scales."""
    functional = pytest.importorskip("bitsandbytes").functional
    for options in (FOUR_BITS, NESTED):
        layer = load_quantized(checkpoint, **options).get_submodule(QUERY)
        expected = float_weight(layer)
        packed, state = functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        layer.weight.data, layer.weight.quant_state = packed, state
        for _ in range(2):  # the state is left as it is
            error = (float_weight(layer) - expected).abs() / expected.abs().clamp(min=1e-12)
            assert error.max() <= 2**-8


class StoredInt8(torch.Tensor):
    """A weight as torchao's are: a tensor that says float32, and holds codes and scales."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is F.linear:
            x, weight, *bias = arguments
            return F.linear(x, weight.dequantize(), *bias)
        return super().__torch_function__(function, types, arguments, keywords or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments, keywords=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].codes, arguments[0].scale)
        raise NotImplementedError(f"{function}: expected a linear layer")

    def __deepcopy__(self, memo):
        return nn.Parameter(StoredInt8(self.codes, self.scale), requires_grad=False)


def quantize(model):
    """As `torchao.quantization.quantize_` does it: the layers stay, their weights are others."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(StoredInt8(codes, scale), requires_grad=False)


@pytest.mark.parametrize("name", ["transformers", "fastseg"])
@pytest.mark.parametrize("first", ["quantized", "accelerated"])
def test_tensors_with_a_dequantize(name, first, pixels, calls):
    if name not in HOSTS:
        pytest.skip("not tested in this process")
    host = HOSTS[name]
    model = host.build()
    if first == "accelerated":
        fastseg.accelerate(model)
    quantize(model)
    reference = copy.deepcopy(fastseg.restore(copy.deepcopy(model)))
    for layer in reference.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.dequantize())
    with fastseg.plain_path():
        expected = logits(reference.double(), pixels.double())
    calls.clear()
    logits(model, pixels)
    assert "sr_attention" not in calls
    with torch.no_grad():
        report = fastseg.report(fastseg.accelerate(model))
    assert f"quantised weights ({__name__.partition('.')[0]}): pass dequantize=True" in report

    fastseg.accelerate(model, dequantize=True, strict=True)
    calls.clear()
    assert relative_error(logits(model, pixels), expected) <= FP32_BOUND
    assert calls.count_and_clear() == host.calls()
    fastseg.restore(model)
    assert isinstance(model.get_submodule(host.query).weight, StoredInt8)


def test_weights_that_cannot_be_read(pixels):
    """Nothing is changed where the library cannot tell what its weights are."""
    model = HOSTS["transformers"].build()
    quantize(model)
    broken = model.get_submodule(HOSTS["transformers"].value)
    broken.weight.codes = None
    with pytest.raises(
        ValueError, match=r"dequantize: segformer.* has quantised weights .*TypeErr"
    ):
        fastseg.accelerate(model, dequantize=True)
    assert isinstance(model.get_submodule(QUERY).weight, StoredInt8)


def test_layer_with_a_forward_of_its_own(eight_bits):
    layer = eight_bits.get_submodule(QUERY)
    layer.forward = lambda x: x
    with pytest.raises(
        ValueError, match=r"8-bit weights \(bitsandbytes\) and a forward of its own"
    ):
        fastseg.accelerate(eight_bits, dequantize=True, strict=True)
    del layer.forward
    assert not hasattr(eight_bits.get_submodule(FFN), "_fastseg_quantized")  # as it was
