"""The kernels of the loss against interpolate and cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.kernels import upsample_cross_entropy
from fastseg.kernels.core.configurations import family_entries
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.loss import op
from fastseg.kernels.tune.candidates import by_kernel
from tests.half_precision import HALF_FACTOR
from tests.kernels.loss_cases import draw, error, loss_and_gradient, plain_loss
from tests.kernels.triton.kernel_cases import DTYPES, FLOORS, set_config

KERNELS = ["upsample_cross_entropy_kernel", "upsample_cross_entropy_gradient_kernel"]
LOSS = {"BLOCK": 256, "LANE_OUTPUTS": 16, "PREFETCH": 2, "num_warps": 4}
GRADIENT = {"BLOCK": 32, "GROUP": 3, "CHUNK": 16, "num_warps": 1}


@pytest.fixture
def use_config(monkeypatch):
    """`use_config(...)` replaces parts of the configurations by what runs quickly interpreted."""

    def use(**changes):
        for name, base in ((op.NAME, LOSS), (f"{op.NAME}_gradient", GRADIENT)):
            changed = {key: value for key, value in changes.items() if key in base}
            set_config(monkeypatch, name, {**base, **changed})

    use()
    return use


@pytest.fixture(autouse=True)
def large_blocks(use_config):
    """In all tests."""


def check(logits, labels, device, **options):
    """Two launches; errors of at most 1.25 times those of torch's operators in the same dtype."""
    weight = options.pop("weight", None)
    on_device = {"weight": None if weight is None else weight.to(device), **options}
    with record_launches() as launches:
        ours = loss_and_gradient(
            upsample_cross_entropy, logits.to(device), labels.to(device), **on_device
        )
    assert [launch.name for launch in launches] == KERNELS
    plain = loss_and_gradient(plain_loss, logits, labels, weight=weight, **options)
    wide = None if weight is None else weight.double()
    exact = loss_and_gradient(plain_loss, logits.double(), labels, weight=wide, **options)
    for one, usual, reference in zip(ours, plain, exact, strict=True):
        limit = HALF_FACTOR * max(error(usual, reference), FLOORS[logits.dtype])
        assert error(one.cpu(), reference) <= limit
    return ours


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_parity(weighted, smoothing, dtype, device):
    logits, labels = draw(3, (3, 4), (12, 16))
    weight = torch.rand(3) + 0.5 if weighted else None
    check(logits.to(dtype), labels, device, weight=weight, label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((3, 5), (9, 13)),  # odd scales: pixels lie at the very edges of cells
        ((4, 5), (4, 5)),
        ((9, 7), (5, 4)),
        ((4, 4), (1, 1)),
        ((1, 2), (3, 4)),
        ((1, 1), (2, 9)),  # a cell larger than what a lane takes
        pytest.param((2, 1), (9, 37), marks=pytest.mark.slow),
        pytest.param((20, 70), (41, 139), marks=pytest.mark.slow),  # several blocks and chunks
    ],
)
@pytest.mark.parametrize("align_corners", [False, True])
def test_sizes(grid, size, align_corners, device):
    logits, labels = draw(2, grid, size)
    check(logits.float(), labels, device, align_corners=align_corners)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_groups_of_classes(classes, group, use_config, device):
    use_config(GROUP=group, PREFETCH=group)
    logits, labels = draw(classes, (3, 4), (6, 8))
    check(logits.float(), labels, device)


def test_blocks_and_chunks(use_config, device):
    """Borders between programs go through rows and columns of positions."""
    use_config(BLOCK=32, CHUNK=2, LANE_OUTPUTS=2)
    logits, labels = draw(2, (5, 34), (6, 40), batch=1)
    check(logits.float(), labels, device)


def test_one_class(device):
    logits, labels = draw(1, (4, 5), (8, 15))
    labels[0, 0] = -1
    check(logits.float(), labels, device)


