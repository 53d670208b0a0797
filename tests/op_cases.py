"""Every operation with a backward, described once, for the checks in test_ops.py.

A case knows its inputs (float64 unless said otherwise), how to run forward and how to run backward;
the checks (gradients, native against reference, poisoned memory, thread counts, NaN) know nothing
about operations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minisb.ops import attention, cross_entropy, embedding, ffn, gate, gla, heads, linear, norm, rope, swiglu


@dataclass
class Case:
    name: str
    natives: tuple  # names of the operations that it runs
    inputs: Callable  # (rng, T) -> {name: array}
    forward: Callable  # (be, inputs) -> ({name: output}, saved)
    # (be, {output: its gradient}, saved, inputs, {parameter: gradient, added to}) -> {input: gradient}
    backward: Callable
    params: tuple = ()  # inputs whose gradient is added to
    local: bool = True  # NaN goes exactly where the reference takes it
    many: int = 1030  # a T at which several threads work


def normal(rng, *shape):
    return rng.standard_normal(shape)


def away_from_zero(rng, *shape):
    """Not within 0.05 of zero, where relu bends."""
    x = rng.standard_normal(shape)
    return x + np.where(x < 0, -0.05, 0.05)


def rmsnorm(C):
    def forward(be, x):
        y, saved = norm.rmsnorm_forward(be, x["x"], x["w"], 1e-6)
        return {"y": y}, saved

    def backward(be, d, saved, x, grads):
        return {"x": norm.rmsnorm_backward(be, d["y"], saved, grads["w"])}

    def inputs(rng, T):
        return {"x": normal(rng, 2, T, C), "w": normal(rng, C)}

    return Case(f"rmsnorm-{C}", ("rmsnorm_forward", "rmsnorm_backward"), inputs, forward, backward, ("w",))


def add_rmsnorm(C):
    def forward(be, x):
        z, y, saved = norm.add_rmsnorm_forward(be, x["x"], x["delta"], x["w"], 1e-6)
        return {"z": z, "y": y}, saved

    def backward(be, d, saved, x, grads):
        both = norm.add_rmsnorm_backward(be, d["z"], d["y"], saved, grads["w"])
        return {"x": both, "delta": both}

    def inputs(rng, T):
        return {"x": normal(rng, 2, T, C), "delta": normal(rng, 2, T, C), "w": normal(rng, C)}

    return Case(f"add_rmsnorm-{C}", ("add_rmsnorm_forward", "add_rmsnorm_backward"), inputs, forward, backward, ("w",))


def columns(dqkv, used):
    """Columns after q | k | v belong to the caller, and hold what the caller put there."""
    assert (dqkv[..., used:] == 7).all()
    dqkv[..., used:] = 0
    return {"qkv": dqkv}


def relu_heads(H, G, D):
    def forward(be, x):
        q, k, v, saved = heads.relu_heads_forward(be, x["qkv"], H, G, D)
        return {"q": q, "k": k, "v": v}, saved

    def backward(be, d, saved, x, grads):
        dqkv = np.full_like(x["qkv"], 7)
        return columns(heads.relu_heads_backward(be, d["q"], d["k"], d["v"], saved, dqkv), (H + 2 * G) * D)

    def inputs(rng, T):
        return {"qkv": away_from_zero(rng, 2, T, (H + 2 * G) * D + 3)}

    return Case(f"relu_heads-{H}-{G}-{D}", ("relu_heads_forward", "relu_heads_backward"), inputs, forward, backward)


def rotary(H, G, D):
    def table(be, x):
        return (be.xp.asarray(a, x.dtype) for a in rope.rope_table(5, x.shape[1], D, 100.0))

    def forward(be, x):
        q, k, v = rope.rope_forward(be, x["qkv"], *table(be, x["qkv"]), H, G, D)
        return {"q": q, "k": k, "v": v}, None

    def backward(be, d, saved, x, grads):
        dqkv = np.full_like(x["qkv"], 7)
        rope.rope_backward(be, d["q"], d["k"], d["v"], *table(be, x["qkv"]), dqkv)
        return columns(dqkv, (H + 2 * G) * D)

    def inputs(rng, T):
        return {"qkv": normal(rng, 2, T, (H + 2 * G) * D + 3)}

    return Case(f"rope-{H}-{G}-{D}", ("rope_forward", "rope_backward"), inputs, forward, backward)


def swi(F):
    def forward(be, x):
        h, saved = swiglu.swiglu_forward(be, x["gate_up"])
        return {"h": h}, saved

    def backward(be, d, saved, x, grads):
        return {"gate_up": swiglu.swiglu_backward(be, d["h"], saved)}

    def inputs(rng, T):
        return {"gate_up": 3 * normal(rng, 2, T, 2 * F)}

    return Case(f"swiglu-{F}", ("swiglu_forward", "swiglu_backward"), inputs, forward, backward)


def feed_forward(C, F):
    """Wide enough that the native does not leave it to the reference."""

    def forward(be, x):
        y, saved = ffn.ffn_forward(be, x["x"], x["w_in"], x["w_out"])
        return {"y": y}, saved

    def backward(be, d, saved, x, grads):
        weights = x["w_in"], x["w_out"], grads["w_in"], grads["w_out"]
        return {"x": ffn.ffn_backward(be, d["y"], saved, *weights)}

    def inputs(rng, T):
        return {"x": normal(rng, 2, T, C), "w_in": normal(rng, 2 * F, C), "w_out": normal(rng, C, F) / F}

    names = ("ffn_forward", "ffn_backward")
    return Case(f"ffn-{C}-{F}", names, inputs, forward, backward, ("w_in", "w_out"), local=False)


def log_gate(N):
    def forward(be, x):
        log_g, saved = gate.log_gate_forward(be, x["z"], 16.0)
        return {"log_g": log_g}, saved

    def backward(be, d, saved, x, grads):
        return {"z": gate.log_gate_backward(be, d["log_g"], saved)}

    def inputs(rng, T):
        return {"z": 5 * normal(rng, 2, T, N)}

    return Case(f"log_gate-{N}", ("log_gate_forward", "log_gate_backward"), inputs, forward, backward)


def low_rank_gate(R, J):
    """Its input and that one's gradient are columns of something wider."""
    natives = ("low_rank_gate_forward", "low_rank_gate_backward", "log_gate_forward", "log_gate_backward")

    def forward(be, x):
        log_g, saved = gate.low_rank_gate_forward(be, x["x"][..., 3:], x["w"], x["b"], 16.0)
        return {"log_g": log_g}, saved

    def backward(be, d, saved, x, grads):
        dx = np.full_like(x["x"], 7)
        gate.low_rank_gate_backward(be, d["log_g"], saved, dx[..., 3:], grads["w"], grads["b"])
        assert (dx[..., :3] == 7).all()
        dx[..., :3] = 0
        return {"x": dx}

    def inputs(rng, T):
        return {"x": normal(rng, 2, T, 3 + R), "w": normal(rng, J, R), "b": normal(rng, J)}

    return Case(f"low_rank_gate-{R}-{J}", natives, inputs, forward, backward, ("w", "b"), local=False)


