"""When to learn how fast, and one clipped step of AdamW."""

from __future__ import annotations

import numpy as np

from minisb.ops.adamw import adamw


def lr_at(step: int, peak: float, steps: int, warmup: int, floor: float) -> float:
    """The learning rate of step `step` (from 0) out of `steps`: a function of the step alone.

    It rises in a line over the first `warmup` steps, because AdamW's second moment knows nothing
    yet, then falls in a line from `peak` to floor * peak at the last step.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - 1 - warmup, 1)
    return peak * (1 - (1 - floor) * min(done, 1.0))


def clip_scale(norm, limit: float, xp=np):
    """What to multiply a gradient of Euclidean norm `norm` by, so that it is at most `limit`.

    Written without a branch: on a GPU the norm is an array there, and to look at it would be to wait.
    """
    return limit / xp.maximum(norm, limit)


def update(be, store, step: int, lr: float, norm, settings, loss_scale=1.0):
    """One AdamW step over every parameter of `store`, from its gradients, `loss_scale` times too large.

    norm: of the gradients without that scale.  step counts from 1.
    settings: clip, beta1, beta2, eps and weight_decay (a TrainSettings).
    A norm that is not finite is the caller's to refuse: it would spread to every weight.  (On a GPU, where
    the caller looks at a few steps only, such a step changes nothing.)
    """
    adamw(
        be, store.flat_p, store.flat_g, store.flat_m, store.flat_v, store.decayed,
        lr, settings.beta1, settings.beta2, settings.eps, settings.weight_decay,
        step, clip_scale(norm, settings.clip, be.xp) / loss_scale, store.flat_w if store.mixed else None,
    )  # fmt: skip


class LossScale:
    """What a loss is multiplied by, so that its gradients are not too small for float16.

    A float16 ends at 6e-8 below and 65504 above.  Where a gradient overflows the step is skipped and the scale
    halved; after GROWTH steps without that it is doubled.  Both numbers live where the gradients do, so that
    nobody has to wait for them.  Types with a float's range need none: then the scale is 1 and stays.
    """

    GROWTH = 1000

    def __init__(self, xp, needed: bool):
        self.xp, self.needed = xp, needed
        self.value = xp.full((), 2.0**13) if needed else 1.0
        self.good = xp.zeros(()) if needed else 0.0

    def follow(self, norm):
        """norm: of the last gradient, finite or not."""
        if not self.needed:
            return
        xp, fine = self.xp, self.xp.isfinite(norm)
        grown = self.good + 1 >= self.GROWTH
        # In place: a recorded step looks where the number was.
        self.value[...] = xp.where(fine, xp.where(grown, 2 * self.value, self.value), xp.maximum(self.value / 2, 1.0))
        self.good[...] = xp.where(fine & ~grown, self.good + 1, 0.0)
