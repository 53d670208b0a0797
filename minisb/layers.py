"""The layers: which operations follow each other, forward, and in reverse, backward.

A layer holds views of its parameters and nothing else.  forward returns (y, saved), backward takes
saved and returns the gradient of the input; parameter gradients are added to the views.  With a
decode state, forward also reads and updates what the layer remembers.

Sinks, learned tokens before the text, are read in a pass of their own (`ctx.sinks`).  What the text needs
of them, a mixer's `memory`, is the state of linear attention (1,G,D,D) or keys and values (S,G,D).
"""

from __future__ import annotations

from minisb.config import Config
from minisb.ops.attention import attention_backward, attention_forward, attention_step
from minisb.ops.decode import decode_attention, decode_ffn, decode_gla
from minisb.ops.ffn import ffn_backward, ffn_forward
from minisb.ops.gate import log_gate_forward, low_rank_gate_backward, low_rank_gate_forward
from minisb.ops.gla import gla_backward, gla_forward, gla_step
from minisb.ops.heads import (
    ends,
    relu_heads_backward,
    relu_heads_forward,
    sigmoid_heads_backward,
    sigmoid_heads_forward,
)
from minisb.ops.linear import add
from minisb.ops.norm import rmsnorm_backward, rmsnorm_forward
from minisb.ops.rope import rope_backward, rope_forward
from minisb.ops.sinks import sinks_backward, sinks_forward, sinks_state_backward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward
from minisb.ops.w8aspike import attention_step_int8, code_heads, decode_heads, decode_pair
from minisb.params import ParamStore, Spec
from minisb.projections import Context, projections
from minisb.quantized import QuantizedProjections, QuantizedStore
from minisb.state import GLAState, Int8KeyValueCache, KeyValueCache


class Mixer:
    """What mixes over time: projections of the input, heads, a projection back.  Subclasses have the heads:

    mix(ctx, rows, state, sinks) -> o (B,T,H*D), memory, saved
        rows (B,T,N), columns q | k | v | ...; sinks: the memory that reading them gave, None without.
    mix_backward(be, do, saved, dmemory) -> drows (B,T,N), dsinks
        dmemory: the gradient of memory after the sinks were read, None after a text.
    """

    def __init__(self, c: Config, store: ParamStore, prefix: str, gated: bool, projected: bool = True):
        """gated: the input's projections include the low-rank gate's.  projected: False if they and the
        output's belong to the caller, who calls mix."""
        self.c = c
        if projected:
            weights = {**_QKV, "gk": "gk_proj.0.weight"} if gated else _QKV
            self.inputs = projections(store, prefix, weights, _BIASES if c.qkv_bias else ())
            self.output = projections(store, prefix, {"o": "o_proj.weight"})

    def forward(self, ctx: Context, x, state=None, sinks=None):
        """x (B,T,C) -> y (B,T,C), memory, saved."""
        rows, s_in = self.inputs.forward(ctx, x)
        o, memory, s_mix = self.mix(ctx, rows, state, sinks)
        y, s_out = self.output.forward(ctx, o)
        return y, memory, (s_in, s_mix, s_out)

    def backward(self, be, dy, saved, dmemory=None):
        """dy (B,T,C) -> dx (B,T,C), dsinks."""
        s_in, s_mix, s_out = saved
        drows, dsinks = self.mix_backward(be, self.output.backward(be, dy, s_out), s_mix, dmemory)
        return self.inputs.backward(be, drows, s_in), dsinks


