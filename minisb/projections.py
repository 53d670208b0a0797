"""What a layer is made of: the linear projections, which may read spikes, and what a pass says to all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.spike import spike_count, spike_forward
from minisb.params import ParamStore
from minisb.quantized import QuantizedProjections, QuantizedStore, input_name


@dataclass
class Context:
    """What is true of one forward pass for every layer.

    spikes: for each layer, its projections that read spikes.
    tap(name, array): sees inner values, None costs nothing.
    cos, sin: rotary tables (T,D/2) of this pass's positions.
    sinks: this pass reads the sinks (1,S,C), not a text.
    aux: in training, what the routers' own losses are multiplied by in the gradient; else None.
    """

    be: Any
    spikes: tuple[frozenset, ...] = ()
    spike_k: float = 3.0
    cos: Any = None
    sin: Any = None
    tap: Callable | None = None
    sinks: bool = False
    aux: float | None = None


class Projections:
    """Linear projections of one common input, as one matrix: rows of q, then k, then v, ...

    The ones that spike share one threshold and one rounding of the input.  If all of them spike
    or none does, the whole is a single matrix product.
    """

    def __init__(self, store: ParamStore, prefix: str, weights: dict[str, str], biases: tuple[str, ...] = ()):
        """weights: short name for spikes and taps -> parameter name under prefix, in row order."""
        self.prefix, self.layer = prefix, int(prefix.split(".")[1])  # layers.3.attn
        self.w, self.dw = store.rows([f"{prefix}.{name}" for name in weights.values()])
        self.b, self.db = store.rows([f"{prefix}.{name}" for name in biases]) if biases else (None, None)
        self.rows, start = {}, 0
        for short, name in weights.items():
            end = start + store.p[f"{prefix}.{name}"].shape[0]
            self.rows[short] = slice(start, end)
            start = end

    def forward(self, ctx: Context, x):
        """x (B,T,I) -> y (B,T,O).  saved: the inputs as read, by rows."""
        spiking = [name for name in self.rows if name in ctx.spikes[self.layer]]
        if spiking:
            x_hat, vth = spike_forward(ctx.be, x, ctx.spike_k)
            if ctx.tap:
                for name in spiking:
                    ctx.tap(f"{self.prefix}.{name}.count", spike_count(ctx.be, x_hat, vth))
        else:
            x_hat = x
            if ctx.tap:
                ctx.tap(f"{input_name(self.prefix, self.rows)}.input", x)
        if len(spiking) in (0, len(self.rows)):
            return linear_forward(ctx.be, x_hat, self.w, self.b), [(slice(0, self.w.shape[0]), x_hat)]
        y = ctx.be.xp.empty((*x.shape[:-1], self.w.shape[0]), x.dtype)
        saved = [(rows, x_hat if name in spiking else x) for name, rows in self.rows.items()]
        for rows, read in saved:
            linear_forward(ctx.be, read, self.w[rows], self._bias(self.b, rows), out=y[..., rows])
        return y, saved

    def backward(self, be, dy, saved):
        """dy (B,T,O) -> dx (B,T,I): straight through the spikes; weights see what was read."""
        dx = None
        for rows, read in saved:
            db = self._bias(self.db, rows)
            dx = linear_backward(be, dy[..., rows], read, self.w[rows], self.dw[rows], db, dx)
        return dx

    @staticmethod
    def _bias(b, rows):
        part = b[rows] if b is not None else None
        return part if part is not None and part.size else None


def projections(store, prefix: str, weights: dict[str, str], biases: tuple[str, ...] = ()):
    """Projections of one input, of the kind that the store holds: a quantised model may keep its routers in fp32."""
    int8 = isinstance(store, QuantizedStore) and f"{prefix}.{next(iter(weights.values()))}" in store.int8
    return (QuantizedProjections if int8 else Projections)(store, prefix, weights, biases)
