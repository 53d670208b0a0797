"""SpikingBrain: embedding, a stack of blocks, a head; forward, backward, prefill and step."""

from __future__ import annotations

from minisb.config import Config, spikes_by_layer
from minisb.errors import MinisbError
from minisb.layers import Context, GatedLinearAttention, SoftmaxAttention, SwiGLU
from minisb.ops.cross_entropy import IGNORE, cross_entropy
from minisb.ops.embedding import embedding_backward, embedding_forward
from minisb.ops.norm import add_rmsnorm_backward, add_rmsnorm_forward, rmsnorm_forward
from minisb.ops.rope import rope_table
from minisb.params import ParamStore, Spec
from minisb.quantized import Int8Matrix, QuantizedStore
from minisb.state import DecodeState

#: The head works on this many logits at a time: a slice stays in cache, and the logits of a
#: whole batch never exist at once.
HEAD_LOGITS = 1 << 21


def specs(c: Config) -> list[Spec]:
    """Every parameter of the model, in the order of the forward pass; allocates nothing."""
    found = [Spec("embeddings.weight", (c.vocab, c.width), init=0.1)]
    for i in range(c.layers):
        mixer = GatedLinearAttention if c.mixer(i) == "gla" else SoftmaxAttention
        found += [
            Spec(f"layers.{i}.attn_norm.weight", (c.width,), init="ones", decay=False),
            *mixer.specs(c, f"layers.{i}.attn"),
            Spec(f"layers.{i}.mlp_norm.weight", (c.width,), init="ones", decay=False),
            *SwiGLU.specs(c, f"layers.{i}.mlp"),
        ]
    found.append(Spec("norm.weight", (c.width,), init="ones", decay=False))
    if not c.tied:
        found.append(Spec("lm_head.weight", (c.vocab, c.width), init=0.02))
    return found


class Block:
    """One layer of the model: norm, mixer, norm, feed-forward, with residual sums.

    The residual stream travels as (x, delta): delta is what the last sublayer wants to add.  The
    next norm does the sum, so that it costs no pass over memory of its own; and as z = x + delta,
    one gradient dz serves both.
    """

    def __init__(self, c: Config, store: ParamStore, index: int):
        prefix, self.eps = f"layers.{index}", c.norm_eps
        kind = c.mixer(index)
        if kind == "gla":
            self.mixer = GatedLinearAttention(c, store, f"{prefix}.attn")
        else:
            self.mixer = SoftmaxAttention(c, store, f"{prefix}.attn", c.window if kind == "window" else None)
        self.ffn = SwiGLU(c, store, f"{prefix}.mlp")
        self.norm1, self.dnorm1 = store.rows([f"{prefix}.attn_norm.weight"])
        self.norm2, self.dnorm2 = store.rows([f"{prefix}.mlp_norm.weight"])

    def forward(self, ctx: Context, x, delta, state=None):
        """x, delta (B,T,C) -> x, delta (B,T,C), saved.  delta is None in the first block."""
        x, h, s_norm1 = add_norm(ctx.be, x, delta, self.norm1, self.eps)
        delta, s_mixer = self.mixer.forward(ctx, h, state)
        x, h, s_norm2 = add_norm(ctx.be, x, delta, self.norm2, self.eps)
        delta, s_ffn = self.ffn.forward(ctx, h)
        return x, delta, (s_norm1, s_mixer, s_norm2, s_ffn)

    def backward(self, be, dz, saved):
        """dz (B,T,C), the gradient of the stream after this block -> before it."""
        s_norm1, s_mixer, s_norm2, s_ffn = saved
        dh = self.ffn.backward(be, dz, s_ffn)
        dz = add_rmsnorm_backward(be, dz, dh, s_norm2, self.dnorm2)
        dh = self.mixer.backward(be, dz, s_mixer)
        return add_rmsnorm_backward(be, dz, dh, s_norm1, self.dnorm1)


def add_norm(be, x, delta, w, eps):
    """x + delta, its norm, saved; the first block has nothing to add yet."""
    if delta is None:
        return x, *rmsnorm_forward(be, x, w, eps)
    return add_rmsnorm_forward(be, x, delta, w, eps)


