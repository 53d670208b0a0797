"""The gate of linear attention: log g = logsigmoid(z) / divisor (7B)."""

from minisb.backend import op
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
