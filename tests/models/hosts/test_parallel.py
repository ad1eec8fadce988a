"""Wrappers that copy or drive a model: DistributedDataParallel and DataParallel's replicas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastseg

from .checks import assert_parity, errors, fresh, reference, run, same_bits


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(host, model, pixels, calls, process_group):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    calls.clear()
    outcomes = []
    for each in (model, plain):
        wrapped = nn.parallel.DistributedDataParallel(each.train(), find_unused_parameters=True)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
        sum(t.square().mean() for t in host.call(wrapped, pixels)).backward()
        optimizer.step()
        outcomes.append(list(each.state_dict().values()))
    assert calls == []
    assert same_bits(*outcomes)
    wrapped = nn.parallel.DistributedDataParallel(model.eval())
    assert_parity(host, wrapped, fresh(host, model), pixels)
    assert calls.count_and_clear() == host.calls()


def test_accelerated_inside_a_wrapper(host, model, pixels, calls, process_group):
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert fastseg.accelerate(wrapped) is wrapped
    assert_parity(host, wrapped.eval(), plain, pixels)
    assert calls.count_and_clear() == host.calls()


def replica_of(model):
    """A replica as DataParallel makes it on a second device: its tensors are no parameters."""
    replicas = {}
    for name, module in model.named_modules():
        replicas[name] = module._replicate_for_data_parallel()
    for name, module in model.named_modules():
        replica = replicas[name]
        for child in module._modules:
            path = f"{name}.{child}" if name else child
            if path in replicas:
                setattr(replica, child, replicas[path])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.clone())
        for key, buffer in module._buffers.items():
            if buffer is not None:
                setattr(replica, key, buffer.clone())
    return replicas[""]


def test_data_parallel_replica(host, model, pixels):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    replica = replica_of(model)
    for error in errors(run(host, replica, pixels), reference(host, plain, pixels)):
        assert error <= 2e-6
    # Gradients flow from a replica to the weights that it was made of.
    sum(t.square().mean() for t in host.call(replica, pixels)).backward()
    ours = [p.grad for p in model.parameters()]
    sum(t.square().mean() for t in host.call(plain, pixels)).backward()
    theirs = [p.grad for p in plain.parameters()]
    assert sum(g is not None for g in ours) == sum(g is not None for g in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other)
    assert_parity(host, model, plain, pixels)


def test_data_parallel_without_devices(host, model, pixels, calls):
    plain = copy.deepcopy(model)
    wrapped = nn.DataParallel(model)
    fastseg.accelerate(wrapped)
    assert_parity(host, wrapped, plain, pixels)
    assert calls.count_and_clear() == host.calls()
