#!/usr/bin/env python3
"""The Mixtral that make_upcycled.py makes against transformers in float32: the logits of a few hundred tokens.

  upcycled_oracle.py MODEL.gguf [--tokens 256]

Text: tests/golden/data/sample.txt. Wanted: no logit further off than 1e-3, every best token the same but where the two best
are nearer to each other than that. Memory: 3 GB. Needs torch, transformers, gguf and numpy.
Environment: DUET = the duet binary. Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

try:
    import gguf
    import numpy as np
    import torch
    import transformers
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
TEXT = ROOT / "tests/golden/data/sample.txt"
LIMIT = 1e-3


def run(*args):
    done = subprocess.run([DUET, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"FAIL duet {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout


def halves_together(weights, heads):
    """Rows of queries or keys in the order of transformers: rotated pairs half a head apart, in GGUF side by side."""
    rows, width = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, width).transpose(0, 2, 1, 3).reshape(rows, width)


def model_of(reader):
    key = lambda name: reader.fields[f"llama.{name}"].contents()
    tensors = {t.name: np.array(t.data, dtype=np.float32) for t in reader.tensors}
    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    tied = "output.weight" not in tensors
    config = transformers.MixtralConfig(
        vocab_size=tensors["token_embd.weight"].shape[0], hidden_size=key("embedding_length"), intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=key("rope.dimension_count"),
        num_local_experts=key("expert_count"), num_experts_per_tok=key("expert_used_count"), rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")}, sliding_window=None, tie_word_embeddings=tied)
    state = {"model.embed_tokens.weight": tensors.pop("token_embd.weight"), "model.norm.weight": tensors.pop("output_norm.weight")}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else tensors.pop("output.weight")
    for i in range(config.num_hidden_layers):
        take = lambda name, i=i: tensors.pop(f"blk.{i}.{name}.weight")
        layer = f"model.layers.{i}."
        state |= {layer + "self_attn.q_proj.weight": halves_together(take("attn_q"), heads),
                  layer + "self_attn.k_proj.weight": halves_together(take("attn_k"), kv_heads),
                  layer + "self_attn.v_proj.weight": take("attn_v"), layer + "self_attn.o_proj.weight": take("attn_output"),
                  layer + "input_layernorm.weight": take("attn_norm"), layer + "post_attention_layernorm.weight": take("ffn_norm"),
                  layer + "mlp.gate.weight": take("ffn_gate_inp"), layer + "mlp.experts.down_proj": take("ffn_down_exps"),
                  layer + "mlp.experts.gate_up_proj": np.concatenate([take("ffn_gate_exps"), take("ffn_up_exps")], axis=1)}
    if tensors:
        sys.exit(f"FAIL: tensors without a place: {sorted(tensors)[:5]}")
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in state.items()}, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights
    return model.eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    ids = run("tokenize", args.model, "--file", TEXT).replace(",", " ").split()[:args.tokens]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "logits.npy"
        run("logits", args.model, "--ids", ",".join(ids), "-o", path)
        ours = np.load(path)
    with torch.no_grad():
        theirs = model_of(gguf.GGUFReader(args.model))(torch.tensor([[int(i) for i in ids]])).logits[0].numpy()
    error = np.abs(ours - theirs)
    best = theirs.argmax(1)
    lead = np.diff(np.sort(theirs, axis=1)[:, -2:], axis=1)[:, 0]
    other = (ours.argmax(1) != best) & (lead > LIMIT)
    good = error.max() <= LIMIT and not other.any()
    print(f"{'PASS' if good else 'FAIL'} {len(ids)} tokens: largest difference {error.max():.2e} (logits' own deviation {theirs.std():.2f}), "
          f"rms {np.sqrt((error ** 2).mean()):.2e}, other best tokens {int(other.sum())}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
