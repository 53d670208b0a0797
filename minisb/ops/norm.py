"""RMSNorm, alone and with the residual sum before it: the smallest forward/backward pairs."""

from minisb.backend import op


@op
def rmsnorm_forward(be, x, w, eps):
    """Scale each row to unit root mean square, then each channel by w.

    x (...,C), w (C,) -> y (...,C).  saved: x, w, rstd (...,1).
    y = x * rstd * w,  rstd = (mean(x^2) + eps)^-1/2.
    """
    rstd = 1 / be.xp.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * rstd * w, (x, w, rstd)


@op
def rmsnorm_backward(be, dy, saved, dw):
    """dy (...,C) -> dx (...,C);  dw (C,) is added to.

    With n = x * rstd (so that mean(n^2) = 1) and y = n * w:
        dn = dy * w
        dx = rstd * (dn - n * mean(dn * n))
    The second term takes out the part of dn along n: growing x as a whole changes nothing.
    """
    x, w, rstd = saved
    n = x * rstd
    dn = dy * w
    dw += (dy * n).reshape(-1, w.size).sum(0)
    return rstd * (dn - n * (dn * n).mean(-1, keepdims=True))


@op
def add_rmsnorm_forward(be, x, delta, w, eps):
    """The residual sum and the norm that reads it, in one pass over memory.

    x, delta (...,C), w (C,) -> z = x + delta, y = rmsnorm(z), saved as in rmsnorm_forward.
    """
    z = x + delta
    y, saved = rmsnorm_forward(be, z, w, eps)
    return z, y, saved


@op
def add_rmsnorm_backward(be, dz, dy, saved, dw):
    """dz, dy (...,C) -> one gradient (...,C) for both x and delta;  dw (C,) is added to.

    z reaches the loss along the residual stream (dz) and through the norm (dy).
    """
    return dz + rmsnorm_backward(be, dy, saved, dw)
