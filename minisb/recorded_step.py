"""Decoding on a GPU: the step from one token to the next, recorded once and then replayed.

A step of a small model is a hundred launches of a few microseconds each, and Python takes longer to give them than
the GPU to do them.  A recording does the same thing to the same memory every time, so what differs from token to token
has to stand in memory as well: the token, the angles of its position, and for each cache of keys and values the slot it
goes to and how many are in use.  Here the host works these numbers out, as it does without a recording, and a recording
begins by copying them to the GPU and ends by copying the logits back.
"""

from __future__ import annotations

import numpy as np

from minisb import launchers
from minisb.backend import on_host
from minisb.launchers.grid import LARGEST_HEAD
from minisb.launchers.linear_attention import walkable
from minisb.model import TABLE
from minisb.ops.rope import rope_table


def can_record(model) -> bool:
    """On a GPU with our kernels for every operation: a reference in their place works with numbers of the host, or with
    products that CuPy does not record.  So it is for heads too large for our kernels."""
    be, c = model.be, model.config
    if be.name != "cuda":
        return False
    names = [twin.__name__ for twins in launchers.MODULES.values() for twin in twins]
    ours = all(name in be.natives and be.natives[name].__module__.startswith(launchers.__name__) for name in names)
    return ours and c.head_dim <= LARGEST_HEAD and walkable(c.head_dim, c.heads // c.kv_heads, model.embedding.dtype)


class RecordedStep:
    """model.step for one state.  It may be prefilled, or grow, between two steps: then a recording is made anew.

    Every result is that of model.step, bit for bit.
    """

    def __init__(self, model, state, spike=False, batch: int = 1):
        be, c = model.be, model.config
        self.model, self.state, self.spike, self.batch = model, state, spike, batch
        self.device, self.caches = be.device, state.caches()
        dtype = model.embedding.dtype
        self.wide, self.half = be.wide(dtype), c.head_dim // 2
        size = 2 * self.half * self.wide.itemsize + 4 * (batch + 2 * len(self.caches))
        self.here, self.there = self.device.pinned((size,), np.uint8), be.xp.empty(size, np.uint8)
        self.logits = self.device.pinned((batch, c.vocab), dtype)
        self.arrays, self.repeat = [], None
        self.first, self.table = None, ()  # the angles of TABLE positions, from `first` on

    def __call__(self, tokens):
        """tokens (B,), on the host -> logits (B,V), on the host."""
        state, position = self.state, self.state.position
        if self.model.config.sinks and position == 0:  # which are read now, and never again
            return on_host(self.model.step(self.model.be.xp.asarray(tokens, "int32"), state, self.spike))
        rotary, its_tokens, places = self._numbers(self.here)
        rotary[:, 0] = self._angles(self.model.config.sinks + position)
        its_tokens[:] = tokens
        for place, cache in zip(places, self.caches, strict=True):
            place[:] = cache.claim(), cache.count
        self._work_in_place()
        state.position = position + 1  # whether or not Python walked through the layers
        return self.logits.copy()

    def _work_in_place(self):
        """One step on the numbers of `here`; its recording belongs to the arrays that the state has now."""
        arrays = self.state.arrays()
        if len(arrays) != len(self.arrays) or any(a is not b for a, b in zip(arrays, self.arrays, strict=True)):
            self.arrays, self.repeat = arrays, self.device.repeated(self._work)
        self.repeat()

    def _work(self):
        self.device.upload(self.there, self.here)
        rotary, tokens, places = self._numbers(self.there)
        for cache, place in zip(self.caches, places, strict=True):
            cache.place = place
        try:
            logits = self.model.step_at(tokens, list(rotary), self.state, self.spike)
        finally:
            for cache in self.caches:
                cache.place = None
        self.device.download(self.logits, logits)

    def _numbers(self, memory):
        """The bytes of here or there as cos, sin (2,1,D/2), tokens (B,) and slot, count of each cache (caches,2)."""
        end = 2 * self.half * self.wide.itemsize
        whole = memory[end:].view(np.int32)
        return (
            memory[:end].view(self.wide).reshape(2, 1, self.half),
            whole[: self.batch],
            whole[self.batch :].reshape(len(self.caches), 2),
        )

    def _angles(self, position: int):
        """cos, sin (D/2,), as SpikingBrain looks them up."""
        row = position % TABLE
        if self.first != position - row:
            c, self.first = self.model.config, position - row
            self.table = rope_table(self.first, TABLE, c.head_dim, c.rope_theta)
        return [x[row] for x in self.table]
