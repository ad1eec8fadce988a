"""Images of a batch in threads of their own, on a CPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.inference.workers import worker_count
from fastseg.kernels.blocks.workers import thread_pool
from tests.inference.segment_cases import picture
from tests.model_cases import TINY, randomize

PROCESSOR = fastseg.SegformerImageProcessor(size={"height": 64, "width": 96})


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**TINY)).eval()
    randomize(model)
    return model


class Model(torch.nn.Module):
    """Logits of the mean colour, and who asked for them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = []
        self.together = None

    def forward(self, pixels):
        self.calls.append((threading.get_ident(), torch.get_num_threads(), len(pixels)))
        if self.together is not None:
            self.together.wait(timeout=30)
        return torch.nn.functional.avg_pool2d(pixels * self.weight, 4)


@pytest.mark.parametrize("options", [{}, {"slide": (48, 40)}, {"tta": ["flip", 0.5]}])
def test_the_same_bits_as_each_image_by_itself(model, options):
    images = [picture(50 + 7 * i, 90 - 3 * i, seed=i) for i in range(5)]
    options |= {"processor": PROCESSOR, "return_scores": True, "scores_dtype": torch.float32}
    labels, scores = fastseg.segment(model, images, **options)
    torch.set_num_threads(1)
    for i, image in enumerate(images):
        (one,), (score,) = fastseg.segment(model, image, **options)
        assert torch.equal(labels[i], one)
        assert torch.equal(scores[i], score)
    assert all(len(score.unique()) > 9 for score in scores)


def test_two_images_are_in_two_threads_at_once():
    model = Model().eval()
    model.together = threading.Barrier(2)
    images = [picture(40, 40, seed=i) for i in range(4)]
    found = fastseg.segment(model, images, processor=PROCESSOR)
    threads = {thread for thread, _, _ in model.calls}
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert [numbers for _, *numbers in model.calls] == [[1, 1]] * 4
    model.together = None
    for labels, image in zip(found, images, strict=True):
        assert torch.equal(labels, fastseg.segment(model, image, processor=PROCESSOR)[0])


def test_threads_share_what_torch_has():
    torch.set_num_threads(4)
    model = Model().eval()
    model.together = threading.Barrier(2)
    fastseg.segment(model, [picture(40, 40, seed=i) for i in range(2)], processor=PROCESSOR)
    assert [numbers for _, *numbers in model.calls] == [[2, 1], [2, 1]]


def test_the_numbers_of_all_other_threads_stay():
    seen = []

    def look():
        seen.append(torch.get_num_threads())

    with thread_pool(2, 1) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert torch.get_num_threads() == 2
    assert seen == [2, 2]
    assert not [one for one in threading.enumerate() if one.name.startswith("fastseg")]


def test_an_error_is_of_the_first_image_that_has_one(model):
    images = [picture(40, 40), np.full((4, 4, 3), np.nan), picture(40, 40), np.zeros((0, 4, 3))]
    with pytest.raises(ValueError, match=r"images\[1\]: "):
        fastseg.segment(model, images, processor=PROCESSOR)
    assert not [one for one in threading.enumerate() if one.name.startswith("fastseg")]


def test_where_the_caller_runs_all_by_itself(model):
    assert worker_count(model, 1) == 1
    assert worker_count(model, 2) == 2
    assert worker_count(model, 9) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worker_count(model, 9) == 1
    with FlopCounterMode(display=False):
        assert worker_count(model, 9) == 1
    with torch.autograd.profiler.profile():
        assert worker_count(model, 9) == 1
    assert worker_count(torch.compile(Model(), backend="eager"), 9) == 1
    compiled = torch.nn.Sequential(Model())
    compiled[0].compile(backend="eager")
    assert worker_count(compiled, 9) == 1
    assert worker_count(Model().to("meta"), 9) == 1
    torch.set_num_threads(1)
    assert worker_count(model, 9) == 1


def test_one_forward_of_all_where_there_is_one_thread():
    torch.set_num_threads(1)
    model = Model().eval()
    images = [picture(40, 40, seed=i) for i in range(5)]
    fastseg.segment(model, images, processor=PROCESSOR, batch_size=4)
    assert model.calls == [(threading.get_ident(), 1, 4), (threading.get_ident(), 1, 1)]
