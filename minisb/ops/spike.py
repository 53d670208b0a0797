"""Adaptive-threshold spike counts with a straight-through gradient (report, eq. 19 and 21)."""

from minisb.backend import op
from minisb.errors import MinisbError

#: The released code keeps thresholds in this range, in fp32.
VTH_MIN, VTH_MAX = 1e-5, 1e4


def threshold(be, x, k):
    """x (...,C) -> vth (...,1) = clamp(mean|x| / k) over the channels of each token (eq. 19).

    One threshold a token, not one a tensor: a token ten times as large has the same counts.
    """
    xp = be.xp
    return xp.clip(xp.abs(x).mean(-1, keepdims=True) / k, VTH_MIN, VTH_MAX).astype(x.dtype)


@op
def spike_forward(be, x, k):
    """Replace each activation by a whole number of spikes of its token's threshold.

    x (...,C) -> x_hat (...,C), vth (...,1).
        vth   = clamp(mean|x| / k)   over the channels of one token   (eq. 19)
        count = rint(x / vth)        half to even, signed             (eq. 21)
        x_hat = count * vth
    The backward pass is straight-through: the gradient of x is that of x_hat, so there is no
    function for it, and weight gradients are taken with x_hat.
    NaN and infinity go on into x_hat; with be.checked they raise MinisbError instead.
    """
    if be.checked:
        check_finite(be, x)
    vth = threshold(be, x, k)
    return be.xp.rint(x / vth) * vth, vth


def check_finite(be, x):
    """Raises MinisbError if an activation of x (...,C) is NaN or infinite: it has no number of spikes."""
    bad = ~be.xp.isfinite(x.reshape(-1, x.shape[-1]))
    if bad.any():
        token, channel = (int(i) for i in divmod(int(bad.argmax()), x.shape[-1]))
        raise MinisbError(
            f"{int(bad.sum())} of {x.size} activations to be spike-coded are not finite, the first at token {token}, "
            f"channel {channel}."
        )


def spike_count(be, x_hat, vth):
    """The integers behind x_hat = count * vth (...,C), as floats."""
    return be.xp.rint(x_hat / vth)


def window_sparsity(be, count) -> float:
    """The share of empty slots when counts (...,C) travel as three signed bits, one a time step.

    A channel with |count| <= 7 (larger ones are clipped to it) needs the three time steps of the
    bidirectional bitwise code (report, section 3.3.2): the spike of step t is bit t of |count|,
    with the sign of count.  A slot is one (bit, channel); the empty ones cost no addition.
    """
    xp = be.xp
    magnitude = xp.minimum(xp.abs(count), 7).astype(xp.uint8)
    spikes = (magnitude & 1) + (magnitude >> 1 & 1) + (magnitude >> 2)
    return 1 - float(spikes.mean(dtype=xp.float64)) / 3
