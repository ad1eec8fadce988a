"""The encoder with gradients on tokens, against its own code and with parts that were changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastseg
from fastseg.kernels.blocks import bilinear
from fastseg.models.segformer import encoder_training
from tests.memory_cases import Allocated
from tests.model_cases import TINY, tiny_model

# Layers that drop pictures, and a second one in two stages.
CONFIG = {"depths": [2, 1, 1, 2], "drop_path_rate": 0.4, "classifier_dropout_prob": 0.0}
LINE = "segformer.encoder, with gradients: "


@pytest.fixture(autouse=True)
def hidden_tensors_are_made_again(monkeypatch):
    """Small as they are."""
    monkeypatch.setattr(encoder_training, "_MAKE_AGAIN_FROM", 0)


@pytest.fixture
def model():
    return tiny_model(**CONFIG).double().train()


@pytest.fixture
def calls(monkeypatch):
    """Names of the forms for training that ran."""
    made = []
    for name in ("patch_embedding", "attention", "mix_ffn"):
        function = getattr(encoder_training, name)

        def counted(*arguments, name=name, function=function, **options):
            made.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(encoder_training, name, counted)
    return made


def counts(calls):
    found = [calls.count(name) for name in ("patch_embedding", "attention", "mix_ffn")]
    calls.clear()
    return found


WHOLE = [4, 6, 6]


def draw(model, size=(64, 96), batch=3):
    """Pixels, and an outer gradient for each map."""
    pixels = torch.randn(batch, 3, *size, dtype=model.dtype)
    grids = model.segformer.encoder.grids(*size)
    widths = zip(TINY["hidden_sizes"], grids, strict=True)
    return pixels, [torch.randn(batch, width, *grid, dtype=model.dtype) for width, grid in widths]


def results(model, pixels, outer):
    """Maps and gradients, of pixels too; what is random drawn from the same seed."""
    leaf = pixels.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(7)
    maps, _ = model.segformer.encoder(leaf)
    torch.autograd.backward(maps, outer)
    gradients = [one.grad.clone() for one in model.segformer.parameters()]
    return [*(one.detach() for one in maps), leaf.grad, *gradients]


def check_equal(found, exact):
    """To 1e-12 of each; some, as of a key's bias, are 0 but for rounding of what is larger."""
    largest = max(one.norm() for one in exact)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm() + 1e-15 * largest


