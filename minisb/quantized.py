"""A quantised model's parameters and projections: what layers.py builds on instead of ParamStore and Projections.

Every matrix inside the layers is int8 with fp32 scales (ops/w8aspike.py), and so, if asked for, are the
embedding and the head, with one scale a row; norms, biases and sinks stay fp32.  Those of a layer's E experts
stand in one tensor (E,O,I), scales (E,O,groups), and read spikes of one k.

The router is a projection like any other: the report spikes the input of every linear projection (section 3.3) and
keeps from int8 the embedding, the head, norms and the state of linear attention, no more.  So its matrix is int8 and
reads spikes of a k of its own wherever config.spike names it; where config.spike does not, it stays fp32 and reads
floats, as it did in training.  Everything else spikes whatever config.spike says.

The gate's low-rank pair is
multiplied out into one matrix gk_proj.weight [G*D, C], as in the released files.  It holds more bytes
than the pair (1 % of a model of 135M), and is worth them: the gate's rows stand below those of q, k and v,
so that one product gives all four, and no half-way result needs a rounding of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minisb.config import Config, spikes_by_layer
from minisb.errors import MinisbError
from minisb.ops.w8aspike import GROUP, count_spikes, embedding_int8, w8aspike_grouped, w8aspike_linear

#: The head's input is spike-coded too, with a finer threshold: every token is chosen by small
#: differences between logits.  mean|x| / 24 leaves almost all counts inside int8.
HEAD_K = 24.0
GATE_PAIR, GATE, GATE_BIAS = ("gk_proj.0.weight", "gk_proj.1.weight"), "gk_proj.weight", "gk_proj.1.bias"
ROUTER = "router.weight"
INT8, SCALES = ".int8", ".scales"
OUTSIDE = ("embeddings.weight", "lm_head.weight")  # the matrices outside the layers that may be int8
LINE = 64  # bytes of a cache line


@dataclass
class Int8Matrix:
    """w8 int8 (O,I), scales fp32 (O,groups), and the k of the spikes that it reads.

    Of experts, all in one: (E,O,I) and (E,O,groups).
    """

    w8: np.ndarray
    scales: np.ndarray
    k: float = HEAD_K
    prepared: Any = None  # what a native keeps of it from one token to the next
    dtype = np.dtype(np.float32)  # of what it stands for

    @property
    def nbytes(self) -> int:
        return self.w8.nbytes + self.scales.nbytes

    def product(self, be, x, b=None):
        """x (...,I) -> y (...,O) = spikes(x) W^T + b."""
        return w8aspike_linear(be, x, self.w8, self.scales, self.k, b)

    def by_expert(self, be, x, offsets):
        """x (R,I), expert e's rows from offsets[e] on -> y (R,O)."""
        return w8aspike_grouped(be, x, self.w8, self.scales, self.k, offsets)

    def rows(self, be, tokens):
        """Row `token` for each of tokens (B,T) -> fp32 (B,T,I), of a matrix with one scale a row."""
        return embedding_int8(be, tokens, self.w8, self.scales)


