"""Mixture of experts (report, eq. 7-8): route, dispatch, multiply by expert, combine.

    p = softmax(x Wr^T)                 the router's probabilities, one per expert
    y = shared(x) + sum over the K chosen experts i of p_i E_i(x)

N tokens choose K of E experts each: N K slots.  Slots are sorted by expert into a buffer of R rows, so that
each expert reads one piece of it, rows offsets[e] .. offsets[e+1] - 1; no token is dropped unless a capacity
says so.  R and all shapes follow from N, K and E alone, and where the pieces lie is an array of the backend:
a GPU need not tell the host.

Which experts are chosen has no gradient.  Gradients flow through the gate values p_i and the rows.
"""

from dataclasses import dataclass
from typing import Any

from minisb.backend import op

# --- the router ---------------------------------------------------------------------------------


@op
def router_forward(be, logits, top_k):
    """logits (N,E) -> gates (N,K), experts (N,K) integers, p (N,E), lse (N,), saved.

    The K largest logits, largest first; of equal ones the expert with the lowest index.  lse is the
    logarithm of the softmax's denominator.  saved: experts, p, the type of logits (p may be wider).
    """
    xp = be.xp
    top = logits.max(-1, keepdims=True)
    e = xp.exp(logits - top)
    total = e.sum(-1, keepdims=True)
    p = e / total
    experts = xp.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    gates = xp.take_along_axis(p, experts, axis=-1)
    return gates, experts, p, (top + xp.log(total))[:, 0], (experts, p, logits.dtype)


@op
def router_backward(be, dgates, dp, dlse, saved):
    """dgates (N,K), dp (E,) or (N,E), dlse (N,) -> dlogits (N,E).  dp and dlse come from the router's losses.

    A gate is an entry of p, so its gradient joins dp there.  Then, as p = exp(logits - lse) and
    dlse/dlogits = p,
        dlogits = p * (dp - sum(p * dp)) + dlse * p
    """
    xp = be.xp
    experts, p, dtype = saved
    dp = xp.broadcast_to(dp, p.shape).copy()
    rows = xp.arange(len(p))[:, None]
    dp[rows, experts] += dgates  # the K experts of a token differ: no entry twice
    return (p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[:, None])).astype(dtype, copy=False)


@op
def balance_loss(be, p, counts, weight=1.0):
    """E sum f_i P_i -> loss (a scalar), weight * its gradient dp (E,), the same for each token.

    weight: a number, or an array of no axes where nobody should wait for it.

    counts (E,): slots that chose each expert; f_i = counts_i / sum, the share of expert i; P_i, the mean of p_i.
    1 where all are equal, up to E where one expert takes all.  f has no gradient: it pushes down the
    probabilities of experts that are chosen too often, d loss / d p_ni = E f_i / N.
    """
    f = (counts / counts.sum()).astype(p.dtype)
    dp = weight * p.shape[1] / len(p) * f
    return p.shape[1] * (f * p.mean(0)).sum(), dp.astype(p.dtype, copy=False)


@op
def z_loss(be, lse, weight=1.0):
    """mean(lse^2) -> loss (a scalar), weight * its gradient dlse (N,).  Keeps logits from growing without bound."""
    return (lse * lse).mean(), (weight * 2 / lse.size * lse).astype(lse.dtype, copy=False)


# --- which row goes where -----------------------------------------------------------------------


@dataclass
class Plan:
    """Where the slots of N tokens stand in a buffer of R rows sorted by expert.

    row (N,K): the row of each slot, -1 if it was dropped.  token (R,): the token in each row, -1 in padding.
    offsets (E+1,): where each expert's rows begin and the last one's end.
    """

    row: Any
    token: Any
    offsets: Any


