"""GPT-2 and LLaMA in plain PyTorch: the definitions that the golden files are made from.

Written to be read, not to be fast: attention holds its scores, every tensor has the dtype of the
parameters. Parameters are a dictionary from the name that the C++ model gives them to a tensor;
Linear weights are [out, in].
"""

import dataclasses
import math

import torch

MASK64 = (1 << 64) - 1


def hash_name(name):
    """64-bit FNV-1a, as HashName in core/base/philox.h."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK64
    return h


def word(name, index):
    """The 64-bit word of element `index` of the stream `name`: the finaliser of SplitMix64 (Steele
    et al., "Fast splittable pseudorandom number generators", OOPSLA'14) over a Weyl sequence."""
    z = (hash_name(name) + (index + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def values(name, shape, scale, offset=0.0):
    """offset + scale * (top 16 bits of the word / 2^16 - 1/2), row-major. With a scale that is a
    power of two every value is exact in f32 too, so all precisions start from the same weights."""
    n = math.prod(shape)
    flat = [offset + scale * ((word(name, i) >> 48) / 65536.0 - 0.5) for i in range(n)]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def integers(name, shape, below):
    """(top 32 bits of the word) mod below."""
    n = math.prod(shape)
    return torch.tensor([(word(name, i) >> 32) % below for i in range(n)], dtype=torch.int64).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Config:
    family: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    context: int
    tied: bool
    eps: float = 1e-5
    theta: float = 10000.0

    @property
    def head_dim(self):
        return self.d_model // self.heads


def parameter_shapes(c):
    """Name -> global shape, in the order of the model."""
    d, h = c.d_model, c.head_dim
    bias = c.family == "gpt2"
    shapes = {"embed.weight": (c.vocab, d)}

    def linear(name, out, inside):
        shapes[name + ".weight"] = (out, inside)
        if bias:
            shapes[name + ".bias"] = (out,)

    def norm(name):
        shapes[name + ".weight"] = (d,)
        if bias:
            shapes[name + ".bias"] = (d,)

    if c.family == "gpt2":
        shapes["position.weight"] = (c.context, d)
    for i in range(c.layers):
        block = f"blocks.{i}."
        norm(block + "attention_norm")
        linear(block + "attention.q", c.heads * h, d)
        linear(block + "attention.k", c.kv_heads * h, d)
        linear(block + "attention.v", c.kv_heads * h, d)
        linear(block + "attention.out", d, c.heads * h)
        norm(block + "mlp_norm")
        if c.family == "llama":
            linear(block + "mlp.gate", c.mlp, d)
        linear(block + "mlp.up", c.mlp, d)
        linear(block + "mlp.down", d, c.mlp)
    norm("norm")
    if not c.tied:
        shapes["head.weight"] = (c.vocab, d)
    return shapes


# Matrices, biases and norm weights: scale and offset of `values`.
SCALES = {"matrix": (0.5, 0.0), "bias": (0.25, 0.0), "norm": (0.5, 1.0)}


def kind(name, shape):
    if len(shape) == 2:
        return "matrix"
    return "bias" if name.endswith(".bias") else "norm"


def make_parameters(c, dtype):
    out = {}
    for name, shape in parameter_shapes(c).items():
        scale, offset = SCALES[kind(name, shape)]
        out[name] = values(name, shape, scale, offset).to(dtype).requires_grad_()
    return out


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * torch.sigmoid(x)


def rope(x, positions, theta):
    """x [B, T, N, H], positions [B, T]; half-split: i and i + H/2 turn together."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    angle = (positions.double()[..., None] * frequency)[:, :, None, :]  # [B, T, 1, H/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(q, k, v, *, causal=True, window=0, query_offset=0, q_document=None, k_document=None):
    """q [B, T, N, H]; k, v [B, S, K, H]; scale H^-1/2. Returns out [B, T, N, H], lse [B, N, T]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    i = torch.arange(q.shape[1])[:, None] + query_offset
    j = torch.arange(k.shape[1])[None, :]
    seen = torch.ones(q.shape[0], 1, q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        seen = seen & (j <= i)
    if window > 0:
        seen = seen & (j > i - window)
    if q_document is not None:
        seen = seen & (q_document[:, None, :, None] == k_document[:, None, None, :])
    scores = scores.masked_fill(~seen, -math.inf)
    out = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def cross_entropy(logits, labels):
    """Losses [M], 0 where the label is negative."""
    kept = labels >= 0
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(kept, logits.logsumexp(-1) - picked, torch.zeros_like(picked))


def model_loss(c, p, tokens, labels, documents=None):
    """tokens, labels, documents [B, T]. The mean over labels that are not negative."""
    b, t = tokens.shape
    positions = torch.arange(t).expand(b, t)

    def linear(name, x):
        y = x @ p[name + ".weight"].T
        return y + p[name + ".bias"] if name + ".bias" in p else y

    def norm(name, x):
        if c.family == "gpt2":
            return layer_norm(x, p[name + ".weight"], p[name + ".bias"], c.eps)
        return rms_norm(x, p[name + ".weight"], c.eps)

    x = p["embed.weight"][tokens]  # [B, T, D]
    if c.family == "gpt2":
        x = x + p["position.weight"][positions]
    for i in range(c.layers):
        block = f"blocks.{i}."
        y = norm(block + "attention_norm", x)
        q, k, v = (linear(block + "attention." + s, y).reshape(b, t, -1, c.head_dim) for s in "qkv")
        if c.family == "llama":
            q, k = rope(q, positions, c.theta), rope(k, positions, c.theta)
        out, _ = attention(q, k, v, q_document=documents, k_document=documents)
        x = x + linear(block + "attention.out", out.reshape(b, t, -1))
        y = norm(block + "mlp_norm", x)
        if c.family == "llama":
            y = silu(linear(block + "mlp.gate", y)) * linear(block + "mlp.up", y)
        else:
            y = gelu(linear(block + "mlp.up", y))
        x = x + linear(block + "mlp.down", y)
    x = norm("norm", x)
    logits = x @ p["embed.weight" if c.tied else "head.weight"].T
    if logits.dtype == torch.bfloat16:  # autocast
        logits = logits.float()
    losses = cross_entropy(logits.reshape(b * t, -1), labels.reshape(-1))
    return losses.sum() / (labels >= 0).sum()
