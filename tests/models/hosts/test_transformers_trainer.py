"""Around `accelerate(training=True)`: checkpointing, Trainer, adapters, averages, torch.func."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastseg
from fastseg.models.segformer import encoder_training
from fastseg.training import head
from fastseg.training.masks import compared

from .test_transformers_training import build, check_equal, draw

transformers = pytest.importorskip("transformers")  # this file is collected where it is there
IS_5 = transformers.__version__.startswith("5")
PLAIN = {"drop_path_rate": 0.0}


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    """Calls of the forms for training, small as the maps are."""
    monkeypatch.setattr(encoder_training, "_MAKE_AGAIN_FROM", 0)
    monkeypatch.setattr(head, "_FEWEST", 0)
    made = []
    for where, name in (
        (encoder_training, "attention"),
        (encoder_training, "mix_ffn"),
        (head, "logits_in_stripes"),
    ):
        function = getattr(where, name)
        monkeypatch.setattr(
            where,
            name,
            lambda *given, name=name, function=function, **options: (
                made.append(name) or function(*given, **options)
            ),
        )
    return made


def counts(forms):
    found = tuple(forms.count(name) for name in ("attention", "mix_ffn", "logits_in_stripes"))
    forms.clear()
    return found


def gradients(model, pixels, labels):
    """Loss and gradients of what has one, by name."""
    model.zero_grad()
    torch.manual_seed(5)
    with compared():
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **found}


def check(ours, exact):
    assert ours.keys() == exact.keys()
    check_equal(list(ours.values()), list(exact.values()))


# -- checkpointing ---------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_5, reason="4.57's Segformer has none")
@pytest.mark.parametrize("arguments", [{}, {"use_reentrant": True}])
def test_gradient_checkpointing(arguments, forms):
    model = build(classifier_dropout_prob=0.3).double()
    fast = fastseg.accelerate(copy.deepcopy(model), training=True)
    drawn = draw()
    exact = gradients(model, *drawn)
    forms.clear()
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    check(gradients(fast, *drawn), exact)
    assert counts(forms) == (10, 10, 1)
    fast.gradient_checkpointing_disable()
    check(gradients(fast, *drawn), exact)
    assert counts(forms) == (5, 5, 1)


# -- Trainer ---------------------------------------------------------------------------------------


def trainer(model, folder, loss=None, **options):
    pixels, labels = draw(batch=6)
    labels[:, :9] = 255
    data = [{"pixel_values": one, "labels": two} for one, two in zip(pixels, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **options},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:2],
        compute_loss_func=loss,
    )


def both(folder, options, loss=None, plain_loss=None):
    """Trainers of transformers' own model and of an accelerated one, trained."""
    torch.manual_seed(2)
    model = build(**PLAIN, classifier_dropout_prob=0.0).double()
    trainers = []
    for name, one, its_loss in (
        ("plain", copy.deepcopy(model), plain_loss),
        ("fast", fastseg.accelerate(model, training=True), loss),
    ):
        torch.manual_seed(4)
        trainers.append(trainer(one, folder / name, its_loss, **options))
        trainers[-1].train()
    return trainers