@op
def dispatch_plan(be, experts, count, tile=1, capacity=None):
    """experts (N,K), `count` of them in all -> Plan.

    Slots keep their order within an expert (the sort is stable).  Each expert's piece is filled up to a multiple
    of `tile` rows.  capacity: an expert takes this many slots at most, the first in order; the rest are dropped.
    R = N K + count (tile - 1).
    """
    xp = be.xp
    N, K = experts.shape
    chosen = experts.reshape(-1)
    order = xp.argsort(chosen, kind="stable")
    wanted = (chosen[:, None] == xp.arange(count)).sum(0)
    taken = wanted if capacity is None else xp.minimum(wanted, capacity)
    offsets = _starts(be, -(-taken // tile) * tile)
    sorted_experts = chosen[order]
    rank = xp.arange(N * K) - _starts(be, wanted)[sorted_experts]
    kept = rank < taken[sorted_experts]
    row = xp.full(N * K, -1)
    row[order] = xp.where(kept, offsets[sorted_experts] + rank, -1)
    # One row more than R: what is dropped is written there, and cut off.
    token = xp.full(N * K + count * (tile - 1) + 1, -1)
    token[row] = xp.arange(N * K) // K
    return Plan(row.reshape(N, K), token[:-1], offsets)


def _starts(be, sizes):
    """(E,) -> (E+1,): 0, and the running sum."""
    xp = be.xp
    return xp.concatenate([xp.zeros(1, sizes.dtype), sizes.cumsum()])


@op
def load(be, experts, count):
    """experts (N,K) -> how many slots chose each expert, (count,)."""
    return (experts.reshape(-1)[:, None] == be.xp.arange(count)).sum(0)


# --- rows to experts and back -------------------------------------------------------------------


@op
def dispatch_forward(be, x, plan):
    """x (N,C) -> rows (R,C), each the token of that row; padding is zero."""
    xp = be.xp
    return xp.where(plan.token[:, None] >= 0, x[xp.maximum(plan.token, 0)], xp.zeros((), x.dtype))


@op
def dispatch_backward(be, drows, plan):
    """drows (R,C) -> dx (N,C): a token's gradient is the sum over the rows that hold it."""
    return _at(be, drows, plan.row).sum(1)


@op
def combine_forward(be, rows, gates, plan, shared=None):
    """rows (R,C), the experts' outputs, gates (N,K), shared (N,C) or None -> y (N,C), saved.

    y_n = shared_n + sum over k of gate_nk rows[row_nk]; a dropped slot adds nothing.  saved: rows, gates, plan.
    """
    kept = be.xp.where(plan.row >= 0, gates, be.xp.zeros((), gates.dtype))
    y = (kept[..., None] * _at(be, rows, plan.row)).sum(1)
    return y if shared is None else shared + y, (rows, gates, plan)


@op
def combine_backward(be, dy, saved):
    """dy (N,C) -> drows (R,C), dgates (N,K).  (That of `shared` is dy.)

    drows[row_nk] = gate_nk dy_n and dgate_nk = rows[row_nk] . dy_n; 0 in padding and for dropped slots.
    """
    xp = be.xp
    rows, gates, plan = saved
    dgates = xp.where(plan.row >= 0, (rows[plan.row] * dy[:, None]).sum(-1), xp.zeros((), gates.dtype))
    drows = xp.zeros((len(rows) + 1, rows.shape[1]), rows.dtype)  # one more, which dropped slots write to
    drows[plan.row] = gates[..., None] * dy[:, None]
    return drows[:-1], dgates


def _at(be, rows, row):
    """rows (R,C), row (N,K) -> (N,K,C), 0 where row is -1."""
    return be.xp.where((row >= 0)[..., None], rows[row], be.xp.zeros((), rows.dtype))


# --- one product per expert ---------------------------------------------------------------------


@op
def grouped_forward(be, x, w, offsets, out=None):
    """x (R,I) rows by expert, w (E,O,I) -> y (R,O): an expert's rows times its matrix, y_e = x_e w_e^T.

    Rows past the last expert's are zero.  `out`, if given, is written; it may be columns of a wider array.
    """
    y = be.xp.empty((len(x), w.shape[1]), x.dtype) if out is None else out
    for e, rows in pieces(offsets):
        be.gemm(x[rows], w[e], out=y[rows], tb=True)
    y[int(offsets[-1]) :] = 0
    return y


@op
def grouped_backward(be, dy, x, w, offsets, dw, dx=None):
    """dy (R,O) -> dx (R,I);  dw (E,O,I) is added to.

    Of each expert, as of any linear map: dx_e = dy_e w_e, dw_e += dy_e^T x_e.  An expert without rows gets no
    gradient.  Give `dx` to add to an existing gradient instead (two projections of one input).
    """
    accumulate = dx is not None
    if dx is None:
        dx = be.xp.empty((len(dy), w.shape[2]), dy.dtype)
        dx[int(offsets[-1]) :] = 0
    for e, rows in pieces(offsets):
        be.gemm(dy[rows], w[e], out=dx[rows], accumulate=accumulate)
        be.gemm(dy[rows], x[rows], out=dw[e], ta=True, accumulate=True)
    return dx


def pieces(offsets):
    """Each expert e that has rows, and which: (e, slice).  This reads offsets on the host."""
    ends = [int(offset) for offset in offsets]
    for e in range(len(ends) - 1):
        if ends[e] < ends[e + 1]:
            yield e, slice(ends[e], ends[e + 1])
