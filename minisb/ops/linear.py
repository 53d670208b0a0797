"""y = x W^T + b, and the sum of two of them."""

from minisb.backend import op


@op
def linear_forward(be, x, w, b=None, out=None):
    """x (...,I), w (O,I), b (J,) or None -> y (...,O), written to `out` if given.

    The bias covers the first J <= O outputs: q, k and v have one, the gate beside them has not.
    saved is (x, w), which the caller holds anyway: nothing is returned for it.
    """
    y = be.xp.empty((*x.shape[:-1], w.shape[0]), x.dtype) if out is None else out
    be.gemm(_rows(x), w, out=_rows(y), tb=True)
    if b is not None:
        y[..., : b.size] += b
    return y


@op
def linear_backward(be, dy, x, w, dw, db=None, dx=None):
    """dy (...,O) -> dx (...,I) = dy W;  dw (O,I) += dy^T x and db (J,) += sum of dy.

    Give `dx` to add to an existing gradient instead (several projections of one input).
    With spikes x is the spike-coded input x_hat, and dx passes straight through to x.
    """
    accumulate = dx is not None
    if dx is None:
        dx = be.xp.empty((*dy.shape[:-1], w.shape[1]), dy.dtype)
    be.gemm(_rows(dy), w, out=_rows(dx), accumulate=accumulate)
    be.gemm(_rows(dy), _rows(x), out=dw, ta=True, accumulate=True)
    if db is not None:
        db += _rows(dy)[:, : db.size].sum(0)
    return dx


@op
def add(be, x, y):
    """x, y (...) -> x + y: what two projections give, or the gradients that reach what both have read."""
    return x + y


def _rows(x):
    """(...,C) seen as a matrix of rows."""
    return x.reshape(-1, x.shape[-1])
