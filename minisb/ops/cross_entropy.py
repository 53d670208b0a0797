"""Softmax cross-entropy, its gradient written over the logits."""

from minisb.backend import op

#: A target of -1 is not counted: padding, or text that is read but not learned from.
IGNORE = -1


@op
def counted(be, targets):
    """How many targets are not IGNORE, at least 1: a number to divide by.  On a GPU it stays there."""
    return max(int((targets != IGNORE).sum()), 1)


@op
def total_loss(be, losses):
    """The sum of losses (N,), in float64.  On a GPU it stays there, an array of no axes."""
    return losses.sum(dtype="float64")


@op
def cross_entropy(be, logits, targets, dloss=None):
    """logits (N,V), targets (N,) -> losses (N,) in nats, 0 where the target is IGNORE.

    With `dloss`, the gradient that each counted loss receives, logits become their own gradient
        dlogits = (softmax(logits) - onehot(target)) * dloss
    so that the largest array of a training step exists once.  Without it they are left alone.
    """
    xp = be.xp
    rows = xp.arange(logits.shape[0])
    counted = targets != IGNORE
    safe = xp.where(counted, targets, 0)
    shifted = logits - logits.max(-1, keepdims=True)
    target_logit = shifted[rows, safe]
    e = xp.exp(shifted, out=shifted)
    total = e.sum(-1, keepdims=True)
    losses = xp.where(counted, xp.log(total[:, 0]) - target_logit, 0)
    if dloss is not None:
        xp.divide(e, total, out=logits)
        logits[rows, safe] -= 1
        logits *= (counted * dloss).astype(logits.dtype)[:, None]
    return losses
