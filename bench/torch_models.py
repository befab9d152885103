"""The models of the step benchmark, written for speed in PyTorch: SDPA, q, k and v in one Linear
(gate and up too), loss inside the forward pass so that a compiler sees it."""

import torch
from torch import nn
from torch.nn import functional as F

MODELS = {
    "llama-60m": dict(family="llama", d_model=512, layers=8, heads=8, mlp=1376, vocab=32000),
    "gpt2-124m": dict(family="gpt2", d_model=768, layers=12, heads=12, mlp=3072, vocab=50257, context=1024),
}


def split_heads(x, heads):
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)  # [B, N, T, H]


class GptBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["d_model"]
        self.heads = c["heads"]
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, c["mlp"]), nn.Linear(c["mlp"], d)

    def forward(self, x, _):
        q, k, v = (split_heads(z, self.heads) for z in self.qkv(self.attention_norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


def turn(x, rotation):
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class LlamaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["d_model"]
        self.heads = c["heads"]
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate_up, self.down = nn.Linear(d, 2 * c["mlp"], bias=False), nn.Linear(c["mlp"], d, bias=False)

    def forward(self, x, rotation):
        q, k, v = (split_heads(z, self.heads) for z in self.qkv(self.attention_norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(turn(q, rotation), turn(k, rotation), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, name, length, dtype):
        super().__init__()
        c = MODELS[name]
        d = c["d_model"]
        gpt = c["family"] == "gpt2"
        self.embed = nn.Embedding(c["vocab"], d)
        self.position = nn.Embedding(c["context"], d) if gpt else None
        self.blocks = nn.ModuleList((GptBlock if gpt else LlamaBlock)(c) for _ in range(c["layers"]))
        self.norm = nn.LayerNorm(d) if gpt else nn.RMSNorm(d, eps=1e-5)
        self.head = nn.Linear(d, c["vocab"], bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        if gpt:
            self.head.weight = self.embed.weight
        h = d // c["heads"]
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(h // 2) * 2 / h)
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
