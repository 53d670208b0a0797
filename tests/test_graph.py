"""What is asked of CuPy to record and replay, and in which order: on a stand-in for it."""

import contextlib
from types import SimpleNamespace

import pytest

from minisb.graph import WARM, Recorded, Repeated


class Cupy:
    """Writes down what it is asked.  While a stream captures, work goes into a graph."""

    def __init__(self):
        self.log, self.theirs = [], Stream(self, "theirs")
        self.stream = self.theirs
        self.cuda = SimpleNamespace(
            MemoryPool=lambda: SimpleNamespace(malloc="pool"),
            Stream=lambda non_blocking: Stream(self, "own"),
            get_current_stream=lambda: self.stream,
            using_allocator=self.using,
        )

    @contextlib.contextmanager
    def using(self, malloc):
        self.log.append(malloc)
        yield
        self.log.append(f"no {malloc}")

    def work(self, name):
        (self.log if self.stream.graph is None else self.stream.graph.work).append(f"{name} on {self.stream.name}")


class Stream:
    def __init__(self, cupy, name):
        self.cupy, self.name, self.graph = cupy, name, None

    def __enter__(self):
        self.before, self.cupy.stream = self.cupy.stream, self

    def __exit__(self, *_):
        self.cupy.stream = self.before

    def synchronize(self):
        assert self.graph is None, "waiting while recording"
        self.cupy.log.append(f"wait for {self.name}")

    def begin_capture(self):
        assert self.name != "theirs", "CUDA's default stream cannot be recorded"
        self.graph = Graph(self.cupy)

    def end_capture(self):
        graph, self.graph = self.graph, None
        return graph


class Graph:
    def __init__(self, cupy):
        self.cupy, self.work = cupy, []

    def launch(self, stream):
        self.cupy.log += [f"graph on {stream.name}", *self.work]


def test_a_step_runs_then_is_recorded_then_replayed():
    cupy = Cupy()
    repeated = Repeated(cupy, lambda: cupy.work("step"))
    repeated()
    assert cupy.log == ["wait for theirs", "pool", "step on own", "wait for own", "no pool"]
    cupy.log.clear()
    repeated()
    replay = ["graph on theirs", "step on own", "wait for theirs"]
    assert cupy.log == ["wait for theirs", "pool", "no pool", *replay]
    cupy.log.clear()
    repeated()
    assert cupy.log == replay


def test_a_failure_while_recording_ends_the_recording_and_the_next_call_tries_again():
    cupy, fails = Cupy(), [False, True, False]

    def work():
        if fails.pop(0):
            raise ValueError("no")
        cupy.work("step")

    repeated = Repeated(cupy, work)
    repeated()
    with pytest.raises(ValueError, match="no"):
        repeated()
    assert cupy.stream is cupy.theirs and repeated.stream.graph is None
    repeated()
    assert cupy.log[-3:] == ["graph on theirs", "step on own", "wait for theirs"]


def test_a_training_step_is_recorded_for_each_shape_and_flag():
    class Array(list):
        dtype = SimpleNamespace(str="<f4")
        shape = property(lambda self: (len(self),))

        def copy(self):
            return Array(self)

        def __setitem__(self, _, other):
            super().__setitem__(slice(None), other)

    cupy = Cupy()
    stream, calls = Stream(cupy, "training"), []
    recorded = Recorded(cupy, lambda x, spiking: (calls.append((list(x), spiking)), x)[1])
    with stream:
        for i in range(WARM + 2):
            out = recorded(Array([i, i]), spiking=False)
        assert calls == [([i, i], False) for i in range(WARM + 1)]  # the last replayed what stands in out's place
        assert out == [WARM + 1, WARM + 1] and cupy.log.count("graph on training") == 2
        recorded(Array([1]), spiking=False)
        recorded(Array([1, 2]), spiking=True)
    assert calls[-2:] == [([1], False), ([1, 2], True)] and len(recorded.takes) == 3
