"""SwiGLU: silu(gate) * up."""

from minisb.backend import op


def sigmoid(be, x):
    """1 / (1 + e^-x) without overflow on either side: e^-|x| never exceeds 1."""
    e = be.xp.exp(-be.xp.abs(x))
    return be.xp.where(x >= 0, 1, e) / (1 + e)


@op
def swiglu_forward(be, gate_up):
    """gate_up (...,2F), gate in the first half -> h (...,F) = gate * sigmoid(gate) * up.

    saved: gate_up.
    """
    gate, up = be.xp.split(gate_up, 2, axis=-1)
    return gate * sigmoid(be, gate) * up, gate_up


@op
def swiglu_backward(be, dh, saved):
    """dh (...,F) -> dgate_up (...,2F).

    With s = sigmoid(gate): silu = gate * s, silu' = s + silu * (1 - s).
        dgate = dh * up * silu',  dup = dh * silu
    """
    gate, up = be.xp.split(saved, 2, axis=-1)
    s = sigmoid(be, gate)
    silu = gate * s
    return be.xp.concatenate([dh * up * (s + silu * (1 - s)), dh * silu], axis=-1)
