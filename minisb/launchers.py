"""The CUDA twins of the operations: each has the operation's own signature and launches its kernels.

What a twin owes: contiguous inputs, outputs of the right type, a grid.  What it computes stands in
cuda/NAME.cu; what it means in ops/NAME.py.  Everything that a grid or a slice depends on is a shape,
so two runs give equal bits.
"""

from __future__ import annotations

from minisb.gpu import THREADS, Rows
from minisb.ops import attention, gla
from minisb.ops.cross_entropy import IGNORE
from minisb.ops.spike import VTH_MAX, VTH_MIN

MOST_BLOCKS = 4096  # of a kernel that walks its elements: enough for every GPU, and each thread takes several
WARPS = 4  # of a block, where a warp takes a row
SLICES = 256  # pieces of a long sum, at most
MULTIPROCESSORS = 132  # of an H100: blocks that a launch should not fall short of
LARGEST_HEAD = 256  # channels that the kernels of attention and linear attention hold
FAST_CHUNK = 64  # tokens of a chunk on tensor cores (CHUNK in cuda/gla_fast.cu)
CHUNK = 16  # tokens between two saved states of linear attention (CHUNK in cuda/gla.cu)


# --- shapes, types, grids


def _wide(x) -> str:
    """The dtype that kernels compute in, and keep statistics and parameter gradients in."""
    return "float64" if x.dtype.itemsize == 8 else "float32"


def _contiguous(be, *arrays):
    return [None if x is None else be.xp.ascontiguousarray(x) for x in arrays]


def _rows(x):
    """(...,C) seen as a matrix of rows; a view."""
    return x.reshape(-1, x.shape[-1])


