"""The meter: what the spikes of a model look like, how sparse they are, and what that would save.

`measure` runs a model over text and listens through forward's `tap`; each projection's counts are kept
as a histogram, so memory does not grow with the text (|count| <= k * C, as the threshold is a mean over k).
Every quantity has its definition beside it: the report's figures (section 3.3, k = 3) leave some of them open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from minisb.backend import on_host
from minisb.data import eval_batches
from minisb.model import SpikingBrain
from minisb.ops.codes import CODES, SIGNED, spikes_emitted, steps_needed
from minisb.quantized import GATE_PAIR, ROUTER

#: The window of the report's sparsity: three steps of the bidirectional code hold |count| <= 7.
WINDOW_STEPS, WINDOW_MOST = 3, 7


@dataclass(frozen=True)
class Quantity:
    """One figure of the meter.  report: the report's figure at k = 3, None where it gives none."""

    key: str
    report: float | None
    definition: str
    share: bool = True


QUANTITIES = (
    Quantity("silent", 0.184, "share of (token, channel) pairs with count 0"),
    Quantity("silent_channels", 0.184, "share of channels with count 0 at every token (18.4 % may mean this)"),
    Quantity("at_most_7", 0.941, "share of pairs with |count| <= 7"),
    Quantity("over_7", 0.059, "share of pairs with |count| > 7, long trains (a press account says 1.85 %)"),
    Quantity("over_16", 0.01, "share of pairs with |count| > 16 (the report: about 1 %)"),
    Quantity("mean_count", None, "mean of |count| over all pairs, silent ones included", False),
    Quantity("spikes_per_channel", 1.13, "spikes of the bidirectional code a pair, nothing clipped", False),
    Quantity("spikes_per_firing", 1.13, "the same over those that fire (1.13 may mean this: 69.15 % follows)", False),
    Quantity("sparsity", 0.6915, "empty slots of the 3-step bidirectional window, counts clipped to 7"),
    Quantity("sparsity_firing", 0.6915, "the same over those that fire (69.15 % may mean this)"),
    Quantity("sparsity_full", None, "empty slots, in as many steps as the largest count needs"),
)  # fmt: skip
#: Sparsity over k in the report.
REPORT_SPARSITY = {2.0: 0.730, 2.5: 0.709, 3.0: 0.692, 3.5: 0.677, 4.0: 0.664}


class Tally:
    """The counts of one projection, or of several: how often each value came, which channels ever fired.

    Experts are one projection together: their hidden channel f fired if that of any expert did.
    """

    def __init__(self):
        self.reach, self.seen = 0, np.zeros(1, np.int64)  # seen[i]: of count i - reach
        self.fired = np.zeros(0, bool)

    def add(self, count):
        """count (..., C), whole numbers as floats."""
        count = on_host(count)
        rows = count.reshape(-1, count.shape[-1]).astype(np.int64)
        self._widen(int(np.abs(rows).max(initial=0)))
        self.seen += np.bincount(rows.ravel() + self.reach, minlength=len(self.seen))
        fired = rows.any(0)
        self.fired = self.fired | fired if self.fired.size else fired

    def merge(self, other: Tally):
        """Add another projection's counts; its channels are other channels."""
        self._widen(other.reach)
        self.seen[self.reach - other.reach : self.reach + other.reach + 1] += other.seen
        self.fired = np.concatenate([self.fired, other.fired])

    def statistics(self) -> dict:
        """Every one of QUANTITIES, and for each code its steps and spikes."""
        counts = np.arange(-self.reach, self.reach + 1)
        counts, seen = counts[self.seen > 0], self.seen[self.seen > 0]
        magnitude, total = np.abs(counts), seen.sum()

        def mean(values):
            return float((values * seen).sum() / total)

        firing = mean(magnitude > 0)
        clipped = mean(spikes_emitted(np.minimum(magnitude, WINDOW_MOST), "bidirectional"))
        codes = {}
        for code in CODES:
            sent = counts if code in SIGNED else magnitude  # codes without a sign: what |count| takes
            spikes = mean(spikes_emitted(sent, code))
            codes[code] = {
                "steps": steps_needed(sent, code),
                "spikes_per_channel": spikes,
                "spikes_per_firing": spikes / firing if firing else 0.0,
            }
        chosen = codes["bidirectional"]
        return {
            "silent": 1 - firing,
            "silent_channels": float(1 - self.fired.mean()),
            "at_most_7": mean(magnitude <= 7),
            "over_7": mean(magnitude > 7),
            "over_16": mean(magnitude > 16),
            "mean_count": mean(magnitude),
            "spikes_per_channel": chosen["spikes_per_channel"],
            "spikes_per_firing": chosen["spikes_per_firing"],
            "sparsity": 1 - clipped / WINDOW_STEPS,
            "sparsity_firing": 1 - clipped / firing / WINDOW_STEPS if firing else 1.0,
            "sparsity_full": 1 - chosen["spikes_per_channel"] / chosen["steps"],
            "largest": int(magnitude.max()),
            "codes": codes,
        }

    def _widen(self, reach: int):
        grow = reach - self.reach
        if grow > 0:
            self.seen, self.reach = np.pad(self.seen, grow), reach


def measure(model: SpikingBrain, tokens, k: float | None = None) -> tuple[dict, dict[str, Tally]]:
    """Run `model` with spikes (threshold mean|x| / k, its own k by default) over tokens (N,).

    -> {"k", "loss", "total", "projections", "operations"} and the tallies by projection's name.
    "total" goes over all projections, so an input that q, k and v share counts three times.
    "operations" is per multiply-accumulate of the dense model, so wide projections weigh more:
    additions (bidirectional code), the share of weights that a spike reaches, activations read.
    """
    c = model.config
    if k is not None:
        model = SpikingBrain(replace(c, spike_k=k), model.be, model.store)
    tallies: dict[str, Tally] = {}

    def tap(name, array):
        if name.endswith(".count"):
            tallies.setdefault(name.removesuffix(".count"), Tally()).add(array)

    loss, total = mean_loss(model, tokens, True, tap), Tally()
    for tally in tallies.values():
        total.merge(tally)
    projections = {name: tally.statistics() for name, tally in tallies.items()}
    return {
        "k": model.config.spike_k,
        "loss": loss,
        "total": total.statistics(),
        "projections": projections,
        "operations": operations(model, projections),
    }, tallies


def operations(model: SpikingBrain, projections: dict) -> dict:
    """What one multiply-accumulate of the spiking projections becomes, on average over all of them.

    Of E experts a token goes through K.
    """
    macs = additions = reached = inputs = 0
    special = {"gk": GATE_PAIR[0], "router": ROUTER}
    for name, found in projections.items():
        prefix, short = name.rsplit(".", 1)
        *stacked, O, I = model.store.p[f"{prefix}.{special.get(short, f'{short}_proj.weight')}"].shape
        times = model.config.top_k if stacked else 1
        macs += times * O * I
        inputs += times * I
        additions += times * O * I * found["spikes_per_channel"]
        reached += times * O * I * (1 - found["silent"])
    return {"additions": additions / macs, "weights_reached": reached / macs, "activations": inputs / macs}


def mean_loss(model: SpikingBrain, tokens, spike, tap=None) -> float:
    """Nats a token over tokens (N,), in windows of T side by side, as the evaluation of training has it."""
    c = model.config
    total = read = 0
    for x, y in eval_batches(tokens, c.batch_size, c.seq_len):
        x, y = model.be.xp.asarray(x), model.be.xp.asarray(y)
        total += y.size * model.loss(x, y, spike, tap)
        read += y.size
    return float(total / read)
