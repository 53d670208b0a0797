"""The peer: minisb's hybrid model trained by PyTorch on a CPU, written to be fast there.

One configuration per process, fp32 throughout:

    python bench/torch_train_cpu.py --shape tiny --mode compile --chunk 64 --json
    python bench/torch_train_cpu.py --check          # chunked GLA against the plain recurrence

Dimension letters: B batch, T time, C width, H query heads, G key/value heads, D head size,
F FFN width, V vocabulary, W window, R = H/G query heads per group, N chunks, c chunk length.

What each mode uses was chosen by measurement; the alternatives that lost are listed at the
functions they would replace.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    C: int
    L: int
    T: int
    B: int
    V: int
    F: int
    H: int
    G: int
    W: int

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
    """[c+1, c] matrix that turns log gates into cumulative exponents by one matmul.

    Row t < c sums the gates from the middle of the chunk to t (negative before the middle), so no
    exponent spans more than half a chunk. Row c sums the first half, chunk start to middle.
    A matmul beats torch.cumsum here by a wide margin, in both directions.
    """
    first_half = (torch.arange(chunk) < chunk // 2).float()
    since_middle = torch.ones(chunk, chunk).tril() - first_half
    return torch.cat([since_middle, first_half[None]])


def scan_states(update: Tensor, decay: Tensor) -> Tensor:
    """R_0 = 0, R_{n+1} = decay_n (R_n + update_n).  update [B,N,G,D,D], decay [B,N-1,G,D,1]."""
    state = torch.zeros_like(update[:, 0])
    states = [state]
    for n in range(update.shape[1] - 1):
        state = decay[:, n] * (state + update[:, n])
        states.append(state)
    return torch.stack(states, 1)


class ScanStates(torch.autograd.Function):
    """scan_states without an autograd node per chunk; eager mode only."""

    @staticmethod
    def forward(ctx, update: Tensor, decay: Tensor) -> Tensor:
        states = torch.empty_like(update)
        states[:, 0] = 0
        for n in range(update.shape[1] - 1):
            torch.add(states[:, n], update[:, n], out=states[:, n + 1])
            states[:, n + 1] *= decay[:, n]
        ctx.save_for_backward(update, decay, states)
        return states

    @staticmethod
    def backward(ctx, dstates: Tensor) -> tuple[Tensor, Tensor]:
        update, decay, states = ctx.saved_tensors
        last = update.shape[1] - 1
        dupdate = torch.empty_like(update)
        dupdate[:, last] = 0
        dsum = states[:, :last] + update[:, :last]
        for n in reversed(range(last)):
            incoming = dstates[:, n + 1] + dupdate[:, n + 1]
            torch.mul(incoming, decay[:, n], out=dupdate[:, n])
            dsum[:, n] *= incoming
        return dupdate, dsum.sum(-1, keepdim=True)


def gla_chunked(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, exponents: Tensor) -> Tensor:
    """The same function as gla_recurrent, by chunks; shapes as there, result [B,N,G,R,c,D].

    Everything is expressed relative to the middle of its chunk: with x the exponent since the
    middle, q' = q e^x and k' = k e^-x give the scores inside the chunk, and the state carried in is
    kept as R_n = e^(start..middle) S_n, so the carried part is q' R_n and the recursion only
    changes its decay. No further scaled copies of q and k are needed. The R query heads of a
    group are stacked as rows against one k, v and state.
    """
    B, T, H, D = q.shape
    G, c = k.shape[2], exponents.shape[1]
    N, R = T // c, H // G

    summed = exponents @ log_gate.reshape(B, N, c, G * D)
    exponent = summed[:, :, :c].view(B, N, c, G, D).transpose(2, 3)  # [B,N,G,c,D]
    to_middle = summed[:, 1:, c].view(B, N - 1, G, D, 1)
    from_middle = summed[:, :-1, c - 1].view(B, N - 1, G, D, 1)
    growth = exponent.exp()

    q = q.view(B, N, c, G, R, D).permute(0, 1, 3, 4, 2, 5) * growth[:, :, :, None]
    k = k.view(B, N, c, G, D).transpose(2, 3) / growth
    v = v.view(B, N, c, G, D).transpose(2, 3)
    q = q.reshape(B * N * G, R * c, D)
    k = k.reshape(B * N * G, c, D)
    v = v.reshape(B * N * G, c, D)

    scores = torch.bmm(q, k.mT).view(-1, R, c, c).tril().view(-1, R * c, c)
    if N == 1:
        return torch.bmm(scores, v).view(B, N, G, R, c, D)
    update = torch.bmm(k.mT, v).view(B, N, G, D, D)
    decay = (from_middle + to_middle).exp()
    scan = scan_states if torch.compiler.is_compiling() else ScanStates.apply
    states = scan(update, decay).view(-1, D, D)
    return torch.baddbmm(torch.bmm(q, states), scores, v).view(B, N, G, R, c, D)


# --- sliding-window attention -------------------------------------------------------------


def rope_tables(T: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin [T,1,D] for rotate-half RoPE."""
    frequency = ROPE_THETA ** (-torch.arange(0, D, 2).float() / D)
    angle = torch.arange(T)[:, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,T,heads,D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin


def window_mask(rows: int, W: int) -> Tensor:
    """[rows, W+rows] True where a query may look; its block's keys start W tokens earlier."""
    distance = torch.arange(rows)[:, None] + W - torch.arange(W + rows)
    return (distance >= 0) & (distance < W)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, W: int) -> Tensor:
    T = q.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = (distance >= 0) & (distance < W)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    return o.transpose(1, 2)