def _blocks(count: int) -> int:
    """Blocks for `count` elements, one a thread and then the next."""
    return min(-(-count // THREADS), MOST_BLOCKS)


def _warps(rows: int) -> tuple[int, int]:
    """Blocks and threads for a warp a row."""
    return -(-rows // WARPS), 32 * WARPS


def _each(be, name: str, like, count: int, *args):
    be.launch(name, like, _blocks(count), THREADS, *args)


def _sliced_sum(be, name: str, like, arrays, rows: int, columns: int, total):
    """total (columns,) += column sums over `rows`, by a kernel that sums each slice of the rows."""
    tiles = -(-columns // 32)
    slices = max(1, min(SLICES, -(-rows // 64), MOST_BLOCKS // tiles))
    rows_a_slice = -(-rows // slices)
    slices = -(-rows // rows_a_slice)
    partial = be.xp.empty((slices, columns), _wide(like))
    be.launch(name, like, (tiles, slices), (32, 8), *arrays(partial), rows_a_slice)
    _each(be, "add_slices", like, columns, partial, total, slices, columns)


def _int32(be, tokens):
    return be.xp.ascontiguousarray(be.xp.asarray(tokens), dtype="int32")


# --- norm


def rmsnorm_forward(be, x, w, eps):
    x, w = _contiguous(be, x, w)
    rows, C = _rows(x).shape
    y, rstd = be.xp.empty_like(x), be.xp.empty((*x.shape[:-1], 1), _wide(x))
    be.launch("rmsnorm_forward", x, *_warps(rows), x, w, y, rstd, rows, C, eps)
    return y, (x, w, rstd)


def rmsnorm_backward(be, dy, saved, dw):
    return add_rmsnorm_backward(be, None, dy, saved, dw)


def add_rmsnorm_forward(be, x, delta, w, eps):
    x, delta, w = _contiguous(be, x, delta, w)
    rows, C = _rows(x).shape
    z, y, rstd = be.xp.empty_like(x), be.xp.empty_like(x), be.xp.empty((*x.shape[:-1], 1), _wide(x))
    be.launch("add_rmsnorm_forward", x, *_warps(rows), x, delta, w, z, y, rstd, rows, C, eps)
    return z, y, (z, w, rstd)


def add_rmsnorm_backward(be, dz, dy, saved, dw):
    x, w, rstd = saved
    dz, dy, x, rstd = _contiguous(be, dz, dy, x, rstd)
    rows, C = _rows(x).shape
    dx = be.xp.empty_like(x)
    be.launch("rmsnorm_backward", x, *_warps(rows), dz, dy, x, w, rstd, dx, rows, C)
    _sliced_sum(be, "rmsnorm_backward_w", x, lambda partial: (dy, x, rstd, partial, rows, C), rows, C, dw)
    return dx


# --- linear


def linear_forward(be, x, w, b=None, out=None):
    y = be.xp.empty((*x.shape[:-1], w.shape[0]), x.dtype) if out is None else out
    be.gemm(_rows(x), w, out=_rows(y), tb=True)
    if b is not None:
        columns = Rows(_rows(y)[:, : b.size])
        rows = columns.matrix.shape[0]
        _each(be, "add_bias", y, rows * b.size, columns, b, rows, b.size, columns.stride)
    return y


def linear_backward(be, dy, x, w, dw, db=None, dx=None):
    accumulate = dx is not None
    if dx is None:
        dx = be.xp.empty((*dy.shape[:-1], w.shape[1]), dy.dtype)
    be.gemm(_rows(dy), w, out=_rows(dx), accumulate=accumulate)
    be.gemm(_rows(dy), _rows(x), out=dw, ta=True, accumulate=True)
    if db is not None:
        columns = Rows(_rows(dy)[:, : db.size])
        rows, J = columns.matrix.shape
        _sliced_sum(be, "column_sums", dy, lambda partial: (columns, partial, rows, J, columns.stride), rows, J, db)
    return dx


# --- one element or one row at a time


def spike_forward(be, x, k):
    (x,) = _contiguous(be, x)
    rows, C = _rows(x).shape
    x_hat, vth = be.xp.empty_like(x), be.xp.empty((*x.shape[:-1], 1), _wide(x))
    be.launch("spike_forward", x, *_warps(rows), x, x_hat, vth, rows, C, k, VTH_MIN, VTH_MAX)
    return x_hat, vth


def embedding_forward(be, tokens, table):
    tokens = _int32(be, tokens)
    (V, C), N = table.shape, tokens.size
    x = be.xp.empty((*tokens.shape, C), table.dtype)
    _each(be, "embedding_forward", table, N * C, tokens, table, x, N, V, C)
    return x


def embedding_backward(be, dx, tokens, dtable):
    (dx,) = _contiguous(be, dx)
    tokens = _int32(be, tokens)
    be.launch("embedding_backward", dx, tokens.size, THREADS, dx, tokens, dtable, tokens.size, *dtable.shape)


def swiglu_forward(be, gate_up):
    (gate_up,) = _contiguous(be, gate_up)
    N, F = _rows(gate_up).shape[0], gate_up.shape[-1] // 2
    h = be.xp.empty((*gate_up.shape[:-1], F), gate_up.dtype)
    _each(be, "swiglu_forward", gate_up, N * F, gate_up, h, N, F)
    return h, gate_up


def swiglu_backward(be, dh, saved):
    dh, saved = _contiguous(be, dh, saved)
    N, F = _rows(dh).shape
    dgate_up = be.xp.empty_like(saved)
    _each(be, "swiglu_backward", dh, N * F, dh, saved, dgate_up, N, F)
    return dgate_up


def log_gate_forward(be, z, divisor):
    (z,) = _contiguous(be, z)
    log_g = be.xp.empty(z.shape, _wide(z))
    _each(be, "log_gate_forward", z, z.size, z, log_g, z.size, divisor)
    return log_g, (z, divisor)


def log_gate_backward(be, dlog_g, saved):
    z, divisor = saved
    dlog_g, z = _contiguous(be, dlog_g, z)
    dz = be.xp.empty_like(z)
    _each(be, "log_gate_backward", z, z.size, dlog_g, z, dz, z.size, divisor)
    return dz


def _split(be, qkv, heads, kv_heads, head_dim):
    """Empty q (B,T,H,D), k and v (B,T,G,D) for a fused projection (B,T,N)."""
    return [be.xp.empty((*qkv.shape[:2], n, head_dim), qkv.dtype) for n in (heads, kv_heads, kv_heads)]


def relu_heads_forward(be, qkv, heads, kv_heads, head_dim):
    (qkv,) = _contiguous(be, qkv)
    q, k, v = _split(be, qkv, heads, kv_heads, head_dim)
    rows, N = _rows(qkv).shape
    sizes = rows, N, heads * head_dim, kv_heads * head_dim
    _each(be, "relu_heads_forward", qkv, q.size + 2 * k.size, qkv, q, k, v, *sizes)
    return q, k, v, (q, k)


def relu_heads_backward(be, dq, dk, dv, saved, dqkv):
    dq, dk, dv, q, k = _contiguous(be, dq, dk, dv, *saved)
    rows, N = _rows(dqkv).shape
    sizes = rows, N, dq.shape[2] * dq.shape[3], dk.shape[2] * dk.shape[3]
    _each(be, "relu_heads_backward", dq, dq.size + 2 * dk.size, dq, dk, dv, q, k, dqkv, *sizes)
    return dqkv


def rope_forward(be, qkv, cos, sin, heads, kv_heads, head_dim):
    (qkv,) = _contiguous(be, qkv)
    B, T, N = qkv.shape
    q, k, v = _split(be, qkv, heads, kv_heads, head_dim)
    pairs = (q.size + 2 * k.size) // 2
    _each(be, "rope_forward", qkv, pairs, qkv, cos, sin, q, k, v, B * T, T, N, heads, kv_heads, head_dim)
    return q, k, v


def rope_backward(be, dq, dk, dv, cos, sin, dqkv):
    dq, dk, dv = _contiguous(be, dq, dk, dv)
    B, T, H, D = dq.shape
    pairs = (dq.size + 2 * dk.size) // 2
    sizes = B * T, T, dqkv.shape[2], H, dk.shape[2], D
    _each(be, "rope_backward", dq, pairs, dq, dk, dv, cos, sin, dqkv, *sizes)
    return dqkv


def cross_entropy(be, logits, targets, dloss=None):
    """A target outside the vocabulary gives a loss of NaN: from a GPU nobody can raise IndexError."""
    rows = Rows(logits)
    N, V = logits.shape
    losses, factors, step = be.xp.empty(N, _wide(logits)), None, 0
    if dloss is not None:
        factors = _on_device(be, dloss, _wide(logits)).reshape(-1)
        step = int(factors.size > 1)
    sizes = V, rows.stride, IGNORE
    writes = dloss is not None
    be.launch("cross_entropy", logits, N, THREADS, rows, _int32(be, targets), losses, factors, step, writes, *sizes)
    return losses


def _on_device(be, number, dtype):
    """A Python number (sent as part of a launch, not as a copy) or an array, as an array of `dtype`."""
    if isinstance(number, (int, float)):
        return be.xp.full((), number, dtype)
    return be.xp.ascontiguousarray(number, dtype=dtype)


# --- AdamW


def grad_norm(be, g):
    """The norm stays on the device, an array of no axes: reading it would stop the queue."""
    (g,) = _contiguous(be, g)
    slices = max(1, min(SLICES, -(-g.size // (4 * THREADS))))
    partial, norm = be.xp.empty(slices, "float64"), be.xp.empty((), "float64")
    be.launch("square_sums", g, slices, THREADS, g, partial, g.size, -(-g.size // slices))
    be.launch("norm_of_sums", g, 1, THREADS, partial, norm, slices)
    return norm


def adamw(be, p, g, m, v, decayed, lr, beta1, beta2, eps, weight_decay, step, g_scale):
    scale = _on_device(be, g_scale, "float64")
    numbers = lr, beta1, beta2, eps, weight_decay, 1 - beta1**step, 1 - beta2**step
    _each(be, "adamw", p, p.size, p, g, m, v, None, p.size, decayed, *numbers, scale)


# --- gated linear attention


def gla_forward(be, q, k, v, log_g, state=None, scale=None, chunk=CHUNK):
    if _tensor_cores(be, q):
        return _gla_forward_fast(be, q, k, v, log_g, state, scale)
    if not _walkable(q, k):
        return gla.gla_forward.reference(be, q, k, v, log_g, state, scale, chunk)
    return _gla_forward_plain(be, q, k, v, log_g, state, scale, chunk)


def _gla_forward_plain(be, q, k, v, log_g, state, scale, chunk):
    q, k, v, log_g, state = _contiguous(be, q, k, v, log_g, state)
    B, T, G, D = k.shape
    scale = D**-0.5 if scale is None else scale
    o, final = be.xp.empty_like(q), be.xp.empty((B, G, D, D), _wide(q))
    states = be.xp.empty((B, -(-T // chunk), G, D, D), _wide(q))
    _walk(be, q, k, v, _decay(be, q, log_g), state, o, final, states, scale, chunk)
    return o, final, (q, k, v, log_g, scale, chunk, states)


def gla_step(be, q, k, v, log_g, state, scale=None):
    if not _walkable(q, k):
        return gla.gla_step.reference(be, q, k, v, log_g, state, scale)
    q, k, v, log_g = _contiguous(be, q, k, v, log_g)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    o = be.xp.empty_like(q)
    _walk(be, q, k, v, _decay(be, q, log_g), state, o, state, None, scale, 1)
    return o


def gla_backward(be, do, dstate, saved):
    q, k, v, log_g, scale, chunk, states = saved
    if not _walkable(q, k):
        return gla.gla_backward.reference(be, do, dstate, saved)
    if chunk > CHUNK:  # more than a thread keeps: walk once more, saving oftener
        return gla_backward(be, do, dstate, _gla_forward_plain(be, q, k, v, log_g, states[:, 0], scale, CHUNK)[2])
    do, dstate, q, k, v, log_g, states = _contiguous(be, do, dstate, q, k, v, log_g, states)
    B, T, G, D = k.shape
    decay = _decay(be, q, log_g)
    dq, dk, dv, dlog_g = (be.xp.empty_like(x) for x in (q, k, v, log_g))
    dfirst = be.xp.empty((B, G, D, D), _wide(q))
    sizes = T, q.shape[2], G, D, scale
    blocks, threads, parts = _lines(B * G, D, per_thread=16)
    be.launch("gla_backward_columns", q, blocks, threads, do, q, k, decay, dstate, dv, dfirst, *sizes, parts)
    blocks, threads, parts = _lines(B * G, D, per_thread=8)
    inputs = do, q, k, v, decay, states, dstate
    be.launch("gla_backward_rows", q, blocks, threads, *inputs, dq, dk, dlog_g, *sizes, chunk, parts)
    return dq, dk, dv, dlog_g, dfirst


def _tensor_cores(be, q) -> bool:
    """Whether cuda/gla_fast.cu is for these heads and this GPU (sm_80 and later, and with the shared memory)."""
    D, target = q.shape[3], getattr(be.device, "target", "sm_0")
    if q.dtype.itemsize != 2 or D not in (64, 128) or int(target.strip("sm_a")) < 80:
        return False
    return _fast_bytes(D) <= be.device.shared_bytes


def _fast_bytes(D: int) -> int:
    """sizeof(Shared<D>) in cuda/gla_fast.cu."""
    padded = 2 * (D + 8)
    stage = FAST_CHUNK * (4 * D + 2 * D + padded)
    return 2 * stage + 3 * FAST_CHUNK * padded + D * padded + 8 * 4 * D


def _gla_forward_fast(be, q, k, v, log_g, first, scale):
    """Many states: a block walks each.  Few: the text is cut into pieces, whose states are found first."""
    q, k, v, log_g, first = _contiguous(be, q, k, v, log_g, first)
    (B, T, G, D), H = k.shape, q.shape[2]
    scale = D**-0.5 if scale is None else scale
    chunks = -(-T // FAST_CHUNK)
    a_piece = -(-chunks // max(1, min(chunks // 4, MULTIPROCESSORS // (B * G))))
    pieces = -(-chunks // a_piece)
    o, final, wide = be.xp.empty_like(q), be.xp.empty((B, G, D, D), "float32"), "float32"
    states = be.xp.empty((B, chunks, G, D, D), wide)
    sizes, shared = (T, H, G, scale, a_piece), _fast_bytes(D)
    kernel = {64: "gla_fast_forward_64", 128: "gla_fast_forward_128"}[D]
    grid, inputs = (B * G, 1, pieces), (q, k, v, log_g)
    ends = final
    if pieces > 1:
        ends, decays = be.xp.empty((B, G, pieces, D, D), wide), be.xp.empty((B, G, pieces, D), wide)
        be.launch(kernel, q, grid, 256, *inputs, None, None, ends, None, decays, *sizes, shared=shared)
        _each(be, "gla_fast_join", q, final.size, first, ends, decays, final, B * G, pieces, D)
        first, ends = ends, be.xp.empty_like(ends)
    be.launch(kernel, q, grid, 256, *inputs, first, o, ends, states, None, *sizes, shared=shared)
    return o, final, (q, k, v, log_g, scale, FAST_CHUNK, states)


def _walkable(q, k) -> bool:
    """Whether one token of a group fits into a block's shared memory (STAGE in cuda/gla.cu)."""
    padded = 8 << (-(-k.shape[3] // 8) - 1).bit_length()
    heads = 3 + 2 * (q.shape[2] // k.shape[2])
    return k.shape[3] <= LARGEST_HEAD and heads * max(padded, 16) * (8 if q.dtype.itemsize == 8 else 4) <= 40960


def _decay(be, q, log_g):
    decay = be.xp.empty_like(log_g)
    _each(be, "gla_decay", q, log_g.size, log_g, decay, log_g.size)
    return decay


def _walk(be, q, k, v, decay, first, o, final, states, scale, chunk):
    B, T, G, D = k.shape
    blocks, threads, parts = _lines(B * G, D, per_thread=16)
    sizes = T, q.shape[2], G, D, scale, chunk
    be.launch("gla_forward", q, blocks, threads, q, k, v, decay, first, o, final, states, *sizes, parts)


def _lines(states: int, D: int, per_thread: int):
    """Grid for columns or rows of states: blocks, threads, and the lanes that share one line of D entries."""
    parts = 1 << (-(-D // per_thread) - 1).bit_length()
    warps = -(-D // (32 // parts))
    a_block = min(warps, WARPS)
    return (states, -(-warps // a_block)), 32 * a_block, parts


# --- softmax attention


def attention_forward(be, q, k, v, window, scale=None):
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_forward.reference(be, q, k, v, window, scale)
    q, k, v = _contiguous(be, q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = be.xp.empty_like(q), be.xp.empty(q.shape[:-1], _wide(q))
    blocks = q.shape[0] * q.shape[2], _tiles(q, q.shape[1])
    be.launch("attention_forward", q, blocks, (16, 16), q, k, v, o, lse, *_sizes(q, k, window), scale)
    return o, (q, k, v, o, lse, window, scale)


def attention_backward(be, do, saved):
    q, k, v, o, lse, window, scale = saved
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_backward.reference(be, do, saved)
    do, q, k, v, o, lse = _contiguous(be, do, q, k, v, o, lse)
    dq, dk, dv, delta = *(be.xp.empty_like(x) for x in (q, k, v)), be.xp.empty_like(lse)
    be.launch("attention_delta", q, *_warps(lse.size), do, o, delta, lse.size, q.shape[3])
    inputs, sizes = (do, q, k, v, lse, delta), (*_sizes(q, k, window), scale)
    blocks = q.shape[0] * q.shape[2], _tiles(q, q.shape[1])
    be.launch("attention_backward_q", q, blocks, (16, 16), *inputs, dq, *sizes)
    blocks = k.shape[0] * k.shape[2], _tiles(q, k.shape[1])
    for of_values, found in ((0, dk), (1, dv)):
        be.launch("attention_backward_kv", q, blocks, (16, 16), *inputs, found, of_values, *sizes)
    return dq, dk, dv


def attention_step(be, q, k, v, count, scale=None):
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_step.reference(be, q, k, v, count, scale)
    q, k, v = _contiguous(be, q, k, v)
    (B, _, H, D), (_, S, G, _) = q.shape, k.shape
    scale = D**-0.5 if scale is None else scale
    o = be.xp.empty_like(q)
    be.launch("attention_step", q, B * H, 32 * WARPS, q, k, v, o, count, S, H, G, D, scale)
    return o


def _sizes(q, k, window):
    """T, S, H, G, D and the window; one longer than the text is the text."""
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], min(window, k.shape[1])


def _tiles(q, count: int) -> int:
    """TILE in cuda/attention.cu."""
    return -(-count // (32 if q.dtype.itemsize == 8 else 64))


#: Module -> operation -> twin, by the names that --native takes.
MODULES = {
    "linear": (linear_forward, linear_backward),
    "spike": (spike_forward,),
    "norm": (rmsnorm_forward, rmsnorm_backward, add_rmsnorm_forward, add_rmsnorm_backward),
    "rope": (rope_forward, rope_backward),
    "heads": (relu_heads_forward, relu_heads_backward),
    "swiglu": (swiglu_forward, swiglu_backward),
    "cross_entropy": (cross_entropy,),
    "gla": (gla_forward, gla_backward, gla_step),
    "attention": (attention_forward, attention_backward, attention_step),
    "adamw": (adamw, grad_norm),
    "gate": (log_gate_forward, log_gate_backward),
    "embedding": (embedding_forward, embedding_backward),
}