class GatedLinearAttention(Mixer):
    """Linear attention (report, eq. 10-11), its gate low-rank (7B) or tied to the key (76B)."""

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        return [
            *input_specs(c, prefix, c.gate == "low_rank"),
            *GatedLinearAttention.own_specs(c, prefix),
            _out_spec(c, f"{prefix}.o_proj.weight", c.heads * c.head_dim),
        ]

    @staticmethod
    def own_specs(c: Config, prefix: str) -> list[Spec]:
        """What is not a projection of the input or to the output."""
        gate = [
            Spec(f"{prefix}.gk_proj.1.weight", (c.kv_heads * c.head_dim, c.gate_rank), init=c.gate_rank**-0.5),
            Spec(f"{prefix}.gk_proj.1.bias", (c.kv_heads * c.head_dim,), init="zeros", decay=False),
        ]
        return [*(gate if c.gate == "low_rank" else []), _head_norm_spec(c, prefix)]

    def __init__(self, c: Config, store: ParamStore, prefix: str, projected: bool = True):
        super().__init__(c, store, prefix, c.gate == "low_rank", projected)
        self.merged = isinstance(store, QuantizedStore)  # the gate's two matrices are one, among the inputs
        if c.gate == "low_rank" and not self.merged:
            self.gate_w, self.dgate_w = store.rows([f"{prefix}.gk_proj.1.weight"])
            self.gate_b, self.dgate_b = store.rows([f"{prefix}.gk_proj.1.bias"])
        self.g_norm, self.dg_norm = store.rows([f"{prefix}.g_norm.weight"])
        self.decodes = self.merged and c.feature_map == "relu"

    def new_state(self, be, batch: int, dtype) -> GLAState:
        return GLAState(be, self.c, batch, dtype)

    def decode(self, ctx: Context, x, delta, norm, eps, state: GLAState):
        """One token in a quantised model, with the norm before it: x, delta (B,1,C) -> x, delta."""
        c, read = self.c, self.inputs
        return decode_gla(
            ctx.be, x, delta, norm, eps, read.matrix, read.b, c.heads, c.kv_heads, c.gate_divisor, self.g_norm,
            state.matrix, self.output.matrix,
        )  # fmt: skip

    def mix(self, ctx: Context, rows, state: GLAState | None = None, sinks=None):
        """See Mixer.  memory: the state after the last token."""
        be, c = ctx.be, self.c
        B, T, _ = rows.shape
        log_g = s_gate = s_gla = memory = None
        if c.feature_map == "relu":
            q, k, v, s_heads = relu_heads_forward(be, rows, c.heads, c.kv_heads, c.head_dim)
        else:
            tied = c.gate == "tied"
            q, k, v, log_g, s_heads = sigmoid_heads_forward(be, rows, c.heads, c.kv_heads, c.head_dim, tied)
        if log_g is None:
            low_rank = rows[..., ends(c.heads, c.kv_heads, c.head_dim)[2] :]
            if self.merged:
                log_g, _ = log_gate_forward(be, low_rank, c.gate_divisor)
            else:
                log_g, s_gate = low_rank_gate_forward(be, low_rank, self.gate_w, self.gate_b, c.gate_divisor)
            log_g = log_g.reshape(k.shape)
        if state is None:
            start = None if sinks is None else be.xp.repeat(sinks, B, axis=0)
            o, memory, s_gla = gla_forward(be, q, k, v, log_g, start)
        elif T == 1:
            o = gla_step(be, q, k, v, log_g, state.matrix)
        else:
            o, state.matrix, _ = gla_forward(be, q, k, v, log_g, state.matrix)
        o, s_norm = rmsnorm_forward(be, o, self.g_norm, c.norm_eps)
        return o.reshape(B, T, -1), memory, (rows.shape, s_heads, s_gate, s_gla, s_norm, sinks is not None)

    def mix_backward(self, be, do, saved, dmemory=None):
        """See Mixer."""
        shape, s_heads, s_gate, s_gla, s_norm, has_sinks = saved
        do = rmsnorm_backward(be, do.reshape(s_heads[0].shape), s_norm, self.dg_norm)
        dq, dk, dv, dlog_g, dstart = gla_backward(be, do, dmemory, s_gla)
        drows = be.xp.empty(shape, do.dtype)
        if self.c.feature_map == "relu":
            relu_heads_backward(be, dq, dk, dv, s_heads, drows)
        else:
            sigmoid_heads_backward(be, dq, dk, dv, dlog_g, s_heads, drows)
        if s_gate is not None:
            dlow_rank = drows[..., -self.c.gate_rank :]
            low_rank_gate_backward(be, dlog_g.reshape(*shape[:2], -1), s_gate, dlow_rank, self.dgate_w, self.dgate_b)
        return drows, sinks_state_backward(be, dstart) if has_sinks else None


