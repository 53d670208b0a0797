"""AdamW over flat buffers, and the norm of a gradient."""

from minisb.backend import op


@op
def grad_norm(be, g):
    """The Euclidean norm of a flat gradient, summed in float64: a Python float, or on a GPU an array there."""
    return float(be.xp.sqrt((g.astype(be.xp.float64) ** 2).sum()))


@op
def adamw(be, p, g, m, v, decayed, lr, beta1, beta2, eps, weight_decay, step, g_scale, rounded=None):
    """One update in place of p, m, v (all flat).  step counts from 1; g is scaled by g_scale first.

    rounded: in mixed precision the copy of p that layers read, which is written too.

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
        p = p - lr * weight_decay * p  (only p[:decayed])
        p = p - lr * m' / (sqrt(v') + eps),   m', v' corrected by 1 - beta^step
    """
    g = g * be.xp.asarray(g_scale, p.dtype)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    p[:decayed] *= 1 - lr * weight_decay
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    p -= (lr / c1) * m / (be.xp.sqrt(v / c2) + eps)
    if rounded is not None:
        rounded[...] = p
