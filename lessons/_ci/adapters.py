"""Each exercise solved by the package: the proof that it can be solved, and no solution to copy.

Where the package has no function of that shape, the adapter is a thin composition of its functions.
`solutions(number, variant)` also solves the flipped conventions of graded courses.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np

from lessons._lib.book import lesson
from lessons._lib.conventions import flipped
from minisb.backend import Backend
from minisb.ops import codes, gla, neuron, spike

BE = Backend(1)
ROOT = Path(__file__).resolve().parents[2]


def solutions(number: str, variant: int = 0) -> dict:
    """Exercise function -> one that passes its check under the course's variant."""
    standard, flip, _ = LESSONS[number]
    return {f.__name__: f for f in standard} | flip(flipped(lesson(number).check.CONVENTIONS, variant))


def pasted(number: str) -> str:
    """A submission that is right: the package's own files pasted above the adapters.

    It imports nothing of the package, so no import hook can object; a flipped convention can.
    """
    standard, _, files = LESSONS[number]
    parts = ["import types\n\nimport numpy as np\n\nBE = types.SimpleNamespace(xp=np, natives={}, checked=False)\n"]
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        text = re.sub(r"^from minisb\.backend import op$", "op = lambda f: f", text, flags=re.M)
        text = re.sub(r"^from minisb\.errors import MinisbError$", "MinisbError = ValueError", text, flags=re.M)
        name = Path(file).stem
        parts.append(f"{name} = types.ModuleType({name!r})\nexec({text!r}, {name}.__dict__)\n")
    used = [_one_head, *standard] if number == "04" else standard
    return "\n\n".join(parts + [inspect.getsource(f) for f in used])


# --- 04 --------------------------------------------------------------------------------------------


def _one_head(*arrays):
    """(T,D) -> (1,T,1,D), and a state (D,D) -> (1,1,D,D), which the last of them is."""
    *tokens, state = arrays
    return [*(x[None, :, None] for x in tokens), None if state is None else state[None, None]]


def gla_step(q, k, v, log_g, state):
    *inputs, state = _one_head(q[None], k[None], v[None], log_g[None], state.copy())
    o = gla.gla_step(BE, *inputs, state)
    return o[0, 0, 0], state[0, 0]


def gla_recurrent(q, k, v, log_g, state):
    o, state, _ = gla.gla_recurrent_forward(BE, *_one_head(q, k, v, log_g, state))
    return o[0, :, 0], state[0, 0]


def gla_parallel(q, k, v, log_g):
    return gla.gla_forward(BE, *_one_head(q, k, v, log_g, None), chunk=len(q))[0][0, :, 0]


def gla_chunk(q, k, v, log_g, state, chunk):
    o, state, _ = gla.gla_forward(BE, *_one_head(q, k, v, log_g, state), chunk=chunk)
    return o[0, :, 0], state[0, 0]


def flip_04(flips):
    if not flips:
        return {}

    def step(q, k, v, log_g, state):
        if "gate on the value side" in flips:
            new = gla_step(q, v, k, log_g, state.T)[1].T
        else:
            new = gla_step(q, k, v, log_g, state)[1]
        return q @ (state if "read before writing" in flips else new) * len(q) ** -0.5, new

    def recurrent(q, k, v, log_g, state):
        outputs = []
        for token in zip(q, k, v, log_g, strict=True):
            o, state = step(*token, state)
            outputs.append(o)
        return np.stack(outputs), state

    return {
        "gla_step": step,
        "gla_recurrent": recurrent,
        "gla_parallel": lambda q, k, v, log_g: recurrent(q, k, v, log_g, np.zeros((q.shape[1],) * 2, q.dtype))[0],
        "gla_chunk": lambda q, k, v, log_g, state, chunk: recurrent(q, k, v, log_g, state),
    }


# --- 10 --------------------------------------------------------------------------------------------


def threshold(x, k):
    return spike.threshold(BE, x, k)


def spike_count(x, vth):
    return spike.spike_count(BE, x, vth)


def simulate_neuron(x, vth, steps, v0):
    return neuron.adaptive_neuron(x, vth, steps, v0)


def ste_backward(dy, x, w, k):
    x_hat, _ = spike.spike_forward(BE, x, k)
    return dy @ w, dy.T @ x_hat


def flip_10(flips):
    def flip_threshold(x, k):
        mean = (x * x).mean(-1, keepdims=True) ** 0.5 / k
        return np.clip(mean, spike.VTH_MIN, spike.VTH_MAX) if "root mean square" in flips else threshold(x, k)

    def flip_count(x, vth):
        return np.floor(x / vth + 0.5) if "ties up" in flips else spike_count(x, vth)

    def flip_backward(dy, x, w, k):
        vth = flip_threshold(x, k)
        return dy @ w, dy.T @ (flip_count(x, vth) * vth)

    return {"threshold": flip_threshold, "spike_count": flip_count, "ste_backward": flip_backward} if flips else {}


# --- 11 --------------------------------------------------------------------------------------------


def encode_binary(counts, steps):
    return codes.encode(counts, "binary", steps)


def encode_ternary(counts, steps):
    return codes.encode(counts, "ternary", steps)


def encode_bitwise(counts, steps):
    return codes.encode(counts, "bitwise", steps)


def encode_bidirectional(counts, steps):
    return codes.encode(counts, "bidirectional", steps)


def encode_twos_complement(counts, steps):
    return codes.encode(counts, "twos_complement", steps)


def decode(spikes, code):
    return codes.decode(spikes, code)


def event_matmul(spikes, w, code):
    return codes.event_linear(spikes, w, code)


def flip_11(flips):
    def turned(spikes, code):
        rate = code in codes.RATE
        return spikes[::-1] if ("late spikes" if rate else "highest bit first") in flips else spikes

    encoders = {
        f"encode_{code}": lambda counts, steps, code=code: turned(codes.encode(counts, code, steps), code)
        for code in codes.CODES
    }
    return {
        **encoders,
        "decode": lambda spikes, code: codes.decode(turned(spikes, code), code),
        "event_matmul": lambda spikes, w, code: codes.event_linear(turned(spikes, code), w, code),
    }


#: Lesson -> its adapters, what changes when conventions are flipped, the files that they call.
LESSONS = {
    "04": ((gla_step, gla_recurrent, gla_parallel, gla_chunk), flip_04, ("minisb/ops/gla.py",)),
    "10": (
        (threshold, spike_count, simulate_neuron, ste_backward),
        flip_10,
        ("minisb/ops/spike.py", "minisb/ops/neuron.py"),
    ),
    "11": (
        (
            encode_binary,
            encode_ternary,
            encode_bitwise,
            encode_bidirectional,
            encode_twos_complement,
            decode,
            event_matmul,
        ),
        flip_11,
        ("minisb/ops/codes.py",),
    ),
}
