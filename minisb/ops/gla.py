"""Gated linear attention (report, eq. 10-11) in three forms: recurrent, chunked, one step.

    S_t = diag(g_t) S_{t-1} + k_t^T v_t        the state, one D x D matrix a key/value head
    o_t = scale * q_t S_t                      a token sees itself

Shapes: q, o (B,T,H,D); k, v, log_g (B,T,G,D); state (B,G,D,D), key axis first.  The H/G query
heads of a group read one state, so k, v and g are never repeated.  log_g <= 0 is the natural
logarithm of the decay of each key channel.

All three forms are equal.  The recurrent one is the definition; it walks one token at a time.
The chunked one turns the walk inside a chunk into matrix products.  No exponent in it is ever
positive, because a decay is always taken from the earlier place to the later one.
"""

from minisb.backend import op

CHUNK = 64  # tokens between two saved states
SUB = 16  # tokens whose pairwise decays are formed one by one


# --- the definition -----------------------------------------------------------------------------


def gla_recurrent_forward(be, q, k, v, log_g, state=None, scale=None):
    """One token at a time.  -> o (B,T,H,D), final state (B,G,D,D), every state (T+1,B,G,D,D)."""
    xp = be.xp
    q, scale, state = _prepare(be, q, k, state, scale)
    states, outputs = [state], []
    for t in range(k.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        states.append(xp.exp(log_g[:, t])[..., None] * states[-1] + kv)
        outputs.append(scale * q[:, t] @ states[-1])  # (B,G,R,D) @ (B,G,D,D)
    return _heads_last(xp.stack(outputs, axis=1)), states[-1], xp.stack(states)


def gla_recurrent_backward(be, do, dstate, q, k, v, log_g, states, scale=None):
    """The walk backwards.  states as gla_recurrent_forward gives them.

    do (B,T,H,D), dstate (B,G,D,D) or None -> dq, dk, dv, dlog_g, gradient of the first state.
    Let dS be the gradient of S_t, summed from the future and from o_t:
        dS += scale q_t^T do_t     dq_t = scale S_t do_t
        dk_t = dS v_t              dv_t = dS^T k_t
        dlog_g_t = sum over v of (g_t S_{t-1}) * dS
        dS <- g_t dS               and on to t - 1
    """
    xp = be.xp
    q, scale, dS = _prepare(be, q, k, dstate, scale)
    do = _group(do, k.shape[2])
    dq, dk, dv, dlog_g = xp.empty_like(q), xp.empty_like(k), xp.empty_like(v), xp.empty_like(k)
    for t in reversed(range(k.shape[1])):
        g = xp.exp(log_g[:, t])[..., None]
        dS = dS + scale * q[:, t].swapaxes(-1, -2) @ do[:, t]
        dq[:, t] = scale * do[:, t] @ states[t + 1].swapaxes(-1, -2)
        dk[:, t] = (dS @ v[:, t, :, :, None])[..., 0]
        dv[:, t] = (k[:, t, :, None, :] @ dS)[..., 0, :]
        dS_decayed = g * dS
        dlog_g[:, t] = (states[t] * dS_decayed).sum(-1)
        dS = dS_decayed
    return _heads_last(dq), dk, dv, dlog_g, dS


@op
def gla_step(be, q, k, v, log_g, state, scale=None):
    """Decoding: one token, q (B,1,H,D), k, v, log_g (B,1,G,D) -> o (B,1,H,D); state is updated."""
    q, scale, _ = _prepare(be, q, k, state, scale)
    state *= be.xp.exp(log_g[:, 0])[..., None]
    state += k[:, 0, :, :, None] * v[:, 0, :, None, :]
    return _heads_last((scale * q[:, 0] @ state)[:, None])


# --- chunks -------------------------------------------------------------------------------------


@op
def gla_forward(be, q, k, v, log_g, state=None, scale=None, chunk=CHUNK):
    """-> o (B,T,H,D), final state (B,G,D,D), saved.

    saved: the inputs, scale, chunk, and the state before each chunk (B,N,G,D,D).
    Inside a chunk, with b_t the sum of log_g from the chunk's start up to t,
        o_t = scale * ( (q_t exp(b_t)) S_start + sum_{s <= t} A_ts v_s )
        A_ts = sum_d q_td k_sd exp(b_td - b_sd)
    """
    xp = be.xp
    inputs = (q, k, v, log_g)
    q, scale, state = _prepare(be, q, k, state, scale)
    q, k, v, log_g = _time_inside(q * scale), _time_inside(k), _time_inside(v), _time_inside(log_g)
    o = xp.empty_like(q)
    states = []
    for start in range(0, k.shape[2], chunk):
        at = slice(start, start + chunk)
        qc, kc, vc, gc = q[..., at, :], k[:, :, at], v[:, :, at], log_g[:, :, at]
        states.append(state)
        from_start, to_end, whole = _chunk_decays(be, gc)
        o[..., at, :] = (qc * from_start[:, :, None]) @ state[:, :, None] + _scores(be, qc, kc, gc) @ vc[:, :, None]
        state = whole[..., None] * state + (kc * to_end).swapaxes(-1, -2) @ vc
    return _time_outside(o), state, (*inputs, scale, chunk, xp.stack(states, axis=1))


@op
def gla_backward(be, do, dstate, saved):
    """do (B,T,H,D), dstate (B,G,D,D) or None -> dq, dk, dv, dlog_g, gradient of the first state.

    Chunks are walked backwards, each from its saved start.  A gate at place t decays every pair
    (reader t' >= t, writer s < t), so its gradient is a sum over those pairs.  With the products
    x = q * dq at readers and y = k * dk at writers, that sum is
        pairs inside the chunk:      reverse cumsum of (x - y)
        old state -> reader:         reverse cumsum of x
        writer -> state at the end:  cumsum of y over earlier writers
        old state -> end:            sum over v of decayed S * dS
    A token's own term (t' = s) crosses no gate and is left out of x and y: it would cancel only
    up to rounding, and at strong gates rounding would be all that is left.
    """
    xp = be.xp
    q, k, v, log_g, scale, chunk, states = saved
    q, _, dS = _prepare(be, q, k, dstate, scale)
    do = _time_inside(_group(do, k.shape[2]))
    q, k, v, log_g = _time_inside(q * scale), _time_inside(k), _time_inside(v), _time_inside(log_g)
    dq, dk, dv, dlog_g = xp.empty_like(q), xp.empty_like(k), xp.empty_like(v), xp.empty_like(k)
    for n in reversed(range(states.shape[1])):
        at = slice(n * chunk, (n + 1) * chunk)
        qc, kc, vc, gc, doc = q[..., at, :], k[:, :, at], v[:, :, at], log_g[:, :, at], do[..., at, :]
        S = states[:, n]
        from_start, to_end, whole = _chunk_decays(be, gc)

        A = _scores(be, qc, kc, gc)
        dA = xp.tril(doc @ vc[:, :, None].swapaxes(-1, -2))
        dq_pairs, dk_pairs = _scores_backward(be, dA, qc, kc, gc)
        dq_state = (doc @ S[:, :, None].swapaxes(-1, -2)) * from_start[:, :, None]
        dk_end = (vc @ dS.swapaxes(-1, -2)) * to_end

        own = xp.diagonal(dA, axis1=-2, axis2=-1)[..., None]
        dq[..., at, :] = dq_pairs + own * kc[:, :, None] + dq_state
        dk[:, :, at] = dk_pairs + (own * qc).sum(2) + dk_end
        dv[:, :, at] = (A.swapaxes(-1, -2) @ doc).sum(2) + (kc * to_end) @ dS

        dS_decayed = whole[..., None] * dS
        readers = (qc * (dq_pairs + dq_state)).sum(2) - kc * dk_pairs
        writers = kc * dk_end
        dlog_g[:, :, at] = (
            _sum_from(readers) + _sum_before(writers) + (S * dS_decayed).sum(-1)[:, :, None]
        )
        dS = dS_decayed + ((qc * from_start[:, :, None]).swapaxes(-1, -2) @ doc).sum(2)
    dk, dv, dlog_g = (x.swapaxes(1, 2) for x in (dk, dv, dlog_g))
    return _time_outside(dq * scale), dk, dv, dlog_g, dS


def _chunk_decays(be, log_g):
    """log_g (B,G,c,D) -> decay from the chunk's start up to each token (B,G,c,D), from each
    token to the chunk's end (B,G,c,D), and across the whole chunk (B,G,D)."""
    exp = be.xp.exp
    return exp(log_g.cumsum(2)), exp(_sum_after(log_g)), exp(log_g.sum(2))


def _scores(be, q, k, log_g):
    """A_ts for s <= t, else 0: q (B,G,R,c,D), k, log_g (B,G,c,D) -> (B,G,R,c,c)."""
    xp = be.xp
    A = xp.zeros((*q.shape[:-1], q.shape[-2]), q.dtype)
    for rows, earlier, from_ref, to_ref, decay in _sub_chunks(be, log_g, strict=False):
        A[..., rows, rows] = xp.einsum("bgrtd,bgtsd,bgsd->bgrts", q[..., rows, :], decay, k[:, :, rows], optimize=True)
        q_ref, k_ref = q[..., rows, :] * from_ref[:, :, None], k[:, :, earlier] * to_ref
        A[..., rows, earlier] = q_ref @ k_ref[:, :, None].swapaxes(-1, -2)
    return A


def _scores_backward(be, dA, q, k, log_g):
    """dA (B,G,R,c,c) -> the parts of dq (B,G,R,c,D) and dk (B,G,c,D) from pairs s < t."""
    xp = be.xp
    dq, dk = xp.empty_like(q), xp.zeros_like(k)
    for rows, earlier, from_ref, to_ref, decay in _sub_chunks(be, log_g, strict=True):
        qi, ki, dA_own, dA_earlier = q[..., rows, :], k[:, :, rows], dA[..., rows, rows], dA[..., rows, earlier]
        q_ref, k_ref = qi * from_ref[:, :, None], k[:, :, earlier] * to_ref
        dq[..., rows, :] = xp.einsum("bgrts,bgtsd,bgsd->bgrtd", dA_own, decay, ki, optimize=True)
        dq[..., rows, :] += (dA_earlier @ k_ref[:, :, None]) * from_ref[:, :, None]
        dk[:, :, rows] += xp.einsum("bgrts,bgtsd,bgrtd->bgsd", dA_own, decay, qi, optimize=True)
        dk[:, :, earlier] += (dA_earlier.swapaxes(-1, -2) @ q_ref).sum(2) * to_ref
    return dq, dk


def _sub_chunks(be, log_g, strict):
    """Cut a chunk into sub-chunks and give, for each, its decays to and from its start.

    The start of the sub-chunk is the reference point of its pairs with earlier tokens: the key's
    decay runs up to it (to_ref), the query's from it on (from_ref); both exponents are <= 0, and
    sums start anew here, so that near neighbours are exact however strong the gates.  Pairs
    inside the sub-chunk get their decay (B,G,t,s,D) directly, 0 where s > t (or s >= t: strict).
    """
    xp = be.xp
    for start in range(0, log_g.shape[2], SUB):
        rows, earlier = slice(start, min(start + SUB, log_g.shape[2])), slice(0, start)
        c = log_g[:, :, rows].cumsum(2)
        allowed = xp.tril(xp.ones((c.shape[2],) * 2, bool), -1 if strict else 0)[..., None]
        decay = xp.exp(xp.where(allowed, c[:, :, :, None] - c[:, :, None], -xp.inf))
        yield rows, earlier, xp.exp(c), xp.exp(_sum_after(log_g[:, :, earlier])), decay


# --- shapes and sums ----------------------------------------------------------------------------


def _prepare(be, q, k, state, scale):
    """q by groups (B,T,G,R,D), the scale (default D^-1/2), the state or zeros."""
    B, _, G, D = k.shape
    scale = D**-0.5 if scale is None else scale
    return _group(q, G), scale, be.xp.zeros((B, G, D, D), q.dtype) if state is None else state


def _group(x, G):
    """(B,T,H,D) -> (B,T,G,R,D): head h belongs to group h // R."""
    B, T, H, D = x.shape
    return x.reshape(B, T, G, H // G, D)


def _heads_last(x):
    """(B,T,G,R,D) -> (B,T,H,D)."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _time_inside(x):
    """(B,T,G,R,D) -> (B,G,R,T,D), or (B,T,G,D) -> (B,G,T,D): ready for matrix products."""
    return x.transpose(0, 2, 3, 1, 4) if x.ndim == 5 else x.swapaxes(1, 2)


def _time_outside(x):
    """(B,G,R,T,D) -> (B,T,H,D)."""
    return _heads_last(x.transpose(0, 3, 1, 2, 4))


def _sum_from(x):
    """Along time: sum over places >= t."""
    return x[:, :, ::-1].cumsum(2)[:, :, ::-1]


def _sum_after(x):
    """Along time: sum over places > t, added from the nearest outwards."""
    total = _sum_from(x)
    total[:, :, :-1] = total[:, :, 1:]
    total[:, :, -1:] = 0
    return total


def _sum_before(x):
    """Along time: sum over places < t."""
    total = x.cumsum(2)
    total[:, :, 1:] = total[:, :, :-1]
    total[:, :, :1] = 0
    return total
