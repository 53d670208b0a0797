"""Model and training settings, and the presets.

Letters used everywhere: B batch, T time, C model width, H query heads, G key/value heads,
D head size, F feed-forward width, V vocabulary, W window, L layers, E experts, K of them a token, S sinks.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import asdict, dataclass, fields

from minisb.errors import MinisbError

#: Projections whose input can be spike-coded: the eight of a GLA layer (a window layer has no gk), and the router
#: of a mixture of experts.
SPIKE_PROJECTIONS = ("q", "k", "v", "gk", "o", "gate", "up", "down", "router")
#: What mixes over time in a layer.  With a +, both in parallel (76B: report, eq. 6).
MIXERS = ("gla", "window", "full", "gla+window", "gla+full")


@functools.cache
def spikes_by_layer(spike: tuple[str, ...], layers: int) -> tuple[frozenset[str], ...]:
    """Which projections read spikes, layer by layer, from names such as "down", "3.q" or "0-3.all".

    A name is one of SPIKE_PROJECTIONS, or "all" of them, in every layer or (before a dot, from 0) in one
    or in a range of layers.  Raises MinisbError for a name or a layer that there is not.
    """
    chosen = [set() for _ in range(layers)]
    for entry in spike:
        where, name = re.fullmatch(r"(?:(.*)\.)?(.*)", entry, re.DOTALL).groups()
        if name not in (*SPIKE_PROJECTIONS, "all"):
            names = ", ".join(SPIKE_PROJECTIONS)
            raise MinisbError(
                f"unknown projection {name!r} in spike; choose from {names}, all, or one with layers before it: 0-3.q."
            )
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", where) if where is not None else None
        if where is not None and not ends:
            raise MinisbError(f"{entry!r} in spike names no layers: write one (3.{name}) or a range (0-3.{name}).")
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, layers - 1)
        if not first <= last < layers:
            raise MinisbError(f"{entry!r} in spike asks for layers that the model lacks: it has 0 to {layers - 1}.")
        for layer in chosen[first : last + 1]:
            layer.update(SPIKE_PROJECTIONS if name == "all" else (name,))
    return tuple(map(frozenset, chosen))


@dataclass(frozen=True)
class Config:
    """The shape of a SpikingBrain.  Subclasses below are the presets."""

    preset: str = "custom"
    vocab: int = 4096  # V, rows of the embedding
    width: int = 128  # C, channels of the residual stream
    layers: int = 6  # L
    heads: int = 4  # H, query heads
    kv_heads: int = 2  # G, key/value heads: H/G query heads share one
    head_dim: int = 32  # D
    ffn: int = 384  # F, hidden width of the SwiGLU
    window: int = 128  # W, keys a windowed token sees, itself included
    # The mixer of layer i is mixers[i % len(mixers)], one of MIXERS.
    # Linear attention first, then a window, as in the 7B (report, section 3.1).
    mixers: tuple[str, ...] = ("gla", "window")
    shared_projections: bool = False  # whether the two of a parallel hybrid share q, k, v and o
    feature_map: str = "relu"  # on q and k of linear attention: "relu" (7B) or "sigmoid" (76B)
    gate: str = "low_rank"  # of linear attention: "low_rank" (7B) or "tied" to the key, g = 1 - k (76B)
    gate_rank: int = 16  # inner width of the low-rank gate W1 W2
    gate_divisor: float = 16.0  # log g = logsigmoid(z) / 16: slow forgetting to begin with
    rope_theta: float = 1e6  # rotary base of the softmax layers; GLA has no positions
    norm_eps: float = 1e-6
    qkv_bias: bool = True  # Qwen2.5 has a bias on q, k and v and nowhere else
    sinks: int = 0  # S, learned tokens before every text, which all its tokens see
    # The feed-forward network of layer i is ffns[i % len(ffns)]: "dense", or "moe", a mixture of experts:
    ffns: tuple[str, ...] = ("dense",)
    experts: int = 16  # E, each a SwiGLU of width F
    top_k: int = 1  # K, the experts that a token is routed to
    shared_experts: int = 1  # experts that every token goes through, beside those
    capacity: float = 0.0  # in training an expert takes so many times its fair share N K / E; 0: whatever comes
    balance_weight: float = 0.01  # of the loss that evens out the experts' load
    z_weight: float = 1e-3  # of the loss that keeps the router's logits small
    tied: bool = True  # the head reuses the embedding: small models cannot afford two
    spike_k: float = 3.0  # threshold = mean|x| / k (eq. 19): larger k, finer spikes
    spike: tuple[str, ...] = SPIKE_PROJECTIONS  # what reads spikes when spiking is on: see spikes_by_layer

    # Settings of training that belong to a size: what a laptop or one GPU does well.
    seq_len: int = 256  # T
    batch_size: int = 4  # B, sequences a step
    steps: int = 2000
    lr: float = 4e-3  # peak learning rate, after warm-up

    def __post_init__(self):
        positive = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "window",
                    "gate_rank", "seq_len", "batch_size", "steps")
        for name in positive:
            if getattr(self, name) < 1:
                raise MinisbError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise MinisbError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly.")
        if self.head_dim % 2:
            raise MinisbError(f"head_dim must be even for rotary embedding, got {self.head_dim}.")
        if self.width % self.heads:
            raise MinisbError(f"width {self.width} is not divisible by {self.heads} heads.")
        for name in ("spike_k", "rope_theta", "gate_divisor", "norm_eps", "lr"):
            if not getattr(self, name) > 0:
                raise MinisbError(f"{name} must be above 0, got {getattr(self, name)}.")
        spikes_by_layer(self.spike, self.layers)
        for kind, given, known in (
            ("mixer", self.mixers, MIXERS),
            ("feed-forward network", self.ffns, ("dense", "moe")),
            ("feature map", (self.feature_map,), ("relu", "sigmoid")),
            ("gate", (self.gate,), ("low_rank", "tied")),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise MinisbError(f"unknown {kind} {unknown[:1]}; choose from {', '.join(known)}.")
        if self.gate == "tied" and self.feature_map != "sigmoid":
            raise MinisbError("a tied gate g = 1 - k needs keys between 0 and 1: set feature_map to sigmoid.")
        if not 1 <= self.top_k <= self.experts:
            raise MinisbError(f"top_k must be between 1 and the {self.experts} experts, got {self.top_k}.")
        for name in ("sinks", "shared_experts", "capacity", "balance_weight", "z_weight"):
            if not getattr(self, name) >= 0:
                raise MinisbError(f"{name} must be at least 0, got {getattr(self, name)}.")

    def mixer(self, layer: int) -> str:
        return self.mixers[layer % len(self.mixers)]

    def ffn_kind(self, layer: int) -> str:
        return self.ffns[layer % len(self.ffns)]

    @property
    def has_experts(self) -> bool:
        return "moe" in self.ffns

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Config:
        """Inverse of to_dict.  Unknown keys are an error: a newer format must not be half read."""
        known = {f.name for f in fields(Config)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise MinisbError(f"the configuration has a setting this version does not know: {unknown[0]}.")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return Config(**values)


@dataclass(frozen=True)
class Nano(Config):
    """About 1.5M parameters: learns Python on a laptop in five minutes."""

    preset: str = "nano"
    layers: int = 4  # two of each kind; six thinner ones learn no better and take longer
    ffn: int = 512
    steps: int = 2200
    lr: float = 1e-2


@dataclass(frozen=True)
class Small(Config):
    """About 30M: an evening on a good CPU, minutes on a GPU."""

    preset: str = "small"
    width: int = 512
    layers: int = 10
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    ffn: int = 1408
    window: int = 256
    seq_len: int = 512
    batch_size: int = 8
    steps: int = 6000  # nine times through the standard library: validation turns on the way
    lr: float = 1e-3


@dataclass(frozen=True)
class M124(Config):
    """GPT-2's size, 124M, with its depth and width: a GPU's work."""

    preset: str = "124m"
    vocab: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64
    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    ffn: int = 2048
    window: int = 512
    seq_len: int = 1024
    batch_size: int = 16
    steps: int = 20000
    lr: float = 6e-4


@dataclass(frozen=True)
class M135(Config):
    """SmolLM2-135M's shape as a hybrid: the largest model here that is pleasant to decode on a laptop."""

    preset: str = "135m"
    vocab: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    ffn: int = 1536
    window: int = 512
    qkv_bias: bool = False  # Llama's architecture has none
    rope_theta: float = 1e5
    norm_eps: float = 1e-5
    seq_len: int = 2048
    batch_size: int = 16
    steps: int = 10000
    lr: float = 5e-4