def project(n_in, n_out, biased):
    def forward(be, x):
        return {"y": linear.linear_forward(be, x["x"], x["w"], x["b"])}, None

    def backward(be, d, saved, x, grads):
        return {"x": linear.linear_backward(be, d["y"], x["x"], x["w"], grads["w"], grads["b"])}

    def inputs(rng, T):
        return {"x": normal(rng, 2, T, n_in), "w": normal(rng, n_out, n_in), "b": normal(rng, biased)}

    natives = "linear_forward", "linear_backward"
    return Case(f"linear-{n_in}-{n_out}", natives, inputs, forward, backward, ("w", "b"), local=False)


def embed(V, C):
    def tokens(be, x):
        T = int(x["T"][0])
        return be.xp.asarray(np.random.default_rng(0).integers(0, V, (2, T)))

    def forward(be, x):
        return {"x": embedding.embedding_forward(be, tokens(be, x), x["table"])}, None

    def backward(be, d, saved, x, grads):
        embedding.embedding_backward(be, d["x"], tokens(be, x), grads["table"])
        return {}

    def inputs(rng, T):
        return {"table": normal(rng, V, C), "T": np.array([T])}

    return Case(
        f"embedding-{V}-{C}", ("embedding_forward", "embedding_backward"), inputs, forward, backward, ("table",)
    )


