"""DistributedDataParallel and FSDP of two processes, with `accelerate(training=True)`."""

from __future__ import annotations

import pytest

from tests.model_cases import randomize
from tests.training import processes
from tests.training.processes import Case, check_equal

transformers = pytest.importorskip("transformers")  # this file is collected where it is there

SIZES = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "decoder_hidden_size": 24,
    "num_labels": 5,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}


def build():
    config = transformers.SegformerConfig(**SIZES)
    model = transformers.SegformerForSemanticSegmentation(config)
    randomize(model)
    return model.double().train()


CASES = [
    Case("data_parallel", build, processes.data_parallel),
    Case("accelerated_inside", build, processes.data_parallel_first, frozen=False),
    Case("accumulated", build, processes.data_parallel, micro_batches=2),
    Case("sharded", build, processes.sharded),
    Case("sharded_batch_statistics", build, processes.sharded, frozen=False),
    Case("sharded_first", build, processes.sharded_first),
    Case("sharded_parts", build, processes.sharded_parts),
    Case("sharded_convolutions", build, processes.sharded_convolutions),
]
# The forms that are left where calls of modules gather weights, and what reports say how often.
LEFT = {
    "sharded_parts": ({"_fused_map": 1}, {": as it is written: has forward hooks": 8}),
    "sharded_convolutions": (
        {"attention": 1},  # of the last stage, which reduces nothing
        {
            ": as it is written: proj has forward hooks": 4,
            "attention: as it is written: ": 3,
            "Mix-FFN: as it is written: mlp.dwconv.dwconv has forward hooks": 4,
            "decode_head, with gradients: as it is written: one of its layers is a FSDPConv2d": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.in_two(tmp_path_factory.mktemp("processes"), processes.trained, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_gradients_and_steps_of_two_processes(case, found):
    """Those of one process with the whole batch, by transformers' own code."""
    ours, exact = found[case.name], processes.expected(case)
    check_equal(ours, exact)
    assert "loss: without resized logits" in ours["report"]
    fast = {name: count / case.micro_batches for name, count in ours["counts"].items() if count}
    of_head = {"_fused_map" if case.frozen else "logits_in_stripes": 1}
    as_written = LEFT.get(case.name)
    if as_written is None:
        assert fast == {"patch_embedding": 4, "attention": 4, "mix_ffn": 4, **of_head}
        assert "as it is written" not in ours["report"]
    else:
        expected_forms, lines = as_written
        assert fast == expected_forms
        assert {line: ours["report"].count(line) for line in lines} == lines
