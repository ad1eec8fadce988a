"""The loss of resized logits, on a CPU, against torch's interpolate and cross_entropy."""

from __future__ import annotations

import pytest
import torch

from bench.allocated import most_allocated
from fastseg.kernels import upsample_cross_entropy
from fastseg.kernels.loss import tiles
from tests.half_precision import HALF_FACTOR
from tests.kernels.loss_cases import draw, error, loss_and_gradient, plain_loss

CPU = torch.device("cpu")
# Grid and labels: whole and odd scales, of the same size, smaller, of one position and one row.
SIZES = [
    ((16, 16), (64, 64)),
    ((13, 9), (50, 37)),
    ((8, 8), (8, 8)),
    ((9, 9), (5, 4)),
    ((1, 1), (7, 3)),
    ((3, 1), (1, 9)),
    ((40, 3), (161, 90)),
]
# On both sides of FEW_CLASSES.
CLASSES = [1, 2, 9, 19, 150]


def options_of(classes, weighted, smoothing):
    if classes == 1:
        return {}
    weight = torch.rand(classes, dtype=torch.float64) + 0.5 if weighted else None
    return {"weight": weight, "label_smoothing": smoothing}


def check_exact(logits, labels, **options):
    loss, gradient = loss_and_gradient(upsample_cross_entropy, logits, labels, **options)
    expected, exact = loss_and_gradient(plain_loss, logits, labels, **options)
    assert error(loss, expected) < 1e-12
    assert error(gradient, exact) < 1e-12


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize(("grid", "size"), SIZES)
@pytest.mark.parametrize("classes", CLASSES)
def test_loss_and_gradient_in_float64(classes, grid, size, weighted, smoothing, align_corners):
    logits, labels = draw(classes, grid, size)
    for reduction in ("mean", "sum"):
        options = options_of(classes, weighted, smoothing)
        check_exact(logits, labels, reduction=reduction, align_corners=align_corners, **options)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_bands_in_threads(threads, batch, channels_last):
    logits, labels = draw(150, (20, 9), (81, 37), batch=batch)
    format = torch.channels_last if channels_last else torch.contiguous_format
    logits = logits.contiguous(memory_format=format)
    torch.set_num_threads(threads)
    try:
        check_exact(logits, labels, label_smoothing=0.1)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("classes", [1, 2, 150])
def test_the_gradient_lies_as_the_logits(classes):
    logits, labels = draw(classes, (8, 9), (33, 30))
    for format in (torch.contiguous_format, torch.channels_last):
        leaf = logits.contiguous(memory_format=format).requires_grad_()
        upsample_cross_entropy(leaf, labels).backward()
        (gradient,) = torch.autograd.grad(upsample_cross_entropy(leaf, labels), leaf)
        assert gradient.stride() == leaf.stride()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("ignored", [0.0, 0.99])
def test_ignored_shares(classes, ignored):
    logits, labels = draw(classes, (8, 8), (33, 30), ignored=ignored)
    check_exact(logits, labels, **options_of(classes, True, 0.3))
    labels[0] = 255  # a whole image
    labels[1, 0, 0] = 0
    check_exact(logits, labels, **options_of(classes, False, 0.0))


@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("ignore_index", [0, 1, -100, 12345])
def test_other_labels_to_ignore(classes, ignore_index):
    logits, labels = draw(classes, (5, 6), (20, 24))
    labels[labels == 255] = ignore_index
    check_exact(logits, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [0, 1, 255])
def test_one_class_ignores_negative_labels(ignore_index):
    logits, labels = draw(1, (5, 6), (20, 24))
    labels[labels == 255] = -1
    check_exact(logits, labels, ignore_index=ignore_index)
    check_exact(30 * logits, labels, ignore_index=ignore_index)  # where softplus is linear


@pytest.mark.parametrize("classes", [2, 19])
def test_no_pixel_counts(classes):
    logits, labels = draw(classes, (4, 4), (16, 16), ignored=1.1)
    for options in ({}, options_of(classes, True, 0.1)):
        loss, gradient = loss_and_gradient(upsample_cross_entropy, logits, labels, **options)
        expected, exact = loss_and_gradient(plain_loss, logits, labels, **options)
        assert loss.isnan()
        assert expected.isnan()
        assert torch.equal(gradient, exact)
        assert not gradient.any()
        loss, gradient = loss_and_gradient(
            upsample_cross_entropy, logits, labels, empty="zero", **options
        )
        assert loss == 0
        assert not gradient.any()
    assert upsample_cross_entropy(logits, labels, reduction="sum") == 0
    assert upsample_cross_entropy(logits[:0], labels[:0]).isnan()


def test_no_pixel_of_one_class_counts():
    logits, labels = draw(1, (4, 4), (16, 16), ignored=1.1)
    assert upsample_cross_entropy(logits, labels) == 0 == plain_loss(logits, labels)


