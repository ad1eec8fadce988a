"""SegGPT in the tests of SegFormer's hosts: modes, weights that change, copies, pickles, graphs.

They are imported, and run on the fixtures of the same names that are here.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastseg
from fastseg.models.seggpt.decoder_plan import DecoderPlan
from fastseg.models.seggpt.encoder_plan import LayerPlan
from tests.models.hosts import test_compile, test_parts, test_weights
from tests.models.hosts.checks import assert_parity, run
from tests.models.hosts.conftest import Calls
from tests.models.hosts.test_compile import (  # noqa: F401
    forget_graphs,
    test_whole_graph,
)
from tests.models.hosts.test_life import (  # noqa: F401
    test_a_pickle_names_its_host,
    test_accelerated_before_weights_are_loaded,
    test_classes_and_names,
    test_copies_are_accelerated_and_fold_for_themselves,
    test_dtypes_and_back,
    test_idempotent,
    test_inner_then_outer,
    test_one_model_leaves_others_alone,
    test_restore_gives_back_what_was,
    test_shallow_copy,
    test_state_dict_before_during_and_after,
    test_to_meta_and_materialised,
)
from tests.models.hosts.test_modes import (  # noqa: F401
    pair,
    test_accelerated_and_first_run_in_inference_mode,
    test_autocast,
    test_back_to_eval_after_training,
    test_gradients_are_the_hosts,
    test_gradients_of_the_input,
    test_gradients_on_and_nothing_that_asks_for_one,
    test_inference_mode,
    test_plain_path,
    test_threads_that_run_first_at_once,
    test_training_mode_under_no_grad,
)
from tests.models.hosts.test_parts import (  # noqa: F401
    test_global_hooks_fire,
    test_hooks_on_all_inner_modules_fire_as_in_the_host,
    test_hooks_on_whole_modules_fire,
    test_removed_again,
    test_report,
    test_strict,
)
from tests.models.hosts.test_weights import (  # noqa: F401
    test_changed_eps_is_noticed,
    test_every_parameter_counts,
    test_one_changed_weight,
    test_what_has_not_changed_is_not_looked_at_twice,
)

from .cases import SMALL, exact_softmax, randomize, theirs


class SegGptHost:
    """As `Host` of SegFormer's tests: what they reach for, and how they call a model."""

    encoder, stage = "model", "model.encoder"
    query = value = "model.encoder.layers.1.attention.qkv"
    ffn, fuse, classifier = "model.encoder.layers.1.mlp.lin1", "decoder.decoder_embed", ""
    multiple = 1

    def __init__(self, name: str) -> None:
        self.name = name  # the library's

    def make(self, **config: Any) -> torch.nn.Module:
        if self.name == "transformers":
            return theirs()
        return fastseg.SegGptForImageSegmentation(fastseg.SegGptConfig(**SMALL))

    def build(self, **config: Any) -> torch.nn.Module:
        """A new model in eval mode with random weights; the number of layers stays."""
        model = self.make().eval()
        randomize(model)
        return model

    def call(self, model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """All tensors that a forward answers with, for three pictures of one."""
        image = pixels[:, :, :32, :32]
        output = model(image, image.flip(3), image.flip(2), output_hidden_states=True)
        return tree_leaves(output)

    def calls(self) -> dict[str, int]:
        return {"layer": SMALL["num_hidden_layers"], "decoder": 1}


# Their plans are the same; that of fastseg's own classes runs in test_parity.py too.
@pytest.fixture(params=["transformers", pytest.param("fastseg", marks=pytest.mark.slow)])
def host(request):
    return SegGptHost(request.param)


@pytest.fixture
def model(host):
    return host.build()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def calls(monkeypatch):
    """Grows by a name for each run of a plan's part."""
    made = Calls()

    @torch.compiler.assume_constant_result
    def note(name):
        made.append(name)

    def counted(name, method):
        def call(*args):
            note(name)
            return method(*args)

        return call

    accelerate = fastseg.accelerate

    def accelerate_unheard(model, **options):
        before = len(made)
        result = accelerate(model, **options)
        del made[before:]
        return result

    monkeypatch.setattr(fastseg, "accelerate", accelerate_unheard)
    for name, plan in (("layer", LayerPlan), ("decoder", DecoderPlan)):
        monkeypatch.setattr(plan, "run", counted(name, plan.run))
    return made


@pytest.fixture(autouse=True)
def references_are_exact():
    with exact_softmax():
        yield


@pytest.mark.parametrize(
    "change",
    [
        test_weights.sgd,
        test_weights.foreach,
        test_weights.fused_in_training,
        test_weights.load,
        test_weights.load_assigned,
        test_weights.replace_parameters,
        test_weights.exchange_data,
        test_weights.swap_tensors,
        test_weights.scale_in_inference_mode,
        test_weights.average,
    ],
)
def test_changed_weights_are_noticed(host, model, pixels, calls, change):
    test_weights.test_changed_weights_are_noticed(host, model, pixels, calls, change)


@pytest.mark.slow
def test_compiled_graph_sees_changed_weights(host, pixels):
    test_compile.test_compiled_graph_sees_changed_weights(host, pixels)


@pytest.mark.slow
def test_whole_graph_by_aot_eager(host, pixels, calls):
    test_compile.test_whole_graph_after_a_forward(host, pixels, calls, frozen=False)


@pytest.mark.parametrize("name", ["rel_pos_h", "rel_pos_w"])
def test_changed_tables_are_noticed(host, model, pixels, name):
    """They alone are folded; all other weights are read where they are."""
    fastseg.accelerate(model)
    plain = copy.deepcopy(model)
    fastseg.restore(plain)
    before = run(host, model, pixels)[0]
    for each in (model, plain):
        with torch.no_grad():
            getattr(each.model.encoder.layers[2].attention, name).mul_(-2)
    assert not torch.allclose(run(host, model, pixels)[0], before)
    with fastseg.plain_path():
        expected = run(host, plain.double(), pixels.double())[0]
    torch.testing.assert_close(run(host, model, pixels)[0].double(), expected, rtol=1e-4, atol=1e-4)


ROLES = {
    "qkv": ("model.encoder.layers.1.attention.qkv", r"encoder.layers.1, attention: "),
    "lin1": ("model.encoder.layers.1.mlp.lin1", r"encoder.layers.1, MLP: "),
    "decoder": ("decoder.decoder_pred.conv", "decoder( |:)"),
}


@pytest.mark.every(5)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("first", ["changed", "accelerated"])
@pytest.mark.parametrize("change", test_parts.CHANGES)
def test_changed_layer_is_not_left_out(host, model, pixels, role, change, first):
    path, line = ROLES[role]
    plain = copy.deepcopy(model)
    change(plain, path)
    if first == "changed":
        change(model, path)
        fastseg.accelerate(model)
    else:
        fastseg.accelerate(model)
        run(host, model, pixels)
        change(model, path)
    for each in (model, plain):
        each.eval()
    assert_parity(host, model, plain, pixels)
    with torch.no_grad():
        report = fastseg.report(model)
    if change is test_parts.subclass and first == "changed" and host.name != "fastseg":
        # Tried out: what it computes is right, as the layer itself is called.
        assert not re.search(line + "the host", report)
        return

    assert re.search(line, report), report
    assert "plain: " in report or "own: " in report


@pytest.mark.parametrize("what", ["", ".attention", ".mlp", ".layernorm_before"])
@pytest.mark.parametrize("kind", ["the same", "another"])
def test_exchanged_afterwards(host, model, pixels, what, kind):
    fastseg.accelerate(model)
    plain = copy.deepcopy(model)
    fastseg.restore(plain)
    run(host, model, pixels)
    for each in (model, plain):
        layer = each.model.encoder.layers[2]
        new = copy.deepcopy(each.get_submodule(f"model.encoder.layers.2{what}"))
        if kind == "another":

            class Changed(type(new)):
                def forward(self, *args, **kwargs):
                    output = super().forward(*args, **kwargs)
                    is_tuple = isinstance(output, tuple)
                    return (output[0].relu(), *output[1:]) if is_tuple else output.relu()

            new.__class__ = Changed
            Changed.__module__ = "user"
        with torch.no_grad():
            next(new.parameters()).mul_(-1)
        if what:
            setattr(layer, what[1:], new)
        else:
            each.model.encoder.layers[2] = new
    assert_parity(host, model, plain, pixels)
    with torch.no_grad():
        is_own = "since it was tried out" in fastseg.report(model) or "is a Changed" in (
            fastseg.report(model)
        )
    assert is_own == (kind == "another")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_attention_of_another_scale(host, model, pixels, scale):
    attention = model.model.encoder.layers[2].attention
    attention.scale = attention.scale * scale
    plain = copy.deepcopy(model)
    fastseg.accelerate(model, strict=True)
    assert_parity(host, model, plain, pixels)


def test_a_layer_that_computes_something_else_is_refused(host, model, pixels):
    if host.name == "fastseg":
        pytest.skip("its own classes are not tried out")
    kind = type(model.model.encoder.layers[1])

    class Parallel(kind):
        """Attention and MLP beside each other, as in other transformers."""

        def forward(self, x, ensemble_cond, feature_ensemble=False, output_attentions=False):
            out = x + self.attention(self.layernorm_before(x))[0]
            return (out + self.mlp(self.layernorm_after(x)),)

    for layer in model.model.encoder.layers:
        layer.__class__ = Parallel
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(host, model, plain, pixels)
    with pytest.raises(ValueError, match="computes something else than a SegGPT's"):
        fastseg.accelerate(copy.deepcopy(plain), strict=True)