class SoftmaxAttention(Mixer):
    """Softmax attention with RoPE, through a window of W keys or (window None) over all of them."""

    @staticmethod
    def specs(c: Config, prefix: str, normed: bool = False) -> list[Spec]:
        return [
            *input_specs(c, prefix),
            *([_head_norm_spec(c, prefix)] if normed else []),
            _out_spec(c, f"{prefix}.o_proj.weight", c.heads * c.head_dim),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str, window: int | None, normed=False, projected=True):
        """normed: an RMSNorm per head, as linear attention has it, before the two are added."""
        super().__init__(c, store, prefix, False, projected)
        self.window, self.int8, self.normed = window, isinstance(store, QuantizedStore), normed
        if normed:
            self.g_norm, self.dg_norm = store.rows([f"{prefix}.g_norm.weight"])
        self.decodes = self.int8 and not normed

    def new_state(self, be, batch: int, dtype) -> KeyValueCache:
        return (Int8KeyValueCache if self.int8 else KeyValueCache)(be, self.c, batch, dtype, self.window)

    def decode(self, ctx: Context, x, delta, norm, eps, state: Int8KeyValueCache):
        """As GatedLinearAttention.decode."""
        c, read = self.c, self.inputs
        return decode_attention(
            ctx.be, x, delta, norm, eps, read.matrix, read.b, ctx.cos, ctx.sin, c.heads, c.kv_heads, c.spike_k, state,
            self.output.matrix,
        )  # fmt: skip

    def mix(self, ctx: Context, rows, state: KeyValueCache | None = None, sinks=None):
        """See Mixer.  memory: keys and values of the sinks; in a quantised model coded, k, ku, v, vu."""
        be, c = ctx.be, self.c
        B, T, _ = rows.shape
        q, k, v = rope_forward(be, rows, ctx.cos, ctx.sin, c.heads, c.kv_heads, c.head_dim)
        memory = s_attention = None
        if self.int8:
            o, memory = self._attend_int8(ctx, q, k, v, state, sinks)
        elif ctx.sinks:  # they see each other, in both directions, and nothing else
            memory = k[0], v[0]
            o, s_attention = self._attend_sinks(be, q, None, memory)
        elif state is not None and T == 1:
            state.append(k, v)
            o, s_attention = attention_step(be, q, state.k, state.v, state.count), None
        else:
            if state is not None:
                past_k, past_v = state.past()
                state.append(k, v)
                k = be.xp.concatenate([past_k, k], axis=1)
                v = be.xp.concatenate([past_v, v], axis=1)
                sinks = state.sinks()
            o, s_window = attention_forward(be, q, k, v, self.window or k.shape[1])
            o, s_attention = (o, (s_window, None)) if sinks is None else self._attend_sinks(be, q, s_window, sinks)
        s_norm = None
        if self.normed:
            o, s_norm = rmsnorm_forward(be, o, self.g_norm, c.norm_eps)
        return o.reshape(B, T, -1), memory, (rows.shape, q.shape, ctx.cos, ctx.sin, s_attention, s_norm, ctx.sinks)

    @staticmethod
    def _attend_sinks(be, q, s_window, memory):
        """Attention to the sinks beside that through the window, if there was one -> o, saved of both."""
        if s_window is None:
            o, lse = sinks_forward(be, q, *memory)
        else:
            *qkv, o, lse, window, scale = s_window
            o, lse = sinks_forward(be, q, *memory, o, lse)
            s_window = (*qkv, o, lse, window, scale)  # its backward wants o and lse over all keys
        return o, (s_window, (q, *memory, o, lse))

    def _attend_int8(self, ctx: Context, q, k, v, state: Int8KeyValueCache | None, sinks):
        """As mix, with q (B,T,H,D) as spike counts and k, v (B,T,G,D) as int8: here, in the cache, and of the sinks.

        -> o (B,T,H,D), memory.
        """
        be = ctx.be
        q16, qv, *kept = code_heads(be, q, k, v, self.c.spike_k)
        if state is not None and q.shape[1] == 1:
            state.append(*kept)
            return attention_step_int8(be, q16, qv, state.k, state.ku, state.v, state.vu, state.count), None
        q, (k, v) = decode_heads(q16, qv), decode_pair(kept)
        if ctx.sinks:
            return self._attend_sinks(be, q, None, (k[0], v[0]))[0], tuple(x[0] for x in kept)
        if state is not None:
            past_k, past_v = state.past()
            state.append(*kept)
            k, v = be.xp.concatenate([past_k, k], axis=1), be.xp.concatenate([past_v, v], axis=1)
        o, s_window = attention_forward(be, q, k, v, self.window or k.shape[1])
        if self.c.sinks:
            o, _ = self._attend_sinks(be, q, s_window, decode_pair(sinks) if state is None else state.sinks())
        return o, None

    def mix_backward(self, be, do, saved, dmemory=None):
        """See Mixer."""
        shape, heads_shape, cos, sin, (s_window, s_sinks), s_norm, reading_sinks = saved
        do = do.reshape(heads_shape)
        if self.normed:
            do = rmsnorm_backward(be, do, s_norm, self.dg_norm)
        dq = dk = dv = dsinks = None
        if s_window is not None:
            dq, dk, dv = attention_backward(be, do, s_window)
        if s_sinks is not None:
            dq, *dsinks = sinks_backward(be, do, *s_sinks, dq=dq)
        if reading_sinks:  # their keys and values are read by themselves and by the text
            dk, dv = (add(be, own, text)[None] for own, text in zip(dsinks, dmemory, strict=True))
            dsinks = None
        drows = be.xp.empty(shape, do.dtype)
        rope_backward(be, dq, dk, dv, cos, sin, drows)
        drows[..., ends(self.c.heads, self.c.kv_heads, self.c.head_dim)[2] :] = 0  # a gate's, not read here
        return drows, dsinks


