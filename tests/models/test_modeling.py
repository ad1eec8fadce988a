"""What users touch of the models: outputs, names, defaults and errors."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastseg
from tests.model_cases import TINY, randomize

MODELS = ["SegformerModel", "SegformerForSemanticSegmentation", "SegformerForImageClassification"]


def make(name="SegformerForSemanticSegmentation", **changes):
    config = fastseg.SegformerConfig(**{**TINY, **changes})
    return getattr(fastseg, name)(config).eval()


@pytest.fixture
def pixel_values():
    return torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_by_name_index_and_tuple(name, pixel_values):
    model = make(name)
    labels = None
    if name == "SegformerForSemanticSegmentation":
        labels = torch.zeros(1, 64, 64, dtype=torch.long)
    elif name == "SegformerForImageClassification":
        labels = torch.tensor([1])
    arguments = {} if labels is None else {"labels": labels}
    theirs = getattr(transformers, name)(
        transformers.SegformerConfig(**TINY, attn_implementation="eager")
    ).eval()
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        result = model(pixel_values, **arguments, **asked)
        expected = theirs(pixel_values, **arguments, **asked)
        as_tuple = model(pixel_values, **arguments, **asked, return_dict=False)
    assert tuple(result.keys()) == tuple(expected.keys())
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(result) == len(expected)
    for index, key in enumerate(result.keys()):
        value = result[key]
        assert value is result[index] is getattr(result, key)
        assert type(value) is type(expected[key])
        first, theirs_first = (v if torch.is_tensor(v) else v[0] for v in (value, expected[key]))
        assert first.shape == theirs_first.shape
    assert list(result) == list(expected)
    assert "logits" in result or name == "SegformerModel"
    assert "nothing" not in result
    assert result[:1] == (result[0],)
    with pytest.raises(KeyError, match="nothing"):
        result["nothing"]


def test_defaults_of_forward_come_from_the_config(pixel_values):
    model = make(output_hidden_states=True, output_attentions=True, return_dict=False)
    with torch.no_grad():
        logits, hidden_states, attentions = model(pixel_values)
        output = model(pixel_values, output_hidden_states=False, return_dict=True)
    assert logits.shape == (1, 5, 16, 16)
    assert len(hidden_states) == len(attentions) == 4
    assert output.hidden_states is None


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_is_that_of_transformers(name):
    torch.manual_seed(0)
    changes = {"hidden_sizes": [32, 64, 160, 256], "initializer_range": 0.05}
    model = make(name, **changes)
    theirs = getattr(transformers, name)(transformers.SegformerConfig(**{**TINY, **changes}))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx(0.05, rel=0.05)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert sum(p.numel() for p in model.parameters()) == theirs.num_parameters()
    eps = {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}


def test_drop_path_rates_rise_over_the_layers():
    model = make(depths=[1, 2, 1, 2], drop_path_rate=0.5)
    rates = [
        layer.drop_path.drop_prob for stage in model.segformer.encoder.block for layer in stage
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("pixels", "error", "text"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "pixel_values: .*uint8"),
        ("picture", TypeError, "pixel_values: .*str"),
        (torch.zeros(3, 64, 64), ValueError, r"pixel_values: .*\(3, 64, 64\)"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"pixel_values: .*3.*\(1, 4, 64, 64\)"),
        (torch.zeros(0, 3, 64, 64), ValueError, r"pixel_values: .*\(0, 3, 64, 64\)"),
        (torch.zeros(1, 3, 20, 64), ValueError, "pixel_values: .*stage 1.*8.*5x16"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_wrong_pixels(name, pixels, error, text):
    with torch.no_grad(), pytest.raises(error, match=text):
        make(name)(pixels)


def test_wrong_labels(pixel_values):
    with pytest.raises(ValueError, match=r"labels: .*\(1, height, width\).*\(64, 64\)"):
        make()(pixel_values, labels=torch.zeros(64, 64, dtype=torch.long))


def test_wrong_maps_for_the_head():
    head = make().decode_head
    with pytest.raises(ValueError, match="encoder_hidden_states: expected 4 maps"):
        head([torch.zeros(1, 8, 4, 4)])
    with pytest.raises(ValueError, match="encoder_hidden_states: expected 4 maps"):
        head([torch.zeros(1, 16, 8)] * 4)


def test_wrong_config():
    with pytest.raises(TypeError, match="config: expected a SegformerConfig, got dict"):
        fastseg.SegformerModel({})


def test_nan_pixels_stay_visible(pixel_values):
    model = make()
    randomize(model)
    pixel_values[0, 0, 5, 5] = float("nan")
    with torch.no_grad():
        assert model(pixel_values).logits.isnan().any()


def replica_of(module):
    """A replica as DataParallel makes it: its weights are tensors computed from the parameters."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    replica._modules = {name: replica_of(child) for name, child in module._modules.items()}
    return replica


def test_data_parallel(pixel_values):
    model = make()
    model(pixel_values)
    outputs = [replica_of(model)(part) for part in (pixel_values, 2 * pixel_values)]
    gathered = gather_map(outputs)
    torch.testing.assert_close(
        gathered.logits, model(torch.cat([pixel_values, 2 * pixel_values])).logits
    )
    assert gathered.loss is None
    gathered.logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():  # folded
        result = replica_of(model)(pixel_values).logits
        torch.testing.assert_close(result, model(pixel_values).logits)


def gather_map(outputs):
    """torch.nn.parallel.gather's treatment of dicts, without its CUDA tensors."""
    assert isinstance(outputs[0], dict)
    return type(outputs[0])((key, torch.cat([out[key] for out in outputs])) for key in outputs[0])


def test_backends(monkeypatch):
    assert fastseg.kernels.select_backend("cpu")[0] == "eager"
    with fastseg.backend("eager"):
        assert "asked for" in fastseg.kernels.select_backend("cpu")[1]
    with pytest.raises(ValueError, match="backend: .*'cuda'"), fastseg.backend("cuda"):
        pass
    with fastseg.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        fastseg.kernels.layer_norm(torch.zeros(1, 4))
    assert fastseg.kernels.requested_backend() == "auto"
    monkeypatch.setenv("FASTSEG_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTSEG_BACKEND: .*'fast'"):
        fastseg.kernels.select_backend("cpu")
