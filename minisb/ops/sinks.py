"""Attention sinks: S learned tokens before the text that every token sees, however far its window has moved on.

A text token sees all S sinks and the keys in its window; a sink sees all sinks, in both directions, and no text.
So everything about the sinks follows from the weights alone: their keys and values (S,G,D) are computed once and
serve the whole batch.

The sinks come as a second softmax, joined to that over the window.  Let o1, lse1 belong to one set of keys
(attention.py gives them) and o2, lse2 to the other; over both together
    lse = log(exp(lse1) + exp(lse2))        o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2
The gradient needs no such joining: with lse and o of both, attention_backward gives the window's part of it, and
sinks_backward the sinks' part, each over its own keys.
"""

from minisb.backend import op


@op
def sinks_forward(be, q, k, v, o=None, lse=None, scale=None):
    """q (B,T,H,D), sinks' k, v (S,G,D), o (B,T,H,D) and lse (B,T,H) over the other keys, or None if there are
    none -> o (B,T,H,D), lse (B,T,H) over all keys.

    The inputs o and lse are not changed.  scale: default D^-1/2.
    """
    xp = be.xp
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = _scores(q, k, scale)
    top = s.max(-1, keepdims=True)
    if o is not None:
        before = _group(lse[..., None], k.shape[1])
        top = xp.maximum(top, before)
    e = xp.exp(s - top)
    total = e.sum(-1, keepdims=True)
    mixed = e @ v.swapaxes(0, 1)[:, None]
    if o is not None:
        weight = xp.exp(before - top)
        total = total + weight
        mixed = mixed + weight * _group(o, k.shape[1])
    return _ungroup(mixed / total), _ungroup(top + xp.log(total))[..., 0]


@op
def sinks_backward(be, do, q, k, v, o, lse, scale=None, dq=None):
    """do, q, o (B,T,H,D), k, v (S,G,D), lse (B,T,H) -> dq (B,T,H,D), dk, dv (S,G,D), summed over the batch.

    o and lse as sinks_forward returns them.  The formulas are attention_backward's: with p = exp(score - lse),
        ds = p * (do v^T - sum(do * o)),  dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T do
    Give `dq` to add to an existing gradient instead (that through the window).
    """
    xp = be.xp
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    G = k.shape[1]
    p = xp.exp(_scores(q, k, scale) - _group(lse[..., None], G))
    delta = _group((do * o).sum(-1, keepdims=True), G)
    qg, dog = _group(q, G), _group(do, G)
    ds = scale * p * (dog @ v.transpose(1, 2, 0)[:, None] - delta)
    dq_sinks = _ungroup(ds @ k.swapaxes(0, 1)[:, None])
    dk = (ds.swapaxes(-1, -2) @ qg).sum((0, 2)).swapaxes(0, 1)
    dv = (p.swapaxes(-1, -2) @ dog).sum((0, 2)).swapaxes(0, 1)
    return dq_sinks if dq is None else dq + dq_sinks, dk, dv


@op
def sinks_state_backward(be, dstate):
    """In linear attention all sequences start from the state that the sinks left: dstate (B,G,D,D), the gradient of
    each one's start, -> (1,G,D,D), their sum."""
    return dstate.sum(0, keepdims=True)


def _scores(q, k, scale):
    """q (B,T,H,D), k (S,G,D) -> (B,G,R,T,S)."""
    return scale * _group(q, k.shape[1]) @ k.transpose(1, 2, 0)[:, None]


def _group(x, G):
    """(B,T,H,D) -> (B,G,R,T,D): head h belongs to group h // R."""
    B, T, H, D = x.shape
    return x.reshape(B, T, G, H // G, D).transpose(0, 2, 3, 1, 4)


def _ungroup(x):
    """(B,G,R,T,D) -> (B,T,H,D)."""
    B, G, R, T, D = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, D)
