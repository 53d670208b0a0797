"""The gates of linear attention: log g = logsigmoid(z) / divisor (7B), or tied to the key, g = 1 - k (76B)."""

from minisb.backend import op
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.swiglu import sigmoid


@op
def log_gate_forward(be, z, divisor):
    """z (...) -> log_g (...) <= 0, natural log of the decay.  saved: z, divisor.

    logsigmoid(z) = min(z, 0) - log(1 + e^-|z|): no overflow on either side.
    """
    xp = be.xp
    return (xp.minimum(z, 0) - xp.log1p(xp.exp(-xp.abs(z)))) / divisor, (z, divisor)


@op
def log_gate_backward(be, dlog_g, saved):
    """dlog_g (...) -> dz (...) = dlog_g * sigmoid(-z) / divisor."""
    z, divisor = saved
    return dlog_g * sigmoid(be, -z) / divisor


@op
def low_rank_gate_forward(be, x, w, b, divisor):
    """The second matrix of the low-rank gate, and the gate: x (...,R), w (J,R), b (J,) -> log_g (...,J), the
    log_gate of x w^T + b.

    saved: x, w, b, divisor and z = x w^T + b, which may be None: with so small an R it is sooner computed again
    than read.
    """
    z = linear_forward(be, x, w, b)
    log_g, _ = log_gate_forward(be, z, divisor)
    return log_g, (x, w, b, divisor, z)


@op
def low_rank_gate_backward(be, dlog_g, saved, dx, dw, db):
    """dlog_g (...,J) -> dx (...,R), which is written: columns of a fused projection's gradient.

    dw (J,R) and db (J,) are added to, as in linear_backward.
    """
    x, w, b, divisor, z = saved
    if z is None:
        z = linear_forward(be, x, w, b)
    dz = log_gate_backward(be, dlog_g, (z, divisor))
    dx[...] = linear_backward(be, dz, x, w, dw, db)
    return dx


@op
def tied_gate_forward(be, z):
    """The gate tied to the key: z (...) -> k = sigmoid(z), log_g = log(1 - k) (76B: g = 1 - k).

    A channel forgets as much as it writes.  From z, because 1 - k is 0 in fp32 from z = 17 on:
        log g = log(1 - sigmoid(z)) = -softplus(z) = -max(z, 0) - log(1 + e^-|z|)
    saved: k.
    """
    xp = be.xp
    k = sigmoid(be, z)
    return k, -xp.maximum(z, 0) - xp.log1p(xp.exp(-xp.abs(z))), k


@op
def tied_gate_backward(be, dk, dlog_g, saved):
    """dk, dlog_g (...) -> dz (...).

    dk/dz = k (1 - k) and dlog_g/dz = -k, so dz = dk k (1 - k) - dlog_g k.
    """
    k = saved
    return k * (dk * (1 - k) - dlog_g)
