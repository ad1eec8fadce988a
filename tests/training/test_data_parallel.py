"""DistributedDataParallel of two processes: the mean of the gradients of both halves of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import fastseg
from tests.model_cases import TINY, tiny_model


def model_and_batch():
    torch.manual_seed(0)
    model = tiny_model(**{**TINY, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0})
    labels = torch.randint(0, 5, (4, 64, 64))
    labels[:, :9] = 255
    return model.double().train(), torch.randn(4, 3, 64, 64, dtype=torch.float64), labels


def work(rank, store, path):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    model, pixels, labels = model_and_batch()
    half = slice(2 * rank, 2 * rank + 2)
    # Without a search for parameters that get no gradient: all get one.
    wrapped = DistributedDataParallel(model)
    wrapped(pixels[half], labels=labels[half]).loss.backward()
    if rank == 0:
        torch.save({name: one.grad for name, one in model.named_parameters()}, path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    path = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(path)), nprocs=2)
    found = torch.load(path)
    model, pixels, labels = model_and_batch()
    with fastseg.plain_path():
        for half in (slice(0, 2), slice(2, 4)):
            (model(pixels[half], labels=labels[half]).loss / 2).backward()
    exact = {name: one.grad for name, one in model.named_parameters()}
    assert found.keys() == exact.keys()
    largest = max(one.norm() for one in exact.values())
    for name, one in exact.items():
        assert (found[name] - one).norm() < 1e-12 * one.norm() + 1e-14 * largest, name
