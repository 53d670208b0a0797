"""The operations of the 76B as cases for the checks in test_ops.py, see op_cases.py."""

import numpy as np
from op_cases import Case, columns, normal

from minisb.ops import attention, gate, heads, moe, sinks


def route(E, K):
    def forward(be, x):
        gates, _, p, lse, saved = moe.router_forward(be, x["logits"], K)
        return {"gates": gates, "p": p, "lse": lse}, saved

    def backward(be, d, saved, x, grads):
        return {"logits": moe.router_backward(be, d["gates"], d["p"], d["lse"], saved)}

    def inputs(rng, T):
        return {"logits": 2 * normal(rng, 2 * T, E)}

    return Case(f"router-{E}-{K}", ("router_forward", "router_backward"), inputs, forward, backward, many=3000)


def plan_of(be, N, E, K, tile, capacity=None):
    """Expert 1 of E is never chosen, expert 0 often."""
    scores = np.random.default_rng(7).random((N, E))
    scores[:, 0] += 0.3
    scores[:, 1] = -1
    experts = np.argsort(-scores, axis=-1)[:, :K]
    return moe.dispatch_plan(be, be.xp.asarray(experts), E, tile, capacity)


def dispatch(C, E, K, tile):
    def forward(be, x):
        plan = plan_of(be, len(x["x"]), E, K, tile)
        return {"rows": moe.dispatch_forward(be, x["x"], plan)}, plan

    def backward(be, d, saved, x, grads):
        return {"x": moe.dispatch_backward(be, d["rows"], saved)}

    def inputs(rng, T):
        return {"x": normal(rng, 2 * T, C)}

    names = ("dispatch_plan", "dispatch_forward", "dispatch_backward")
    return Case(f"dispatch-{C}-{E}-{K}-tile{tile}", names, inputs, forward, backward)


def combine(C, E, K, tile, capacity=None, shared=True):
    def forward(be, x):
        plan = plan_of(be, len(x["gates"]), E, K, tile, capacity)
        y, saved = moe.combine_forward(be, x["rows"], x["gates"], plan, x["shared"] if shared else None)
        return {"y": y}, saved

    def backward(be, d, saved, x, grads):
        drows, dgates = moe.combine_backward(be, d["y"], saved)
        return {"rows": drows, "gates": dgates, "shared": d["y"] if shared else np.zeros_like(d["y"])}

    def inputs(rng, T):
        N = 2 * T
        return {
            "rows": normal(rng, N * K + E * (tile - 1), C), "gates": rng.random((N, K)), "shared": normal(rng, N, C),
        }  # fmt: skip

    names = ("combine_forward", "combine_backward")
    name = f"combine-{C}-{E}-{K}-tile{tile}-capacity{capacity}"
    return Case(name, names, inputs, forward, backward, local=capacity is None and shared)


