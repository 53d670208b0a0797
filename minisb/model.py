"""SpikingBrain: embedding, a stack of blocks, a head; forward, backward, prefill and step."""

from __future__ import annotations

from minisb.config import Config, spikes_by_layer
from minisb.errors import MinisbError
from minisb.experts import MixtureOfExperts
from minisb.hybrid import ParallelHybrid, SharedHybrid
from minisb.layers import GatedLinearAttention, SoftmaxAttention, SwiGLU
from minisb.ops.cross_entropy import counted, cross_entropy, total_loss
from minisb.ops.embedding import embedding_backward, embedding_forward
from minisb.ops.linear import linear_forward
from minisb.ops.norm import add_rmsnorm_backward, add_rmsnorm_forward, rmsnorm_forward
from minisb.ops.rope import rope_table
from minisb.params import ParamStore, Spec
from minisb.projections import Context
from minisb.quantized import Int8Matrix, QuantizedStore
from minisb.state import DecodeState

#: A single token looks its rotary angles up in a table of so many positions, made once for all of them.
TABLE = 256


def embedding_std(c: Config) -> float:
    """Of initial values: 0.1, which was tuned at width 128 (NOTES.md).  A tied embedding is the head, too, where a
    token's own logit begins at up to width * std; so the std falls with the width, and that stays 12.8."""
    return min(0.1, 12.8 / c.width) if c.tied else 0.1


def specs(c: Config) -> list[Spec]:
    """Every parameter of the model, in the order of the forward pass; allocates nothing."""
    found = [Spec("embeddings.weight", (c.vocab, c.width), init=embedding_std(c))]
    if c.sinks:
        found.append(Spec("sinks.weight", (c.sinks, c.width), init=embedding_std(c)))
    for i in range(c.layers):
        found += [
            Spec(f"layers.{i}.attn_norm.weight", (c.width,), init="ones", decay=False),
            *_mixer_class(c, i).specs(c, f"layers.{i}.attn"),
            Spec(f"layers.{i}.mlp_norm.weight", (c.width,), init="ones", decay=False),
            *_ffn_class(c, i).specs(c, f"layers.{i}.mlp"),
        ]
    found.append(Spec("norm.weight", (c.width,), init="ones", decay=False))
    if not c.tied:
        found.append(Spec("lm_head.weight", (c.vocab, c.width), init=0.02))
    return found


def _mixer_class(c: Config, layer: int):
    linear, _, softmax = c.mixer(layer).partition("+")
    if softmax:
        return SharedHybrid if c.shared_projections else ParallelHybrid
    return GatedLinearAttention if linear == "gla" else SoftmaxAttention


def _ffn_class(c: Config, layer: int):
    return MixtureOfExperts if c.ffn_kind(layer) == "moe" else SwiGLU


class Block:
    """One layer of the model: norm, mixer, norm, feed-forward, with residual sums.

    The residual stream travels as (x, delta): delta is what the last sublayer wants to add.  The
    next norm does the sum, so that it costs no pass over memory of its own; and as z = x + delta,
    one gradient dz serves both.
    """

    def __init__(self, c: Config, store: ParamStore, index: int):
        prefix, self.eps = f"layers.{index}", c.norm_eps
        kind = c.mixer(index)
        softmax = () if kind == "gla" else (c.window if kind.endswith("window") else None,)
        self.mixer = _mixer_class(c, index)(c, store, f"{prefix}.attn", *softmax)
        self.ffn = _ffn_class(c, index)(c, store, f"{prefix}.mlp")
        #: can a single token go through each half of the layer in one operation?
        self.decodes = all(getattr(part, "decodes", False) for part in (self.mixer, self.ffn))
        self.norm1, self.dnorm1 = store.rows([f"{prefix}.attn_norm.weight"])
        self.norm2, self.dnorm2 = store.rows([f"{prefix}.mlp_norm.weight"])

    def forward(self, ctx: Context, x, delta, state=None, sinks=None):
        """x, delta (B,T,C) -> x, delta (B,T,C), memory, saved.  delta is None in the first block.

        sinks: the memory that this block gave when it read the sinks, None without them.
        """
        if state is not None and x.shape[1] == 1 and self.decodes and ctx.tap is None:
            x, delta = self.mixer.decode(ctx, x, delta, self.norm1, self.eps, state)
            return *self.ffn.decode(ctx, x, delta, self.norm2, self.eps), None, None
        x, h, s_norm1 = add_norm(ctx.be, x, delta, self.norm1, self.eps)
        delta, memory, s_mixer = self.mixer.forward(ctx, h, state, sinks)
        x, h, s_norm2 = add_norm(ctx.be, x, delta, self.norm2, self.eps)
        delta, s_ffn = self.ffn.forward(ctx, h)
        return x, delta, memory, (s_norm1, s_mixer, s_norm2, s_ffn)

    def backward(self, be, dz, saved, dmemory=None):
        """dz (B,T,C), the gradient of the stream after this block -> before it, and dsinks."""
        s_norm1, s_mixer, s_norm2, s_ffn = saved
        dh = self.ffn.backward(be, dz, s_ffn)
        dz = add_rmsnorm_backward(be, dz, dh, s_norm2, self.dnorm2)
        dh, dsinks = self.mixer.backward(be, dz, s_mixer, dmemory)
        return add_rmsnorm_backward(be, dz, dh, s_norm1, self.dnorm1), dsinks