def loss(V):
    def targets(be, x):
        chosen = np.random.default_rng(0).integers(0, V, len(x["logits"]))
        chosen[1::3] = cross_entropy.IGNORE
        return be.xp.asarray(chosen)

    def forward(be, x):
        return {"losses": cross_entropy.cross_entropy(be, x["logits"], targets(be, x))}, None

    def backward(be, d, saved, x, grads):
        dlogits = x["logits"].copy()
        cross_entropy.cross_entropy(be, dlogits, targets(be, x), d["losses"])
        return {"logits": dlogits}

    def inputs(rng, T):
        return {"logits": 4 * normal(rng, T, V)}

    return Case(f"cross_entropy-{V}", ("cross_entropy",), inputs, forward, backward, many=2050)


def attend(H, G, D, window, past=0):
    def forward(be, x):
        o, saved = attention.attention_forward(be, x["q"], x["k"], x["v"], window)
        return {"o": o}, saved

    def backward(be, d, saved, x, grads):
        return dict(zip("qkv", attention.attention_backward(be, d["o"], saved), strict=True))

    def inputs(rng, T):
        S = T + past
        return {"q": normal(rng, 2, T, H, D), "k": normal(rng, 2, S, G, D), "v": normal(rng, 2, S, G, D)}

    names = ("attention_forward", "attention_backward")
    name = f"attention-{H}-{G}-{D}-window{window}-past{past}"
    return Case(name, names, inputs, forward, backward, local=False, many=257)


def linear_attend(H, G, D, strongest=-5.0):
    def forward(be, x):
        o, final, saved = gla.gla_forward(be, x["q"], x["k"], x["v"], x["log_g"], x["state"])
        return {"o": o, "final": final}, saved

    def backward(be, d, saved, x, grads):
        return dict(
            zip(("q", "k", "v", "log_g", "state"), gla.gla_backward(be, d["o"], d["final"], saved), strict=True)
        )

    def inputs(rng, T):
        x = {"q": normal(rng, 2, T, H, D), "k": normal(rng, 2, T, G, D), "v": normal(rng, 2, T, G, D)}
        x["log_g"] = rng.uniform(strongest, 0, (2, T, G, D))
        x["state"] = normal(rng, 2, G, D, D)
        return x

    return Case(f"gla-{H}-{G}-{D}", ("gla_forward", "gla_backward"), inputs, forward, backward, local=False, many=257)


CASES = [
    rmsnorm(7), rmsnorm(33), add_rmsnorm(7), add_rmsnorm(33),
    relu_heads(6, 2, 5), relu_heads(3, 3, 6), rotary(6, 2, 6), rotary(3, 3, 10),
    swi(7), swi(33), feed_forward(40, 55), log_gate(7), log_gate(33), low_rank_gate(5, 24),
    project(7, 33, 7), project(33, 11, 5),
    embed(11, 7), embed(5, 40),
    loss(11), loss(33),
    attend(6, 2, 6, 5), attend(3, 3, 5, 64), attend(6, 2, 16, 1000),
    attend(4, 1, 6, 5, past=9), attend(3, 3, 6, 1000, past=70),
    linear_attend(6, 2, 6), linear_attend(3, 3, 8), linear_attend(6, 2, 16),
]  # fmt: skip
