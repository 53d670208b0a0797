"""The layers: which operations follow each other, forward, and in reverse, backward.

A layer holds views of its parameters and nothing else.  forward returns (y, saved), backward takes
saved and returns the gradient of the input; parameter gradients are added to the views.  With a
decode state, forward also reads and updates what the layer remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minisb.config import Config
from minisb.ops.attention import attention_backward, attention_forward, attention_step
from minisb.ops.gate import log_gate_backward, log_gate_forward
from minisb.ops.gla import gla_backward, gla_forward, gla_step
from minisb.ops.heads import relu_heads_backward, relu_heads_forward
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.norm import rmsnorm_backward, rmsnorm_forward
from minisb.ops.rope import rope_backward, rope_forward
from minisb.ops.spike import spike_count, spike_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward
from minisb.ops.w8aspike import attention_step_int8, code_heads, decode_heads
from minisb.params import ParamStore, Spec
from minisb.quantized import QuantizedProjections, QuantizedStore, input_name
from minisb.state import GLAState, Int8KeyValueCache, KeyValueCache


@dataclass
class Context:
    """What is true of one forward pass for every layer.

    spikes: for each layer, its projections that read spikes.
    tap(name, array): sees inner values, None costs nothing.
    cos, sin: rotary tables (T,D/2) of this pass's positions.
    """

    be: Any
    spikes: tuple[frozenset, ...] = ()
    spike_k: float = 3.0
    cos: Any = None
    sin: Any = None
    tap: Callable | None = None


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
    """Projections of one input, of the kind that the store holds."""
    kind = QuantizedProjections if isinstance(store, QuantizedStore) else Projections
    return kind(store, prefix, weights, biases)


class GatedLinearAttention:
    """Linear attention with a low-rank gate (7B: report, eq. 10-11, section 3.1)."""

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        return [
            *_qkv_specs(c, prefix),
            Spec(f"{prefix}.gk_proj.0.weight", (c.gate_rank, c.width), init=c.width**-0.5, joined=True),
            *_qkv_bias_specs(c, prefix),
            Spec(f"{prefix}.gk_proj.1.weight", (c.kv_heads * c.head_dim, c.gate_rank), init=c.gate_rank**-0.5),
            Spec(f"{prefix}.gk_proj.1.bias", (c.kv_heads * c.head_dim,), init="zeros", decay=False),
            Spec(f"{prefix}.g_norm.weight", (c.head_dim,), init="ones", decay=False),
            _out_spec(c, f"{prefix}.o_proj.weight", c.heads * c.head_dim),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str):
        self.c = c
        self.inputs = projections(store, prefix, {**_QKV, "gk": "gk_proj.0.weight"}, _BIASES if c.qkv_bias else ())
        self.output = projections(store, prefix, {"o": "o_proj.weight"})
        self.merged = isinstance(store, QuantizedStore)  # the gate's two matrices are one, among the inputs
        if not self.merged:
            self.gate_w, self.dgate_w = store.rows([f"{prefix}.gk_proj.1.weight"])
            self.gate_b, self.dgate_b = store.rows([f"{prefix}.gk_proj.1.bias"])
        self.g_norm, self.dg_norm = store.rows([f"{prefix}.g_norm.weight"])

    def new_state(self, be, batch: int, dtype) -> GLAState:
        return GLAState(be, self.c, batch, dtype)

    def forward(self, ctx: Context, x, state: GLAState | None = None):
        """x (B,T,C) -> y (B,T,C)."""
        be, c = ctx.be, self.c
        B, T, _ = x.shape
        rows, s_in = self.inputs.forward(ctx, x)
        q, k, v, s_heads = relu_heads_forward(be, rows, c.heads, c.kv_heads, c.head_dim)
        low_rank = rows[..., self.inputs.rows["gk"]]
        z = low_rank if self.merged else linear_forward(be, low_rank, self.gate_w, self.gate_b)
        log_g, s_gate = log_gate_forward(be, z.reshape(k.shape), c.gate_divisor)
        s_gla = None
        if state is None:
            o, _, s_gla = gla_forward(be, q, k, v, log_g)
        elif T == 1:
            o = gla_step(be, q, k, v, log_g, state.matrix)
        else:
            o, state.matrix, _ = gla_forward(be, q, k, v, log_g, state.matrix)
        o, s_norm = rmsnorm_forward(be, o, self.g_norm, c.norm_eps)
        y, s_out = self.output.forward(ctx, o.reshape(B, T, -1))
        return y, (s_in, s_heads, low_rank, s_gate, s_gla, s_norm, s_out)

    def backward(self, be, dy, saved):
        """dy (B,T,C) -> dx (B,T,C)."""
        s_in, s_heads, low_rank, s_gate, s_gla, s_norm, s_out = saved
        do = self.output.backward(be, dy, s_out).reshape(s_heads[0].shape)
        do = rmsnorm_backward(be, do, s_norm, self.dg_norm)
        dq, dk, dv, dlog_g, _ = gla_backward(be, do, None, s_gla)
        dz = log_gate_backward(be, dlog_g, s_gate).reshape(*dy.shape[:2], -1)
        drows = be.xp.empty((*dy.shape[:2], self.inputs.w.shape[0]), dy.dtype)
        relu_heads_backward(be, dq, dk, dv, s_heads, drows)
        drows[..., self.inputs.rows["gk"]] = linear_backward(
            be, dz, low_rank, self.gate_w, self.dgate_w, self.dgate_b
        )
        return self.inputs.backward(be, drows, s_in)


class SoftmaxAttention:
    """Softmax attention with RoPE, through a window of W keys or (window None) over all of them."""

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        return [
            *_qkv_specs(c, prefix),
            *_qkv_bias_specs(c, prefix),
            _out_spec(c, f"{prefix}.o_proj.weight", c.heads * c.head_dim),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str, window: int | None):
        self.c, self.window, self.int8 = c, window, isinstance(store, QuantizedStore)
        self.inputs = projections(store, prefix, _QKV, _BIASES if c.qkv_bias else ())
        self.output = projections(store, prefix, {"o": "o_proj.weight"})

    def new_state(self, be, batch: int, dtype) -> KeyValueCache:
        return (Int8KeyValueCache if self.int8 else KeyValueCache)(be, self.c, batch, dtype, self.window)

    def forward(self, ctx: Context, x, state: KeyValueCache | None = None):
        """x (B,T,C) -> y (B,T,C)."""
        be, c = ctx.be, self.c
        B, T, _ = x.shape
        rows, s_in = self.inputs.forward(ctx, x)
        q, k, v = rope_forward(be, rows, ctx.cos, ctx.sin, c.heads, c.kv_heads, c.head_dim)
        s_attention = None
        if self.int8:
            o = self._attend_int8(be, q, k, v, state)
        elif state is not None and T == 1:
            state.append(k, v)
            o = attention_step(be, q, state.k, state.v, state.count)
        else:
            if state is not None:
                past_k, past_v = state.past()
                state.append(k, v)
                k = be.xp.concatenate([past_k, k], axis=1)
                v = be.xp.concatenate([past_v, v], axis=1)
            o, s_attention = attention_forward(be, q, k, v, self.window or k.shape[1])
        y, s_out = self.output.forward(ctx, o.reshape(B, T, -1))
        return y, (s_in, ctx.cos, ctx.sin, s_attention, s_out)

    def _attend_int8(self, be, q, k, v, state: Int8KeyValueCache | None):
        """q (B,T,H,D) as spike counts, k, v (B,T,G,D) as int8, here and in the cache -> o (B,T,H,D)."""
        q16, qv, *kept = code_heads(be, q, k, v, self.c.spike_k)
        if state is not None and q.shape[1] == 1:
            state.append(*kept)
            return attention_step_int8(be, q16, qv, state.k, state.ku, state.v, state.vu, state.count)
        k, v = decode_heads(*kept[:2]), decode_heads(*kept[2:])
        if state is not None:
            past_k, past_v = state.past()
            state.append(*kept)
            k, v = be.xp.concatenate([past_k, k], axis=1), be.xp.concatenate([past_v, v], axis=1)
        return attention_forward(be, decode_heads(q16, qv), k, v, self.window or k.shape[1])[0]

    def backward(self, be, dy, saved):
        """dy (B,T,C) -> dx (B,T,C)."""
        s_in, cos, sin, s_attention, s_out = saved
        do = self.output.backward(be, dy, s_out).reshape(s_attention[0].shape)
        dq, dk, dv = attention_backward(be, do, s_attention)
        drows = be.xp.empty((*dy.shape[:2], self.inputs.w.shape[0]), dy.dtype)
        rope_backward(be, dq, dk, dv, cos, sin, drows)
        return self.inputs.backward(be, drows, s_in)


class SwiGLU:
    """The feed-forward network: down(silu(gate(x)) * up(x))."""

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        return [
            Spec(f"{prefix}.gate_proj.weight", (c.ffn, c.width), init=c.width**-0.5),
            Spec(f"{prefix}.up_proj.weight", (c.ffn, c.width), init=c.width**-0.5, joined=True),
            _out_spec(c, f"{prefix}.down_proj.weight", c.ffn),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str):
        self.inputs = projections(store, prefix, {"gate": "gate_proj.weight", "up": "up_proj.weight"})
        self.output = projections(store, prefix, {"down": "down_proj.weight"})

    def forward(self, ctx: Context, x):
        """x (B,T,C) -> y (B,T,C)."""
        gate_up, s_in = self.inputs.forward(ctx, x)
        h, s_swiglu = swiglu_forward(ctx.be, gate_up)
        y, s_out = self.output.forward(ctx, h)
        return y, (s_in, s_swiglu, s_out)

    def backward(self, be, dy, saved):
        """dy (B,T,C) -> dx (B,T,C)."""
        s_in, s_swiglu, s_out = saved
        dh = self.output.backward(be, dy, s_out)
        return self.inputs.backward(be, swiglu_backward(be, dh, s_swiglu), s_in)


_QKV = {"q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight"}
_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


def _qkv_sizes(c: Config) -> tuple[int, int, int]:
    return c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim


def _qkv_specs(c: Config, prefix: str) -> list[Spec]:
    return [
        Spec(f"{prefix}.{name}", (size, c.width), init=c.width**-0.5, joined=name != "q_proj.weight")
        for name, size in zip(_QKV.values(), _qkv_sizes(c), strict=True)
    ]


def _qkv_bias_specs(c: Config, prefix: str) -> list[Spec]:
    if not c.qkv_bias:
        return []
    return [
        Spec(f"{prefix}.{name}", (size,), init="zeros", decay=False, joined=name != "q_proj.bias")
        for name, size in zip(_BIASES, _qkv_sizes(c), strict=True)
    ]


def _out_spec(c: Config, name: str, fan_in: int) -> Spec:
    """Projections back into the residual stream start small: 2L of them add up, and at first what
    they add should not drown the embedding (std 0.1)."""
    return Spec(name, (c.width, fan_in), init=0.25 * (fan_in * 2 * c.layers) ** -0.5)
