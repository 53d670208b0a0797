"""Twins of what works on single tokens: norm, linear, spikes, embedding, SwiGLU, gate, heads, rope, loss, AdamW."""

from __future__ import annotations

import numpy as np

from minisb.gpu import THREADS, Rows
from minisb.launchers.grid import (
    MULTIPROCESSORS,
    WARPS,
    add_slices,
    contiguous,
    each,
    flat,
    has_tensor_cores,
    int32,
    row_lanes,
    shared_rows,
    sliced_sum,
    wide_type,
)  # fmt: skip
from minisb.ops import gate, norm
from minisb.ops.cross_entropy import IGNORE
from minisb.ops.spike import VTH_MAX, VTH_MIN

# --- norm

ANY = np.empty(0, "float32")  # for a kernel that has no real in it
NORM_SUMS = 60 << 10  # bytes of shared memory for the sums of a norm's weight gradient: even a T4 has them


def rmsnorm_forward(be, x, w, eps):
    _, y, saved = add_rmsnorm_forward(be, x, None, w, eps)
    return y, saved


def rmsnorm_backward(be, dy, saved, dw):
    return add_rmsnorm_backward(be, None, dy, saved, dw)


def add_rmsnorm_forward(be, x, delta, w, eps):
    x, delta, w = contiguous(be, x, delta, w)
    rows, C = flat(x).shape
    y, rstd = be.xp.empty_like(x), be.xp.empty((*x.shape[:-1], 1), wide_type(x))
    z = None if delta is None else be.xp.empty_like(x)
    be.launch("rmsnorm_forward", x, *shared_rows(rows), x, delta, w, z, y, rstd, rows, C, eps)
    z = x if z is None else z
    return z, y, (z, w, rstd)


