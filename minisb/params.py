"""Parameters: one list of specs drives allocation, initial values, checkpoints and counting."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

#: Every parameter (or group of joined parameters) starts on a multiple of this many elements,
#: so that vector loads are aligned on every machine.
ALIGN = 64


@dataclass(frozen=True)
class Spec:
    """One parameter tensor.

    init: standard deviation of a normal draw, or the constants "zeros" and "ones".
    decay: whether AdamW's weight decay applies (matrices yes, norms and biases no).
    joined: placed directly after the spec before it, without padding, so that a group such as
        q, k, v can also be seen as one matrix (`ParamStore.rows`).
    """

    name: str
    shape: tuple[int, ...]
    init: float | str = 0.02
    decay: bool = True
    joined: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def count(specs: list[Spec]) -> int:
    """Number of parameters; allocates nothing."""
    return sum(spec.size for spec in specs)


def _zeros(xp, size: int, dtype):
    """Zeros that start on a cache line, where NumPy starts anywhere: a product that adds to rows across lines
    takes a quarter longer."""
    if xp is not np:
        return xp.zeros(size, dtype)
    line = 64 // np.dtype(dtype).itemsize
    zeros = np.zeros(size + line, dtype)
    start = -zeros.ctypes.data % 64 // zeros.itemsize
    return zeros[start : start + size]


class ParamStore:
    """Flat buffers with named views.

    p: parameters, g: gradients (+=), m, v: AdamW's moments (allocated with optimizer=True), all of `dtype`.
    w: what layers read: p itself, or in mixed precision a copy of p rounded to `activations`, the type that
    activations then have too.  AdamW writes both; who writes p otherwise calls `round`.
    Decayed tensors come first: `decayed` is where they end.  Zeroing gradients is one fill,
    clipping one reduction, AdamW one launch.
    """

    def __init__(self, specs: list[Spec], xp=np, dtype=np.float32, optimizer: bool = False, activations=None):
        self.specs, self.xp, self.dtype = specs, xp, dtype
        self._spec = {spec.name: spec for spec in specs}
        self._offset: dict[str, int] = {}
        end = 0
        for decay in (True, False):
            for spec in (s for s in specs if s.decay is decay):
                if not spec.joined:
                    end = -(-end // ALIGN) * ALIGN
                self._offset[spec.name] = end
                end += spec.size
            end = -(-end // ALIGN) * ALIGN
            if decay:
                self.decayed = end
        self.size = end
        self.flat_p = _zeros(xp, end, dtype)
        self.flat_w = self.flat_p if activations in (None, dtype) else _zeros(xp, end, activations)
        self.flat_g = _zeros(xp, end, dtype)
        self.flat_m = _zeros(xp, end if optimizer else 0, dtype)
        self.flat_v = _zeros(xp, end if optimizer else 0, dtype)
        self.p = {spec.name: self._view(self.flat_p, spec) for spec in specs}
        self.g = {spec.name: self._view(self.flat_g, spec) for spec in specs}

    def _view(self, flat, spec: Spec):
        start = self._offset[spec.name]
        return flat[start : start + spec.size].reshape(spec.shape)

    def rows(self, names: list[str]):
        """Joined specs as one (w, g) pair of views, stacked along their first axis."""
        specs = [self._spec[name] for name in names]
        start, end = self._offset[names[0]], self._offset[names[-1]] + specs[-1].size
        assert end - start == count(specs), f"{names} are not joined"
        shape = (sum(s.shape[0] for s in specs), *specs[0].shape[1:])
        return self.flat_w[start:end].reshape(shape), self.flat_g[start:end].reshape(shape)

    def named(self, flat) -> dict:
        """Views into `flat` (one of flat_p, flat_m, ...) by parameter name."""
        return {spec.name: self._view(flat, spec) for spec in self.specs}

    def initialise(self, seed: int):
        """Draw every parameter; each has its own stream, so adding one changes no other, and threads draw several."""

        def draw(index: int):
            spec = self.specs[index]
            if isinstance(spec.init, str):
                return {"zeros": 0, "ones": 1}[spec.init]
            drawn = np.random.default_rng([seed, index]).standard_normal(spec.shape, dtype=np.float32)
            drawn *= np.float32(spec.init)
            return drawn

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for spec, drawn in zip(self.specs, pool.map(draw, range(len(self.specs))), strict=True):
                self.p[spec.name][...] = self.xp.asarray(drawn)
        self.round()

    @property
    def mixed(self) -> bool:
        """Whether layers read a rounded copy."""
        return self.flat_w is not self.flat_p

    def round(self):
        """Bring the rounded copy up to date after p was written."""
        if self.mixed:
            self.flat_w[...] = self.flat_p

    def zero_grad(self):
        self.flat_g.fill(0)