def check_runs(ours, theirs, names=("loss", "eval_loss")):
    for name in names:
        found, exact = (
            [entry[name] for entry in one.state.log_history if name in entry]
            for one in (ours, theirs)
        )
        assert found
        assert found == pytest.approx(exact, rel=1e-4 if name == "loss" else 1e-9)
    exact = theirs.model.state_dict()
    for name, one in ours.model.state_dict().items():
        torch.testing.assert_close(one, exact[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.slow
def test_trainer_keeps_the_best(tmp_path, forms):
    """With accumulation and, where there is one, checkpointing; evaluation runs folded."""
    options = {"gradient_accumulation_steps": 2, "load_best_model_at_end": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.02}
    options |= {"gradient_checkpointing": IS_5}
    theirs, ours = both(tmp_path, options)
    check_runs(ours, theirs)
    assert forms
    best = [one.state.best_model_checkpoint.rpartition("-")[2] for one in (ours, theirs)]
    assert best[0] == best[1]
    model = ours.model.eval()
    # As for resuming: Trainer does not find the names that transformers 5 has saved.
    read = type(model).from_pretrained(ours.state.best_model_checkpoint, dtype=torch.float64)
    model.load_state_dict(read.state_dict())
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-9)
    with torch.no_grad():
        pixels, _ = draw()
        logits = model(pixels).logits
        assert "decode_head (transformers): folded" in fastseg.report(model)
        with fastseg.plain_path():
            torch.testing.assert_close(logits, model(pixels).logits, rtol=1e-9, atol=1e-9)


def smoothed(outputs, labels, num_items_in_batch=None):
    return fastseg.kernels.upsample_cross_entropy(
        outputs["logits"], labels, ignore_index=255, label_smoothing=0.1
    )


def plainly_smoothed(outputs, labels, num_items_in_batch=None):
    logits = nn.functional.interpolate(outputs["logits"], labels.shape[1:], mode="bilinear")
    return nn.functional.cross_entropy(logits, labels, ignore_index=255, label_smoothing=0.1)


@pytest.mark.slow
def test_trainer_with_label_smoothing(tmp_path):
    """By a loss of one's own: Trainer's option takes no maps, with fastseg or without."""
    theirs, ours = both(tmp_path, {"save_strategy": "no"}, smoothed, plainly_smoothed)
    check_runs(ours, theirs, ["loss"])
    for one in (ours.model, theirs.model):
        options = {"label_smoothing_factor": 0.1, "save_strategy": "no"}
        with pytest.raises(RuntimeError, match="Size does not match"):
            trainer(one, tmp_path / "option", **options).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accelerated", "plain", "fastseg"])
def test_trainer_resumes_exactly(kind, tmp_path, forms):
    """With dropout, stochastic depth and statistics of BatchNorm, to the bit.

    transformers 5 saves other names than it has in memory, and its Trainer finds none of them when
    it resumes, which is a warning: so weights are read before, as the documents say. Those of
    fastseg's class are found.
    """
    torch.manual_seed(2)
    first = build(classifier_dropout_prob=0.3).double()
    if kind == "fastseg":
        config = fastseg.SegformerConfig.from_dict(first.config.to_dict())
        first = fastseg.SegformerForSemanticSegmentation(config).double()
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = copy.deepcopy(first)
        if checkpoint is not None and kind != "fastseg":
            read = type(first).from_pretrained(checkpoint, dtype=torch.float64)
            model.load_state_dict(read.state_dict())
        if kind == "accelerated":
            fastseg.accelerate(model, training=True)
        forms.clear()
        torch.manual_seed(4)
        trainer(model, tmp_path, save_steps=2).train(resume_from_checkpoint=checkpoint)
        assert counts(forms)[2] == (0 if kind == "plain" else 4 if checkpoint is None else 2)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, one in states[0].items():
        assert torch.equal(one, states[1][name]), name


# -- adapters --------------------------------------------------------------------------------------

ATTENTION = ["q_proj", "v_proj"] if IS_5 else ["query", "value"]


@pytest.mark.parametrize("first", ["lora", "accelerated"])
def test_lora(first, forms):
    """The attentions with adapters run as they are written, the classifier's copy as it is."""
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(11)
        config = peft.LoraConfig(
            r=4,
            target_modules=ATTENTION,
            init_lora_weights=False,
            lora_dropout=0.2,
            modules_to_save=["classifier"],
        )
        return peft.get_peft_model(model, config).double()

    model = build().double()
    plain = lora(copy.deepcopy(model))
    if first == "lora":
        adapted = fastseg.accelerate(lora(model), training=True)
    else:
        adapted = lora(fastseg.accelerate(model, training=True))
    pixels, labels = draw()
    forms.clear()
    exact = gradients(plain, pixels, labels)
    assert not forms
    ours = gradients(adapted, pixels, labels)
    assert sum("lora_" in name for name in ours) == 2 * 2 * 5
    assert sum("classifier" in name for name in ours) == 2
    check(ours, exact)
    assert counts(forms) == (0, 5, 0)
    report = fastseg.report(adapted)
    assert report.count("attention: as it is written: ") == 5
    assert "Mix-FFN: as it is written" not in report
    line = (
        "decode_head, with gradients: every projection at its own stage's size, the rest as it is"
    )
    assert f"{line}: its classifier is a" in report
    assert "loss: without resized logits" in report


class Adapter(nn.Module):
    """A linear layer with a low-rank one beside it, as written by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind", ["adapter", "parametrization"])
def test_changed_layers_and_the_rest(kind, forms):
    """One Mix-FFN, one attention and one projection of the head; where they were changed before."""
    model = build().double()
    ends = ("fc1", "dense1"), ("q_proj", "query"), ("proj",)
    for end in ends:
        name, layer = next(
            (name, one)
            for name, one in model.named_modules()
            if isinstance(one, nn.Linear) and name.rpartition(".")[2] in end
        )
        if kind == "parametrization":
            nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
        else:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapter(layer).double())
    fast = fastseg.accelerate(copy.deepcopy(model), training=True)
    drawn = draw()
    exact = gradients(model, *drawn)
    forms.clear()
    check(gradients(fast, *drawn), exact)
    assert counts(forms) == (4, 4, 0)
    report = fastseg.report(fast)
    assert report.count("attention: as it is written") == 1
    assert report.count("Mix-FFN: as it is written") == 1
    assert "decode_head, with gradients: as it is written: one of its layers is a" in report
