"""The CUDA twins of the operations: each has the operation's own signature and launches its kernels.

What a twin owes: contiguous inputs, outputs of the right type, a grid.  What it computes stands in
cuda/NAME.cu; what it means in ops/NAME.py.  Everything that a grid or a slice depends on is a shape,
so two runs give equal bits.
"""

from minisb.launchers import attention, dense, experts, hybrid, linear_attention, sinks, w8aspike

#: Module -> twins of its operations, by the names that --native takes.
MODULES: dict[str, tuple] = {}
for _part in (dense, linear_attention, attention, hybrid, sinks, experts, w8aspike):
    for _module, _twins in _part.TWINS.items():
        MODULES[_module] = (*MODULES.get(_module, ()), *_twins)