class SpikingBrain:
    """The whole model over a ParamStore.

    Methods take integer tokens (B,T).  Over a QuantizedStore everything spikes, whatever `spike` says, and
    there is no training.  Else spike: False, True (the config's projections), or the
    names of what reads spikes, as in the config: "down", "3.q", "0-3.all".
    """

    def __init__(self, config: Config, be, store: ParamStore | None = None):
        self.config, self.be = config, be
        self.specs = specs(config)
        self.store = store or ParamStore(self.specs, be.xp)
        self.blocks = [Block(config, self.store, i) for i in range(config.layers)]
        self.embedding, self.dembedding = self.store.rows(["embeddings.weight"])
        self.head, self.dhead = self.store.rows(["embeddings.weight" if config.tied else "lm_head.weight"])
        self.norm, self.dnorm = self.store.rows(["norm.weight"])
        self._angles = None, []

    def forward(self, tokens, spike=False, tap=None):
        """One full pass: tokens (B,T) -> logits (B,T,V)."""
        h, _ = self._forward(tokens, spike, tap)
        return self._logits(h)

    def loss(self, tokens, targets, spike=False, tap=None):
        """Mean cross-entropy in nats over the counted targets (B,T), in float64; no gradients.

        On a GPU it is an array of no axes there: float() of it waits for the GPU.
        """
        h, _ = self._forward(tokens, spike, tap)
        return self._head_loss(h, targets) / self._counted(targets)

    def loss_and_backward(self, tokens, targets, spike=False, scale: float = 1.0):
        """Mean loss, as `loss` gives it; scale * its gradient is added to store.g."""
        if isinstance(self.store, QuantizedStore):
            raise MinisbError("a quantised model cannot be trained: go on with the run it was made from.")
        h, saved = self._forward(tokens, spike)
        count = self._counted(targets)
        dh = self.be.xp.empty_like(h)
        total = self._head_loss(h, targets, dh, scale / count)
        self._backward(dh, tokens, saved)
        return total / count

    def new_state(self, batch: int = 1) -> DecodeState:
        """An empty memory for prefill and step."""
        dtype = self.embedding.dtype
        return DecodeState([block.mixer.new_state(self.be, batch, dtype) for block in self.blocks])

    def prefill(self, tokens, state: DecodeState, spike=False):
        """Read tokens (B,T), T >= 1, in one piece; state is updated -> logits of the last, (B,V)."""
        h, _ = self._forward(tokens, spike, state=state)
        return self._logits(h[:, -1])

    def step(self, tokens, state: DecodeState, spike=False):
        """Read one token each (B,); state is updated -> logits (B,V)."""
        return self.prefill(tokens[:, None], state, spike)

    def _context(self, length: int, start: int, spike, tap) -> Context:
        c = self.config
        spikes = spikes_by_layer(c.spike if spike is True else tuple(spike or ()), c.layers)
        return Context(self.be, spikes, c.spike_k, *self._rotary(start, length), tap)

    def _rotary(self, start: int, length: int):
        """cos, sin (length,D/2).  The last ones are kept: training asks for the same in every step."""
        if self._angles[0] != (start, length):
            tables = rope_table(start, length, self.config.head_dim, self.config.rope_theta)
            self._angles = (start, length), [self.be.xp.asarray(x, self.embedding.dtype) for x in tables]
        return self._angles[1]

    def _forward(self, tokens, spike, tap=None, state: DecodeState | None = None):
        """-> normed output of the last block (B,T,C), and what backward needs."""
        ctx = self._context(tokens.shape[1], state.position if state else 0, spike, tap)
        x, delta = self._embed(tokens), None
        saved = []
        for i, block in enumerate(self.blocks):
            x, delta, s = block.forward(ctx, x, delta, state.layers[i] if state else None)
            saved.append(s if state is None else None)
        if state is not None:
            state.position += tokens.shape[1]
        _, h, s_norm = add_norm(self.be, x, delta, self.norm, self.config.norm_eps)
        return h, (saved, s_norm)

    def _backward(self, dh, tokens, saved):
        """dh (B,T,C), the gradient of _forward's output; every parameter's gradient is added."""
        blocks, s_norm = saved
        dz = add_rmsnorm_backward(self.be, self.be.xp.zeros_like(dh), dh, s_norm, self.dnorm)
        for block in reversed(self.blocks):
            dz = block.backward(self.be, dz, blocks.pop())  # popped: freed as soon as it is used
        embedding_backward(self.be, dz, tokens, self.dembedding)

    def _embed(self, tokens):
        """tokens (B,T) -> (B,T,C)."""
        if isinstance(self.embedding, Int8Matrix):
            return self.embedding.rows(tokens)
        return embedding_forward(self.be, tokens, self.embedding)

    def _head_product(self, h):
        """h (N,C) -> logits (N,V)."""
        if isinstance(self.head, Int8Matrix):
            return self.head.product(self.be, h)
        return self.be.gemm(h, self.head, tb=True)

    def _logits(self, h):
        """h (...,C) -> (...,V)."""
        rows = self._head_product(h.reshape(-1, h.shape[-1]))
        return rows.reshape(*h.shape[:-1], -1)

    def _counted(self, targets):
        """How many targets count, 1 if none does."""
        return self.be.xp.maximum((targets != IGNORE).sum(), 1)

    def _head_loss(self, h, targets, dh=None, dloss=None):
        """Sum of losses; with dloss also dh, and the head's gradient added.

        Slices of rows, so that the largest array of the step stays small: logits, loss and both
        gradients of a slice are finished before the next begins.
        """
        be = self.be
        h, targets = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
        size = max(64, HEAD_LOGITS // self.config.vocab)
        total = 0.0
        for start in range(0, len(h), size):
            rows = slice(start, start + size)
            logits = self._head_product(h[rows])
            total = total + cross_entropy(be, logits, targets[rows], dloss).sum(dtype="float64")
            if dloss is not None:
                be.gemm(logits, self.head, out=dh.reshape(h.shape)[rows])
                be.gemm(logits, h[rows], out=self.dhead, ta=True, accumulate=True)
        return total
