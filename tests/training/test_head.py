"""The decode head with gradients against it as it is written: both forms, and what takes which."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg.training import masks, stripes
from tests.half_precision import HALF_FACTOR
from tests.model_cases import TINY, tiny_model

STRIPES, COMPOSED = "logits_in_stripes", "_fused_map"


@pytest.fixture
def head():
    return tiny_model(classifier_dropout_prob=0.3).decode_head.double().train()


def draw(grid=(16, 24), batch=2):
    sizes = [[max(-(-side // 2**stage), 1) for side in grid] for stage in range(4)]
    widths = TINY["hidden_sizes"]
    maps = [
        torch.randn(batch, width, *size, dtype=torch.float64) + 1
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
    torch.rand(1)
    return [logits.detach(), *(one.grad for one in (*leaves, *head.parameters()))]


def check_equal(head, maps, outer):
    """The generator goes on as it would have, too."""
    with masks.compared():
        found = [one.clone() for one in results(head, maps, outer)]
    state = torch.get_rng_state()
    with fastseg.plain_path():
        exact = results(head, maps, outer)
    assert torch.equal(torch.get_rng_state(), state)
    largest = max(one.norm() for one in exact)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm() + 1e-14 * largest


@pytest.mark.parametrize("grid", [(16, 24), (13, 9), (1, 5), (1, 1)])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_logits_and_all_gradients(grid, rows, head, head_forms, monkeypatch):
    monkeypatch.setattr(stripes, "_LEAST_ROWS", rows)
    monkeypatch.setattr(stripes, "STRIPE_BYTES", 1)
    check_equal(head, *draw(grid))
    assert head_forms == [STRIPES]


@pytest.mark.parametrize("grid", [(13, 9), (1, 5)])
def test_logits_and_all_gradients_in_eval_mode(grid, head, head_forms):
    check_equal(head.eval(), *draw(grid))
    assert head_forms == [COMPOSED]


def without_dropout(head):
    head.dropout.p = 0.0


def of_features(head):
    head.dropout = nn.Dropout2d(0.5)


def without_class_bias(head):
    head.classifier.bias = None


def with_fuse_bias(head):
    head.linear_fuse.bias = nn.Parameter(torch.randn(TINY["decoder_hidden_size"]).double())


@pytest.mark.parametrize(
    "change", [without_dropout, of_features, without_class_bias, with_fuse_bias]
)
def test_variations_run_in_stripes(change, head, head_forms):
    change(head)
    check_equal(head, *draw((13, 9)))
    assert head_forms == [STRIPES]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}], ids=str
)
def test_statistics_of_batch_norm(options, head, head_forms):
    """Of three batches; far from zero in all channels, where a variance could cancel."""
    head.batch_norm = nn.BatchNorm2d(TINY["decoder_hidden_size"], **options).double()
    with torch.no_grad():
        head.linear_c[0].proj.bias += 1e3
    plain = copy.deepcopy(head)
    for _ in range(3):
        maps, outer = draw((5, 7))
        results(head, maps, outer)
        with fastseg.plain_path():
            results(plain, maps, outer)
    assert head_forms == [STRIPES] * 3
    for (name, one), other in zip(head.named_buffers(), plain.buffers(), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)


def group_norm(head):
    head.batch_norm = nn.GroupNorm(4, TINY["decoder_hidden_size"]).double()


def frozen(head):
    head.batch_norm.eval()


def without_weight(head):
    head.batch_norm = nn.BatchNorm2d(TINY["decoder_hidden_size"], affine=False).double()


def gelu(head):
    head.activation = nn.GELU()


def two_layers(head):
    head.classifier = nn.Sequential(head.classifier, nn.Tanh())


def wide_classifier(head):
    last = head.classifier
    head.classifier = nn.Conv2d(last.in_channels, last.out_channels, 3, padding=1).double()


def nothing_left(head):
    head.dropout.p = 1.0


def hooked(head):
    head.activation.register_forward_hook(lambda *_: None)


BEHIND = {
    "its normalisation is a GroupNorm": group_norm,
    "its normalisation is frozen, or has no weight": frozen,
    "or has no weight": without_weight,
    "its activation is a GELU": gelu,
    "its classifier is a Sequential": two_layers,
    "its classifier is not pointwise": wide_classifier,
    "its dropout leaves nothing": nothing_left,
    "its activation has hooks or a forward of its own": hooked,
}


@pytest.mark.parametrize("reason", BEHIND)
def test_what_is_changed_behind_runs_as_it_is(reason, head, head_forms):
    BEHIND[reason](head)
    check_equal(head, *draw((5, 7)))
    assert head_forms == [COMPOSED]
    line = next(one for one in fastseg.report(head).splitlines() if "with gradients" in one)
    assert "every projection at its own stage's size, the rest as it is: " in line
    assert line.endswith(reason)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def scaled(head):
    projection = head.linear_c[1].proj
    head.linear_c[1].proj = Scaled(projection.in_features, projection.out_features).double()


class Other(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.proj = mlp.proj

    def forward(self, one):
        return self.proj(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).sigmoid()


def another_mlp(head):
    head.linear_c[2] = Other(head.linear_c[2])


def wide_convolution(head):
    fuse = head.linear_fuse
    head.linear_fuse = nn.Conv2d(fuse.in_channels, fuse.out_channels, 3, padding=1).double()


CHANGES = {
    "a Scaled": scaled,
    "a Other": another_mlp,
    "not pointwise": wide_convolution,
    "a ParametrizedConv2d": lambda head: nn.utils.parametrizations.weight_norm(head.linear_fuse),
    "hooks": lambda head: head.linear_c[2].proj.register_forward_hook(lambda *_: None),
    "has hooks": lambda head: head.linear_c[0].register_full_backward_hook(lambda *_: None),
    "of its own": lambda head: setattr(head.linear_c[0], "forward", head.linear_c[0].forward),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_changed_runs_as_it_is_written(reason, head, head_forms):
    CHANGES[reason](head)
    results(head, *draw())
    assert not head_forms
    line = next(one for one in fastseg.report(head).splitlines() if "with gradients" in one)
    assert "as it is written: " in line
    assert line.endswith(reason)


def test_plain_path_and_global_hooks(head, head_forms):
    with fastseg.plain_path():
        results(head, *draw())
        assert "as it is written: asked for by fastseg.plain_path" in fastseg.report(head)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    results(head, *draw())
    handle.remove()
    assert not head_forms
    line = "with gradients: every projection at its own stage's size, all in stripes"
    assert line in fastseg.report(head)


def test_a_batch_of_one_position_is_torchs_error(head):
    maps, _ = draw((1, 1), batch=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        head(maps)


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_errors_are_no_larger(kind):
    """Against float64, than those of the head as it is written."""
    head = tiny_model(classifier_dropout_prob=0.0).decode_head.train()
    maps, outer = draw((32, 32))
    exact = [one.clone() for one in results(copy.deepcopy(head).double(), maps, outer)]
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    head, maps = head.to(dtype), [one.to(dtype) for one in maps]

    def errors():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
            found = results(head, maps, outer)
        # But for the projections' biases, whose gradients are of rounding alone.
        pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b.norm() > 1e-9]
        return [((one - other).norm() / other.norm()).item() for one, other in pairs]

    ours = errors()
    with fastseg.plain_path():
        plain = errors()
    assert len(ours) == len(exact) - len(head.linear_c)
    for one, usual in zip(ours, plain, strict=True):
        assert one < HALF_FACTOR * max(usual, 1e-6)


def test_gradients_of_gradients(head):
    maps, _ = draw((4, 4))
    leaf = maps[0].requires_grad_()
    with masks.compared():
        logits = head([leaf, *maps[1:]])
    with pytest.raises(RuntimeError, match="in stripes there are no gradients of gradients"):
        torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
    head.batch_norm.eval()  # which is composed
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


def arguments(mask=True):
    """Of the operator."""
    torch.manual_seed(0)
    sizes, channels = ((4, 3), (2, 2), (1, 2)), 6
    tokens = [torch.randn(2, *size, 3 + i).double() for i, size in enumerate(sizes)]
    weights = [torch.randn(channels, one.shape[3]).double() for one in tokens]
    vectors = [torch.randn(channels).double() for _ in range(3)]  # bias, gain, shift
    classifier = [torch.randn(2, channels).double(), torch.randn(2).double()]
    drawn = torch.randint(0, 2, (2, 4, 3, channels), dtype=torch.uint8) if mask else None
    given = [tokens, weights, *vectors, *classifier]
    leaves = [one for some in given for one in (some if isinstance(some, list) else [some])]
    for one in leaves:
        one.requires_grad_()
    return (*given, drawn, 0.5, 1e-5), leaves


def test_gradcheck():
    given, leaves = arguments()

    def logits(*_):
        return torch.ops.fastseg.head_in_stripes(*given)[0]

    torch.autograd.gradcheck(logits, leaves, fast_mode=True)


@pytest.mark.parametrize("mask", [True, False])
def test_opcheck(mask):
    given, _ = arguments(mask)
    torch.library.opcheck(torch.ops.fastseg.head_in_stripes.default, given)
    logits, centred, _, variance = torch.ops.fastseg.head_in_stripes(*given)
    tokens, weights, _, gain, shift, classifier, _, *others = given
    behind = (others[0], centred.detach(), variance, *others[1:])
    given = (torch.randn_like(logits), tokens, weights, gain, shift, classifier, *behind)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.fastseg.head_in_stripes_backward.default,
            given,
            test_utils=("test_schema", "test_faketensor"),
        )


def test_checkpointing_changes_nothing(head, head_forms):
    maps, outer = draw((5, 7))
    expected = results(head, maps, outer)
    run, head.forward = head.forward, lambda given: checkpoint(run, given, use_reentrant=False)
    found = results(head, maps, outer)
    assert head_forms == [STRIPES] * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_frozen_parts(head):
    """A classifier that learns alone, of maps that need no gradient."""
    head.requires_grad_(False)
    head.classifier.requires_grad_(True)
    maps, outer = draw((5, 7))
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        head.zero_grad()
        with masks.compared():
            head(maps).backward(outer)
        found.append(head.classifier.weight.grad.clone())
        head.classifier.register_forward_hook(lambda *_: None)  # the second runs composed
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert head.linear_fuse.weight.grad is None


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9999999])
def test_masks_of_dropout(p):
    """They keep the share that they say, p to 2^-17, each position and each draw by itself."""
    torch.manual_seed(0)
    dropout = torch.nn.Dropout(p).train()
    drawn = []
    for _ in range(2):
        mask, share = masks.draw_mask(dropout, (3, 50, 51, 7), "cpu")
        assert mask.dtype == torch.uint8
        assert mask.shape == (3, 50, 51, 7)
        assert int(mask.max()) <= 1
        assert share > 0
        assert abs(share - (1 - p)) <= max(2.0**-17, 2.0**-16 - (1 - p))
        drawn.append(mask.double())
    count = drawn[0].numel()
    for mask in drawn:
        assert abs(mask.mean() - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-4
    together = (drawn[0] * drawn[1]).mean()
    assert abs(together - share**2) < 5 * (share**2 / count) ** 0.5
    neighbours = (drawn[0].flatten()[1:] * drawn[0].flatten()[:-1]).mean()
    assert abs(neighbours - share**2) < 5 * (share**2 / count) ** 0.5
