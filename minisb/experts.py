"""The mixture of experts as a layer (report, eq. 7-8): in place of the feed-forward network, from the same input.

    y = shared(x) + sum over the K chosen experts of p_i E_i(x)

Every expert is a SwiGLU of width F; the matrices of all E stand in one tensor (E,O,I).  MixtureOfExperts is the layer,
Experts are the routed ones in it, QuantizedExperts the same in int8.
"""

from __future__ import annotations

import math

from minisb.config import Config
from minisb.layers import SwiGLU
from minisb.ops.linear import add
from minisb.ops.moe import (
    balance_loss,
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
    dispatch_plan,
    grouped_backward,
    grouped_forward,
    load,
    router_backward,
    router_forward,
    z_loss,
)
from minisb.ops.spike import spike_count, spike_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward
from minisb.params import ParamStore, Spec
from minisb.projections import Context, projections
from minisb.quantized import GATE_UP, QuantizedStore, input_name, tap_counts

ROUTER_STD = 1e-3  # near zero, so that all experts begin alike; never zero: of equals the first would take all


class Loads:
    """A tap that sums what the routers say in one step, or over a whole text: load, entropy, dropped slots."""

    def __init__(self):
        self.seen = {}

    def __call__(self, name, value):
        layer, _, kind = name.removeprefix("layers.").partition(".moe.")
        if kind:
            self.seen.setdefault(kind, {}).setdefault(int(layer), []).append(value)

    def shares(self) -> dict[int, list[float]]:
        """Layer -> each expert's share of the slots."""
        load = {layer: sum(values) for layer, values in sorted(self.seen["load"].items())}
        return {layer: [float(n / x.sum()) for n in x] for layer, x in load.items()}

    def least(self) -> float:
        """Of the least loaded expert of all layers: its slots over its fair share N K / E.  1 where all are equal."""
        return min(min(shares) * len(shares) for shares in self.shares().values())

    def entropy(self) -> float:
        """Mean over tokens and layers, in nats."""
        entropies = [float(value) for values in self.seen["entropy"].values() for value in values]
        return sum(entropies) / len(entropies)

    def record(self) -> dict:
        """For the log: each expert's share of the slots, layer by layer, the mean entropy in nats, dropped slots."""
        return {
            "expert_load": {str(layer): [round(x, 4) for x in shares] for layer, shares in self.shares().items()},
            "router_entropy": self.entropy(),
            "dropped": sum(int(value) for values in self.seen["dropped"].values() for value in values),
        }


class MixtureOfExperts:
    """Router, routed experts and shared ones.

    The tap sees layers.N.moe.load (E,), how many slots chose each expert, .entropy, the mean entropy of p in nats,
    .dropped, slots over the capacity, and the two losses, .balance_loss and .z_loss; for a text, not for sinks.
    """

    @staticmethod
    def specs(c: Config, prefix: str) -> list[Spec]:
        gate, up, down = SwiGLU.specs(c, f"{prefix}.experts")
        return [
            Spec(f"{prefix}.router.weight", (c.experts, c.width), init=ROUTER_STD),
            *(Spec(s.name, (c.experts, *s.shape), init=s.init) for s in (gate, up, down)),
            *(SwiGLU.specs(c, f"{prefix}.shared", c.shared_experts * c.ffn) if c.shared_experts else ()),
        ]

    def __init__(self, c: Config, store: ParamStore, prefix: str):
        self.c, self.prefix, self.layer = c, prefix, int(prefix.split(".")[1])
        self.router = projections(store, prefix, {"router": "router.weight"})
        kind = QuantizedExperts if isinstance(store, QuantizedStore) else Experts
        self.experts = kind(c, store, f"{prefix}.experts")
        self.shared = SwiGLU(c, store, f"{prefix}.shared") if c.shared_experts else None

    def forward(self, ctx: Context, x):
        """x (B,T,C) -> y (B,T,C), saved."""
        be, c = ctx.be, self.c
        logits, s_router = self.router.forward(ctx, x)
        gates, experts, p, lse, s_gates = router_forward(be, logits.reshape(-1, c.experts), c.top_k)
        plan = dispatch_plan(be, experts, c.experts, capacity=self._capacity(ctx, len(p)))
        dlosses = self._losses(ctx, experts, p, lse, plan)
        out, s_experts = self.experts.forward(ctx, x.reshape(-1, c.width), plan)
        y, s_shared = self.shared.forward(ctx, x) if self.shared else (None, None)
        y, s_combine = combine_forward(be, out, gates, plan, None if y is None else y.reshape(-1, c.width))
        return y.reshape(x.shape), (s_router, s_gates, dlosses, s_experts, s_combine, s_shared)

    def backward(self, be, dy, saved):
        """dy (B,T,C) -> dx (B,T,C): through the shared experts, the routed ones, and the gate values."""
        s_router, s_gates, dlosses, s_experts, s_combine, s_shared = saved
        dout, dgates = combine_backward(be, dy.reshape(-1, dy.shape[-1]), s_combine)
        dlogits = router_backward(be, dgates, *dlosses, s_gates)
        dx = self.router.backward(be, dlogits.reshape(*dy.shape[:-1], -1), s_router)
        dx = add(be, dx, self.experts.backward(be, dout, s_experts).reshape(dx.shape))
        return add(be, dx, self.shared.backward(be, dy, s_shared)) if self.shared else dx

    def _capacity(self, ctx: Context, tokens: int) -> int | None:
        """The slots that an expert takes, in training; elsewhere nothing is ever dropped."""
        if ctx.aux is None or not self.c.capacity:
            return None
        return max(1, math.ceil(self.c.capacity * tokens * self.c.top_k / self.c.experts))

    def _losses(self, ctx: Context, experts, p, lse, plan):
        """The router's two losses: the gradients dp (E,) and dlse (N,), zero where nobody trains on this."""
        be, c, xp = ctx.be, self.c, ctx.be.xp
        if ctx.aux is None and not ctx.tap:  # the pass that reads the sinks has neither
            return xp.zeros(c.experts, p.dtype), xp.zeros_like(lse)
        counts = load(be, experts, c.experts)
        scale = 0.0 if ctx.aux is None else ctx.aux
        balance, dp = balance_loss(be, p, counts, scale * c.balance_weight)
        z, dlse = z_loss(be, lse, scale * c.z_weight)
        if ctx.tap:
            entropy = -(p * xp.log(xp.maximum(p, 1e-30))).sum(-1).mean()
            for name, value in (
                ("load", counts), ("entropy", entropy), ("dropped", (plan.row < 0).sum()),
                ("balance_loss", balance), ("z_loss", z),
            ):  # fmt: skip
                ctx.tap(f"layers.{self.layer}.moe.{name}", value)
        return dp, dlse


