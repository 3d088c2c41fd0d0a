"""Writes blocks.json: blocks of each type with what the gguf package (PyPI, of llama.cpp's authors) reads in them.
Needs gguf 0.17 and numpy."""
import json, pathlib
import numpy as np
from gguf import GGMLQuantizationType as T, GGML_QUANT_SIZES, quants

rng = np.random.default_rng(1)
# Where a block's halves are, which random bits would make infinite.
halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "BF16": []}
out = {}
for name, at in halves.items():
    length, size = GGML_QUANT_SIZES[T[name]]
    n = 2 if length > 1 else 32
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    if name == "BF16":
        blocks = (rng.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(n, 2)
    for i in at:
        blocks[:, i:i + 2] = rng.standard_normal(n).astype(np.float16).view(np.uint8).reshape(n, 2)
    values = quants.dequantize(blocks.reshape(1, -1), T[name]).reshape(-1)
    out[name] = {"bytes": blocks.tobytes().hex(), "bits": values.astype(np.float32).view(np.uint32).tolist()}
pathlib.Path(__file__).with_name("blocks.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
