"""minisb's hybrid model in PyTorch for a CPU, written to be fast there: the model of bench/torch_train_cpu.py.

Dimension letters: B batch, T time, C width, H query heads, G key/value heads, D head size,
F FFN width, V vocabulary, W window, R = H/G query heads per group, N chunks, c chunk length.

What is used was chosen by measurement; the alternatives that lost are named where they would
stand. GEMMs are MKL's in both modes: in compile mode they are three quarters of a step or more.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(namedtuple("Shape", "C L T B V F H G W")):
    @property
    def D(self) -> int:
        return self.C // self.H


SHAPES = {
    "tiny": Shape(C=128, L=4, T=256, B=8, V=512, F=384, H=4, G=2, W=64),
    "base": Shape(C=256, L=6, T=512, B=8, V=2048, F=704, H=4, G=2, W=128),
}
GATE_RANK = 16
GATE_DIVISOR = 16.0
ROPE_THETA = 1e6
NORM_EPS = 1e-6


# --- gated linear attention ---------------------------------------------------------------


def gla_recurrent(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """The definition, one token at a time: S_t = diag(g_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t.

    q [B,T,H,D] already scaled; k, v, log_gate [B,T,G,D]. Returns [B,T,H,D].
    """
    B, T, H, D = q.shape
    G = k.shape[2]
    state = q.new_zeros(B, G, D, D)
    outputs = []
    for t in range(T):
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = log_gate[:, t, :, :, None].exp() * state + update
        outputs.append(q[:, t].view(B, G, H // G, D) @ state)
    return torch.stack(outputs, 1).view(B, T, H, D)


def chunk_exponents(chunk: int) -> Tensor:
    """[c+2, c] matrix that turns a chunk's log gates into cumulative exponents by one matmul.

    Row t < c sums the gates from the middle of the chunk to t (negated before the middle), so no
    exponent spans more than half a chunk. The last two rows sum the first and the second half.
    It costs what torch.cumsum costs and gives the reference point and the half sums as well.
    """
    first_half = (torch.arange(chunk) < chunk // 2).float()
    since_middle = torch.ones(chunk, chunk).tril() - first_half
    return torch.cat([since_middle, first_half[None], 1 - first_half[None]])


def gla_chunked(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, exponents: Tensor) -> Tensor:
    """The same function as gla_recurrent, by chunks; arguments and result as there.

    Everything is relative to the middle of its chunk. With x the exponent since the middle,
    q' = q e^x and k' = k e^-x give the scores inside the chunk. The state carried into chunk n is
    kept as R_n = e^(start to middle) S_n, so that the carried part is q' R_n and

        R_{n+1} = e^(middle of n to middle of n+1) (R_n + k'^T v):

    no further scaled copies of q and k are needed. The R query heads of a group are stacked as
    rows against one k, v and state. In fp32 it holds while half a chunk's log gates sum to more
    than about -44 (a mean of -1.4 a token at c = 64; with the divisor 16, gates are near -0.05).
    Tried: an autograd.Function for the scan over chunks; no faster than unbind and stack (which
    is much faster than indexing: its backward fills one whole tensor of zeros per chunk).
    """
    B, T, H, D = q.shape
    G, c = k.shape[2], exponents.shape[1]
    N, R = T // c, H // G

    summed = exponents @ log_gate.reshape(B, N, c, G * D)
    exponent, halves = summed.split([c, 2], 2)
    growth = exponent.view(B, N, c, G, D).transpose(2, 3).exp()  # [B,N,G,c,D]
    first, second = halves.view(B, N, 2, G, D, 1).unbind(2)
    decay = (second[:, :-1] + first[:, 1:]).exp()  # [B,N-1,G,D,1]

    q = q.view(B, N, c, G, R, D).permute(0, 1, 3, 4, 2, 5) * growth[:, :, :, None]
    q = q.reshape(B * N * G, R * c, D)
    k = (k.view(B, N, c, G, D).transpose(2, 3) / growth).reshape(B * N * G, c, D)
    v = v.view(B, N, c, G, D).transpose(2, 3).reshape(B * N * G, c, D)

    updates = torch.bmm(k.mT, v).view(B, N, G, D, D)
    states = [torch.zeros_like(updates[:, 0])]
    for update, factor in zip(updates.unbind(1), decay.unbind(1), strict=False):  # N-1 steps
        states.append(factor * (states[-1] + update))
    carried = torch.bmm(q, torch.stack(states, 1).view(-1, D, D))

    scores = torch.bmm(q, k.mT).view(-1, R, c, c).tril().view(-1, R * c, c)
    o = torch.baddbmm(carried, scores, v).view(B, N, G, R, c, D)
    return o.permute(0, 1, 4, 2, 3, 5).reshape(B, T, H, D)


# --- sliding-window attention -------------------------------------------------------------


def rope_tables(T: int, D: int, theta: float = ROPE_THETA) -> tuple[Tensor, Tensor]:
    """cos and sign-carrying sin, [T,1,D], for rotate-half RoPE."""
    frequency = theta ** (-torch.arange(0, D, 2).float() / D)
    angle = torch.arange(T)[:, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,T,heads,D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin


def block_bias(T: int, W: int, block: int) -> Tensor:
    """[N,1,1,block,W+block]: 0 where a block's query may look in its span of keys, else -inf.

    A span starts W tokens before its block; the first spans begin with padding.
    """
    rows, span = torch.arange(block)[:, None], torch.arange(W + block)
    distance = rows + W - span
    key = torch.arange(0, T, block)[:, None, None] - W + span
    visible = (distance >= 0) & (distance < W) & (key >= 0)
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[:, None, None]


def window_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Token t sees t-W+1..t, by blocks of queries against the keys they can reach.

    q [B,T,H,D], k and v [B,T,G,D], bias from block_bias. Returns [B,T,H,D].

    Two batched matmuls around a softmax, the R query heads of a group stacked as rows. Blocks of
    half a window measured best in both modes and both shapes. Tried on two Zen 3 cores, time of
    forward plus backward relative to this, compiled, tiny and base: SDPA with one [T,T] mask 2.1
    and 2.2, SDPA on blocks with enable_gqa 1.4 and 1.2, blocks of W 1.3 and 1.3, of W/4 1.0 and
    1.0 (1.2 and 1.0 eager). flex_attention has no backward on the CPU.
    """
    B, T, H, D = q.shape
    G = k.shape[2]
    N, block, span = bias.shape[0], bias.shape[-2], bias.shape[-1]
    R, behind = H // G, span // block - 1

    def spans(x: Tensor) -> Tensor:
        x = F.pad(x.reshape(B, N, block, G * D), (0, 0, 0, 0, behind, 0))
        x = torch.cat([x[:, i : i + N] for i in range(behind + 1)], 2)
        return x.view(B, N, span, G, D).transpose(2, 3).reshape(B * N * G, span, D)

    q = (q * D**-0.5).view(B, N, block, G, R, D).permute(0, 1, 3, 4, 2, 5)
    q, k, v = q.reshape(B * N * G, R * block, D), spans(k), spans(v)
    scores = torch.bmm(q, k.mT).view(B, N, G, R, block, span) + bias
    weights = scores.softmax(-1).view(B * N * G, R * block, span)
    o = torch.bmm(weights, v).view(B, N, G, R, block, D)
    return o.permute(0, 1, 4, 2, 3, 5).reshape(B, T, H, D)


# --- model --------------------------------------------------------------------------------


def rms_norm(size: int) -> nn.Module:
    # A hand-written autograd.Function gains eager mode about 2 % of a step; not worth its lines.
    return nn.RMSNorm(size, eps=NORM_EPS)


class GatedLinearAttention(nn.Module):
    def __init__(self, s: Shape, chunk: int):
        super().__init__()
        self.s = s
        self.sizes = [s.H * s.D, s.G * s.D, s.G * s.D, GATE_RANK]
        self.in_proj = nn.Linear(s.C, sum(self.sizes), bias=False)
        self.qkv_bias = nn.Parameter(torch.zeros(sum(self.sizes[:3])))
        self.gate_up = nn.Linear(GATE_RANK, s.G * s.D)
        self.head_norm = rms_norm(s.D)
        self.o_proj = nn.Linear(s.C, s.C, bias=False)
        self.register_buffer("exponents", chunk_exponents(chunk), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        s, (B, T, _) = self.s, x.shape
        bias = F.pad(self.qkv_bias, (0, GATE_RANK))
        q, k, v, low = F.linear(x, self.in_proj.weight, bias).split(self.sizes, -1)
        q = F.relu(q).view(B, T, s.H, s.D) * s.D**-0.5
        k = F.relu(k).view(B, T, s.G, s.D)
        v = v.view(B, T, s.G, s.D)
        log_gate = F.logsigmoid(self.gate_up(low)) / GATE_DIVISOR
        o = gla_chunked(q, k, v, log_gate, self.exponents)
        return self.o_proj(self.head_norm(o).view(B, T, s.C))


class WindowAttention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.in_proj = nn.Linear(s.C, (s.H + 2 * s.G) * s.D)
        self.o_proj = nn.Linear(s.C, s.C, bias=False)
        cos, sin = rope_tables(s.T, s.D)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("bias", block_bias(s.T, s.W, s.W // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        s, (B, T, _) = self.s, x.shape
        heads = self.in_proj(x).view(B, T, s.H + 2 * s.G, s.D)
        q, k = rotate(heads[:, :, : s.H + s.G], self.cos, self.sin).split([s.H, s.G], 2)
        o = window_attention(q, k, heads[:, :, s.H + s.G :], self.bias)
        return self.o_proj(o.reshape(B, T, s.C))


class SwiGLU(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_up = nn.Linear(s.C, 2 * s.F, bias=False)
        self.down = nn.Linear(s.F, s.C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, s: Shape, mixer: nn.Module):
        super().__init__()
        self.mixer_norm, self.mixer = rms_norm(s.C), mixer
        self.ffn_norm, self.ffn = rms_norm(s.C), SwiGLU(s)


class Model(nn.Module):
    """Tied embedding; layers 0, 2, .. gated linear attention, 1, 3, .. sliding window."""

    def __init__(self, s: Shape, chunk: int):
        super().__init__()
        self.embed = nn.Embedding(s.V, s.C)
        mixers = (WindowAttention(s) if i % 2 else GatedLinearAttention(s, chunk) for i in range(s.L))
        self.layers = nn.ModuleList(Layer(s, mixer) for mixer in mixers)
        self.final_norm = rms_norm(s.C)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer.mixer(layer.mixer_norm(x))
            x = x + layer.ffn(layer.ffn_norm(x))
        logits = F.linear(self.final_norm(x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