@pytest.mark.parametrize("scale", [200.0, 3000.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_neighbours_far_apart(scale, smoothing):
    """Sums of exponentials underflow, unless each pixel's highest logit is looked for."""
    logits, labels = draw(19, (16, 16), (64, 64), scale=scale)
    check_exact(logits, labels, label_smoothing=smoothing)
    check_no_worse(logits.float(), labels, label_smoothing=smoothing)


def check_no_worse(logits, labels, **options):
    """Errors against float64 of the same logits, and those of torch's operators."""
    ours = loss_and_gradient(upsample_cross_entropy, logits, labels, **options)
    plain = loss_and_gradient(plain_loss, logits, labels, **options)
    exact = loss_and_gradient(plain_loss, logits.double(), labels, **options)
    for one, usual, reference in zip(ours, plain, exact, strict=True):
        assert one.isfinite().all()
        assert error(one, reference) < HALF_FACTOR * max(error(usual, reference), 3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_dtypes(classes, dtype):
    logits, labels = draw(classes, (16, 17), (64, 68))
    check_no_worse(logits.to(dtype), labels)
    assert upsample_cross_entropy(logits.to(dtype), labels).dtype == torch.float32


def test_float16_under_a_gradient_scaler():
    """Rounded to float16 before it is scaled, more of the gradient would be 0."""
    logits, labels = draw(150, (32, 32), (128, 128), scale=6.0, ignored=0.0)
    _, exact = loss_and_gradient(plain_loss, logits, labels)
    lost = (exact.half() == 0).double().mean()
    assert lost > 0.02
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    half = logits.half().requires_grad_()
    scaler.scale(upsample_cross_entropy(half, labels)).backward()
    assert (half.grad == 0).double().mean() < lost / 10
    assert error(3 * half.grad.double() / 65536, exact) < 2e-3


@pytest.mark.parametrize("classes", CLASSES)
def test_autocast_rounds_nothing_inside(classes):
    logits, labels = draw(classes, (9, 8), (36, 32))
    expected = loss_and_gradient(upsample_cross_entropy, logits.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_and_gradient(upsample_cross_entropy, logits.float(), labels)
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)


INTEGERS = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.bool),
]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_labels_of_any_integer_type(dtype, classes):
    logits, labels = draw(classes, (5, 6), (20, 24), ignored=0.0)
    labels %= 2
    ignored = 255 if dtype in (torch.bool, torch.int8) else 100
    if dtype != torch.bool:
        labels[:, 3] = ignored = 100
    loss = upsample_cross_entropy(logits, labels.to(dtype), ignore_index=ignored)
    assert loss == upsample_cross_entropy(logits, labels, ignore_index=ignored)


LAYOUTS = {
    "channels-last": lambda logits: logits.contiguous(memory_format=torch.channels_last),
    "sliced": lambda logits: logits[:, 1:, ::2, 3:],
    "transposed": lambda logits: logits.transpose(2, 3),
    "expanded": lambda logits: logits[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("classes", [4, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, classes):
    logits, labels = draw(classes, (12, 10), (48, 40))
    view = LAYOUTS[layout](logits)
    labels = labels.clamp(max=2).transpose(1, 2)
    leaf = logits.clone().requires_grad_()
    upsample_cross_entropy(LAYOUTS[layout](leaf), labels).backward()
    other = logits.clone().requires_grad_()
    plain_loss(LAYOUTS[layout](other), labels).backward()
    assert error(leaf.grad, other.grad) < 1e-12
    assert error(upsample_cross_entropy(view, labels), plain_loss(view, labels)) < 1e-12


@pytest.mark.parametrize("tile_bytes", [1, 3000, 1 << 30])
def test_tiles(tile_bytes, monkeypatch):
    """Of the least size, of some, and one for all."""
    monkeypatch.setattr(tiles, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(tiles, "FEW_CLASSES", 0)
    for classes in (2, 9):
        logits, labels = draw(classes, (21, 40), (81, 150))
        check_exact(logits, labels, **options_of(classes, True, 0.1))
        check_exact(logits, labels, align_corners=True)


def test_resized_logits_are_never_in_memory():
    logits, labels = draw(40, (64, 64), (256, 256))
    logits = logits.float().requires_grad_()
    resized = 16 * logits.nbytes
    plain = most_allocated(lambda: plain_loss(logits, labels).backward(), CPU)
    ours = most_allocated(lambda: upsample_cross_entropy(logits, labels).backward(), CPU)
    assert plain > 2 * resized
    assert ours < 0.5 * resized


def test_no_gradient_is_made_unless_asked_for():
    logits, labels = draw(19, (4, 4), (16, 16))
    op = torch.ops.fastseg.upsample_cross_entropy
    assert op(logits, labels, None, 255, 0.0, False, False)[2].numel() == 0
    for classes in (1, 2, 19):
        leaf = draw(classes, (4, 4), (16, 16))[0].requires_grad_()
        with torch.no_grad():
            assert not upsample_cross_entropy(leaf, labels.clamp(max=1)).requires_grad
        assert upsample_cross_entropy(leaf, labels.clamp(max=1)).requires_grad


@pytest.mark.parametrize("classes", [1, 3, 9])
def test_gradcheck(classes):
    logits, labels = draw(classes, (3, 3), (11, 10), batch=1)
    options = options_of(classes, True, 0.1)

    def loss(leaf):
        return upsample_cross_entropy(leaf, labels, **options)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_there_are_no_gradients_of_gradients():
    logits, labels = draw(5, (3, 3), (12, 12))
    message = r"no gradients of gradients, .*create_graph=True .*torch.func.*cross_entropy\("
    loss = upsample_cross_entropy(logits.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda one: upsample_cross_entropy(one, labels))(logits.detach())


# Wrong input


@pytest.mark.parametrize(
    ("classes", "label", "dtype", "known"),
    [
        (1, 2, torch.int64, "0 or 1"),
        (2, 2, torch.int64, "0 or 1"),
        (19, 19, torch.uint8, "0 to 18"),
        (19, -1, torch.int8, "0 to 18"),
        (150, -100, torch.int64, "0 to 149"),
    ],
)
def test_wrong_labels_are_named(classes, label, dtype, known):
    logits, labels = draw(classes, (4, 5), (16, 20), ignored=0.0)
    labels = labels.to(dtype)
    labels[1, 3, 7] = labels[1, 4, 2] = label
    message = f"labels: expected {known}, or 255 to ignore a pixel, got {label} in image 1, row 3, "
    with pytest.raises(ValueError, match=f"{message}column 7$"):
        upsample_cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("dtype", "label", "ignored"), [(torch.uint8, 156, -100), (torch.int8, -1, 255)]
)
def test_labels_are_not_compared_modulo_256(dtype, label, ignored):
    logits, labels = draw(19, (4, 5), (16, 20), ignored=0.0)
    labels[0, 0, 0] = label
    with pytest.raises(ValueError, match=f"got {label} in image 0, row 0, column 0"):
        upsample_cross_entropy(logits, labels.to(dtype), ignore_index=ignored)


LOGITS, LABELS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error_type", "text"),
    [
        (
            {"logits": LABELS},
            TypeError,
            "logits: expected a floating-point tensor, got torch.int64",
        ),
        ({"logits": [[0.0]]}, TypeError, "logits: .*got list"),
        ({"logits": LOGITS[0]}, ValueError, r"logits: expected shape .*got \(3, 4, 4\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"logits: .*got \(2, 0, 4, 4\)"),
        ({"labels": LABELS.float()}, TypeError, "labels: expected a tensor of integers, .*float32"),
        ({"labels": LABELS[:1]}, ValueError, r"labels: expected shape \(2, height, width\), got"),
        ({"labels": LABELS[:, None]}, ValueError, r"labels: .*got \(2, 1, 8, 8\)"),
        ({"labels": LABELS[:, :0]}, ValueError, r"labels: .*got \(2, 0, 8\)"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels: expected a tensor on cpu, got meta"),
        (
            {"weight": LABELS},
            TypeError,
            "weight: expected a floating-point tensor, got torch.int64",
        ),
        (
            {"weight": torch.ones(4)},
            ValueError,
            r"weight: expected shape \(3,\) on cpu, got \(4,\)",
        ),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
        ({"empty": "no"}, ValueError, "empty: expected 'nan' or 'zero', got 'no'"),
        ({"logits": LOGITS[:, :1], "weight": torch.ones(1)}, ValueError, "weight: there is none"),
        ({"logits": LOGITS[:, :1], "label_smoothing": 0.1}, ValueError, "label_smoothing: there"),
    ],
    ids=str,
)
def test_wrong_arguments(change, error_type, text):
    arguments = {"logits": LOGITS, "labels": LABELS, **change}
    with pytest.raises(error_type, match=text):
        upsample_cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


# In graphs


@pytest.mark.parametrize("classes", [1, 3, 19])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_registration(classes, wants_gradient):
    logits, labels = draw(classes, (3, 4), (12, 16))
    weight = torch.rand(classes) + 0.5 if classes > 1 else None
    logits = logits.float().requires_grad_(wants_gradient)
    arguments = (logits, labels, weight, 255, 0.1 * (classes > 1), False, wants_gradient)
    torch.library.opcheck(torch.ops.fastseg.upsample_cross_entropy.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_whole_graphs(classes, backend):
    """Of any size, where nothing of the op is traced into; the gradient is right too."""
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, dynamic=True, backend=backend)
    for grid in [(4, 5), (7, 6), (8, 9)]:
        logits, labels = draw(classes, grid, (4 * grid[0], 3 * grid[1]))
        options = options_of(classes, True, 0.1)
        result = loss_and_gradient(compiled, logits, labels, **options)
        expected = loss_and_gradient(plain_loss, logits, labels, **options)
        for one, other in zip(result, expected, strict=True):
            assert error(one, other) < 1e-12
    labels[0, 0, 0] = 200
    with pytest.raises(ValueError, match="got 200 in image 0, row 0, column 0"):
        compiled(logits.requires_grad_(), labels, **options)


def test_graphs_under_autocast():
    logits, labels = draw(19, (4, 5), (16, 20))
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradient(upsample_cross_entropy, logits.bfloat16(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_and_gradient(compiled, logits.bfloat16(), labels)
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)
