#!/usr/bin/env python3
"""Writes the logits that tests compare with, computed by mlx-lm in float32.

    pip install mlx mlx-cpu mlx-lm gguf
    reference.py families > families.json
    reference.py file MODEL.gguf TOKEN... > NAME.json

families: small models of every family, whose weights both sides make from the
tensors' names. file: a real model; its weights are dequantised by the gguf package
and everything else is mlx-lm's.
"""
import importlib
import json
import sys

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

TOKENS = [(7 * i * i + 3 * i + 1) % 128 for i in range(40)]
AT = [0, 7, 20, 39]  # positions whose logits are written

SMALL = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
             rms_norm_eps=1e-5, vocab_size=128, max_position_embeddings=64, rope_theta=10000.0, tie_word_embeddings=False)
YARN = dict(type="yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
GEMMA = dict(SMALL, head_dim=16, num_hidden_layers=7, tie_word_embeddings=True, query_pre_attn_scalar=16)

# name, module of mlx-lm, configuration as in config.json
FAMILIES = [
    ("llama", "llama", dict(SMALL, model_type="llama")),
    ("llama3", "llama", dict(SMALL, model_type="llama", rope_theta=500000.0, rope_scaling=LLAMA3)),
    ("linear", "llama", dict(SMALL, model_type="llama", rope_scaling=dict(type="linear", rope_type="linear", factor=2.0))),
    ("smollm2", "llama", dict(SMALL, model_type="llama", tie_word_embeddings=True, num_key_value_heads=1)),
    ("mistral", "llama", dict(SMALL, model_type="mistral", head_dim=32)),
    ("qwen2", "qwen2", dict(SMALL, model_type="qwen2", tie_word_embeddings=True)),
    ("qwen3", "qwen3", dict(SMALL, model_type="qwen3", head_dim=32)),
    ("yarn", "qwen3", dict(SMALL, model_type="qwen3", head_dim=32, rope_scaling=YARN)),
    ("gemma2", "gemma2", dict(GEMMA, model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=64)),
    ("gemma3", "gemma3_text", dict(GEMMA, model_type="gemma3_text", rope_theta=1000000.0, rope_local_base_freq=10000.0, sliding_window=16,
                                   sliding_window_pattern=6)),
]


def numbers(name, shape):
    """The weights of a tensor: splitmix64, begun with the FNV-1a hash of its name."""
    seed = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for c in name.encode():
            seed = (seed ^ np.uint64(c)) * np.uint64(0x100000001B3)
        z = seed + (np.arange(1, np.prod(shape) + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2**24 * 2 - 1  # -1 to 1
    if "norm" in name:
        return (1 + uniform / 4).reshape(shape).astype(np.float32)
    return (uniform / 4).reshape(shape).astype(np.float32)


def model(module, config):
    m = importlib.import_module("mlx_lm.models." + module)
    return m.Model(m.ModelArgs.from_dict(config))


def logits(net, tokens):
    out = net(mx.array([tokens])).astype(mx.float32)[0]
    mx.eval(out)
    return np.array(out)


def families():
    out = {}
    for name, module, config in FAMILIES:
        net = model(module, config)
        weights = [(k, mx.array(numbers(k, v.shape))) for k, v in tree_flatten(net.parameters())]
        net.load_weights(weights)
        all = logits(net, TOKENS)
        out[name] = dict(config=config, shapes={k: list(v.shape) for k, v in weights},
                         logits=[[round(float(x), 5) for x in all[p]] for p in AT])
    json.dump(dict(tokens=TOKENS, at=AT, families=out), sys.stdout)


NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GEMMA_NAMES = dict(NAMES, post_attention_norm="post_attention_layernorm", ffn_norm="pre_feedforward_layernorm",
                   post_ffw_norm="post_feedforward_layernorm")


def file(path, tokens):
    import gguf
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    get = lambda key, absent=None: reader.fields[f"{arch}.{key}"].contents() if f"{arch}.{key}" in reader.fields else absent
    heads, kv, dim = get("attention.head_count"), get("attention.head_count_kv"), get("embedding_length")
    tensors = {t.name: t for t in reader.tensors}
    config = dict(
        model_type=arch, hidden_size=dim, num_hidden_layers=get("block_count"), intermediate_size=get("feed_forward_length"),
        num_attention_heads=heads, num_key_value_heads=kv, rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        vocab_size=int(tensors["token_embd.weight"].shape[1]), max_position_embeddings=get("context_length"),
        rope_theta=get("rope.freq_base", 10000.0), head_dim=get("attention.key_length", dim // heads),
        tie_word_embeddings="output.weight" not in tensors)
    gemma = arch == "gemma3"
    if gemma:
        config.update(model_type="gemma3_text", query_pre_attn_scalar=config["head_dim"], rope_local_base_freq=10000.0,
                      sliding_window=get("attention.sliding_window"), sliding_window_pattern=6)
    weights = []
    for name, t in tensors.items():
        w = gguf.quants.dequantize(t.data, t.tensor_type)
        if gemma and name.endswith("norm.weight"):
            w = w - 1  # mlx adds it again
        if name.startswith("blk."):
            _, layer, part, kind = name.split(".")
            if arch == "llama" and part in ("attn_q", "attn_k"):  # GGUF has neighbours where others have halves
                n = heads if part == "attn_q" else kv
                w = w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
            name = f"model.layers.{layer}.{(GEMMA_NAMES if gemma else NAMES)[part]}.{kind}"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                    "output.weight": "lm_head.weight"}[name]
        weights.append((name, mx.array(w.astype(np.float32))))
    net = model("gemma3_text" if gemma else arch, config)
    net.load_weights(list(net.sanitize(dict(weights)).items()))
    out = []
    for position, row in enumerate(logits(net, tokens)):
        best = np.argsort(-row)[:40]
        norm = float(np.logaddexp.reduce(row.astype(np.float64)))
        out.append(dict(position=position, tokens=[int(i) for i in best], logprobs=[round(float(row[i]) - norm, 4) for i in best]))
    json.dump(dict(tokens=tokens, at=out), sys.stdout)


if sys.argv[1] == "families":
    families()
else:
    file(sys.argv[2], [int(t) for t in sys.argv[3:]])