@dataclass(frozen=True)
class B1(Config):
    """Llama-3.2-1B's shape as a hybrid: the size of the report's decoding test on a desktop CPU."""

    preset: str = "1b"
    vocab: int = 128256
    width: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    ffn: int = 8192
    window: int = 1024
    qkv_bias: bool = False  # Llama has none
    rope_theta: float = 5e5
    norm_eps: float = 1e-5
    seq_len: int = 4096
    batch_size: int = 2
    steps: int = 10000
    lr: float = 3e-4


@dataclass(frozen=True)
class B7(Config):
    """SpikingBrain-7B (report, section 3.1): Qwen2.5-7B's widths, layers alternating."""

    preset: str = "7b"
    vocab: int = 152064
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    ffn: int = 18944
    window: int = 4096
    tied: bool = False
    seq_len: int = 8192
    batch_size: int = 1
    steps: int = 10000
    lr: float = 3e-5


@dataclass(frozen=True)
class B7Mini(Config):
    """The 7B at 1:1000: the same 28 layers in the same order, every width divided by 32."""

    preset: str = "7b-mini"
    width: int = 112
    layers: int = 28
    heads: int = 7
    kv_heads: int = 1
    head_dim: int = 16
    ffn: int = 592
    tied: bool = False
    steps: int = 2000
    lr: float = 2e-3


