"""What decoding remembers: one entry a layer, of a size that does not depend on how much was read.

GLA keeps a matrix [B,G,D,D].  A windowed layer keeps its last W keys and values in a ring.
Only full attention keeps everything.  Learned sinks before the text are read once and stay.
"""

from __future__ import annotations

import numpy as np

from minisb.config import Config
from minisb.ops.attention import store_token
from minisb.ops.w8aspike import decode_pair, store_token_int8


class GLAState:
    """The state matrix of linear attention, (B,G,D,D), key axis first, float32 also where activations are shorter."""

    def __init__(self, be, config: Config, batch: int, dtype):
        shape = (batch, config.kv_heads, config.head_dim, config.head_dim)
        self.matrix = be.xp.zeros(shape, be.wide(dtype))

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def arrays(self) -> list:
        return [self.matrix]

    def begin(self, memory):
        """Start from what the sinks left, (1,G,D,D)."""
        self.matrix[...] = memory

    def copy(self):
        twin = object.__new__(type(self))
        twin.matrix = self.matrix.copy()
        return twin


class KeyValueCache:
    """Keys (after RoPE) and values of a softmax layer, (B,S,G,D).

    window: a ring of W slots; the token at position t sits in slot t mod W.
    window None: all tokens are kept, and the arrays double when they are full.
    Before these slots stand those of the config's sinks, which never leave.
    """

    FIELDS = ("k", "v")  # what append takes, in this order
    #: While a step is recorded (recorded_step.py): the token's slot and the count of slots, int32 (2,) on the GPU.
    place = None

    def __init__(self, be, config: Config, batch: int, dtype, window: int | None):
        self.be, self.window, self.seen, self.first = be, window, 0, config.sinks
        shape = (batch, self.first + (window or 64), config.kv_heads, config.head_dim)
        self.k = be.xp.zeros(shape, dtype)
        self.v = be.xp.zeros(shape, dtype)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays())

    def arrays(self) -> list:
        return [getattr(self, name) for name in self.FIELDS]

    @property
    def count(self):
        """Slots in use, from the beginning."""
        if self.place is not None:
            return self.place[1:]
        return self.first + (min(self.seen, self.window) if self.window else self.seen)

    def begin(self, memory):
        """What append takes, of the sinks, which are the same in every sequence: keys and values (S,G,D)."""
        for name, x in zip(self.FIELDS, memory, strict=True):
            getattr(self, name)[:, : self.first] = x

    def sinks(self):
        """Keys and values (S,G,D) of the sinks, None if there are none."""
        return (self.k[0, : self.first], self.v[0, : self.first]) if self.first else None

    def append(self, *new):
        """Remember the keys and values (B,T,G,D) of the next T tokens."""
        T = new[0].shape[1]
        if T == 1:  # as in decoding: one operation, and no gathers
            self._store(self.claim() if self.place is None else self.place[:1], *new)
            return
        if not self.window:
            self._grow(self.seen + T)
        slots = self.k.shape[1] - self.first
        first = max(0, T - slots)  # tokens before this one would be overwritten at once
        at = (self.seen + self.be.xp.arange(first, T)) % slots
        for name, x in zip(self.FIELDS, new, strict=True):
            getattr(self, name)[:, self.first + at] = x[:, first:]
        self.seen += T

    def claim(self) -> int:
        """The slot of the next token, counted as read: the caller fills it."""
        if not self.window:
            self._grow(self.seen + 1)
        slot = self.first + self.seen % (self.k.shape[1] - self.first)
        self.seen += 1
        return slot

    def _store(self, slot, k, v):
        store_token(self.be, self.k, self.v, k, v, slot)

    def past(self):
        """Keys and values that the next token may see, oldest first."""
        return tuple(x[:, self._past()] for x in (self.k, self.v))

    def _past(self):
        """The slots of past(), in its order."""
        if not self.window:
            return slice(self.first, self.first + self.seen)
        length = min(self.seen, self.window - 1)
        return self.first + self.be.xp.arange(self.seen - length, self.seen) % self.window

    def copy(self):
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, **{name: getattr(self, name).copy() for name in self.FIELDS})
        return twin

    def _grow(self, needed: int):
        slots = self.k.shape[1] - self.first
        if needed <= slots:
            return
        while slots < needed:
            slots *= 2
        for name in self.FIELDS:
            old = getattr(self, name)
            new = self.be.xp.zeros((old.shape[0], self.first + slots, *old.shape[2:]), old.dtype)
            new[:, : old.shape[1]] = old
            setattr(self, name, new)


class Int8KeyValueCache(KeyValueCache):
    """Keys and values of a quantised model: int8 (B,S,G,D) with a unit a token and head, ku, vu (B,S,G) fp32."""

    FIELDS = ("k", "ku", "v", "vu")

    def __init__(self, be, config: Config, batch: int, dtype, window: int | None):
        super().__init__(be, config, batch, np.int8, window)
        self.ku, self.vu = (be.xp.zeros(self.k.shape[:3], np.float32) for _ in range(2))

    def _store(self, slot, *new):
        store_token_int8(self.be, *self.arrays(), *new, slot)

    def past(self):
        """As fp32."""
        at = self._past()
        return decode_pair(x[:, at] for x in (self.k, self.ku, self.v, self.vu))

    def sinks(self):
        """As fp32."""
        at = slice(self.first)
        return decode_pair(x[0, at] for x in (self.k, self.ku, self.v, self.vu)) if self.first else None


class PairState(tuple):
    """The states of a parallel hybrid: its linear attention's, then its softmax attention's."""

    def __new__(cls, linear: GLAState, softmax: KeyValueCache):
        return super().__new__(cls, (linear, softmax))

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self)

    def arrays(self) -> list:
        return [x for state in self for x in state.arrays()]

    def begin(self, memory):
        for state, part in zip(self, memory, strict=True):
            state.begin(part)

    def copy(self):
        return PairState(*(state.copy() for state in self))


class DecodeState:
    """The memory of a whole model between two calls of prefill or step.  position: tokens of text read so far."""

    def __init__(self, layers: list, position: int = 0):
        self.layers, self.position = layers, position

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def arrays(self) -> list:
        """Everything that is remembered, layer after layer."""
        return [x for layer in self.layers for x in layer.arrays()]

    def caches(self) -> list[KeyValueCache]:
        """Those of softmax attention, layer after layer."""
        parts = (part for layer in self.layers for part in (layer if isinstance(layer, PairState) else (layer,)))
        return [part for part in parts if isinstance(part, KeyValueCache)]

    def copy(self) -> DecodeState:
        return DecodeState([layer.copy() for layer in self.layers], self.position)
