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
        stream.begin_capture()
        try:
            take.results = self.function(*take.inputs, **flags)
        finally:
            graph = stream.end_capture()
        take.graph = graph


class Take:
    """One recording."""

    calls, graph, inputs, results = 0, None, (), None
