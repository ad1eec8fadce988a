"""SegGPT against transformers' own: accelerated, and fastseg's classes on both paths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import fastseg
from fastseg.models.seggpt import attention, decoder_plan
from fastseg.models.seggpt.encoder_plan import LayerPlan
from tests.half_precision import half_bound
from tests.model_cases import relative_error

from .cases import SMALL, exact_softmax, inputs, theirs, twins

CALLS = {
    "plain": {},
    "semantic": {"embedding_type": "semantic"},
    "all outputs": {"output_hidden_states": True, "output_attentions": True},
    "states": {"output_hidden_states": True},
    "ensemble": {"feature_ensemble": True, "output_hidden_states": True},
    "tuple": {"return_dict": False, "output_hidden_states": True},
    "bare tuple": {"return_dict": False},
    "own mask": {"bool_masked_pos": torch.rand(3, 32, generator=torch.manual_seed(3)) < 0.4},
}
MODELS = ("SegGptForImageSegmentation", "SegGptModel")
WAYS = ("accelerated", "folded", "plain")


def of_way(way, hosts, ours):
    return fastseg.accelerate(copy.deepcopy(hosts), strict=True) if way == "accelerated" else ours


@torch.no_grad()
def run(way, model, given, **call):
    if way == "plain":
        with fastseg.plain_path():
            return model(**given, **call)
    assert fastseg.report(model).count("folded") == sum(
        type(part).__name__ in ("SegGptEncoder", "SegGptDecoder") for part in model.modules()
    )
    return model(**given, **call)


def assert_same(results, expected, bound):
    results, expected = tree_leaves(results), tree_leaves(expected)
    assert [tuple(one.shape) for one in results] == [tuple(one.shape) for one in expected]
    for mine, their in zip(results, expected, strict=True):
        assert relative_error(mine, their) <= bound


@pytest.mark.every(5)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("class_name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_float64_is_exact_but_for_rounding(way, class_name, call):
    hosts, ours = (one.double() for one in twins(class_name))
    model = of_way(way, hosts, ours)
    batches = (3,) if "bool_masked_pos" in call else (1, 2, 3)
    for batch in batches:
        given = inputs(hosts, batch)
        with torch.no_grad(), exact_softmax():
            expected = hosts(**given, **call)
            results = run(way, model, given, **call)
        assert type(results).__name__ == type(expected).__name__
        if not isinstance(expected, tuple):
            assert list(results) == list(expected)
        assert_same(results, expected, 1e-12)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("way", ["folded", "accelerated", "hooked"])
def test_several_prompts_of_one_image(way, count, monkeypatch):
    """The image's half is computed once; the result is transformers', its ensemble's too."""
    hosts, ours = (one.double() for one in twins())
    model = of_way(way, hosts, ours)
    if way == "hooked":  # layers half by half by their own code
        model.model.encoder.layers[0].attention.register_forward_hook(lambda *arguments: None)
        model.model.encoder.layers[3].register_forward_hook(lambda *arguments: None)
    given = inputs(hosts, count)
    given["pixel_values"] = given["pixel_values"][:1].expand_as(given["pixel_values"])
    tokens = []
    through = LayerPlan._through_mlp

    def counted(plan, x):
        tokens.append(x.numel() // 48)
        return through(plan, x)

    with torch.no_grad(), exact_softmax():
        expected = hosts(**given, feature_ensemble=True, output_hidden_states=True)
        monkeypatch.setattr(LayerPlan, "_through_mlp", counted)
        results = model(**given, feature_ensemble=True, output_hidden_states=True)
    assert_same(results, expected, 1e-12)
    if way != "hooked":
        assert sum(tokens) == (2 * 2 + 3) * 16 * (count + 1)


@pytest.mark.parametrize("labels", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("way", WAYS)
def test_float32(way, labels):
    hosts, ours = twins()
    given = inputs(hosts, 2, labels=labels)
    with torch.no_grad():
        exact = {name: one.double() for name, one in given.items()}
        expected = copy.deepcopy(hosts).double()(**exact)
    results = run(way, of_way(way, hosts, ours), given)
    assert all(one.dtype == torch.float32 for one in tree_leaves(results))
    assert_same(results, expected, 2e-6)


# 1568 tokens of 64 channels a head, and so blocks of fewer rows than there are; and one of the
# real widths.
@pytest.mark.every(2)
@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 192, "image_size": [448, 224], "pretrain_image_size": 64}
        | {"num_hidden_layers": 2, "merge_index": 0, "intermediate_hidden_state_indices": [0, 1]},
        {"num_hidden_layers": 24, "merge_index": 2}
        | {"intermediate_hidden_state_indices": [5, 11, 17, 23]},
        pytest.param(
            {"hidden_size": 1024, "num_attention_heads": 16, "image_size": [896, 448]}
            | {"patch_size": 16, "pretrain_image_size": 224, "decoder_hidden_size": 64}
            | {"num_hidden_layers": 2, "merge_index": 0}
            | {"intermediate_hidden_state_indices": [0, 1]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["grid", "depth", "width"],
)
def test_sizes(config):
    hosts, ours = twins(**config)
    given = inputs(hosts)
    with torch.no_grad():
        expected = hosts(**given)
    assert_same(run("folded", ours, given), expected, 4e-6)  # of two in float32
    assert_same(run("accelerated", fastseg.accelerate(hosts), given), expected, 4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_as_close_as_the_host(way, dtype):
    hosts, ours = (one.to(dtype) for one in twins(hidden_size=96, image_size=[128, 64]))
    given = inputs(hosts, 2)
    with torch.no_grad():
        exact = {name: one.double() for name, one in given.items()}
        expected = copy.deepcopy(hosts).double()(**exact).pred_masks
        their_error = relative_error(hosts(**given).pred_masks, expected)
    results = run(way, of_way(way, hosts, ours), given).pred_masks
    assert results.dtype == dtype
    assert relative_error(results, expected) <= half_bound(their_error, dtype)


def test_masks_in_another_dtype():
    """transformers casts images to the weights' dtype, and fails on masks; here they are cast."""
    _, ours = twins()
    ours.bfloat16()
    given = inputs(ours)
    wide = {name: one.float() for name, one in given.items()}
    expected = run("folded", ours, given).pred_masks
    assert torch.equal(run("folded", ours, wide).pred_masks, expected)


@pytest.mark.parametrize("given_for", ["the batch", "each image"])
def test_training(given_for):
    """Loss and gradients of a seeded step, stochastic depth in it, are transformers'."""
    results = []
    masked = torch.rand(1 if given_for == "the batch" else 2, 32) < 0.5
    for model in twins(drop_path_rate=0.5):
        model.double().train()
        given = inputs(model, 2, labels=True)
        torch.manual_seed(5)
        with exact_softmax():
            loss = model(**given, bool_masked_pos=masked).loss
        loss.backward()
        results.append((loss, {name: one.grad for name, one in model.named_parameters()}))
    (loss, gradients), (our_loss, ours) = results
    assert relative_error(our_loss, loss) < 1e-12
    assert list(ours) == list(gradients)
    for name, their in gradients.items():
        if their is None:
            assert name.endswith("type_token_semantic")  # of the other embedding_type
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name], their, rtol=1e-9, atol=1e-12)


def test_activation_checkpointing():
    _, model = twins(drop_path_rate=0.5)
    model.train()
    given = inputs(model, 2, labels=True)
    losses = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**given).loss
        loss.backward()
        losses.append((loss.item(), model.model.encoder.layers[0].mlp.lin1.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    torch.testing.assert_close(losses[0][1], losses[1][1])


@pytest.mark.parametrize("block", [1, 6_000, 10**9])
def test_attention_in_blocks_of_any_size(block, monkeypatch):
    """Against the formula: one row at a time, a rest at the end, all at once; a rest of heads."""
    monkeypatch.setattr(attention, "_BLOCK", block)
    height, width, heads, d = 5, 3, 3, 8
    query, key, value = torch.randn(3, 2, heads, height * width, d, dtype=torch.float64)
    by_row, by_column = (torch.randn(2 * side - 1, d).double() for side in (height, width))
    expected = torch.empty(2, height * width, heads, d, dtype=torch.float64)
    for q in range(height * width):
        scores = query[:, :, q, None] @ key.transpose(2, 3) * 0.3
        for k in range(height * width):
            rows, columns = q // width - k // width, q % width - k % width
            vector = by_row[rows + height - 1] + by_column[columns + width - 1]
            scores[..., 0, k] += query[:, :, q] @ vector
        expected[:, q] = (scores.softmax(-1) @ value)[:, :, 0]
    tables = [attention.table(one) for one in (by_row, by_column)]
    for form in (attention._in_blocks, attention._by_longer_vectors):
        torch.testing.assert_close(
            form(query, key, value, *tables, 0.3), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", ["rel_pos_h", "rel_pos_w"])
def test_tables_are_made_once_with_the_same_bits(name):
    """At the fold: a forward gathers nothing."""
    hosts, ours = twins()
    of_theirs = hosts.model.encoder.layers[2].attention
    side = {"rel_pos_h": 8, "rel_pos_w": 4}[name]
    expected = of_theirs.get_rel_pos(side, side, getattr(of_theirs, name))
    relative = getattr(ours.model.encoder.layers[2].attention, name).detach()
    assert torch.equal(attention.table(relative), expected.transpose(1, 2))
    for model in (ours, fastseg.accelerate(hosts)):
        given = inputs(model)
        run("folded", model, given)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
            model(**given)
        names = {event.key for event in seen.key_averages()}
        assert "fastseg::attend_in_blocks" in names
        assert not {"aten::index", "aten::index_select", "aten::gather"} & names


@pytest.mark.parametrize(("patches", "rows"), [(900, 32), (5, 8), (1, 1), (10, 24)])
def test_the_decoder_in_stripes_of_any_size(patches, rows, monkeypatch):
    monkeypatch.setattr(decoder_plan, "_PATCHES", patches)
    monkeypatch.setattr(decoder_plan, "_ROWS", rows)
    hosts, ours = (one.double() for one in twins())
    features = torch.randn(2, 7, 4, 3 * 48, dtype=torch.float64)
    with torch.no_grad():
        expected = hosts.decoder(features)
        assert relative_error(ours.decoder(features), expected) < 1e-12


def test_the_operator():
    tensors = torch.randn(3, 2, 3, 15, 8)
    tables = torch.randn(5, 8, 5), torch.randn(3, 8, 3)
    torch.library.opcheck(torch.ops.fastseg.attend_in_blocks, (*tensors, *tables, 0.3))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pixel_values", (1, 3, 64, 32)),
        ("prompt_pixel_values", (1, 1, 32, 32)),
        ("prompt_masks", (3, 32, 32)),
        ("labels", (1, 3, 32, 31)),
    ],
)
def test_wrong_shapes(name, shape):
    _, model = twins()
    given = {**inputs(model), name: torch.randn(shape)}
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(batch, 3, 32, 32\), got"):
        model(**given)


def test_wrong_embedding_type():
    _, model = twins()
    with pytest.raises(ValueError, match="embedding_type: expected one of instance, semantic"):
        model(**inputs(model), embedding_type="panoptic")


def test_the_drafts_names():
    """What an early draft of transformers' documentation called these classes."""
    hosts, ours = twins()
    given = inputs(hosts)
    for name, kind in (
        ("SegGPTForInstanceSegmentation", "instance"),
        ("SegGPTForSemanticSegmentation", "semantic"),
    ):
        model = getattr(fastseg, name)(fastseg.SegGPTConfig(**SMALL)).eval()
        model.load_state_dict(ours.state_dict())
        with torch.no_grad():
            expected = hosts(**given, embedding_type=kind).pred_masks
            other = "semantic" if kind == "instance" else "instance"
            assert_same(model(**given).pred_masks, expected, 4e-6)
            expected = hosts(**given, embedding_type=other).pred_masks
            assert_same(model(**given, embedding_type=other).pred_masks, expected, 4e-6)
    assert fastseg.SegGPTModel is fastseg.SegGptModel
    assert fastseg.SegGPTImageProcessor is fastseg.SegGptImageProcessor


def test_painters_model_in_memory_is_named():
    """It has another tree, which no host describes."""
    model = torch.nn.Module()
    model.decoder_embed = torch.nn.Linear(4, 4)
    model.decoder_pred = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="looks like a part of a SegGPT"):
        fastseg.accelerate(model)


def test_a_grid_of_another_size_is_the_hosts():
    """Tables are for the configuration's grid; transformers resizes its own for any."""
    hosts = theirs()
    x = torch.randn(2, 6, 4, 48)
    with torch.no_grad():
        expected = hosts.model.encoder(x).last_hidden_state
        fastseg.accelerate(hosts)
        assert torch.equal(hosts.model.encoder(x).last_hidden_state, expected)
