"""Evaluation: losses on text that was not trained on, with and without spikes."""

from __future__ import annotations

import numpy as np

from minisb.config import Config
from minisb.data import eval_batches
from minisb.experts import Loads
from minisb.model import SpikingBrain
from minisb.ops.spike import window_sparsity

#: Evaluation reads the validation text from its beginning, up to this many tokens: a glance
#: during training, and at the end enough for three digits in a few seconds (but no more than were learnt from).
GLANCE_TOKENS, FINAL_TOKENS = 1 << 13, 1 << 18

#: Tokens that evaluation reads at once, if the run's own batches are smaller: without a backward pass there is room,
#: and experts, each with its own share of the tokens, see enough of them for their weights to be worth fetching.
PASS_TOKENS = 1 << 12


def whole_windows(tokens, config: Config, limit: int):
    """The first `limit` tokens or fewer, so that they are windows of T and one last target."""
    windows = min(len(tokens) - 1, max(limit, config.seq_len)) // config.seq_len
    return tokens[: windows * config.seq_len + 1]


def evaluate(model: SpikingBrain, tokens) -> dict:
    """Losses in nats per token of `tokens` (N,), and what spikes leave empty.

    val_loss is with float activations, val_loss_spike with spikes, from the same weights.
    sparsity: of the counts of the first pass, see window_sparsity; None if nothing spikes.
    With experts also expert_load_min, see Loads.least, with float activations.
    """
    c = model.config
    windows = max(c.batch_size, PASS_TOKENS // c.seq_len)
    slots, loads = [], Loads() if model.config.has_experts else None

    def tap(name, array):
        if name.endswith(".count"):
            slots.append((window_sparsity(model.be, array), array.size))

    losses = {}
    for name, spike in (("val_loss", False), ("val_loss_spike", True)):
        total = read = 0
        for i, (x, y) in enumerate(eval_batches(tokens, windows, c.seq_len)):
            x, y = model.be.xp.asarray(x), model.be.xp.asarray(y)
            total += y.size * model.loss(x, y, spike, (tap if i == 0 else None) if spike else loads)
            read += y.size
        losses[name] = float(total / read)
    shares, sizes = np.array(slots).reshape(-1, 2).T
    sparsity = float(np.average(shares, weights=sizes)) if slots else None
    return {**losses, "sparsity": sparsity, **({"expert_load_min": loads.least()} if loads else {})}
