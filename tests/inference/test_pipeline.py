"""The pipeline of pictures: order, bounds, errors, batches, and its end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import weakref

import pytest

from fastseg.inference import pipeline as module
from fastseg.inference.pipeline import Pipeline


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("fastseg")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


def make(read=None, model=None, write=None, **options) -> Pipeline:
    """A pipeline that counts by tens, but for the stages given."""

    def read_ten(item, place):
        with place(1):
            return item * 10

    return Pipeline(
        read or read_ten,
        model or (lambda given: [one + 1 for one in given]),
        write or (lambda item, given, found: (item, given, found)),
        **{"kind": bool, "workers": 3, **options},
    )


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"model_threads": 3, "workers": 1}])
def test_order_is_kept(options):
    """Whatever takes how long."""
    sleep = random.Random(0)

    def read(item, place):
        with place(1):
            time.sleep(sleep.uniform(0, 0.004))
            return item * 10

    def model(given):
        time.sleep(sleep.uniform(0, 0.004))
        return [one + 1 for one in given]

    def write(item, given, found):
        time.sleep(sleep.uniform(0, 0.004))
        return item, given, found

    with make(read, model, write, **options) as pipeline:
        outcomes = list(pipeline.run(iter(range(60))))
    assert [one.result for one in outcomes] == [(n, 10 * n, 10 * n + 1) for n in range(60)]
    assert all(set(one.seconds) == {"read", "model", "write"} for one in outcomes)
    assert 0 < pipeline.busy_share() <= 1


@pytest.mark.parametrize("stage", ["read", "model", "write"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_error_is_an_outcome(stage, batch_size):
    def fail(number):
        if number in (3, 4, 11):
            raise MemoryError(f"no {number}")

    def read(item, place):
        with place(1):
            if stage == "read":
                fail(item)
            return item

    def model(given):
        for one in given if stage == "model" else ():
            fail(one)
        return given

    def write(item, given, found):
        if stage == "write":
            fail(item)
        return found

    with make(read, model, write, batch_size=batch_size) as pipeline:
        outcomes = list(pipeline.run(range(12)))
    assert [one.item for one in outcomes] == list(range(12))
    for one in outcomes:
        if one.item in (3, 4, 11):
            assert (str(one.error), one.stage) == (f"no {one.item}", stage)
            assert one.error.__traceback__ is None  # whose frames hold the picture
        else:
            assert (one.error, one.result) == (None, one.item)


class Picture:
    """What can be counted."""


@pytest.mark.parametrize("slow", ["read", "model", "write", "first"])
def test_pictures_that_are_alive_are_bounded(slow):
    made: list[weakref.ref] = []
    lock = threading.Lock()
    most = 0
    held = threading.Event()

    def read(item, place):
        nonlocal most
        with place(1):
            picture = Picture()
        with lock:
            made.append(weakref.ref(picture))
            most = max(most, sum(one() is not None for one in made))
        pause("read")
        return picture

    def pause(stage):
        if stage == slow:
            time.sleep(0.003)

    def model(given):
        pause("model")
        return [None] * len(given)

    def write(item, given, found):
        if slow == "first" and item == 0:
            held.wait(10)
        if item == 150:
            held.set()
        pause("write")

    with make(read, model, write, workers=2) as pipeline:
        assert sum(1 for _ in pipeline.run(range(200))) == 200
    assert len(made) == 200
    assert most <= 2 + 2 * 1 + 1  # workers, the model's two, and one from hand to hand
    assert not any(one() is not None for one in made)


def test_items_are_asked_for_as_there_is_room(monkeypatch):
    """One that takes long holds the others back in the end, as order is kept."""
    monkeypatch.setattr(module, "_AHEAD", 20)
    asked = itertools.count()
    held = threading.Event()

    def write(item, given, found):
        if item == 0:
            held.wait(10)

    with make(write=write) as pipeline:
        outcomes = pipeline.run(next(asked) for _ in itertools.count())
        threading.Timer(0.2, held.set).start()
        assert next(outcomes).item == 0
        assert next(asked) == 20
        assert [next(outcomes).item for _ in range(100)] == [*range(1, 20), *range(21, 102)]
        outcomes.close()


def test_large_pictures_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(module, "PIXELS", 100)
    sizes = [10, 99, 30, 30, 30, 30, 250, 5, 60, 60, 100, 1] * 5
    lock = threading.Lock()
    inside: list[int] = []

    def read(item, place):
        with place(0):
            pass
        with place(sizes[item]), lock:
            inside.append(sizes[item])
            assert sum(inside) <= 100 or len(inside) == 1
        return sizes[item]

    def write(item, given, found):
        time.sleep(0.001)
        with lock:
            inside.remove(given)

    with make(read, lambda given: given, write, workers=8) as pipeline:
        outcomes = list(pipeline.run(range(len(sizes))))
    assert [one.error for one in outcomes] == [None] * len(sizes)


def test_what_waits_goes_together_where_it_is_of_a_kind():
    """And the model waits for nobody."""
    batches = []
    begun, go = threading.Event(), threading.Event()

    def model(given):
        batches.append(given)
        if len(batches) == 1:
            begun.set()
            go.wait(10)
        return given

    def kind(given):
        if given == 70:
            threading.Timer(0.1, go.set).start()
        return given // 10 % 2

    def read(item, place):
        if item:
            begun.wait(10)
        return item * 10

    with make(read, model, kind=kind, batch_size=3) as pipeline:
        assert len(list(pipeline.run(range(8)))) == 8
    assert batches[0] == [0]
    assert sorted(map(len, batches[1:])) == [1, 3, 3]
    assert all(len({one // 10 % 2 for one in batch}) == 1 for batch in batches)
    assert sorted(itertools.chain(*batches)) == [10 * n for n in range(8)]


@pytest.fixture
def interruptible():
    """Of processes in the background shells have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("stage", ["read", "model", "write", "items"])