def add_rmsnorm_backward(be, dz, dy, saved, dw):
    x, w, rstd = saved
    dz, dy, x, rstd = contiguous(be, dz, dy, x, rstd)
    rows, C = flat(x).shape
    # Every row that the warps of a block have at a time keeps a line of C sums: as many warps as that leaves room for.
    line = C * rstd.itemsize * (32 // row_lanes(x, C))
    warps = max(1, min(WARPS, NORM_SUMS // line))
    if warps * line > NORM_SUMS:
        return norm.add_rmsnorm_backward.reference(be, dz, dy, saved, dw)
    blocks = min(-(-rows // warps), 4 * MULTIPROCESSORS)
    dx, partial = be.xp.empty_like(x), be.xp.empty((blocks, C), wide_type(x))
    shared = warps * line
    be.launch("rmsnorm_backward", x, blocks, 32 * warps, dz, dy, x, w, rstd, dx, partial, rows, C, shared=shared)
    add_slices(be, x, partial, dw)
    return dx


# --- linear

MATVEC = True  # one token's product by cuda/matvec.cu and not by cuBLAS: bench/gpu_decode.py times both
MATVEC_WARPS = 2048  # that a product should have, if its rows are long enough to be shared


def linear_forward(be, x, w, b=None, out=None):
    y = be.xp.empty((*x.shape[:-1], w.shape[0]), x.dtype) if out is None else out
    if x.size == w.shape[1] and _one_token(be, x, w, b, y):
        return y
    if b is not None and be.gemm_with(flat(x), w, flat(y), tb=True, bias=b):
        return y
    be.gemm(flat(x), w, out=flat(y), tb=True)
    if b is not None:
        columns = Rows(flat(y)[:, : b.size])
        rows = columns.matrix.shape[0]
        each(be, "add_bias", y, rows * b.size, columns, b, rows, b.size, columns.stride)
    return y


def _one_token(be, x, w, b, y) -> bool:
    """linear_forward of a single row; False where its kernel is not for these arrays."""
    if not MATVEC or any(a.dtype != w.dtype or not a.flags.c_contiguous for a in (x, w, y)):
        return False
    (O, I), sharing = w.shape, 1
    while sharing < 4 and O * sharing < MATVEC_WARPS and 256 * sharing < I:
        sharing *= 2
    blocks, J = -(-O * sharing // 4), 0 if b is None else b.size
    be.launch("matvec", w, blocks, 128, x, w, b, y, O, I, J, sharing)
    return True


def linear_backward(be, dy, x, w, dw, db=None, dx=None):
    accumulate = dx is not None
    if dx is None:
        dx = be.xp.empty((*dy.shape[:-1], w.shape[1]), dy.dtype)
    if db is not None:  # first: what wrote dy has left some of it in the cache
        columns = Rows(flat(dy)[:, : db.size])
        rows, J = columns.matrix.shape
        sliced_sum(be, "column_sums", dy, lambda partial: (columns, partial, rows, J, columns.stride), rows, J, db)
    be.gemm(flat(dy), w, out=flat(dx), accumulate=accumulate)
    be.gemm(flat(dy), flat(x), out=dw, ta=True, accumulate=True)
    return dx


# --- one element or one row at a time

RARE_TOKEN = 32  # places of a token that a warp looks after alone: RARE of cuda/embedding.cu


def spike_forward(be, x, k):
    (x,) = contiguous(be, x)
    rows, C = flat(x).shape
    x_hat, vth = be.xp.empty_like(x), be.xp.empty((*x.shape[:-1], 1), wide_type(x))
    be.launch("spike_forward", x, *shared_rows(rows), x, x_hat, vth, rows, C, k, VTH_MIN, VTH_MAX)
    return x_hat, vth


def embedding_forward(be, tokens, table):
    tokens = int32(be, tokens)
    (V, C), N = table.shape, tokens.size
    x = be.xp.empty((*tokens.shape, C), table.dtype)
    each(be, "embedding_forward", table, N * C, tokens, table, x, N, V, C)
    return x


def embedding_backward(be, dx, tokens, dtable):
    (dx,) = contiguous(be, dx)
    tokens = int32(be, tokens)
    (V, C), N = dtable.shape, tokens.size
    most = N // (RARE_TOKEN + 1)  # tokens that are not rare
    found, before = be.xp.zeros(V + 1 + most, "int32"), be.xp.empty(N, "int32")
    last, frequent = found[:V], found[V:]
    each(be, "embedding_places", dx, N, tokens, last, before, N, V)
    each_warp = -(-N // 8), THREADS
    be.launch("embedding_backward", dx, *each_warp, dx, tokens, last, before, frequent, dtable, N, V, C)
    blocks = min(most, 2 * MULTIPROCESSORS), -(-C // (32 * 16 // dx.itemsize))
    be.launch("embedding_frequent", dx, blocks, 512, dx, tokens, frequent, dtable, N, C)


def swiglu_forward(be, gate_up):
    (gate_up,) = contiguous(be, gate_up)
    N, F = flat(gate_up).shape[0], gate_up.shape[-1] // 2
    h = be.xp.empty((*gate_up.shape[:-1], F), gate_up.dtype)
    each(be, "swiglu_forward", gate_up, N * F, gate_up, h, N, F)
    return h, gate_up


def swiglu_backward(be, dh, saved):
    dh, saved = contiguous(be, dh, saved)
    N, F = flat(dh).shape
    dgate_up = be.xp.empty_like(saved)
    each(be, "swiglu_backward", dh, N * F, dh, saved, dgate_up, N, F)
    return dgate_up


def log_gate_forward(be, z, divisor):
    (z,) = contiguous(be, z)
    log_g = be.xp.empty(z.shape, wide_type(z))
    each(be, "log_gate_forward", z, z.size, z, log_g, z.size, divisor)
    return log_g, (z, divisor)


def log_gate_backward(be, dlog_g, saved):
    z, divisor = saved
    dlog_g, z = contiguous(be, dlog_g, z)
    dz = be.xp.empty_like(z)
    each(be, "log_gate_backward", z, z.size, dlog_g, z, dz, z.size, divisor)
    return dz


# Rank of the gate, at most -> its kernels on tensor cores, and the warps that a block of backward has at most.
LOW_RANK = {
    16: ("low_rank_gate_forward_16", "low_rank_gate_backward_16", 16),
    32: ("low_rank_gate_forward_32", "low_rank_gate_backward_32", 8),
}
GATE_WARPS = 8  # of a block, if the gate has no more columns than these take


def low_rank_gate_forward(be, x, w, b, divisor):
    kernels, threads, a_block = _low_rank(be, w)
    if not kernels:
        return gate.low_rank_gate_forward.reference(be, x, w, b, divisor)
    (J, R), rows = w.shape, Rows(flat(x))
    N = rows.matrix.shape[0]
    log_g = be.xp.empty((*x.shape[:-1], J), wide_type(x))
    blocks = min(-(-N // a_block), 8 * MULTIPROCESSORS)
    be.launch(kernels[0], x, blocks, threads, rows, rows.stride, w, b, log_g, N, J, R, divisor)
    return log_g, (x, w, b, divisor, None)


def low_rank_gate_backward(be, dlog_g, saved, dx, dw, db):
    x, w, b, divisor, _ = saved
    kernels, threads, a_block = _low_rank(be, w)
    if not kernels:
        return gate.low_rank_gate_backward.reference(be, dlog_g, saved, dx, dw, db)
    (dlog_g,) = contiguous(be, dlog_g)
    (J, R), rows, written = w.shape, Rows(flat(x)), Rows(flat(dx))
    N = rows.matrix.shape[0]
    blocks = min(-(-N // a_block), 512 // threads * MULTIPROCESSORS)  # as many as run at once
    partial = be.xp.empty((blocks, J * R + J), wide_type(x))
    arrays = dlog_g, rows, rows.stride, w, b, written, written.stride, partial
    be.launch(kernels[1], x, blocks, threads, *arrays, N, J, R, divisor)
    add_slices(be, x, partial, dw, db)
    return dx


def _low_rank(be, w):
    """The kernels on tensor cores that fit w (J,R), if any do; threads of a block, and its rows of a round."""
    J, R = w.shape
    groups, found = -(-J // 32), LOW_RANK.get(-(-R // 16) * 16)
    if not found or groups > found[2] or not has_tensor_cores(be, w):
        return None, 0, 0
    teams = max(1, GATE_WARPS // groups)
    return found[:2], 32 * groups * teams, 16 * teams


def _split(be, qkv, heads, kv_heads, head_dim):
    """Empty q (B,T,H,D), k and v (B,T,G,D) for a fused projection (B,T,N)."""
    return [be.xp.empty((*qkv.shape[:2], n, head_dim), qkv.dtype) for n in (heads, kv_heads, kv_heads)]


def relu_heads_forward(be, qkv, heads, kv_heads, head_dim):
    (qkv,) = contiguous(be, qkv)
    q, k, v = _split(be, qkv, heads, kv_heads, head_dim)
    rows, N = flat(qkv).shape
    sizes = rows, N, heads * head_dim, kv_heads * head_dim
    each(be, "relu_heads_forward", qkv, q.size + 2 * k.size, qkv, q, k, v, *sizes)
    return q, k, v, (q, k)


def relu_heads_backward(be, dq, dk, dv, saved, dqkv):
    dq, dk, dv, q, k = contiguous(be, dq, dk, dv, *saved)
    rows, N = flat(dqkv).shape
    sizes = rows, N, dq.shape[2] * dq.shape[3], dk.shape[2] * dk.shape[3]
    each(be, "relu_heads_backward", dq, dq.size + 2 * dk.size, dq, dk, dv, q, k, dqkv, *sizes)
    return dqkv


def rope_forward(be, qkv, cos, sin, heads, kv_heads, head_dim):
    (qkv,) = contiguous(be, qkv)
    B, T, N = qkv.shape
    q, k, v = _split(be, qkv, heads, kv_heads, head_dim)
    pairs = (q.size + 2 * k.size) // 2
    each(be, "rope_forward", qkv, pairs, qkv, cos, sin, q, k, v, B * T, T, N, heads, kv_heads, head_dim)
    return q, k, v


def rope_backward(be, dq, dk, dv, cos, sin, dqkv):
    dq, dk, dv = contiguous(be, dq, dk, dv)
    B, T, H, D = dq.shape
    pairs = (dq.size + 2 * dk.size) // 2
    sizes = B * T, T, dqkv.shape[2], H, dk.shape[2], D
    each(be, "rope_backward", dq, pairs, dq, dk, dv, cos, sin, dqkv, *sizes)
    return dqkv


def cross_entropy(be, logits, targets, dloss=None):
    """A target outside the vocabulary gives a loss of NaN: from a GPU nobody can raise IndexError."""
    rows = Rows(logits)
    N, V = logits.shape
    losses, factors, step = be.xp.empty(N, wide_type(logits)), None, 0
    if dloss is not None:
        factors = _on_device(be, dloss, wide_type(logits)).reshape(-1)
        step = int(factors.size > 1)
    sizes = V, rows.stride, IGNORE
    writes = dloss is not None
    threads, kept = loss_block(be, logits)
    arrays = rows, int32(be, targets), losses, factors, step, writes
    be.launch("cross_entropy", logits, N, threads, *arrays, *sizes, kept, shared=kept * logits.itemsize)
    return losses


def loss_block(be, logits) -> tuple[int, int]:
    """Threads of a block of cross_entropy, and how many logits of its row it keeps in shared memory.

    Three blocks on a multiprocessor, so that one loads while another computes; of longer rows two or one.
    """
    pack, V = 16 // logits.itemsize, logits.shape[1]
    packs, blocks = -(-V // pack), 3
    while blocks > 1 and 16 * packs > _shared(be, blocks):
        blocks -= 1
    threads = 32
    while threads * 8 < packs:
        threads *= 2
    most = 768 if logits.itemsize == 8 else 1024  # doubles take too many registers for more
    return min(threads, most, 1536 // blocks), min(packs, _shared(be, blocks) // 16) * pack


def _shared(be, blocks: int) -> int:
    """Bytes of shared memory for each of so many blocks on a multiprocessor, less what each needs besides."""
    return be.device.shared_bytes // blocks - 2048


def counted(be, targets):
    count = be.xp.empty((), "float64")
    targets = int32(be, targets)
    be.launch("counted", ANY, 1, 1024, targets, count, targets.size, IGNORE)
    return count


def total_loss(be, losses):
    total = be.xp.empty((), "float64")
    be.launch("total_loss", losses, 1, 1024, losses, total, losses.size)
    return total


def _on_device(be, number, dtype):
    """A Python number (sent as part of a launch, not as a copy) or an array, as an array of `dtype`."""
    if isinstance(number, (int, float)):
        return be.xp.full((), number, dtype)
    return be.xp.ascontiguousarray(number, dtype=dtype)


# --- AdamW


def grad_norm(be, g):
    """The norm stays on the device, an array of no axes: reading it would stop the queue."""
    (g,) = contiguous(be, g)
    blocks = max(1, min(8 * MULTIPROCESSORS, -(-g.size // (4 * THREADS))))
    partial, norm = be.xp.empty(blocks, "float64"), be.xp.empty((), "float64")
    be.launch("square_sums", g, blocks, THREADS, g, partial, g.size)
    be.launch("norm_of_sums", g, 1, 1024, partial, norm, blocks)
    return norm


def adamw(be, p, g, m, v, decayed, lr, beta1, beta2, eps, weight_decay, step, g_scale, rounded=None):
    scale = _on_device(be, g_scale, "float64")
    like = p if rounded is None else rounded
    numbers = lr, beta1, beta2, eps, weight_decay, 1 - beta1**step, 1 - beta2**step
    each(be, "adamw", like, p.size, p, g, m, v, rounded, p.size, decayed, *numbers, scale)


TWINS = {
    "linear": (linear_forward, linear_backward),
    "spike": (spike_forward,),
    "norm": (rmsnorm_forward, rmsnorm_backward, add_rmsnorm_forward, add_rmsnorm_backward),
    "rope": (rope_forward, rope_backward),
    "heads": (relu_heads_forward, relu_heads_backward),
    "swiglu": (swiglu_forward, swiglu_backward),
    "cross_entropy": (cross_entropy, counted, total_loss),
    "adamw": (adamw, grad_norm),
    "gate": (log_gate_forward, log_gate_backward, low_rank_gate_forward, low_rank_gate_backward),
    "embedding": (embedding_forward, embedding_backward),
}