def add_norm(be, x, delta, w, eps):
    """x + delta, its norm, saved; the first block has nothing to add yet."""
    if delta is None:
        return x, *rmsnorm_forward(be, x, w, eps)
    return add_rmsnorm_forward(be, x, delta, w, eps)


def check_tokens(tokens, axes: int):
    """MinisbError unless tokens is an array of whole numbers with so many axes; looks at none of the numbers."""
    if getattr(tokens, "ndim", None) != axes or tokens.dtype.kind not in "iu":
        wanted = "(B,T), such as np.array([[1, 2, 3]])" if axes == 2 else "(B,), such as np.array([1])"
        array = hasattr(tokens, "dtype")
        got = f"{tokens.dtype} of shape {tokens.shape}" if array else f"the {type(tokens).__name__} {tokens!r:.40}"
        raise MinisbError(f"tokens are an array of ids {wanted}; got {got}.")


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
        if config.sinks:
            self.sinks, self.dsinks = self.store.rows(["sinks.weight"])
        self._angles = {}

    def forward(self, tokens, spike=False, tap=None):
        """One full pass: tokens (B,T) -> logits (B,T,V)."""
        return self._logits(self.hidden(tokens, spike, tap))

    def hidden(self, tokens, spike=False, tap=None):
        """What the head reads: tokens (B,T) -> the normed output of the last block (B,T,C)."""
        return self._forward(tokens, spike, tap)[0]

    def loss(self, tokens, targets, spike=False, tap=None):
        """Mean cross-entropy in nats over the counted targets (B,T), in float64; no gradients.

        On a GPU it is an array of no axes there: float() of it waits for the GPU.
        """
        h, _ = self._forward(tokens, spike, tap)
        return self._head_loss(h, targets) / counted(self.be, targets)

    def loss_and_backward(self, tokens, targets, spike=False, scale: float = 1.0, tap=None):
        """Mean loss, as `loss` gives it; scale * its gradient is added to store.g.

        With experts also scale * the gradient of the routers' own losses, which are not in the number returned:
        the tap sees them (experts.py).
        """
        if isinstance(self.store, QuantizedStore):
            raise MinisbError("a quantised model cannot be trained: go on with the run it was made from.")
        h, saved = self._forward(tokens, spike, tap, aux=scale)
        count = counted(self.be, targets)
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
        check_tokens(tokens, 1)
        return self.prefill(tokens[:, None], state, spike)

    def step_at(self, tokens, rotary, state: DecodeState, spike=False):
        """As step, but with cos, sin (1,D/2) of the token's position given (recorded_step.py)."""
        h, _ = self._forward(tokens[:, None], spike, state=state, rotary=rotary)
        return self._logits(h[:, -1])

    def _context(self, rotary, spike, tap, **how) -> Context:
        c = self.config
        spikes = spikes_by_layer(c.spike if spike is True else tuple(spike or ()), c.layers)
        return Context(self.be, spikes, c.spike_k, *rotary, tap, **how)

    def _rotary(self, start: int, length: int):
        """cos, sin (length,D/2)."""
        if length > 1:
            return self._table(start, length)
        row = start % TABLE
        return [x[row : row + 1] for x in self._table(start - row, TABLE)]

    def _table(self, start: int, length: int):
        """cos, sin (length,D/2).  The last two are kept, sinks' and text's, the same in every step of training."""
        if (start, length) not in self._angles:
            tables = rope_table(start, length, self.config.head_dim, self.config.rope_theta)
            last = list(self._angles.items())[-1:]
            dtype = self.be.wide(self.embedding.dtype)
            self._angles = dict(last) | {(start, length): [self.be.xp.asarray(x, dtype) for x in tables]}
        return self._angles[start, length]

    def _forward(
        self, tokens, spike, tap=None, state: DecodeState | None = None, aux: float | None = None, rotary=None
    ):
        """-> normed output of the last block (B,T,C), and what backward needs, if aux says that there will be one.

        aux: see Context.  rotary: cos, sin (T,D/2), if not those of the state's position.
        """
        check_tokens(tokens, 2)
        S = self.config.sinks
        memories, s_sinks = [None] * len(self.blocks), None
        if S and (state is None or state.position == 0):
            memories, s_sinks = self._read_sinks(spike)
            if state is not None:
                for layer, memory in zip(state.layers, memories, strict=True):
                    layer.begin(memory)
        rotary = rotary or self._rotary(S + (state.position if state else 0), tokens.shape[1])
        ctx = self._context(rotary, spike, tap, aux=aux)
        x, delta = self._embed(tokens), None
        saved = []
        for i, block in enumerate(self.blocks):
            x, delta, _, s = block.forward(ctx, x, delta, state.layers[i] if state else None, memories[i])
            saved.append(s if aux is not None else None)  # else freed here: a long text fits into one pass
        if state is not None:
            state.position += tokens.shape[1]
        _, h, s_norm = add_norm(self.be, x, delta, self.norm, self.config.norm_eps)
        return h, (saved, s_norm, s_sinks)

    def _backward(self, dh, tokens, saved):
        """dh (B,T,C), the gradient of _forward's output; every parameter's gradient is added."""
        blocks, s_norm, s_sinks = saved
        dmemories = []
        dz = add_rmsnorm_backward(self.be, self.be.xp.zeros_like(dh), dh, s_norm, self.dnorm)
        for block in reversed(self.blocks):
            dz, dmemory = block.backward(self.be, dz, blocks.pop())  # popped: freed as soon as it is used
            dmemories.append(dmemory)
        embedding_backward(self.be, dz, tokens, self.dembedding)
        if s_sinks:
            self._read_sinks_backward(dmemories, s_sinks)

    def _read_sinks(self, spike):
        """The sinks through every block, once for all sequences: they see no text.

        -> what each layer's text sees of them, and what backward needs.
        """
        ctx = self._context(self._rotary(0, self.config.sinks), spike, None, sinks=True)
        x, delta = self.sinks[None], None
        memories, saved = [], []
        for block in self.blocks:
            x, delta, memory, s = block.forward(ctx, x, delta)
            memories.append(memory)
            saved.append(s)
        return memories, saved

    def _read_sinks_backward(self, dmemories, saved):
        """dmemories: the gradient of each layer's memory, last layer first, summed over the batch."""
        dz = self.be.xp.zeros_like(self.sinks[None])  # nobody reads the sinks' own outputs
        for block, dmemory in zip(reversed(self.blocks), dmemories, strict=True):
            dz, _ = block.backward(self.be, dz, saved.pop(), dmemory)
        embedding_backward(self.be, dz, self.be.xp.arange(self.config.sinks)[None], self.dsinks)  # a table of S rows

    def _embed(self, tokens):
        """tokens (B,T) -> (B,T,C)."""
        if isinstance(self.embedding, Int8Matrix):
            return self.embedding.rows(self.be, tokens)
        return embedding_forward(self.be, tokens, self.embedding)

    def _head_product(self, h):
        """h (N,C) -> logits (N,V)."""
        if isinstance(self.head, Int8Matrix):
            return self.head.product(self.be, h)
        return linear_forward(self.be, h, self.head)

    def _logits(self, h):
        """h (...,C) -> (...,V)."""
        rows = self._head_product(h.reshape(-1, h.shape[-1]))
        return rows.reshape(*h.shape[:-1], -1)

    def _head_loss(self, h, targets, dh=None, dloss=None):
        """Sum of losses; with dloss also dh, and the head's gradient added.

        Slices of rows, so that the largest array of the step stays small: logits, loss and both
        gradients of a slice are finished before the next begins.
        """
        be = self.be
        h, targets = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
        size = max(64, be.head_logits // self.config.vocab)
        total = 0.0
        for start in range(0, len(h), size):
            rows = slice(start, start + size)
            logits = self._head_product(h[rows])
            total = total + total_loss(be, cross_entropy(be, logits, targets[rows], dloss))
            if dloss is not None:
                be.gemm(logits, self.head, out=dh.reshape(h.shape)[rows])
                be.gemm(logits, h[rows], out=self.dhead, ta=True, accumulate=True)
        return total
