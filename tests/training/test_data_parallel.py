"""DistributedDataParallel and FSDP of two processes, of fastseg's own models."""

from __future__ import annotations

import pytest
import torch

import fastseg
from tests.model_cases import TINY, tiny_model

from . import processes
from .processes import Case, check_equal

PLAIN = {**TINY, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}


def build():
    return tiny_model(**PLAIN).double().train()


def checkpointed():
    model = build()
    model.gradient_checkpointing_enable()
    return model


CASES = [
    Case("data_parallel", build, processes.data_parallel),
    Case("batch_statistics", build, processes.data_parallel, frozen=False),
    Case("accumulated", build, processes.data_parallel, micro_batches=2),
    Case("checkpointed", checkpointed, processes.data_parallel),
    Case("sharded", build, processes.sharded),
    Case("sharded_checkpointed", checkpointed, processes.sharded),
    Case("sharded_batch_statistics", build, processes.sharded, frozen=False),
    Case("sharded_parts", build, processes.sharded_parts),
]
ALL_FAST = {"patch_embedding": 4, "attention": 4, "mix_ffn": 4}
LOSS = "SegformerForSemanticSegmentation, loss: without resized logits"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.in_two(tmp_path_factory.mktemp("processes"), processes.trained, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_gradients_and_steps_of_two_processes(case, found):
    """Those of one process with the whole batch, by torch's operators."""
    ours, exact = found[case.name], processes.expected(case)
    check_equal(ours, exact)
    assert LOSS in ours["report"]
    fast = {name: count for name, count in ours["counts"].items() if count}
    of_head = {"logits_in_stripes" if not case.frozen else "_fused_map": 1}
    if case.name == "sharded_parts":
        assert fast == of_head
        assert "block.0.0: as it is written: has forward hooks" in ours["report"]
        assert "patch_embeddings.1: as it is written: has forward hooks" in ours["report"]
    else:
        fast = {name: count // case.micro_batches for name, count in fast.items()}
        twice = 2 if case.build is checkpointed else 1  # layers alone
        assert fast == {**ALL_FAST, **of_head, "attention": 4 * twice, "mix_ffn": 4 * twice}
        assert "encoder, with gradients: on tokens" in ours["report"]
        assert "as it is written" not in ours["report"]
    assert "decode_head, with gradients: every projection at its own" in ours["report"]


def evaluated(case, rank):
    """Logits before and after a change of the shards, where what is gathered lies where it lay."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    _fsdp_param.free_storage = lambda tensor: None  # as a caching allocator gives it again
    model = case.wrap(processes.built(case)).eval()
    pixels, _ = processes.batch()
    logits = []
    for _ in range(2):
        with torch.no_grad():
            logits.append(model(pixels).logits)
        model.reshard()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    with torch.no_grad():
        return {"logits": logits, "report": fastseg.report(model)}


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("sharded", build, processes.sharded)])
def test_nothing_is_folded_of_shards(case, tmp_path):
    found = processes.in_two(tmp_path, evaluated, [case])[case.name]
    model = processes.built(case).eval()
    pixels, _ = processes.batch()
    with torch.no_grad(), fastseg.plain_path():
        for ours in found["logits"]:
            torch.testing.assert_close(ours, model(pixels).logits, rtol=1e-10, atol=1e-10)
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert "encoder: plain: FSDP gathers its weights for each forward" in found["report"]
    assert "decode_head: plain: FSDP gathers" in found["report"]
