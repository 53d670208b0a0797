"""From one fused projection to q, k and v of linear attention: split, and the feature map, ReLU or sigmoid."""

from minisb.backend import op
from minisb.ops.gate import tied_gate_backward, tied_gate_forward
from minisb.ops.swiglu import sigmoid


@op
def relu_heads_forward(be, qkv, heads, kv_heads, head_dim):
    """qkv (B,T,N), rows q | k | v | anything -> relu(q) (B,T,H,D), relu(k), v (B,T,G,D).

    The feature map keeps q and k non-negative, so that a read-out weighs what was written
    (report, section 3.1).  saved: the two results.
    """
    B, T, _ = qkv.shape
    q_end, k_end, v_end = ends(heads, kv_heads, head_dim)
    q = be.xp.maximum(qkv[..., :q_end], 0).reshape(B, T, heads, head_dim)
    k = be.xp.maximum(qkv[..., q_end:k_end], 0).reshape(B, T, kv_heads, head_dim)
    v = qkv[..., k_end:v_end].reshape(B, T, kv_heads, head_dim).copy()
    return q, k, v, (q, k)


@op
def relu_heads_backward(be, dq, dk, dv, saved, dqkv):
    """dq (B,T,H,D), dk, dv (B,T,G,D) -> dqkv (B,T,N), whose columns q | k | v are written.

    The array is the caller's, who fills the columns that follow.  relu passes a gradient where
    its result is above 0.
    """
    q, k = saved
    B, T, heads, head_dim = dq.shape
    q_end, k_end, v_end = ends(heads, dk.shape[2], head_dim)
    dqkv[..., :q_end] = (dq * (q > 0)).reshape(B, T, -1)
    dqkv[..., q_end:k_end] = (dk * (k > 0)).reshape(B, T, -1)
    dqkv[..., k_end:v_end] = dv.reshape(B, T, -1)
    return dqkv


@op
def sigmoid_heads_forward(be, qkv, heads, kv_heads, head_dim, tied=False):
    """qkv (B,T,N), rows q | k | v | anything -> sigmoid(q) (B,T,H,D), sigmoid(k), v, log_g (B,T,G,D), saved.

    The feature map of the 76B.  tied: log_g is that of the gate tied to the key, else None.  saved: q, k, tied.
    """
    B, T, _ = qkv.shape
    q_end, k_end, v_end = ends(heads, kv_heads, head_dim)
    q = sigmoid(be, qkv[..., :q_end]).reshape(B, T, heads, head_dim)
    z = qkv[..., q_end:k_end].reshape(B, T, kv_heads, head_dim)
    v = qkv[..., k_end:v_end].reshape(B, T, kv_heads, head_dim).copy()
    k, log_g, _ = tied_gate_forward(be, z) if tied else (sigmoid(be, z), None, None)
    return q, k, v, log_g, (q, k, tied)


@op
def sigmoid_heads_backward(be, dq, dk, dv, dlog_g, saved, dqkv):
    """dq (B,T,H,D), dk, dv, dlog_g (B,T,G,D) -> dqkv (B,T,N), whose columns q | k | v are written.

    As relu_heads_backward, with sigmoid' = y (1 - y).  dlog_g is None where the gate is not tied.
    """
    q, k, tied = saved
    B, T, heads, head_dim = dq.shape
    q_end, k_end, v_end = ends(heads, dk.shape[2], head_dim)
    dqkv[..., :q_end] = (dq * q * (1 - q)).reshape(B, T, -1)
    dz = tied_gate_backward(be, dk, dlog_g, k) if tied else dk * k * (1 - k)
    dqkv[..., q_end:k_end] = dz.reshape(B, T, -1)
    dqkv[..., k_end:v_end] = dv.reshape(B, T, -1)
    return dqkv


def ends(heads, kv_heads, head_dim):
    """Where q, k and v end among the columns of a fused projection."""
    q_end = heads * head_dim
    return q_end, q_end + kv_heads * head_dim, q_end + 2 * kv_heads * head_dim
