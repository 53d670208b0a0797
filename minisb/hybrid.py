"""The parallel hybrid of the 76B (report, eq. 6): linear and softmax attention read the same token, and are added.

Each normalises its heads first, so that neither drowns the other.  By default each has q, k, v and o of its own;
with shared_projections the two read one q, k, v (through the sigmoid here, through RoPE there), and one o follows.
"""

from __future__ import annotations

from minisb.config import Config
from minisb.layers import GatedLinearAttention, Mixer, SoftmaxAttention, input_specs
from minisb.ops.linear import add
from minisb.params import ParamStore, Spec
from minisb.projections import Context
from minisb.state import PairState


class ParallelHybrid:
    """Two mixers side by side, each with its own projections."""

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        return [
            *GatedLinearAttention.specs(c, f"{prefix}.linear"),
            *SoftmaxAttention.specs(c, f"{prefix}.softmax", normed=True),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str, window: int | None):
        self.linear = GatedLinearAttention(c, store, f"{prefix}.linear")
        self.softmax = SoftmaxAttention(c, store, f"{prefix}.softmax", window, normed=True)

    def new_state(self, be, batch: int, dtype) -> PairState:
        return PairState(self.linear.new_state(be, batch, dtype), self.softmax.new_state(be, batch, dtype))

    def forward(self, ctx: Context, x, state: PairState | None = None, sinks=None):
        """x (B,T,C) -> y (B,T,C), memory, saved, as Mixer.forward; memory and sinks are pairs."""
        (state1, state2), (sinks1, sinks2) = state or (None, None), sinks or (None, None)
        y1, memory1, saved1 = self.linear.forward(ctx, x, state1, sinks1)
        y2, memory2, saved2 = self.softmax.forward(ctx, x, state2, sinks2)
        return add(ctx.be, y1, y2), (memory1, memory2), (saved1, saved2)

    def backward(self, be, dy, saved, dmemory=None):
        """dy (B,T,C) -> dx (B,T,C), dsinks."""
        dmemory1, dmemory2 = dmemory or (None, None)
        dx1, dsinks1 = self.linear.backward(be, dy, saved[0], dmemory1)
        dx2, dsinks2 = self.softmax.backward(be, dy, saved[1], dmemory2)
        return add(be, dx1, dx2), (dsinks1, dsinks2)


class SharedHybrid(Mixer):
    """Two mixers on one set of projections."""

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        *_, out = SoftmaxAttention.specs(c, prefix)
        *_, norm, _ = SoftmaxAttention.specs(c, f"{prefix}.softmax", normed=True)
        own = GatedLinearAttention.own_specs(c, f"{prefix}.linear")
        return [*input_specs(c, prefix, c.gate == "low_rank"), *own, norm, out]

    def __init__(self, c: Config, store: ParamStore, prefix: str, window: int | None):
        super().__init__(c, store, prefix, c.gate == "low_rank")
        self.linear = GatedLinearAttention(c, store, f"{prefix}.linear", projected=False)
        self.softmax = SoftmaxAttention(c, store, f"{prefix}.softmax", window, normed=True, projected=False)

    new_state = ParallelHybrid.new_state

    def mix(self, ctx: Context, rows, state: PairState | None = None, sinks=None):
        """See Mixer."""
        (state1, state2), (sinks1, sinks2) = state or (None, None), sinks or (None, None)
        o1, memory1, saved1 = self.linear.mix(ctx, rows, state1, sinks1)
        o2, memory2, saved2 = self.softmax.mix(ctx, rows, state2, sinks2)
        return add(ctx.be, o1, o2), (memory1, memory2), (saved1, saved2)

    def mix_backward(self, be, do, saved, dmemory=None):
        """See Mixer."""
        dmemory1, dmemory2 = dmemory or (None, None)
        drows1, dsinks1 = self.linear.mix_backward(be, do, saved[0], dmemory1)
        drows2, dsinks2 = self.softmax.mix_backward(be, do, saved[1], dmemory2)
        return add(be, drows1, drows2), (dsinks1, dsinks2)
