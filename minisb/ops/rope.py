"""Rotary position embedding on q and k, with the split of the fused projection."""

import numpy as np

from minisb.backend import op
from minisb.ops.heads import ends


def rope_table(start, length, head_dim, theta):
    """cos, sin (length, D/2) of the angles of positions start .. start+length-1.

    Pair i of a head turns by position * theta^(-2i/D).  Angles are taken in float64 and rounded
    once at the end, so that position 1,000,000 is as exact as position 1.
    """
    rate = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(start, start + length)[:, None] * rate
    return np.cos(angle), np.sin(angle)


@op
def rope_forward(be, qkv, cos, sin, heads, kv_heads, head_dim):
    """qkv (B,T,N), rows q | k | v; cos, sin (T,D/2) -> rotated q (B,T,H,D), k, and v (B,T,G,D).

    Rotate-half: channel i is paired with channel i + D/2,
        (a, b) -> (a cos - b sin, b cos + a sin).
    """
    B, T, _ = qkv.shape
    q_end, k_end, v_end = ends(heads, kv_heads, head_dim)
    q = _rotate(be, qkv[..., :q_end].reshape(B, T, heads, head_dim), cos, sin)
    k = _rotate(be, qkv[..., q_end:k_end].reshape(B, T, kv_heads, head_dim), cos, sin)
    v = qkv[..., k_end:v_end].reshape(B, T, kv_heads, head_dim).copy()
    return q, k, v


@op
def rope_backward(be, dq, dk, dv, cos, sin, dqkv):
    """dq (B,T,H,D), dk, dv (B,T,G,D) -> dqkv (B,T,N), whose columns q | k | v are written.

    The gradient of a rotation is the rotation back.
    """
    B, T, heads, head_dim = dq.shape
    q_end, k_end, v_end = ends(heads, dk.shape[2], head_dim)
    dqkv[..., :q_end] = _rotate(be, dq, cos, -sin).reshape(B, T, -1)
    dqkv[..., q_end:k_end] = _rotate(be, dk, cos, -sin).reshape(B, T, -1)
    dqkv[..., k_end:v_end] = dv.reshape(B, T, -1)
    return dqkv


def _rotate(be, x, cos, sin):
    a, b = be.xp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same angles for every head
    return be.xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