class QuantizedStore:
    """Parameters by name: fp32 arrays in p, matrices in int8.  No gradients.

    k: for each input of projections ("layers.0.attn.q+k+v+gk") the k of its spikes.
    """

    def __init__(self, p: dict, int8: dict[str, Int8Matrix], k: dict[str, float], xp=np):
        self.xp, self.p, self.int8, self.k = xp, p, int8, k

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.p.values(), *self.int8.values()))

    def rows(self, names: list[str]):
        """(array or Int8Matrix, None for its gradient), several stacked along their first axis."""
        if names[0] in self.int8:
            return self.matrix(names, HEAD_K), None
        return self.p[names[0]] if len(names) == 1 else self.xp.concatenate([self.p[n] for n in names]), None

    def matrix(self, names: list[str], k: float) -> Int8Matrix:
        """Joined rows of several matrices; those become views of the result, so nothing is held twice.

        Scales are kept column after column, as a product reads them.
        """
        parts = [self.int8[name] for name in names]
        if len(parts) == 1 and self._ready(parts[0]):  # such as a tied head, which comes twice
            parts[0].k = k
            return parts[0]
        scales = self.xp.asfortranarray(self.xp.concatenate([m.scales for m in parts]))
        joined = Int8Matrix(aligned([m.w8 for m in parts], self.xp), scales, k)
        start = 0
        for name, part in zip(names, parts, strict=True):
            end = start + len(part.w8)
            self.int8[name] = Int8Matrix(joined.w8[start:end], joined.scales[start:end], k)
            start = end
        return joined

    def _ready(self, matrix: Int8Matrix) -> bool:
        """Whether a product can read it as it is.  (A GPU's arrays start on a line anyway.)"""
        return matrix.scales.flags.f_contiguous and (self.xp is not np or matrix.w8.ctypes.data % LINE == 0)

    def stacked(self, names: list[str], k: float) -> Int8Matrix:
        """As `matrix`, of experts: (E,O,I) joined along O, so that one product of an expert gives all."""
        parts = [self.int8[name] for name in names]
        xp = self.xp
        scales = xp.concatenate([m.scales for m in parts], axis=1)
        scales = xp.ascontiguousarray(scales.swapaxes(1, 2)).swapaxes(1, 2)
        joined, start = Int8Matrix(xp.concatenate([m.w8 for m in parts], axis=1), scales, k), 0
        for name, part in zip(names, parts, strict=True):
            rows = slice(start, start + part.w8.shape[1])
            self.int8[name] = Int8Matrix(joined.w8[:, rows], joined.scales[:, rows], k)
            start = rows.stop
        return joined


class QuantizedProjections:
    """Projections of one common input by one int8 matrix: rows of q, then k, then v, ... All read spikes, always."""

    def __init__(self, store: QuantizedStore, prefix: str, weights: dict[str, str], biases: tuple[str, ...] = ()):
        """As Projections; the gate's first matrix means the merged one, with its bias."""
        self.prefix = prefix
        names = [f"{prefix}.{GATE if name == GATE_PAIR[0] else name}" for name in weights.values()]
        self.matrix = store.matrix(names, store.k[input_name(prefix, weights)])
        self.rows, start = {}, 0
        for short, name in zip(weights, names, strict=True):
            end = start + len(store.int8[name].w8)
            self.rows[short] = slice(start, end)
            start = end
        self.b = None
        if biases or "gk" in weights:
            first = [store.p[f"{prefix}.{name}"] for name in biases]
            self.b, end = store.xp.zeros(start, np.float32), 0
            for b in first:
                self.b[end : end + b.size] = b
                end += b.size
            if "gk" in weights:  # linear attention's own, also where it shares its projections
                own = prefix if f"{prefix}.{GATE_BIAS}" in store.p else f"{prefix}.linear"
                self.b[self.rows["gk"]] = store.p[f"{own}.{GATE_BIAS}"]

    def forward(self, ctx, x):
        """x (B,T,I) -> y (B,T,O), None: there is no way back."""
        if ctx.tap:
            tap_counts(ctx, self.prefix, self.rows, x, self.matrix.k)
        return self.matrix.product(ctx.be, x, self.b), None

    def backward(self, be, dy, saved):
        raise MinisbError("a quantised model cannot be trained: go on with the run it was made from.")


def tap_counts(ctx, prefix: str, names, x, k: float):
    """Show the counts of x (...,I), which the projections `names` read."""
    count = count_spikes(ctx.be, x.reshape(-1, x.shape[-1]), k)[0].astype(np.float32).reshape(x.shape)
    for name in names:
        ctx.tap(f"{prefix}.{name}.count", count)


def input_name(prefix: str, shorts) -> str:
    """What projections of one input are called together: layers.0.attn.q+k+v+gk."""
    return f"{prefix}.{'+'.join(shorts)}"


#: Projections that read one input, by the part of the layer that they end.
QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


def input_names(c: Config) -> list[str]:
    """Every input of int8 projections of the model, in order."""
    found = []
    for i in range(c.layers):
        for prefix, first in _mixers(c, i).items():
            found += [input_name(prefix, first), input_name(prefix, ("o",))]
        prefixes = [f"layers.{i}.mlp"]
        if c.ffn_kind(i) == "moe":
            (mlp,) = prefixes
            found += [] if f"{mlp}.{ROUTER}" in float_routers(c) else [input_name(mlp, ("router",))]
            prefixes = [f"{mlp}.experts", *([f"{mlp}.shared"] if c.shared_experts else [])]
        for prefix in prefixes:
            found += [input_name(prefix, GATE_UP), input_name(prefix, ("down",))]
    return found


