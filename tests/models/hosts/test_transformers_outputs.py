"""What transformers' models answer with, option by option, when accelerated; and their files."""

from __future__ import annotations

import copy

import pytest
import torch

import fastseg
from tests.half_precision import half_limit

from .checks import (
    FP32_BOUND,
    assert_parity,
    errors,
    reference,
    relative_error,
    run,
    same_bits,
)
from .host_models import HOSTS

transformers = pytest.importorskip("transformers")  # this file is collected where it is there

HOST = HOSTS["transformers"]
IS_5 = not transformers.__version__.startswith("4.")
CLASSES = ["transformers", "transformers-base", "transformers-image-classification"]


@pytest.fixture(params=CLASSES)
def host(request):
    return HOSTS[request.param]


@pytest.fixture
def pair(host):
    model = host.build()
    plain = copy.deepcopy(model)
    return fastseg.accelerate(model), plain


def both(pair, *arguments, **options):
    with torch.no_grad():
        return [each(*arguments, **options) for each in pair]


def assert_alike(ours, theirs, bound=FP32_BOUND):
    """The same type with the same fields, close values."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = tuple(ours.values()), tuple(theirs.values())
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_alike(mine, other, bound)
    elif theirs is not None:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 2 * bound


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_hidden_states": True},
        {"output_hidden_states": False},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
    ],
    ids=str,
)
def test_options(pair, pixels, calls, options):
    ours, theirs = both(pair, pixels, **options)
    assert calls.count_and_clear().get("mix_ffn") == 5
    assert_alike(ours, theirs)


def test_options_of_the_configuration(pair, pixels):
    for each in pair:
        each.config.output_hidden_states = True
    assert_alike(*both(pair, pixels))


# transformers refuses sdpa with `config.output_attentions`.
@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("attention", "by"),
    [("eager", "argument"), ("eager", "config"), *([("sdpa", "argument")] if IS_5 else [])],
)
def test_attentions_are_the_hosts_to_the_bit(pair, pixels, calls, attention, by):
    options = {}
    for each in pair:
        if IS_5:
            each.set_attn_implementation(attention)
        if by == "config":
            each.config.output_attentions = True
        else:
            options = {"output_attentions": True}
    ours, theirs = both(pair, pixels, **options)
    assert "sr_attention" not in calls
    assert "mix_ffn" not in calls
    assert list(ours) == list(theirs)
    if attention == "eager":
        assert len(theirs.attentions) == 5
    assert same_bits(
        [t for t in torch.utils._pytree.tree_leaves(ours.attentions) if t is not None],
        [t for t in torch.utils._pytree.tree_leaves(theirs.attentions) if t is not None],
    )
    assert_alike(ours, theirs)


def test_loss(pair, host, pixels):
    if host.name == "transformers-base":
        pytest.skip("an encoder has no loss")
    if host.classifier:
        labels = torch.randint(0, 5, (2, 64, 96))
        labels[:, :9] = 255
    else:
        labels = torch.tensor([0, 3])
    ours, theirs = both(pair, pixels, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    with torch.enable_grad():
        losses = [each(pixels, labels=labels).loss for each in pair]
    assert torch.equal(*losses)


@pytest.mark.parametrize("host", ["transformers-base", "transformers-image-classification"])
def test_tokens_of_the_last_stage(host, pixels, calls):
    """`reshape_last_stage=False`: the last stage stays (B, N, C)."""
    host = HOSTS[host]
    model = host.build(reshape_last_stage=False)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    with torch.no_grad():
        ours, theirs = (m(pixels, output_hidden_states=True) for m in (model, plain))
    assert theirs.hidden_states[-1].ndim == 3
    assert_alike(ours, theirs)
    assert calls.count_and_clear() == host.calls()


def test_tokens_of_the_last_stage_in_a_decode_head():
    """transformers' head takes the square root of the channels for a side: right where it fits."""
    model = HOST.build(reshape_last_stage=False, unit=8)  # 64 channels, a last grid of 8 x 8
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        ours, theirs = model(pixels), plain(pixels)
        assert_alike(ours, theirs)
        with pytest.raises(RuntimeError):  # as the plain one
            plain(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("labels", [1, 2, 19, 150])
def test_numbers_of_classes(labels, pixels):
    model = HOST.build(num_labels=labels)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(HOST, model, plain, pixels)


@pytest.mark.every(3)
def test_saved_and_loaded(pair, pixels, tmp_path, calls):
    model, plain = pair
    with torch.no_grad():
        model(pixels)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        ours, theirs = (tmp_path / folder / name for folder in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    loaded = type(plain).from_pretrained(tmp_path / "ours").eval()
    assert type(loaded) is type(plain)
    calls.clear()
    assert_alike(*both((loaded, plain), pixels), bound=0)
    assert calls == []
    fastseg.accelerate(loaded)
    assert_alike(*both((loaded, plain), pixels))
    assert calls


def test_class_of_an_accelerated_model_loads(pair, tmp_path, pixels):
    """`type(model).from_pretrained`, as trainers call it."""
    model, plain = pair
    plain.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_alike(*both((loaded, plain), pixels))


def test_auto_class(tmp_path, pixels):
    """AutoModelForSemanticSegmentation from a folder, in three dtypes, against float64."""
    HOST.build().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = transformers.AutoModelForSemanticSegmentation.from_pretrained(
            tmp_path, dtype=dtype
        ).eval()
        plain = copy.deepcopy(model)
        fastseg.accelerate(model)
        assert isinstance(model, transformers.SegformerForSemanticSegmentation)
        bound = FP32_BOUND if dtype == torch.float32 else half_limit(dtype)
        expected = reference(HOST, plain, pixels.to(dtype))
        results = run(HOST, model, pixels.to(dtype))
        assert {result.dtype for result in results} == {dtype}
        assert max(errors(results, expected)) <= bound


def test_gradient_checkpointing(pixels, calls):
    if not IS_5:
        pytest.skip("4.57's Segformer has none")
    model = HOST.build()
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    gradients = []
    for each in (model, plain):
        each.gradient_checkpointing_enable()
        each.train()
        torch.manual_seed(5)
        each(pixels).logits.square().mean().backward()
        gradients.append([p.grad for p in each.parameters()])
    assert calls == []
    assert same_bits(*gradients)


def test_resized_by_hand(pixels):
    """`num_labels` changed by a new classifier of the same kind."""
    model = HOST.build()
    fastseg.accelerate(model)
    with torch.no_grad():
        model(pixels)
    model.decode_head.classifier = torch.nn.Conv2d(24, 9, 1)
    plain = HOST.build(num_labels=9)
    plain.load_state_dict(model.state_dict())
    assert_parity(HOST, model, plain, pixels)
