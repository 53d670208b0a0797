"""The CUDA twins of the operations: each has the operation's own signature and launches its kernels.

What a twin owes: contiguous inputs, outputs of the right type, a grid.  What it computes stands in
cuda/NAME.cu; what it means in ops/NAME.py.  Everything that a grid or a slice depends on is a shape,
so two runs give equal bits.
"""

from minisb.launchers import attention, dense, linear_attention

#: Module -> twins of its operations, by the names that --native takes.
MODULES = {**dense.TWINS, **linear_attention.TWINS, **attention.TWINS}