def grouped(n_in, n_out, E, K, tile, wide=False):
    """wide: the result goes into columns of a wider array, and dx is added to what is there."""

    def forward(be, x):
        plan = plan_of(be, len(x["x"]) // K - E * (tile - 1) // K, E, K, tile)
        if not wide:
            return {"y": moe.grouped_forward(be, x["x"], x["w"], plan.offsets)}, plan
        out = be.xp.zeros((len(x["x"]), n_out + 5), x["x"].dtype)
        y = moe.grouped_forward(be, x["x"], x["w"], plan.offsets, out[:, 2:-3])
        assert not out[:, :2].any() and not out[:, -3:].any()
        return {"y": y}, plan

    def backward(be, d, saved, x, grads):
        dx = be.xp.zeros_like(x["x"]) if wide else None
        return {"x": moe.grouped_backward(be, d["y"], x["x"], x["w"], saved.offsets, grads["w"], dx)}

    def inputs(rng, T):
        N = 2 * T
        x = normal(rng, N * K + E * (tile - 1), n_in)
        plan = plan_of(backend(), N, E, K, tile)
        x[plan.token < 0] = 0  # padding is zero, so that it gives the weights no gradient
        return {"x": x, "w": normal(rng, E, n_out, n_in)}

    names = ("grouped_forward", "grouped_backward")
    name = f"grouped-{n_in}-{n_out}-{E}-{K}-tile{tile}" + "-wide" * wide
    return Case(name, names, inputs, forward, backward, ("w",), local=False, many=400)


def backend():
    from conftest import backends

    return backends()["numpy"]


def sigmoid_heads(H, G, D, tied):
    def forward(be, x):
        q, k, v, log_g, saved = heads.sigmoid_heads_forward(be, x["qkv"], H, G, D, tied)
        return {"q": q, "k": k, "v": v} | ({"log_g": log_g} if tied else {}), saved

    def backward(be, d, saved, x, grads):
        dqkv = np.full_like(x["qkv"], 7)
        out = heads.sigmoid_heads_backward(be, d["q"], d["k"], d["v"], d.get("log_g"), saved, dqkv)
        return columns(out, (H + 2 * G) * D)

    def inputs(rng, T):
        return {"qkv": 2 * normal(rng, 2, T, (H + 2 * G) * D + 3)}

    names = ("sigmoid_heads_forward", "sigmoid_heads_backward")
    return Case(f"sigmoid_heads-{H}-{G}-{D}" + "-tied" * tied, names, inputs, forward, backward)


def tied_gate(N):
    def forward(be, x):
        k, log_g, saved = gate.tied_gate_forward(be, x["z"])
        return {"k": k, "log_g": log_g}, saved

    def backward(be, d, saved, x, grads):
        return {"z": gate.tied_gate_backward(be, d["k"], d["log_g"], saved)}

    def inputs(rng, T):
        return {"z": 3 * normal(rng, 2, T, N)}

    return Case(f"tied_gate-{N}", ("tied_gate_forward", "tied_gate_backward"), inputs, forward, backward)


def attend_with_sinks(H, G, D, S, window):
    """Through the window first and then to the sinks; window None: the sinks alone, as sinks see them."""

    def forward(be, x):
        if window is None:
            o, lse = sinks.sinks_forward(be, x["q"], x["sink_k"], x["sink_v"])
            return {"o": o}, (None, o, lse)
        before, (q, k, v, _, lse, *rest) = attention.attention_forward(be, x["q"], x["k"], x["v"], window)
        o, lse = sinks.sinks_forward(be, x["q"], x["sink_k"], x["sink_v"], before, lse)
        return {"o": o}, ((q, k, v, o, lse, *rest), o, lse)

    def backward(be, d, saved, x, grads):
        in_window, o, lse = saved
        dq, *dtext = attention.attention_backward(be, d["o"], in_window) if in_window else [None]
        dq, dsink_k, dsink_v = sinks.sinks_backward(be, d["o"], x["q"], x["sink_k"], x["sink_v"], o, lse, dq=dq)
        return {"q": dq, "sink_k": dsink_k, "sink_v": dsink_v, **dict(zip("kv", dtext, strict=False))}

    def inputs(rng, T):
        text = {} if window is None else {"k": normal(rng, 2, T, G, D), "v": normal(rng, 2, T, G, D)}
        sinks = {"sink_k": normal(rng, S, G, D), "sink_v": normal(rng, S, G, D)}
        return {"q": normal(rng, 2, T, H, D), **text, **sinks}

    names = ("sinks_forward", "sinks_backward")
    return Case(f"sinks-{H}-{G}-{D}-{S}-window{window}", names, inputs, forward, backward, local=False, many=257)


CASES = [
    route(16, 1), route(7, 3), dispatch(7, 5, 1, 1), dispatch(33, 4, 2, 3), combine(7, 5, 1, 1),
    combine(33, 4, 2, 3), combine(6, 4, 2, 1, capacity=3), combine(5, 3, 1, 4, shared=False),
    grouped(7, 11, 4, 1, 1), grouped(33, 20, 3, 1, 4), grouped(40, 30, 3, 2, 1, wide=True),
    sigmoid_heads(6, 2, 5, True), sigmoid_heads(3, 3, 6, False), tied_gate(7), tied_gate(33),
    attend_with_sinks(6, 2, 6, 4, 5), attend_with_sinks(3, 3, 5, 17, 1000), attend_with_sinks(4, 1, 16, 3, None),
]  # fmt: skip
#: Where the entry that the NaN test spoils is padding or belongs to a dropped token, and nobody reads it.
UNREAD = ("combine-6-4-2-tile1-capacity3", "combine-5-3-1-tile4-capacityNone", "grouped-33-20-3-1-tile4")