def test_neighbours_far_apart(device):
    """Sums of powers underflow, unless each pixel's highest logit is looked for."""
    logits, labels = draw(3, (3, 4), (6, 12), scale=400.0)
    check(logits.float(), labels, device, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_type(dtype, device):
    logits, labels = draw(2, (2, 3), (4, 6))
    labels[labels == 255] = 100
    check(logits.float(), labels.to(dtype), device, ignore_index=100)


def test_any_layout(device):
    logits, labels = draw(3, (4, 5), (4, 10))
    check(logits.float().contiguous(memory_format=torch.channels_last), labels, device)
    check(logits.float().transpose(2, 3), labels.transpose(1, 2), device)
    check(logits.float()[:, 1:, ::2, 1:], labels.clamp(max=1), device)


def test_a_class_of_no_weight(device):
    logits, labels = draw(3, (2, 3), (4, 6))
    check(logits.float(), labels, device, weight=torch.tensor([0.0, 1.0, 2.0]))


def test_the_same_bits_every_time(use_config, device):
    logits, labels = draw(2, (5, 34), (5, 40), batch=1)
    use_config(BLOCK=32, CHUNK=2)
    arguments = logits.float().to(device), labels.to(device)
    first = loss_and_gradient(upsample_cross_entropy, *arguments)
    second = loss_and_gradient(upsample_cross_entropy, *arguments)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_nothing_counts(device):
    logits, labels = draw(3, (3, 3), (6, 6), ignored=1.1)
    arguments = logits.float().to(device), labels.to(device)
    loss, gradient = loss_and_gradient(upsample_cross_entropy, *arguments)
    assert loss.isnan()
    assert not gradient.any()
    loss, gradient = loss_and_gradient(upsample_cross_entropy, *arguments, empty="zero")
    assert loss == 0
    assert not gradient.any()


def test_without_a_gradient_there_is_one_launch(device):
    logits, labels = draw(3, (3, 3), (6, 6))
    with record_launches() as launches:
        loss = upsample_cross_entropy(logits.float().to(device), labels.to(device))
    assert [launch.name for launch in launches] == KERNELS[:1]
    assert error(loss.cpu(), plain_loss(logits, labels)) < 1e-6
    with record_launches() as launches:
        empty = upsample_cross_entropy(logits[:0].float().to(device), labels[:0].to(device))
    assert empty.isnan()
    assert not launches


@pytest.mark.parametrize("classes", [1, 3])
def test_wrong_labels_are_named(classes, device):
    logits, labels = draw(classes, (3, 4), (12, 8), ignored=0.0)
    labels[1, 3, 7] = labels[1, 9, 2] = 77
    message = f"labels: expected 0 (or|to) {max(classes - 1, 1)}, .* got 77 in image 1, row 3, "
    with pytest.raises(ValueError, match=f"{message}column 7$"):
        upsample_cross_entropy(logits.float().to(device), labels.to(device))
    options = (None, 255, 0.0, False, False)
    assert op.fused(logits.float().to(device), labels.to(device), *options)[0].isnan()


def test_nan(device):
    logits, labels = draw(3, (3, 3), (6, 6))
    logits[0, 1, 1, 1] = torch.nan
    assert upsample_cross_entropy(logits.float().to(device), labels.to(device)).isnan()


def test_what_is_declined(device):
    logits, labels = draw(3, (3, 3), (6, 6))
    with pytest.raises(RuntimeError, match="no kernels for torch.float64"):
        upsample_cross_entropy(logits.to(device), labels.to(device))
    with fastseg.backend("auto"):
        loss = upsample_cross_entropy(logits.to(device), labels.to(device))
    assert error(loss.cpu(), plain_loss(logits, labels)) < 1e-12
    meta = {"device": "meta", "dtype": torch.float32}

    def reason(shape, size):
        return op.supports(torch.empty(shape, **meta), torch.empty(1, *size, **meta))

    assert reason((1, 150, 128, 128), (512, 512)) is None
    assert "32-bit positions" in reason((1, 3, 4096, 30000), (16384, 60000))
    assert "40000 classes are more than 32767" in reason((1, 40000, 4, 4), (16, 16))


@pytest.mark.parametrize("wants_gradient", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_registration(wants_gradient, device):
    logits, labels = draw(3, (2, 3), (2, 3))
    logits = logits.float().to(device).requires_grad_(wants_gradient)
    weight = torch.rand(3, device=device) + 0.5
    arguments = (logits, labels.to(device), weight, 255, 0.1, False, wants_gradient)
    with torch.enable_grad():
        torch.library.opcheck(torch.ops.fastseg.upsample_cross_entropy.default, arguments)


def test_whole_graphs(device):
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    logits, labels = draw(3, (2, 3), (2, 6))
    arguments = logits.float().to(device), labels.to(device)
    result = loss_and_gradient(compiled, *arguments)
    for one, other in zip(
        result, loss_and_gradient(upsample_cross_entropy, *arguments), strict=True
    ):
        assert torch.equal(one, other)


def test_every_configuration_has_candidates_and_an_entry():
    for kernel in op.CANDIDATES:
        assert family_entries("default")[kernel]
        assert by_kernel()[kernel](True, {})