def _mixers(c: Config, layer: int) -> dict[str, tuple[str, ...]]:
    """Prefix -> projections of its input, for the one mixer of a layer or the two of a parallel hybrid."""
    prefix, kind = f"layers.{layer}.attn", c.mixer(layer)
    linear = (*QKV, "gk") if c.gate == "low_rank" else QKV
    if "+" in kind and not c.shared_projections:
        return {f"{prefix}.linear": linear, f"{prefix}.softmax": QKV}
    return {prefix: linear if kind.startswith("gla") else QKV}


def float_routers(c: Config) -> set[str]:
    """Names of the routers that config.spike leaves out: they stay fp32."""
    spikes = spikes_by_layer(c.spike, c.layers)
    moe = (i for i in range(c.layers) if c.ffn_kind(i) == "moe")
    return {f"layers.{i}.mlp.{ROUTER}" for i in moe if "router" not in spikes[i]}


def aligned(parts: list, xp=np):
    """The parts below each other, in memory that starts on a cache line: no vector lies across two."""
    if xp is not np:  # the allocator of a GPU sees to that
        return xp.concatenate(parts)
    shape, dtype = (sum(len(p) for p in parts), *parts[0].shape[1:]), parts[0].dtype
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return np.concatenate(parts, out=room[start : start + size].view(dtype).reshape(shape))


# --- which tensors there are


def gate_pairs(specs) -> dict[str, tuple]:
    """Name of the merged gate -> the specs of its two matrices, the first always before its second."""
    firsts, seconds = ([spec for spec in specs if spec.name.endswith(end)] for end in GATE_PAIR)
    return {a.name.replace(GATE_PAIR[0], GATE): (a, b) for a, b in zip(firsts, seconds, strict=True)}


def matrix_shapes(specs, embedding: bool, left=()) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that is stored as int8: matrices (O,I), of experts (E,O,I).

    left: names that are not (float_routers).
    """
    found = {name: (b.shape[0], a.shape[1]) for name, (a, b) in gate_pairs(specs).items()}
    for spec in specs:
        inside = spec.name.startswith("layers.") and spec.name not in left and not spec.name.endswith(GATE_PAIR)
        if len(spec.shape) > 1 and (inside or (embedding and spec.name in OUTSIDE)):
            found[spec.name] = spec.shape
    return found


def scale_groups(name: str, inputs: int, group: int | None) -> int:
    """Scales of a row of the matrix: one for embedding and head."""
    return 1 if group is None or not name.startswith("layers.") else -(-inputs // GROUP)


def empty_tensors(specs, group: int | None, embedding: bool, left=()) -> dict[str, np.ndarray]:
    """Every tensor of the file, not filled: NAME.int8 and NAME.scales, or NAME in fp32.  left: as matrix_shapes."""
    matrices, tensors = matrix_shapes(specs, embedding, left), {}
    for name, (*rows, inputs) in matrices.items():
        tensors[name + INT8] = np.empty((*rows, inputs), np.int8)
        tensors[name + SCALES] = np.empty((*rows, scale_groups(name, inputs, group)), np.float32)
    for spec in specs:
        if spec.name not in matrices and not spec.name.endswith(GATE_PAIR):
            tensors[spec.name] = np.empty(spec.shape, np.float32)
    return tensors


def store_of(tensors: dict, k: dict[str, float], xp=np) -> QuantizedStore:
    """Tensors named as in the file -> a store of arrays of `xp`.

    Raises MinisbError for values that no quantisation makes.
    """
    int8 = {}
    for name in (n.removesuffix(INT8) for n in tensors if n.endswith(INT8)):
        w8, scales = tensors[name + INT8], tensors[name + SCALES]
        if w8.min() < -127 or not (np.isfinite(scales).all() and (scales > 0).all()):
            raise MinisbError(f"the int8 matrix {name} is damaged: a weight is -128 or a scale is not above 0.")
        int8[name] = Int8Matrix(xp.asarray(w8), xp.asarray(scales))
    floats = {n: xp.asarray(x) for n, x in tensors.items() if not n.endswith((INT8, SCALES))}
    return QuantizedStore(floats, int8, k, xp)