class SwiGLU:
    """The feed-forward network: down(silu(gate(x)) * up(x))."""

    @staticmethod
    def specs(c: Config, prefix: str, ffn: int | None = None) -> list[Spec]:
        """ffn: the hidden width, if not F."""
        F = c.ffn if ffn is None else ffn
        return [
            Spec(f"{prefix}.gate_proj.weight", (F, c.width), init=c.width**-0.5),
            Spec(f"{prefix}.up_proj.weight", (F, c.width), init=c.width**-0.5, joined=True),
            _out_spec(c, f"{prefix}.down_proj.weight", F),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str):
        self.inputs = projections(store, prefix, {"gate": "gate_proj.weight", "up": "up_proj.weight"})
        self.output = projections(store, prefix, {"down": "down_proj.weight"})
        self.decodes = self.int8 = isinstance(self.inputs, QuantizedProjections)

    def decode(self, ctx: Context, x, delta, norm, eps):
        """As GatedLinearAttention.decode."""
        return decode_ffn(ctx.be, x, delta, norm, eps, self.inputs.matrix, self.output.matrix)

    def forward(self, ctx: Context, x):
        """x (B,T,C) -> y (B,T,C)."""
        if self._joined(ctx):
            y, saved = ffn_forward(ctx.be, x, self.inputs.w, self.output.w)
            return y, (None, saved, None)
        gate_up, s_in = self.inputs.forward(ctx, x)
        h, s_swiglu = swiglu_forward(ctx.be, gate_up)
        y, s_out = self.output.forward(ctx, h)
        return y, (s_in, s_swiglu, s_out)

    def backward(self, be, dy, saved):
        """dy (B,T,C) -> dx (B,T,C)."""
        s_in, s_swiglu, s_out = saved
        if s_in is None:
            return ffn_backward(be, dy, s_swiglu, self.inputs.w, self.output.w, self.inputs.dw, self.output.dw)
        dh = self.output.backward(be, dy, s_out)
        return self.inputs.backward(be, swiglu_backward(be, dh, s_swiglu), s_in)

    def _joined(self, ctx: Context) -> bool:
        """Can both products be one operation?  Spikes and the tap want what lies between."""
        names = {*self.inputs.rows, *self.output.rows}
        return not (self.int8 or ctx.tap or names & ctx.spikes[self.inputs.layer])


_QKV = {"q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight"}
_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


def input_specs(c: Config, prefix: str, gated: bool = False) -> list[Spec]:
    """q, k, v and, below them, the low-rank gate's first matrix; biases of q, k and v."""
    gate = Spec(f"{prefix}.gk_proj.0.weight", (c.gate_rank, c.width), init=c.width**-0.5, joined=True)
    return [*_qkv_specs(c, prefix), *([gate] if gated else []), *_qkv_bias_specs(c, prefix)]


def _head_norm_spec(c: Config, prefix: str) -> Spec:
    """One weight [D] for every head."""
    return Spec(f"{prefix}.g_norm.weight", (c.head_dim,), init="ones", decay=False)


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
    they add should not drown the embedding."""
    return Spec(name, (c.width, fan_in), init=0.25 * (fan_in * 2 * c.layers) ** -0.5)
