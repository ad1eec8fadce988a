"""Random configurations of the hosts that take any: the algebra holds in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastseg

from .checks import errors, reference, run
from .host_models import FAMILIES, HOSTS

few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
BOUND = 1e-10

sides = st.integers(65, 150)
four = lambda values: st.lists(values, min_size=4, max_size=4)  # noqa: E731
depths = four(st.integers(1, 2))


@st.composite
def stages(draw):
    """Heads and widths of four stages, each width a multiple of its heads."""
    heads = draw(four(st.integers(1, 4)))
    return heads, [draw(st.integers(1, 6)) * head for head in heads]


def assert_exact(host, model, batch, size):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model).double()
    pixels = torch.randn(batch, 3, *size, dtype=torch.float64)
    for error in errors(run(host, model, pixels), reference(host, plain, pixels)):
        assert error <= BOUND


@pytest.mark.skipif("transformers" not in HOSTS, reason="needs transformers")
@few
@given(
    stages=stages(),
    depths=depths,
    sr_ratios=four(st.sampled_from([1, 2, 3])),
    mlp_ratios=four(st.integers(1, 4)),
    labels=st.sampled_from([1, 2, 19, 33]),
    decoder=st.integers(1, 40),
    hidden_act=st.sampled_from(["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "mish"]),
    patch_sizes=four(st.sampled_from([3, 5, 7])),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    size=st.tuples(sides, sides),
)
@pytest.mark.slow
def test_transformers(
    stages,
    depths,
    sr_ratios,
    mlp_ratios,
    labels,
    decoder,
    hidden_act,
    patch_sizes,
    seed,
    batch,
    size,
):
    torch.manual_seed(seed)
    heads, widths = stages
    host = HOSTS["transformers"]
    model = host.build(
        depths=depths,
        hidden_sizes=widths,
        num_attention_heads=heads,
        sr_ratios=sr_ratios,
        mlp_ratios=mlp_ratios,
        num_labels=labels,
        decoder_hidden_size=decoder,
        hidden_act=hidden_act,
        patch_sizes=patch_sizes,
    )
    assert_exact(host, model, batch, size)


@pytest.mark.skipif("nvlabs" not in FAMILIES, reason="needs the structured hosts")
@few
@given(
    stages=stages(),
    depths=depths,
    sr_ratios=four(st.sampled_from([1, 2, 3])),
    mlp_ratios=four(st.integers(1, 4)),
    qkv_bias=st.booleans(),
    act=st.sampled_from([nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh]),
    seed=st.integers(0, 1000),
    size=st.tuples(sides, sides),
)
@pytest.mark.slow
def test_nvlabs(stages, depths, sr_ratios, mlp_ratios, qkv_bias, act, seed, size):
    torch.manual_seed(seed)
    heads, widths = stages
    host = HOSTS["nvlabs-encoder"]
    from . import nvlabs
    from .host_models import randomize

    model = nvlabs.MixVisionTransformer(
        widths, heads, mlp_ratios, qkv_bias, depths, sr_ratios, act=act
    ).eval()
    randomize(model)
    assert_exact(host, model, 1, size)
