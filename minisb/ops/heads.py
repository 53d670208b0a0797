"""From one fused projection to q, k and v of linear attention: split, and the ReLU feature map."""

from minisb.backend import op


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


def ends(heads, kv_heads, head_dim):
    """Where q, k and v end among the columns of a fused projection."""
    q_end = heads * head_dim
    return q_end, q_end + kv_heads * head_dim, q_end + 2 * kv_heads * head_dim
