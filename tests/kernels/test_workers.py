"""Parts of a CPU operator's work in threads: which threads, what they inherit, forks, errors."""

import os
import threading

import pytest
import torch

from fastseg.kernels.blocks.workers import map_parts, parts_each

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def look(part):
    grad = torch.is_grad_enabled()
    return (
        part,
        threading.get_ident(),
        torch.get_num_threads(),
        grad,
        torch.is_inference_mode_enabled(),
    )


def test_parts_in_order_in_threads_of_one():
    meet = threading.Barrier(2)

    def together(part):
        meet.wait(timeout=60)
        return look(part)

    found = map_parts(together, range(4), CPU)
    assert [one[0] for one in found] == [0, 1, 2, 3]
    assert len({one[1] for one in found}) == 2
    assert threading.get_ident() not in {o[1] for o in found}
    assert [one[2:] for one in found] == [(1, False, False)] * 4
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert all(one[4] for one in map_parts(look, range(2), CPU))


def test_in_the_callers_thread():
    def here(parts, device=CPU):
        return {one[1] for one in map_parts(look, parts, device)} == {threading.get_ident()}

    assert not here(range(2))
    assert here(range(1))  # a thread would be idle
    assert here(range(4), torch.device("meta"))
    with torch.profiler.profile():
        assert here(range(4))
    nested = map_parts(lambda _: map_parts(look, range(4), CPU), range(2), CPU)
    assert all(len({one[1] for one in found}) == 1 for found in nested)
    torch.set_num_threads(1)
    assert here(range(4))


def test_errors_are_those_of_the_function():
    def fail(part):
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        map_parts(fail, range(4), CPU)
    assert len(map_parts(look, range(4), CPU)) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_threads_of_its_own():
    map_parts(look, range(2), CPU)
    child = os.fork()
    if child == 0:
        found = map_parts(lambda part: part, range(4), CPU)
        os._exit(0 if found == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("batch", "threads", "each"),
    [(1, 2, 2), (2, 2, 1), (3, 2, 2), (2, 16, 8), (8, 6, 3), (0, 2, 1)],
)
def test_every_thread_gets_as_many(batch, threads, each):
    torch.set_num_threads(threads)
    assert parts_each(batch, CPU) == each
    assert parts_each(batch, torch.device("meta")) == 1