def test_ctrl_c_ends_it_in_each_stage(stage, interruptible):
    """What has begun a stage ends it; nothing begins another."""
    counts = dict.fromkeys(("read", "model", "write"), 0)

    def at(name):
        counts[name] += 1
        if counts[name] == 3 and name == stage:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    def read(item, place):
        with place(1):
            at("read")
            return item

    def model(given):
        at("model")
        return given

    def items():
        for number in itertools.count():
            if stage == "items" and number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield number

    with pytest.raises(KeyboardInterrupt), make(read, model, lambda *_: at("write")) as pipeline:
        for _ in pipeline.run(items()):
            pass
    assert not threads()
    assert counts["read"] < 5000


def test_one_who_stops_early_waits_for_no_more_than_what_has_begun():
    begun, written, when_stopped = [], [], []

    def write(item, given, found):
        begun.append(item)
        time.sleep(0.02)
        written.append(item)

    with make(write=write, workers=2) as pipeline:
        pipeline._stack.callback(lambda: when_stopped.append(len(begun)))
        pipeline._stack.callback(pipeline._stop)  # before the line above
        for outcome in pipeline.run(itertools.count()):
            if outcome.item == 5:
                break
    assert not threads()
    assert sorted(begun) == sorted(written)
    assert 6 <= len(written) <= when_stopped[0] + pipeline._threads  # each had one in its hands
    count = len(written)
    time.sleep(0.05)
    assert len(written) == count


def test_an_error_of_the_items_is_raised():
    def items():
        yield 1
        raise OSError("the folder is gone")

    with pytest.raises(OSError, match="the folder is gone"), make() as pipeline:
        list(pipeline.run(items()))


def test_slow_writers_are_kept_at_work():
    """A device of 5 ms and 4 writers of 20 ms: the wall is that of the writers."""
    count, workers = 60, 4

    def model(given):
        time.sleep(0.005 * len(given))
        return given

    best = float("inf")
    for _ in range(3):  # other programs make walls longer, never shorter
        begun = time.perf_counter()
        with make(model=model, write=lambda *_: time.sleep(0.02), workers=workers) as pipeline:
            list(pipeline.run(range(count)))
        best = min(best, time.perf_counter() - begun)
    assert best <= 1.3 * count * 0.02 / workers
