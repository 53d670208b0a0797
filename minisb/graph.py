"""A stretch of GPU work recorded once and then launched as a whole.

A training step is some hundred launches, and Python takes microseconds for each: with a small model the GPU
would wait for it.  A CUDA graph holds all of them, with their addresses.  So whatever is recorded reads and
writes the same memory each time: inputs are copied to where they were, and what it allocates comes from a pool
of its own, which nothing else uses.
"""

from __future__ import annotations

WARM = 2  # calls before recording: they compile what is missing and fill the pool


class Recorded:
    """function(*arrays, **flags) -> arrays, replayed wherever shapes and flags were seen before.

    The results are overwritten by the next call.  The function must not look at what is on the GPU.
    """

    def __init__(self, cupy, function):
        self.cupy, self.function = cupy, function
        self.pool = cupy.cuda.MemoryPool()
        self.takes = {}

    def __call__(self, *arrays, **flags):
        key = *((a.shape, a.dtype.str) for a in arrays), *flags.items()
        take = self.takes.setdefault(key, Take())
        if take.graph is None:
            with self.cupy.cuda.using_allocator(self.pool.malloc):
                if take.calls < WARM:
                    take.calls += 1
                    return self.function(*arrays, **flags)
                self._record(take, arrays, flags)
        for place, array in zip(take.inputs, arrays, strict=True):
            place[...] = array
        take.graph.launch(self.cupy.cuda.get_current_stream())
        return take.results

    def _record(self, take: Take, arrays, flags):
        take.inputs = [array.copy() for array in arrays]
        stream = self.cupy.cuda.get_current_stream()
        take.graph, take.results = record(stream, lambda: self.function(*take.inputs, **flags))


class Repeated:
    """function() again and again, as in decoding: run in the first call, recorded in the second, from then on replayed.

    A call returns when the work is done.  It begins after what the caller's stream has been given before.
    """

    def __init__(self, cupy, function):
        self.cupy, self.function = cupy, function
        self.pool, self.stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
        self.warm, self.graph = False, None

    def __call__(self):
        theirs = self.cupy.cuda.get_current_stream()
        if self.graph is None:
            theirs.synchronize()
            with self.stream, self.cupy.cuda.using_allocator(self.pool.malloc):
                if not self.warm:
                    self.function()
                    self.warm = True
                    return self.stream.synchronize()
                self.graph, _ = record(self.stream, self.function)
        self.graph.launch(theirs)
        theirs.synchronize()


def record(stream, function):
    """-> the CUDA graph of what function() gives to the stream, which is the current one, and what it returns."""
    stream.begin_capture()
    try:
        results = function()
    finally:
        graph = stream.end_capture()
    return graph, results


class Take:
    """One recording."""

    calls, graph, inputs, results = 0, None, (), None
