#!/usr/bin/env python3
"""Writes a Hugging Face folder with the full width of Mixtral 8x7B and few layers: random BF16
weights in shards, config.json, the demo's tokenizer (padded to 32000 tokens on conversion).
2 layers are about 6 GB. For measuring `duet convert`: time, peak memory, use of the cores.

usage: make_wide_folder.py FOLDER [--layers N]     (needs numpy)
"""
import argparse
import json
import os
import shutil
import struct

import numpy as np

EMBD, FF, HEADS, HEADS_KV, HEAD_DIM, EXPERTS, VOCAB = 4096, 14336, 32, 8, 128, 8, 32000
SHARD_BYTES = 2_000_000_000


def tensors(n_layer):
    yield "model.embed_tokens.weight", [VOCAB, EMBD]
    for i in range(n_layer):
        layer = f"model.layers.{i}."
        moe = layer + "block_sparse_moe."
        yield layer + "input_layernorm.weight", [EMBD]
        yield layer + "self_attn.q_proj.weight", [HEADS * HEAD_DIM, EMBD]
        yield layer + "self_attn.k_proj.weight", [HEADS_KV * HEAD_DIM, EMBD]
        yield layer + "self_attn.v_proj.weight", [HEADS_KV * HEAD_DIM, EMBD]
        yield layer + "self_attn.o_proj.weight", [EMBD, HEADS * HEAD_DIM]
        yield layer + "post_attention_layernorm.weight", [EMBD]
        yield moe + "gate.weight", [EXPERTS, EMBD]
        for e in range(EXPERTS):
            yield moe + f"experts.{e}.w1.weight", [FF, EMBD]
            yield moe + f"experts.{e}.w2.weight", [EMBD, FF]
            yield moe + f"experts.{e}.w3.weight", [FF, EMBD]
    yield "model.norm.weight", [EMBD]
    yield "lm_head.weight", [VOCAB, EMBD]


def shards(n_layer):
    """Lists of (name, shape, bytes), each list of at most about SHARD_BYTES."""
    shard, size = [], 0
    for name, shape in tensors(n_layer):
        n_bytes = 2 * int(np.prod(shape))
        if shard and size + n_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, shape, n_bytes))
        size += n_bytes
    yield shard


class Weights:
    """BF16 normal deviates from a pool, started at random places: as fast as the disk."""

    def __init__(self):
        self.rng = np.random.default_rng(1)
        values = self.rng.standard_normal(1 << 23, dtype=np.float32) * np.float32(0.02)
        self.pool = (values.view(np.uint32) >> 16).astype("<u2").tobytes()

    def write(self, out, n_bytes):
        while n_bytes > 0:
            start = 2 * int(self.rng.integers(len(self.pool) // 4))
            part = memoryview(self.pool)[start:start + n_bytes]
            out.write(part)
            n_bytes -= len(part)


def write_shard(path, shard, weights):
    header, offset = {}, 0
    for name, shape, n_bytes in shard:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, _, n_bytes in shard:
            if "norm" in name:
                out.write(b"\x80\x3f" * (n_bytes // 2))  # 1.0
            else:
                weights.write(out, n_bytes)


def config(n_layer):
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": EMBD,
            "intermediate_size": FF, "num_hidden_layers": n_layer, "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS_KV, "vocab_size": VOCAB, "max_position_embeddings": 32768,
            "rope_theta": 1000000.0, "rms_norm_eps": 1e-05, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
            "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "torch_dtype": "bfloat16"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    demo = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models", "demo")
    os.makedirs(args.folder, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(os.path.join(demo, name), args.folder)
    parts = list(shards(args.layers))
    weights, weight_map = Weights(), {}
    for i, shard in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(os.path.join(args.folder, file), shard, weights)
        weight_map.update({name: file for name, _, _ in shard})
    total = sum(n_bytes for shard in parts for _, _, n_bytes in shard)
    with open(os.path.join(args.folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f)
    with open(os.path.join(args.folder, "config.json"), "w") as f:
        json.dump(config(args.layers), f, indent=1)
    print(f"{args.folder}: {args.layers} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