class Experts:
    """E networks, each for the tokens that were routed to it.  Rows stand in a buffer sorted by expert (ops/moe.py)."""

    def __init__(self, c: Config, store: ParamStore, prefix: str):
        self.c, self.prefix, self.layer = c, prefix, int(prefix.split(".")[1])
        names = [f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")]
        (self.gate, self.dgate), (self.up, self.dup), (self.down, self.ddown) = (store.rows([n]) for n in names)

    def forward(self, ctx: Context, x, plan):
        """x (N,C), tokens -> out (R,C), rows by expert, saved."""
        be, F = ctx.be, self.c.ffn
        rows = {name: dispatch_forward(be, part, plan) for name, part in self._read(ctx, x, GATE_UP).items()}
        x_gate, x_up = rows["gate"], rows.get("up", rows["gate"])
        self._show(ctx, x_gate, GATE_UP)
        gate_up = be.xp.empty((len(plan.token), 2 * F), x.dtype)
        grouped_forward(be, x_gate, self.gate, plan.offsets, gate_up[:, :F])
        grouped_forward(be, x_up, self.up, plan.offsets, gate_up[:, F:])
        h, s_swiglu = swiglu_forward(be, gate_up)
        self._show(ctx, h, ("down",))
        h = self._read(ctx, h, ("down",))["down"]
        return grouped_forward(be, h, self.down, plan.offsets), (plan, x_gate, x_up, s_swiglu, h)

    def backward(self, be, dout, saved):
        """dout (R,C) -> dx (N,C)."""
        plan, x_gate, x_up, s_swiglu, h = saved
        F = self.c.ffn
        dh = grouped_backward(be, dout, h, self.down, plan.offsets, self.ddown)
        dgate_up = swiglu_backward(be, dh, s_swiglu)
        drows = grouped_backward(be, dgate_up[:, :F], x_gate, self.gate, plan.offsets, self.dgate)
        grouped_backward(be, dgate_up[:, F:], x_up, self.up, plan.offsets, self.dup, drows)
        return dispatch_backward(be, drows, plan)

    def _read(self, ctx: Context, x, names):
        """What the projections `names` read of x (N,I): spikes or floats, once for equal ones.

        As in Projections, those that spike share one threshold a token; a token is coded before it is dispatched.
        """
        spiking = [name for name in names if name in ctx.spikes[self.layer]]
        if not spiking:
            return {names[0]: x}
        x_hat, vth = spike_forward(ctx.be, x, ctx.spike_k)
        if ctx.tap:
            for name in spiking:
                ctx.tap(f"{self.prefix}.{name}.count", spike_count(ctx.be, x_hat, vth))
        if len(spiking) == len(names):
            return {names[0]: x_hat}
        return {name: x_hat if name in spiking else x for name in names}

    def _show(self, ctx: Context, rows, names):
        """The tap sees what float projections read, rows by expert: how many each has, it has seen as the load."""
        if ctx.tap and not ctx.spikes[self.layer].intersection(names):
            ctx.tap(f"{input_name(self.prefix, names)}.input", rows)


class QuantizedExperts:
    """Experts in int8, which read spikes, always."""

    def __init__(self, c: Config, store: QuantizedStore, prefix: str):
        self.prefix = prefix
        names = [f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")]
        self.gate_up = store.stacked(names[:2], store.k[input_name(prefix, GATE_UP)])
        self.down = store.stacked(names[2:], store.k[input_name(prefix, ("down",))])

    def forward(self, ctx: Context, x, plan):
        """x (N,C), tokens -> out (R,C), rows by expert, None: there is no way back."""
        be = ctx.be
        h, _ = swiglu_forward(be, self.gate_up.by_expert(be, dispatch_forward(be, x, plan), plan.offsets))
        if ctx.tap:
            tap_counts(ctx, self.prefix, GATE_UP, x, self.gate_up.k)
            tap_counts(ctx, self.prefix, ("down",), h, self.down.k)
        return self.down.by_expert(be, h, plan.offsets), None