def attention_sdpa_blocked(q: Tensor, k: Tensor, v: Tensor, W: int) -> Tensor:
    B, T, H, D = q.shape
    G = k.shape[2]
    N = T // W
    first = F.scaled_dot_product_attention(
        q[:, :W].transpose(1, 2), k[:, :W].transpose(1, 2), v[:, :W].transpose(1, 2),
        is_causal=True, enable_gqa=True)  # [B,H,W,D]
    def blocks(x):
        x = x.view(B, N, W, G, D)
        return torch.cat([x[:, :-1], x[:, 1:]], 2).view(B * (N - 1), 2 * W, G, D).transpose(1, 2)
    qb = q[:, W:].reshape(B * (N - 1), W, H, D).transpose(1, 2)
    rest = F.scaled_dot_product_attention(qb, blocks(k), blocks(v), attn_mask=window_mask(W, W), enable_gqa=True)
    return torch.cat([first.transpose(1, 2), rest.transpose(1, 2).reshape(B, T - W, H, D)], 1)


def attention_bmm_blocked(q: Tensor, k: Tensor, v: Tensor, W: int, rows: int) -> Tensor:
    B, T, H, D = q.shape
    G = k.shape[2]
    R, N = H // G, T // rows
    back = W // rows

    def spans(x):
        x = F.pad(x.view(B, N, rows, G * D), (0, 0, 0, 0, back, 0))
        x = torch.cat([x[:, i:i + N] for i in range(back + 1)], 2)
        return x.view(B, N, W + rows, G, D).transpose(2, 3).reshape(B * N * G, W + rows, D)

    k, v = spans(k), spans(v)
    q = (q * D**-0.5).view(B, N, rows, G, R, D).permute(0, 1, 3, 4, 2, 5).reshape(B * N * G, R * rows, D)
    mask = window_mask(rows, W)
    # the first blocks must not see the padding
    start = torch.arange(N) * rows - W
    real = start[:, None] + torch.arange(W + rows) >= 0
    mask = (mask & real[:, None])[:, None, None]  # [N,1,1,rows,W+rows]
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    scores = torch.bmm(q, k.mT).view(B, N, G, R, rows, W + rows) + bias
    p = scores.softmax(-1).view(B * N * G, R * rows, W + rows)
    o = torch.bmm(p, v).view(B, N, G, R, rows, D)
    return o.permute(0, 1, 4, 2, 3, 5).reshape(B, T, H, D)


_flex = {}
def attention_flex(q, k, v, W):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    T = q.shape[1]
    if T not in _flex:
        _flex[T] = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < W), None, None, T, T, device="cpu", BLOCK_SIZE=(64,64))
    return flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=_flex[T], enable_gqa=True).transpose(1, 2)


# --- model --------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


