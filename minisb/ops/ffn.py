"""The feed-forward network as one operation: product, SwiGLU, product."""

from minisb.backend import op
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward


@op
def ffn_forward(be, x, w_in, w_out):
    """y = swiglu(x w_in^T) w_out^T.

    x (...,C), w_in (2F,C), gate's rows first, w_out (C,F) -> y (...,C).  saved: x, gate_up (...,2F), h (...,F)
    or None, if backward is to make it again.
    """
    gate_up = linear_forward(be, x, w_in)
    h, _ = swiglu_forward(be, gate_up)
    return linear_forward(be, h, w_out), (x, gate_up, h)


@op
def ffn_backward(be, dy, saved, w_in, w_out, dw_in, dw_out):
    """dy (...,C) -> dx (...,C);  dw_in (2F,C) and dw_out (C,F) are added to."""
    x, gate_up, h = saved
    h = swiglu_forward(be, gate_up)[0] if h is None else h
    dh = linear_backward(be, dy, h, w_out, dw_out)
    return linear_backward(be, swiglu_backward(be, dh, gate_up), x, w_in, dw_in)