def plain(model, *arguments):
    with fastseg.plain_path():
        return results(model, *arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("size", [(64, 96), (61, 67), (32, 33)])  # the last of one key, one token
def test_maps_and_all_gradients(size, again, training, model, calls, monkeypatch):
    if not again:
        monkeypatch.setattr(encoder_training, "_MAKE_AGAIN_FROM", 1 << 20)
    arguments = draw(model.train(training), size)
    found = results(model, *arguments)
    assert counts(calls) == (WHOLE if again else [*WHOLE[:2], 0])
    check_equal(found, plain(model, *arguments))
    assert not calls


def test_maps_are_views_of_tokens(model):
    for one in model.segformer.encoder(draw(model)[0])[0]:
        assert one.is_contiguous(memory_format=torch.channels_last)


def test_bytes_are_scaled(model):
    bytes_in = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    scale, offset = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    found = []
    for pixels, options in (
        (bytes_in, {"pixel_scale": scale, "pixel_offset": offset}),
        (bytes_in * scale[:, None, None] + offset[:, None, None], {}),
    ):
        torch.manual_seed(1)
        found.append(model.segformer.encoder(pixels, **options)[0][-1])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# -- parts that were changed -----------------------------------------------------------------------


class Adapter(nn.Module):
    """A linear layer with an addition, in the place of it, as LoRA puts it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False).to(base.weight)
        self.up = nn.Linear(2, base.out_features, bias=False).to(base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(layer):
    layer.attention.self.value = Adapter(layer.attention.self.value)


def own_forward(layer):
    layer.mlp.dense2.forward = layer.mlp.dense2.forward


def drop_out(layer):
    layer.mlp.dropout.p = 0.3


def drop_probabilities(layer):
    layer.attention.self.dropout.p = 0.3


def other_activation(layer):
    layer.mlp.hidden_act = "mish"


def hook(path, kind):
    def change(layer):
        getattr(layer.get_submodule(path), f"register_{kind}")(lambda *_: None)

    return change


# What is lost of the forms, and the line in the report.
CHANGES = {
    "adapter": (adapt, [0, 1, 0], "attention: as it is written: attention.self.value is a Adapter"),
    "attention hook": (
        hook("attention.output", "forward_hook"),
        [0, 1, 0],
        "attention: as it is written: attention.output has forward hooks",
    ),
    "backward hook": (
        hook("mlp.dense1", "full_backward_hook"),
        [0, 0, 1],
        "Mix-FFN: as it is written: mlp.dense1 has backward hooks",
    ),
    "layer hook": (hook("", "forward_hook"), [0, 1, 1], "as it is written: has forward hooks"),
    "drop path hook": (
        hook("drop_path", "forward_pre_hook"),
        [0, 1, 1],
        "as it is written: drop_path has forward hooks",
    ),
    "parametrization": (
        lambda layer: nn.utils.parametrizations.weight_norm(layer.mlp.dense1),
        [0, 0, 1],
        "Mix-FFN: as it is written: mlp.dense1 is a ParametrizedLinear",
    ),
    "forward": (own_forward, [0, 0, 1], "Mix-FFN: as it is written: mlp.dense2 has a forward of"),
    "dropout": (drop_out, [0, 0, 1], "Mix-FFN: as it is written: mlp.dropout is on"),
    "attention dropout": (
        drop_probabilities,
        [0, 1, 0],
        "attention: as it is written: attention.self.dropout is on",
    ),
    "activation": (other_activation, [0, 0, 1], "Mix-FFN: as it is written: its activation is mi"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_part_runs_as_it_is_written(name, before, model, calls):
    """Changed before the first step, or after one; the rest stays fast."""
    change, lost, line = CHANGES[name]
    arguments = draw(model)
    if not before:
        results(model, *arguments)
        calls.clear()
    change(model.segformer.encoder.block[0][1])
    found = results(model, *arguments)
    assert counts(calls) == [all_ - less for all_, less in zip(WHOLE, lost, strict=True)]
    check_equal(found, plain(model, *arguments))
    separator = ": " if line.startswith("as") else ", "
    assert f"{LINE}block.0.1{separator}{line}" in fastseg.report(model)


def test_a_changed_patch_embedding(model, calls):
    model.segformer.encoder.patch_embeddings[1].proj.register_forward_hook(lambda *_: None)
    arguments = draw(model)
    found = results(model, *arguments)
    assert counts(calls) == [3, 6, 6]
    check_equal(found, plain(model, *arguments))
    line = f"{LINE}patch_embeddings.1: as it is written: proj has forward hooks"
    assert line in fastseg.report(model)


def test_hooks_of_a_stages_norm_are_called(model, calls):
    seen = []
    model.segformer.encoder.layer_norm[2].register_forward_hook(lambda *_: seen.append(1))
    results(model, *draw(model))
    assert counts(calls) == WHOLE
    assert len(seen) == 1


# -- what switches it off --------------------------------------------------------------------------


def test_modes_of_the_whole(model, calls):
    arguments = draw(model)
    assert f"{LINE}on tokens" in fastseg.report(model)
    with fastseg.plain_path():
        assert f"{LINE}as it is written: asked for by" in fastseg.report(model)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    results(model, *arguments)
    assert f"{LINE}as it is written: global hooks want to" in fastseg.report(model)
    handle.remove()
    assert not calls
    model.segformer.encoder(arguments[0], output_attentions=True)
    assert not calls
    results(model, *arguments)
    assert counts(calls) == WHOLE
    assert "with gradients" not in fastseg.report(model.eval())


def test_transforms_of_torch_func(model, calls):
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    pixels, outer = draw(model)
    exact = results(model, pixels, outer)[5:]
    calls.clear()
    encoder = model.segformer.encoder

    def loss(parameters):
        maps, _ = torch.func.functional_call(encoder, parameters, (pixels,))
        return sum((one * other).sum() for one, other in zip(maps, outer, strict=True))

    parameters = {name: one.detach() for name, one in encoder.named_parameters()}
    check_equal(list(torch.func.grad(loss)(parameters).values()), exact)
    assert not calls


def test_gradients_of_gradients_are_an_error(model):
    pixels, _ = draw(model)
    pixels.requires_grad_()

    def second():
        loss = model.segformer(pixels).last_hidden_state.square().sum()
        (first,) = torch.autograd.grad(loss, pixels, create_graph=True)
        return torch.autograd.grad(first.square().sum(), pixels)[0]

    with pytest.raises(RuntimeError, match="gradients of gradients.*plain_path"):
        second()
    with fastseg.plain_path():
        assert second().isfinite().all()


def test_too_small_a_picture(model):
    with pytest.raises(ValueError, match="pixel_values: expected an input that gives stage 1"):
        model(torch.randn(1, 3, 16, 64, dtype=torch.float64))


# -- life in training ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"use_reentrant": True}])
def test_checkpointing(arguments, model, calls):
    drawn = draw(model)
    exact = results(model, *drawn)
    calls.clear()
    model.gradient_checkpointing_enable(arguments)
    found = results(model, *drawn)
    assert counts(calls) == [4, 12, 12]
    check_equal(found, exact)


def test_a_layer_that_is_written_otherwise_is_checkpointed_too(model, calls):
    drawn, seen = draw(model), []
    model.segformer.encoder.block[0][0].register_forward_pre_hook(lambda *_: seen.append(1))
    exact = results(model, *drawn)
    model.gradient_checkpointing_enable()
    calls.clear()
    check_equal(results(model, *drawn), exact)
    assert len(seen) == 3
    assert counts(calls) == [4, 10, 10]


def test_frozen_layers_and_a_moving_average(model, calls):
    """Gradients of some parameters alone; a copy for evaluation runs folded."""
    model.segformer.encoder.block[:3].requires_grad_(False)
    pixels, outer = draw(model)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.autograd.backward(model.segformer.encoder(pixels)[0], outer)
    frozen = model.segformer.encoder.block[:3].parameters()
    assert all(one.grad is None for one in frozen)
    optimizer.step()
    average.update_parameters(model)
    assert counts(calls) == WHOLE
    assert list(model.state_dict()) == names
    for each in (model.eval(), average.module.eval()):
        with torch.no_grad():
            found = each(pixels).logits
            with fastseg.plain_path():
                torch.testing.assert_close(found, each(pixels).logits, rtol=1e-9, atol=1e-9)
    assert not calls


def test_folded_once_after_training(model):
    pixels, outer = draw(model)
    encoder = model.segformer.encoder
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model.train()
        results(model, pixels, outer)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            first = model(pixels).logits
            folds = encoder.fastseg_state().folds
            assert torch.equal(model(pixels).logits, first)
        assert encoder.fastseg_state().folds == folds
        with torch.no_grad(), fastseg.plain_path():
            torch.testing.assert_close(model(pixels).logits, first, rtol=1e-9, atol=1e-9)


def test_copies(model):
    arguments = draw(model)
    exact = results(model, *arguments)
    check_equal(results(copy.deepcopy(model), *arguments), exact)


def test_memory(monkeypatch):
    """Of a step of the encoder over weights and gradients, in float32, with many small stripes."""
    monkeypatch.setattr(bilinear, "STRIPE_BYTES", 1 << 16)
    model = tiny_model(depths=[2, 2, 2, 2]).train()
    pixels = torch.randn(1, 3, 256, 256)
    peaks = []
    for context in (torch.enable_grad(), fastseg.plain_path()):
        with context:
            for _ in range(2):  # gradients are there in the second
                with Allocated() as memory:
                    model.segformer(pixels).last_hidden_state.sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] < 0.45 * peaks[1]


@pytest.mark.slow
def test_whole_graph(model):
    arguments = draw(model)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    exact = results(model, *arguments)
    encoder = model.segformer.encoder
    compiled = torch.compile(encoder.forward, fullgraph=True, backend="aot_eager")
    encoder.forward = compiled
    check_equal(results(model, *arguments), exact)
