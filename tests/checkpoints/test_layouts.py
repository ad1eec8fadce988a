"""Weights for other libraries: `state_dict_for`, and files of `fastseg convert --to`."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from tests.checkpoints.checkpoint_cases import assert_same_tensors, ours
from tests.model_cases import randomize, relative_error
from tests.models.hosts import mmseg, nvlabs

pytestmark = pytest.mark.filterwarnings("error::fastseg.CheckpointWarning")

HEADS = {"num_attention_heads": [1, 2, 5, 8]}
# In float64 the networks agree to rounding, or else an epsilon or a weight is another.
BOUND = 1e-12


def segmenter():
    backbone = nvlabs.MixVisionTransformer(depths=(2, 1, 1, 1))
    return nvlabs.EncoderDecoder(backbone, nvlabs.SegFormerHead())


class Classifier(nvlabs.MixVisionTransformer):
    """As the authors train their encoder on ImageNet."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.forward_features(x)[-1].mean((2, 3)))


NETWORKS = {
    "nvlabs segmenter": segmenter,
    "nvlabs encoder": nvlabs.MixVisionTransformer,
    "nvlabs classifier": Classifier,
    "mmseg encoder": lambda: mmseg.MixVisionTransformer(num_layers=(2, 1, 1, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(name, dtype):
    """The other library's tensors, loaded and read backwards: names, dtypes, bits."""
    network = NETWORKS[name]()
    randomize(network)
    expected = network.to(dtype).state_dict()
    model = fastseg.from_pretrained(None, state_dict=expected, dtype="auto", **HEADS)
    found = model.state_dict_for(name.split()[0])
    if "decode_head.conv_seg.weight" in expected:  # never called, and no model of ours has it
        for leaf in ("weight", "bias"):
            unused = f"decode_head.conv_seg.{leaf}"
            assert found[unused].shape == expected[unused].shape
            expected = {**expected, unused: torch.zeros_like(expected[unused])}
    assert_same_tensors(found, dict(expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_fits_strictly_and_computes_the_same(name):
    """Of a model of fastseg, whose weights never were under other names."""
    library = name.split()[0]
    kind = {
        "segmenter": "SegformerForSemanticSegmentation",
        "encoder": "SegformerModel",
        "classifier": "SegformerForImageClassification",
    }[name.split()[1]]
    eps = {"block_norm_eps": 1e-6, "stage_norm_eps": 1e-6}
    if library == "mmseg":
        eps |= {"patch_norm_eps": 1e-6, "reduction_norm_eps": 1e-6}
    network = NETWORKS[name]().double().eval()
    config = fastseg.SegformerConfig(
        depths=[1, 1, 1, 1] if name in ("nvlabs encoder", "nvlabs classifier") else [2, 1, 1, 1],
        hidden_sizes=[8, 16, 40, 64],
        decoder_hidden_size=24,
        num_labels=10 if kind.endswith("Classification") else 5,
        **HEADS,
        **eps,
    )
    model = getattr(fastseg, kind)(config).eval()
    randomize(model)
    network.load_state_dict(model.double().state_dict_for(library), strict=True)
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = network(pixels)
        expected = expected[-1] if isinstance(expected, list) else expected
        assert relative_error(model(pixels)[0], expected) <= BOUND


def test_epsilons_that_differ_are_told():
    model = ours("SegformerModel", **{"hidden_sizes": [8, 16, 40, 64], **HEADS})
    with pytest.warns(CheckpointWarning, match=r"NVlabs computes with block_norm_eps=1e-06 \(not "):
        model.state_dict_for("nvlabs")
    model = ours(
        "SegformerModel", hidden_sizes=[8, 16, 40, 64], hidden_act="gelu_pytorch_tanh", **HEADS
    )
    with pytest.warns(CheckpointWarning) as caught:
        model.state_dict_for("mmseg")
    text = str(caught[0].message)
    for part in ("hidden_act='gelu' (not 'gelu_pytorch_tanh')", "patch_norm_eps=1e-06"):
        assert part in text


WIDE = {"hidden_sizes": [8, 16, 40, 64], **HEADS}
B0 = {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256], **HEADS}
SEGMENTATION, CLASSIFICATION = "SegformerForSemanticSegmentation", "SegformerForImageClassification"


@pytest.mark.parametrize(
    ("library", "kind", "config", "told"),
    [
        ("mmseg", SEGMENTATION, WIDE, r"another network \(a ReLU .*encoder alone, `model\.segf"),
        ("mmseg", CLASSIFICATION, WIDE, "without a classifier of images; convert its encoder"),
        ("mmseg", "SegformerModel", {**WIDE, "mlp_ratios": [4, 4, 4, 2]}, "expected one mlp_ratio"),
        ("mmseg", "SegformerModel", {"num_attention_heads": [1, 2, 3, 2]}, "each attention head"),
        ("smp", CLASSIFICATION, B0, "without a classifier of images; convert its encoder"),
        ("smp", SEGMENTATION, WIDE, r"hidden_sizes of mit_b0, .* got .*\[8, 16, 40, 64\]"),
        ("smp", SEGMENTATION, {**B0, "sr_ratios": [4, 4, 2, 1]}, r"sr_ratios=\[8, 4, 2, 1\], got"),
        ("nvlabs", SEGMENTATION, {"strides": [2, 2, 2, 2]}, r"strides=\[4, 2, 2, 2\], got"),
        ("nvlabs", SEGMENTATION, {"hidden_act": "relu"}, "hidden_act='gelu', got 'relu'"),
        ("timm", SEGMENTATION, {}, "library: expected 'nvlabs' or 'mmseg' or 'smp', got 'timm'"),
    ],
)
def test_what_a_library_has_not(library, kind, config, told):
    model = ours(kind, **config)
    with pytest.raises(ValueError, match=told) as caught:
        model.state_dict_for(library)
    assert not isinstance(caught.value, CheckpointError)