#: Both of a parallel hybrid in every layer, its softmax full in every seventh.
_HYBRID = (*("gla+window",) * 6, "gla+full")
#: Dense in layers 1, 2, 3, 5, 7, 9 and 11 (counted from 1), experts elsewhere.
_UPCYCLED = tuple("dense" if layer in (1, 2, 3, 5, 7, 9, 11) else "moe" for layer in range(1, 29))


@dataclass(frozen=True)
class B76(B7):
    """SpikingBrain-76B-A12B (report, section 3.1): the 7B's widths, hybrids inside each layer, 16 + 1 experts."""

    preset: str = "76b"
    mixers: tuple[str, ...] = _HYBRID
    feature_map: str = "sigmoid"
    gate: str = "tied"
    sinks: int = 128
    ffns: tuple[str, ...] = _UPCYCLED


@dataclass(frozen=True)
class B76Mini(B7Mini):
    """The 76B at 1:1000: the same 28 layers in the same order, every width divided by 32."""

    preset: str = "76b-mini"
    mixers: tuple[str, ...] = _HYBRID
    feature_map: str = "sigmoid"
    gate: str = "tied"
    sinks: int = 4
    ffns: tuple[str, ...] = _UPCYCLED


@dataclass(frozen=True)
class B76Tiny(Config):
    """Everything that the 76B has, as small as it gets: for tests and for stepping through with a debugger."""

    preset: str = "76b-tiny"
    vocab: int = 512
    width: int = 24
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    ffn: int = 32
    window: int = 16
    mixers: tuple[str, ...] = ("gla+window", "gla+full")
    feature_map: str = "sigmoid"
    gate: str = "tied"
    sinks: int = 3
    ffns: tuple[str, ...] = ("dense", "moe")
    experts: int = 4
    tied: bool = False
    seq_len: int = 48
    batch_size: int = 4
    steps: int = 100


PRESETS: dict[str, type[Config]] = {
    cls.preset: cls for cls in (Nano, Small, M124, M135, B1, B7, B7Mini, B76, B76Mini, B76Tiny)
}


def preset(name: str, **changes) -> Config:
    """The preset `name` with some settings changed.  Raises MinisbError for an unknown name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.7)
        meant = f", did you mean {near[0]}?  Choose" if near else "; choose"
        raise MinisbError(f"unknown preset {name!r}{meant} from {', '.join(PRESETS)}.")
    return PRESETS[name](**changes)
