"""A family of a few lines is loaded, made fast, reported on, saved and exported as SegFormer is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.checkpoints.translation import CheckpointNames
from fastseg.exporting.folded import ExportedPlan, FoldedStage
from fastseg.folding.find import find_conv2d, find_layer_norm
from fastseg.folding.fold import Part
from fastseg.folding.swap import Accelerated, register_host, with_plan
from fastseg.folding.trial import apart, difference, trial_copy
from fastseg.kernels import patch_embed
from fastseg.kernels.blocks.tokens import tokens_to_map
from fastseg.models import families
from fastseg.models.base import PreTrainedModel
from fastseg.models.segformer.fold import fold_patch_embed
from tests.model_cases import relative_error


class ToyConfig:
    model_type = "toy"

    def __init__(self, width=8, num_labels=3, initializer_range=0.3, **kwargs):
        self.__dict__.update(kwargs, width=width, num_labels=num_labels, id2label={})
        self.initializer_range = initializer_range

    def to_dict(self):
        return {**vars(self), "model_type": self.model_type}

    @classmethod
    def from_dict(cls, fields):
        return cls(**{k: v for k, v in fields.items() if k not in ("model_type", "id2label")})


class ToyPlan(ExportedPlan):
    def __init__(self, encoder, own):
        self.encoder = encoder
        self.embed = Part(encoder, [encoder.proj, encoder.norm], self._fold, own)

    def _fold(self):
        return fold_patch_embed(
            find_conv2d(self.encoder, "proj"), find_layer_norm(self.encoder, "norm")
        )

    def parts(self):
        return [self.embed]

    def is_current(self):
        return self.embed.roots == [self.encoder.proj, self.encoder.norm]

    def weights(self):
        yield "patch_embed", self.embed.folded()

    def folded_stages(self):
        return (FoldedStage(self.embed.folded(), (), self.encoder.last),)


class ToyHost:
    method = "forward"

    def __init__(self, name, own):
        self.name, self.own = name, own

    def plan(self, encoder, refused):
        return ToyPlan(encoder, self.own)

    def answer(self, encoder, plan, pixel_values):
        tokens, *grid = patch_embed(pixel_values, plan.embed.folded())
        return tokens_to_map(encoder.last(tokens), *grid)


class OtherEncoder(nn.Module):
    """Of another library, with the same names."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, 3, stride=2, padding=1)
        self.norm, self.last = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, pixel_values):
        grid = self.proj(pixel_values)
        tokens = self.last(self.norm(grid.flatten(2).transpose(1, 2)))
        return tokens_to_map(tokens, *grid.shape[2:])


class ToyEncoder(Accelerated, OtherEncoder):
    _fastseg_host = ToyHost("fastseg's toy", own=True)
    forward = with_plan(OtherEncoder.forward)


ToyEncoder.__module__ = "fastseg.models.toy"  # as a family of fastseg's own has it


class ToyModel(PreTrainedModel):
    config_class, checkpoint_names = ToyConfig, CheckpointNames()

    def __init__(self, config):
        super().__init__(config)
        self.encoder = ToyEncoder(config)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.apply(self._init_weights)

    def forward(self, pixel_values):
        return self.classifier(self.encoder(pixel_values).mean(dim=(2, 3)))

    def _without_head(self):
        return {"classifier": self.classifier, "id2label": {}}


OTHER = ToyHost("another library's toy", own=False)
register_host(OTHER)


@apart()
def try_out(module, host):
    twin = trial_copy(module)
    plan = host.plan(twin, {})
    plan.settle()
    pixels = torch.randn(1, 3, 9, 11)
    return difference(twin(pixels), host.answer(twin, plan, pixels), "toy"), {}


TOY = families.Family(
    title="toy",
    models=(ToyModel,),
    find_hosts=lambda module: [OTHER] if type(module) is OtherEncoder else [],
    try_out=try_out,
    presets=("toy_small",),
    from_preset=lambda name, num_classes, *_, **kwargs: ToyModel(
        ToyConfig(num_labels=num_classes or 3, **kwargs)
    ),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    families.register_family(TOY)
    yield
    del families.FAMILIES["toy"]


@pytest.fixture
def model():
    return fastseg.from_preset("toy_small", num_classes=5).eval()


@torch.no_grad()
def errors(model):
    pixels = torch.randn(2, 3, 21, 18)
    with fastseg.plain_path():
        expected = copy.deepcopy(model).double()(pixels.double())
    return relative_error(model(pixels), expected)


def test_it_is_fast_from_the_start(model):
    assert errors(model) < 2e-6
    with torch.no_grad():
        assert fastseg.report(model).startswith("encoder: folded, eager")
        model.encoder.proj.weight.mul_(2)
        assert errors(model) < 2e-6
        model.encoder.norm.register_forward_hook(lambda *_: None)
        assert "encoder: plain: norm has forward hooks" in fastseg.report(model)
    assert "gradients are on" in fastseg.report(model)
    assert errors(copy.deepcopy(model)) < 2e-6


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (fastseg.from_pretrained(tmp_path), ToyModel.from_pretrained(tmp_path)):
        assert type(loaded) is ToyModel
        assert loaded.config.num_labels == 5
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(fastseg.CheckpointError, match="expected model_type 'segformer', got 'toy'"):
        fastseg.SegformerModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(fastseg.CheckpointError, match="names of transformers"):  # the first family
        fastseg.from_pretrained(tmp_path)


def test_the_first_family_stays_what_it_was(tmp_path):
    fastseg.from_preset("segformer_b0", num_classes=2).save_pretrained(tmp_path)
    loaded = fastseg.from_pretrained(tmp_path)
    assert type(loaded) is fastseg.SegformerForSemanticSegmentation


def test_another_librarys_is_accelerated():
    torch.manual_seed(0)
    model = nn.Sequential(OtherEncoder(ToyConfig())).eval()
    expected = model(torch.ones(1, 3, 8, 8))
    assert fastseg.accelerate(model, strict=True) is model
    assert errors(model) < 2e-6
    with torch.no_grad():
        assert "0 (another library's toy): folded, eager" in fastseg.report(model)
    assert type(pickle.loads(pickle.dumps(model))[0]).__name__ == "OtherEncoder"
    assert torch.equal(fastseg.restore(model)(torch.ones(1, 3, 8, 8)), expected)
    with pytest.raises(ValueError, match="model: expected one with a SegFormer or .*toy in it"):
        fastseg.accelerate(nn.Linear(2, 2))


def test_exported(model, tmp_path):
    result = fastseg.export(model, tmp_path / "toy.pt2")
    assert result.checked
    program = torch.export.load(result.path).module()
    pixels = torch.randn(3, 3, 16, 20)
    with torch.no_grad():
        torch.testing.assert_close(program(pixels), model(pixels))


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="one of model_type 'toy' already"):
        families.register_family(TOY)
