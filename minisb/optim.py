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


def update(be, store, step: int, lr: float, norm, settings):
    """One AdamW step over every parameter of `store`, from its gradients of norm `norm`.

    step counts from 1.  settings: clip, beta1, beta2, eps and weight_decay (a TrainSettings).
    A norm that is not finite is the caller's to refuse: it would spread to every weight.  (On a GPU, where
    the caller looks at a few steps only, such a step changes nothing.)
    """
    adamw(
        be, store.flat_p, store.flat_g, store.flat_m, store.flat_v, store.decayed,
        lr, settings.beta1, settings.beta2, settings.eps, settings.weight_decay,
        step, clip_scale(norm, settings.clip, be.xp),
    )  # fmt: skip
