"""One token through half a layer of a quantised model, as one operation: a residual sum and its norm, then
attention, linear attention or the feed-forward network.

Each is a sequence of other operations, written out here.  With one token such an operation is over in a
microsecond or two and calling it takes ten, so a native does a whole sequence in one call.  inputs, output,
gate_up and down are quantized.Int8Matrix.
"""

from minisb.backend import op
from minisb.ops.gate import log_gate_forward
from minisb.ops.gla import gla_step
from minisb.ops.heads import ends, relu_heads_forward
from minisb.ops.norm import add_rmsnorm_forward, rmsnorm_forward
from minisb.ops.rope import rope_forward
from minisb.ops.swiglu import swiglu_forward
from minisb.ops.w8aspike import attention_step_int8, code_heads


def _add_norm(be, x, delta, norm, eps):
    """x + delta and its norm; the first layer has no delta (None)."""
    if delta is None:
        return x, rmsnorm_forward(be, x, norm, eps)[0]
    return add_rmsnorm_forward(be, x, delta, norm, eps)[:2]


@op
def decode_ffn(be, x, delta, norm, eps, gate_up, down):
    """x, delta (B,1,C), norm (C,) -> x + delta, and down(swiglu(gate_up(rmsnorm(x + delta)))), both (B,1,C)."""
    z, h = _add_norm(be, x, delta, norm, eps)
    h, _ = swiglu_forward(be, gate_up.product(be, h))
    return z, down.product(be, h)


@op
def decode_gla(be, x, delta, norm, eps, inputs, b, heads, kv_heads, divisor, g_norm, state, output):
    """Linear attention with relu heads and a low-rank gate, whose rows stand below those of q, k and v in `inputs`.

    x, delta (B,1,C), norm (C,), b (O,) or None, g_norm (D,); state (B,G,D,D) is updated.
    -> x + delta, and what the layer adds to it.
    """
    z, h = _add_norm(be, x, delta, norm, eps)
    rows = inputs.product(be, h, b)
    D = state.shape[-1]
    q, k, v, _ = relu_heads_forward(be, rows, heads, kv_heads, D)
    log_g, _ = log_gate_forward(be, rows[..., ends(heads, kv_heads, D)[2] :].reshape(k.shape), divisor)
    o, _ = rmsnorm_forward(be, gla_step(be, q, k, v, log_g, state), g_norm, eps)
    return z, output.product(be, o.reshape(len(x), 1, heads * D))


@op
def decode_attention(be, x, delta, norm, eps, inputs, b, cos, sin, heads, kv_heads, spike_k, cache, output):
    """Softmax attention over an int8 cache (state.Int8KeyValueCache), which is added to.

    x, delta (B,1,C), norm (C,), b (O,) or None; cos, sin (1,D/2).  -> x + delta, and what the layer adds to it.
    """
    z, h = _add_norm(be, x, delta, norm, eps)
    D = 2 * cos.shape[-1]
    q, k, v = rope_forward(be, inputs.product(be, h, b), cos, sin, heads, kv_heads, D)
    q16, qv, *kept = code_heads(be, q, k, v, spike_k)
    cache.append(*kept)
    o = attention_step_int8(be, q16, qv, cache.k, cache.ku, cache.v, cache.vu, cache.count)
    return z, output.product(be, o.reshape(len(x), 1, heads * D))
