"""Twins of what the parallel hybrid has: sigmoid on q and k, the gate tied to the key, the sum of two branches."""

from __future__ import annotations

from minisb.launchers.grid import contiguous, each, flat, wide_type


def sigmoid_heads_forward(be, qkv, heads, kv_heads, head_dim, tied=False):
    (qkv,) = contiguous(be, qkv)
    B, T, N = qkv.shape
    q, k, v = (be.xp.empty((B, T, n, head_dim), qkv.dtype) for n in (heads, kv_heads, kv_heads))
    log_g = be.xp.empty(k.shape, wide_type(qkv)) if tied else None
    sizes = B * T, N, heads * head_dim, kv_heads * head_dim
    each(be, "sigmoid_heads_forward", qkv, q.size + 2 * k.size, qkv, q, k, v, log_g, *sizes)
    return q, k, v, log_g, (q, k, tied)


def sigmoid_heads_backward(be, dq, dk, dv, dlog_g, saved, dqkv):
    q, k, tied = saved
    dq, dk, dv, dlog_g, q, k = contiguous(be, dq, dk, dv, dlog_g if tied else None, q, k)
    rows, N = flat(dqkv).shape
    sizes = rows, N, q.shape[2] * q.shape[3], k.shape[2] * k.shape[3]
    each(be, "sigmoid_heads_backward", dq, dq.size + 2 * dk.size, dq, dk, dv, dlog_g, q, k, dqkv, *sizes)
    return dqkv


def tied_gate_forward(be, z):
    (z,) = contiguous(be, z)
    k, log_g = be.xp.empty_like(z), be.xp.empty(z.shape, wide_type(z))
    each(be, "tied_gate_forward", z, z.size, z, k, log_g, z.size)
    return k, log_g, k


def tied_gate_backward(be, dk, dlog_g, saved):
    dk, dlog_g, k = contiguous(be, dk, dlog_g, saved)
    dz = be.xp.empty_like(k)
    each(be, "tied_gate_backward", k, k.size, dk, dlog_g, k, dz, k.size)
    return dz


def add(be, x, y):
    x, y = contiguous(be, x, y)
    total = be.xp.empty_like(x)
    each(be, "add_arrays", x, x.size, x, y, total, x.size)
    return total


TWINS = {
    "heads": (sigmoid_heads_forward, sigmoid_heads_backward),
    "linear": (add,),
    "gate": (tied_gate_forward, tied_gate_backward),
}
