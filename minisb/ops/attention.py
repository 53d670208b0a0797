"""Softmax attention through a sliding window (report, eq. 1-2), with grouped query heads.

Token t sees the W keys t-W+1 .. t, itself included; a window of at least T is full attention.
Shapes: q, o (B,T,H,D); k, v (B,S,G,D) with S >= T: the queries are the last T of S positions, so
that a prompt can arrive in pieces.  The scores of a whole sequence never exist at once: queries
are taken in blocks, and backward rebuilds each block from the saved log-sum-exp.
"""

from minisb.backend import op

BLOCK = 64  # queries a block


@op
def attention_forward(be, q, k, v, window, scale=None):
    """-> o (B,T,H,D), saved.  saved: q, k, v, o, lse (B,T,H), window, scale (default D^-1/2).

    lse is the logarithm of each softmax's denominator: exp(score - lse) is the probability.
    """
    xp = be.xp
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = xp.empty_like(q), xp.empty(q.shape[:-1], q.dtype)
    for rows, keys, visible in _blocks(be, q.shape[1], k.shape[1], window):
        s = _scores(be, q[:, rows], k[:, keys], visible, scale)
        top = s.max(-1, keepdims=True)
        p = xp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        o[:, rows] = _time_first(p @ _heads_first(v[:, keys])[:, :, None] / total)
        lse[:, rows] = _time_first(top + xp.log(total))[..., 0]
    return o, (q, k, v, o, lse, window, scale)


@op
def attention_backward(be, do, saved):
    """do (B,T,H,D) -> dq (B,T,H,D), dk, dv (B,S,G,D).

    With p the probabilities of one query, o = p v:
        dv = p^T do,  dp = do v^T,  ds = p * (dp - sum(p * dp))
    and sum(p * dp) = sum(do * o): one number a query, no second pass over the keys.
        dq = scale * ds k,  dk = scale * ds^T q
    """
    xp = be.xp
    q, k, v, o, lse, window, scale = saved
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    delta = (do * o).sum(-1, keepdims=True)
    G = k.shape[2]
    for rows, keys, visible in _blocks(be, q.shape[1], k.shape[1], window):
        qb, dob = _grouped(q[:, rows], G), _grouped(do[:, rows], G)
        kb, vb = _heads_first(k[:, keys])[:, :, None], _heads_first(v[:, keys])[:, :, None]
        p = xp.exp(_scores(be, q[:, rows], k[:, keys], visible, scale) - _grouped(lse[:, rows, :, None], G))
        ds = scale * p * (dob @ vb.swapaxes(-1, -2) - _grouped(delta[:, rows], G))
        dq[:, rows] = _time_first(ds @ kb)
        dk[:, keys] += (ds.swapaxes(-1, -2) @ qb).sum(2).swapaxes(1, 2)
        dv[:, keys] += (p.swapaxes(-1, -2) @ dob).sum(2).swapaxes(1, 2)
    return dq, dk, dv


@op
def attention_step(be, q, k, v, count, scale=None):
    """Decoding: q (B,1,H,D) over the first `count` slots of a cache k, v (B,S,G,D) -> o (B,1,H,D).

    In which order the slots were filled does not matter: positions are already in the keys.
    count: an int; on a GPU also an int32 (1,) there, which a step that is recorded reads at each replay.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    G = k.shape[2]
    s = scale * _grouped(q, G) @ _heads_first(k[:, :count])[:, :, None].swapaxes(-1, -2)
    p = be.xp.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return _time_first(p @ _heads_first(v[:, :count])[:, :, None])


@op
def store_token(be, keys, values, k, v, slot):
    """Decoding: one token's k, v (B,1,G,D) into `slot` of a cache keys, values (B,S,G,D).  slot: as count above."""
    keys[:, slot], values[:, slot] = k[:, 0], v[:, 0]


def _blocks(be, T, S, window):
    """For each block of queries: its rows, the keys that it can see, and which query sees which
    key (rows, keys) as booleans."""
    past = S - T
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        first = max(0, past + start - window + 1)
        query = be.xp.arange(past + start, past + end)[:, None]
        key = be.xp.arange(first, past + end)
        yield slice(start, end), slice(first, past + end), (key <= query) & (key > query - window)


def _scores(be, q, k, visible, scale):
    """q (B,t,H,D), k (B,s,G,D) -> scaled scores (B,G,R,t,s), -inf where not visible."""
    s = scale * _grouped(q, k.shape[2]) @ _heads_first(k)[:, :, None].swapaxes(-1, -2)
    return be.xp.where(visible, s, -be.xp.inf)


def _grouped(x, G):
    """(B,t,H,D) -> (B,G,R,t,D): head h belongs to group h // R."""
    B, t, H, D = x.shape
    return x.reshape(B, t, G, H // G, D).transpose(0, 2, 3, 1, 4)


def _heads_first(x):
    """(B,s,G,D) -> (B,G,s,D)."""
    return x.swapaxes(1, 2)


def _time_first(x):
    """(B,G,R,t,D) -> (B,t,H,D)."""
    B, G, R, t, D = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, t, G * R, D)
