"""The decode head with gradients, every projection at its own size, against it as it is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastseg
from fastseg.models.segformer import decode_head
from tests.half_precision import HALF_FACTOR
from tests.model_cases import TINY, tiny_model


@pytest.fixture
def calls(monkeypatch):
    """Calls of the composed form."""
    made = []
    function = decode_head.fused_map
    monkeypatch.setattr(
        decode_head, "fused_map", lambda *arguments: made.append(1) or function(*arguments)
    )
    return made


@pytest.fixture
def head():
    return tiny_model(classifier_dropout_prob=0.3).decode_head.double().train()


def draw(grid=(16, 24), batch=2):
    sizes = [[max(-(-side // 2**stage), 1) for side in grid] for stage in range(4)]
    widths = TINY["hidden_sizes"]
    maps = [
        torch.randn(batch, width, *size, dtype=torch.float64)
        for width, size in zip(widths, sizes, strict=True)
    ]
    return maps, torch.randn(batch, TINY["num_labels"], *grid, dtype=torch.float64)


def results(head, maps, outer):
    """Logits, and gradients of maps and parameters; dropout drawn from the same seed."""
    leaves = [one.detach().clone().requires_grad_() for one in maps]
    head.zero_grad()
    torch.manual_seed(7)
    logits = head(leaves)
    logits.backward(outer.to(logits.dtype))
    return [logits.detach(), *(one.grad for one in (*leaves, *head.parameters()))]


def check_equal(head, maps, outer):
    found = [one.clone() for one in results(head, maps, outer)]
    with fastseg.plain_path():
        exact = results(head, maps, outer)
    largest = max(one.norm() for one in exact)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm() + 1e-14 * largest


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", [(16, 24), (13, 9), (1, 5)])
def test_logits_and_all_gradients(grid, training, head, calls):
    check_equal(head.train(training), *draw(grid))
    assert len(calls) == 1


def test_statistics_of_batch_norm(head):
    maps, outer = draw()
    before = {name: one.clone() for name, one in head.named_buffers()}
    results(head, maps, outer)
    found = {name: one.clone() for name, one in head.named_buffers()}
    head.load_state_dict({**head.state_dict(), **before})
    with fastseg.plain_path():
        results(head, maps, outer)
    assert not torch.equal(found["batch_norm.running_mean"], before["batch_norm.running_mean"])
    for name, one in head.named_buffers():
        torch.testing.assert_close(found[name], one, rtol=1e-12, atol=1e-12)


def test_another_normalisation_classifier_and_hooks_behind(head, calls):
    head.batch_norm = nn.GroupNorm(4, TINY["decoder_hidden_size"]).double()
    head.classifier = nn.Sequential(head.classifier, nn.Tanh())
    seen = []
    head.activation.register_forward_hook(lambda *_: seen.append(1))
    check_equal(head, *draw())
    assert len(calls) == 1
    assert len(seen) == 2


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def scaled(head):
    projection = head.linear_c[1].proj
    head.linear_c[1].proj = Scaled(projection.in_features, projection.out_features).double()


def wide_convolution(head):
    fuse = head.linear_fuse
    head.linear_fuse = nn.Conv2d(fuse.in_channels, fuse.out_channels, 3, padding=1).double()


CHANGES = {
    "a Scaled": scaled,
    "not pointwise": wide_convolution,
    "a ParametrizedConv2d": lambda head: nn.utils.parametrizations.weight_norm(head.linear_fuse),
    "hooks": lambda head: head.linear_c[2].proj.register_forward_hook(lambda *_: None),
    "has hooks": lambda head: head.linear_c[0].register_full_backward_hook(lambda *_: None),
    "of its own": lambda head: setattr(head.linear_c[0], "forward", head.linear_c[0].forward),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_changed_runs_as_it_is_written(reason, head, calls):
    CHANGES[reason](head)
    results(head, *draw())
    assert not calls
    line = next(one for one in fastseg.report(head).splitlines() if "with gradients" in one)
    assert "as it is written: " in line
    assert line.endswith(reason)


def test_plain_path_and_global_hooks(head, calls):
    with fastseg.plain_path():
        results(head, *draw())
        assert "as it is written: asked for by fastseg.plain_path" in fastseg.report(head)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    results(head, *draw())
    handle.remove()
    assert not calls
    assert "with gradients: every projection at its own stage's size" in fastseg.report(head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_no_larger(dtype):
    """Of autocast, and of float32, against float64."""
    model = tiny_model(classifier_dropout_prob=0.0).decode_head
    maps, outer = draw((32, 32))
    exact = [one.clone() for one in results(model.double().train(), maps, outer)]
    model = model.float()
    maps = [one.float() for one in maps]

    def errors():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = results(model, maps, outer)
        pairs = list(zip(found, exact, strict=True))[:5]  # of logits and maps
        return [((one - other).norm() / other.norm()).item() for one, other in pairs]

    ours = errors()
    with fastseg.plain_path():
        plain = errors()
    floor = 1e-6
    assert all(
        one < HALF_FACTOR * max(usual, floor) for one, usual in zip(ours, plain, strict=True)
    )


def test_gradients_of_gradients(head):
    maps, _ = draw((4, 4))
    leaf = maps[0].requires_grad_()
    seconds = []
    for plain in (False, True):
        torch.manual_seed(7)
        if plain:
            with fastseg.plain_path():
                logits = head([leaf, *maps[1:]])
        else:
            logits = head([leaf, *maps[1:]])
        (first,) = torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)
