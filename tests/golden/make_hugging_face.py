#!/usr/bin/env python3
"""Writes tests/golden/hugging_face: small models as transformers stores them, and their loss.

Tokens of row b, column t are (31 t + 17 b) mod V; each predicts the next. The models are small, but
have what is easily confused: grouped kv heads, shards, a head of another width, fused and transposed
projections.
"""

import json
import pathlib

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(__file__).parent / "hugging_face"
VOCAB, ROWS, TOKENS = 60, 3, 11


def Write(name, model, **options):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    model.eval().save_pretrained(OUT / name, **options)
    (OUT / name / "generation_config.json").unlink()
    ids = torch.tensor([[(31 * t + 17 * b) % VOCAB for t in range(TOKENS + 1)] for b in range(ROWS)])
    with torch.no_grad():
        logits = model.double()(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    return loss.item()


def main():
    llama = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 16}
    gpt2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16,
            "bos_token_id": None, "eos_token_id": None}
    losses = {
        "llama": Write("llama", LlamaForCausalLM(LlamaConfig(
            **llama, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
            max_shard_size="15KB"),
        "llama_tied": Write("llama_tied", LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True))),
        "gpt2": Write("gpt2", GPT2LMHeadModel(GPT2Config(**gpt2))),
    }
    (OUT / "losses.json").write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