class GatedLinearAttention(nn.Module):
    def __init__(self, s: Shape, chunk: int):
        super().__init__()
        self.s = s
        self.sizes = [s.H * s.D, s.G * s.D, s.G * s.D, GATE_RANK]
        self.in_proj = nn.Linear(s.C, sum(self.sizes), bias=False)
        self.qkv_bias = nn.Parameter(torch.zeros(sum(self.sizes[:3])))
        self.gate_up = nn.Linear(GATE_RANK, s.G * s.D)
        self.head_norm = RMSNorm(s.D)
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
        o = self.head_norm(o).permute(0, 1, 4, 2, 3, 5).reshape(B, T, s.C)
        return self.o_proj(o)


class WindowAttention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.in_proj = nn.Linear(s.C, (s.H + 2 * s.G) * s.D)
        self.o_proj = nn.Linear(s.C, s.C, bias=False)
        cos, sin = rope_tables(s.T, s.D)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        s, (B, T, _) = self.s, x.shape
        heads = self.in_proj(x).view(B, T, s.H + 2 * s.G, s.D)
        q, k = rotate(heads[:, :, : s.H + s.G], self.cos, self.sin).split([s.H, s.G], 2)
        o = ATT(q, k, heads[:, :, s.H + s.G :], s.W)
        return self.o_proj(o.reshape(B, T, s.C))


class SwiGLU(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_up = nn.Linear(s.C, 2 * s.F, bias=False)
        self.down = nn.Linear(s.F, s.C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, s: Shape, chunk: int):
        super().__init__()
        self.embed = nn.Embedding(s.V, s.C)
        mixers = [GatedLinearAttention(s, chunk) if i % 2 == 0 else WindowAttention(s) for i in range(s.L)]
        self.mixers = nn.ModuleList(mixers)
        self.ffns = nn.ModuleList(SwiGLU(s) for _ in range(s.L))
        self.mixer_norms = nn.ModuleList(RMSNorm(s.C) for _ in range(s.L))
        self.ffn_norms = nn.ModuleList(RMSNorm(s.C) for _ in range(s.L))
        self.final_norm = RMSNorm(s.C)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for mixer, ffn, mn, fn in zip(self.mixers, self.ffns, self.mixer_norms, self.ffn_norms):
            x = x + mixer(mn(x))
            x = x + ffn(fn(x))
        logits = F.linear(self.final_norm(x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def keep_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(-2, 256<<20)

import os
ATT = eval(os.environ.get("ATT", "lambda q,k,v,W: attention_bmm_blocked(q,k,v,W,W//2)"))

def main():
    p = argparse.ArgumentParser()
    p.add_argument("--shape", choices=SHAPES, default="tiny")
    p.add_argument("--mode", choices=["eager", "compile"], default="eager")
    p.add_argument("--chunk", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--json", action="store_true")
    p.add_argument("--prof", action="store_true")
    a = p.parse_args()
    if not os.environ.get("NOMALLOPT"): keep_freed_memory()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    s = SHAPES[a.shape]
    model = Model(s, a.chunk)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    pool = torch.randint(s.V, (64, 2, s.B, s.T))
    fn = torch.compile(model) if a.mode == "compile" else model
    if os.environ.get("KP"):
        import torch._inductor.config as ic
        ic.cpp.enable_kernel_profile = True; ic.cpp.descriptive_names="inductor_node"
    params = list(model.parameters())
    i = 0
    def step():
        nonlocal i
        b = pool[i % 64]; i += 1
        loss = fn(b[0], b[1])
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.item()
    t = time.perf_counter()
    step(); print("first", time.perf_counter() - t)
    for _ in range(3): step()
    if a.prof:
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CPU]) as pr:
            for _ in range(3): step()
        print(pr.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    groups = []
    for _ in range(5):
        t = time.perf_counter()
        for _ in range(a.steps): loss = step()
        groups.append((time.perf_counter() - t) / a.steps)
    ms = statistics.median(groups) * 1e3
    print(json.dumps(dict(shape=a.shape, mode=a.mode, chunk=a.chunk, tok_per_s=round(s.B * s.T / ms * 1e3, 1), step_ms=round(ms, 2), best=round(min(groups)*1e3,2), params=sum(p.numel() for p in params), loss=round(loss, 4))))

if __name__ == "__main__":
    main()
