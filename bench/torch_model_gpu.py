"""The peer's model: minisb's hybrid in PyTorch, as its best user would write it for a GPU.

Linear attention is flash-linear-attention's chunk_gla with k, v and g repeated to all heads, as it takes them; windows
are flex_attention's with a block mask, full attention is SDPA.  Letters as in bench/torch_model_cpu.py, from which
comes what is the same on a CPU.
"""

import functools

import torch
import torch.nn.functional as F
from gpu_train import Config
from torch import Tensor, nn
from torch_model_cpu import Shape, SwiGLU, gla_recurrent, rope_tables, rotate

# --- gated linear attention


def gla_definition(q, k, v, g):
    return gla_recurrent(q * q.shape[-1] ** -0.5, k, v, g)


def gla_plain():
    """fla's function as it is; the compiler leaves it out."""
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(*_all_heads(q, k, v, g))[0]


def gla_operator():
    """fla's forward and backward as one operator, so that what stands before and after it is compiled together."""
    forward = _operator()
    return lambda q, k, v, g: forward(*_all_heads(q, k, v, g), q.shape[-1] ** -0.5)[0]


def _all_heads(q, *shared):
    """q [B,T,H,D] and k, v, g [B,T,G,D] -> all [B,T,H,D]: fla knows no groups."""
    B, T, H, D = q.shape
    G = shared[0].shape[2]
    return q, *(x[:, :, :, None].expand(B, T, G, H // G, D).reshape(B, T, H, D) for x in shared)


@functools.cache
def _operator():
    from fla.ops.gla.chunk import chunk_gla_bwd, chunk_gla_fwd

    def chunk(T: int) -> int:  # as chunk_gla chooses it
        return min(64, max(16, 1 << (T - 1).bit_length()))

    @torch.library.custom_op("peer::gla", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        _, A, _, _, o = chunk_gla_fwd(q, k, v, g, None, scale, None, False, chunk_size=chunk(q.shape[1]))
        return o, A

    @torch.library.custom_op("peer::gla_backward", mutates_args=())
    def backward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, A: Tensor, do: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, g, do = (x.contiguous() for x in (q, k, v, g, do))
        size = chunk(q.shape[1])
        return tuple(chunk_gla_bwd(q, k, v, g, None, scale, None, None, A, do, None, chunk_size=size)[:4])

    @forward.register_fake
    def _(q, k, v, g, scale):
        wide = q.new_empty((*q.shape[:3], chunk(q.shape[1])), dtype=torch.float32)
        return v.new_empty(v.shape), wide

    @backward.register_fake
    def _(q, k, v, g, A, do, scale):
        wide = [q.new_empty(q.shape, dtype=torch.float32) for _ in range(3)]
        return wide[0], wide[1], do.new_empty(do.shape), wide[2]

    def keep(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1])

    def gradients(ctx, do, _):
        inputs = ctx.saved_tensors
        found = backward(*inputs, do, ctx.scale)
        return *(dx.to(x.dtype) for dx, x in zip(found, inputs[:4], strict=True)), None

    forward.register_autograd(gradients, setup_context=keep)
    return forward


# --- softmax attention


def visible(window: int, T: int, device) -> Tensor:
    """[T,T]: token t sees t-W+1..t."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (distance >= 0) & (distance < window)


def attend(q, k, v, mask):
    """q [B,H,T,D], k and v [B,G,T,D] -> as q.  mask: a block mask, a matrix, or None for full causal attention."""
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]}
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **grouped)
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, **grouped)


def make_mask(c: Config, device: str):
    """What attend wants: blocks on a GPU, a matrix elsewhere."""
    T = c.seq_len
    if "window" not in c.mixers:
        return None
    if device != "cuda":
        return visible(c.window, T, device)
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, query, key):
        return (query >= key) & (query - key < c.window)

    return create_block_mask(seen, None, None, T, T, device=device)


# --- model


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """In float32, rounded at the end: autocast would return float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = wide(x)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Mixer(nn.Module):
    """Projections of the input as one product, and one back."""

    def __init__(self, c: Config, rank: int = 0):
        super().__init__()
        self.c = c
        self.sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim, rank]
        self.in_proj = nn.Linear(c.width, sum(self.sizes), bias=False)
        self.qkv_bias = nn.Parameter(torch.zeros(sum(self.sizes[:3]))) if c.qkv_bias else None
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)

    def project(self, x):
        bias = None if self.qkv_bias is None else F.pad(self.qkv_bias, (0, self.sizes[3]))
        *qkv, low = F.linear(x, self.in_proj.weight, bias).split(self.sizes, -1)
        return *(part.unflatten(-1, (-1, self.c.head_dim)) for part in qkv), low


class GatedLinearAttention(Mixer):
    def __init__(self, c: Config, gla):
        super().__init__(c, c.gate_rank)
        self.gla = gla
        self.gate_up = nn.Linear(c.gate_rank, c.kv_heads * c.head_dim)
        self.head_norm = RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, mask):
        q, k, v, low = self.project(x)
        z = self.gate_up(low)
        g = (F.logsigmoid(wide(z)) / self.c.gate_divisor).to(z.dtype).view_as(k)
        return self.o_proj(self.head_norm(self.gla(F.relu(q), F.relu(k), v, g)).flatten(2))


class Attention(Mixer):
    def __init__(self, c: Config):
        super().__init__(c)
        cos, sin = rope_tables(c.seq_len, c.head_dim, c.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, mask):
        q, k, v, _ = self.project(x)
        q, k = (rotate(part, self.cos, self.sin).to(v.dtype) for part in (q, k))
        o = attend(*(part.transpose(1, 2) for part in (q, k, v)), mask)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c: Config, mixer: Mixer):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.width, c.norm_eps), mixer
        shape = Shape(C=c.width, L=c.layers, T=c.seq_len, B=c.batch_size, V=c.vocab, F=c.ffn, H=c.heads, G=c.kv_heads,
                      W=c.window)  # fmt: skip
        self.mlp_norm, self.mlp = RMSNorm(c.width, c.norm_eps), SwiGLU(shape)

    def forward(self, x, mask):
        x = x + self.attn(self.attn_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Tied embedding; mixers as the Config says."""

    def __init__(self, c: Config, gla, stream=None, fused_loss: bool = False):
        super().__init__()
        self.c, self.stream, self.fused_loss = c, stream, fused_loss
        self.embed = nn.Embedding(c.vocab, c.width)
        mixers = (GatedLinearAttention(c, gla) if c.mixer(i) == "gla" else Attention(c) for i in range(c.layers))
        self.layers = nn.ModuleList(Layer(c, mixer) for mixer in mixers)
        self.norm = RMSNorm(c.width, c.norm_eps)

    def initialise(self):
        for name, p in self.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(p, std=0.1)
            elif p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.25 * (2 * self.c.layers) ** -0.5 if out else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor, mask) -> Tensor:
        """Mean loss; with fused_loss the last norm's output, whose product with the embedding is the loss's own."""
        x = self.embed(tokens)
        x = x if self.stream is None else x.to(self.stream)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x, targets)

    def head(self, x, targets):
        x = self.norm(x)
        if self.fused_loss:
            return x
        logits = F.linear(x, self.embed.weight).flatten(0, 1)
        return F.cross_entropy(wide(logits), targets.flatten())
