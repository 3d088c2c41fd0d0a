#!/usr/bin/python3
# Trains a small network to predict the next byte of Python's own sources, and writes its weights in bf16 as $1.0, and
# after 1 and 20 more steps as $1.1 and $1.20. The same numpy makes the same files.
import glob
import sys

import numpy as np

CONTEXT, WIDTH, HIDDEN, BATCH = 16, 64, 1024, 16
rng = np.random.default_rng(1)
text = np.frombuffer(b"".join(open(f, "rb").read() for f in sorted(glob.glob("/usr/lib/python3*/[a-d]*.py"))), dtype=np.uint8)
shapes = [(256, WIDTH), (CONTEXT * WIDTH, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 256)]
weights = [rng.standard_normal(s, dtype=np.float32) * np.float32((1 / s[0]) ** 0.5 if i else 1) for i, s in enumerate(shapes)]
first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]


def step(n, rate=3e-4):
    at = rng.integers(0, len(text) - CONTEXT - 1, BATCH)
    x, y = text[at[:, None] + np.arange(CONTEXT)], text[at + CONTEXT]
    table, a, b, c = weights
    e = table[x].reshape(BATCH, -1)
    h = np.maximum(e @ a, 0)
    g = np.maximum(h @ b, 0)
    z = g @ c
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(BATCH), y] + 1e-9).mean()
    p[np.arange(BATCH), y] -= 1
    p /= BATCH
    dg = (p @ c.T) * (g > 0)
    dh = (dg @ b.T) * (h > 0)
    dt = np.zeros_like(table)
    np.add.at(dt, x.ravel(), (dh @ a.T).reshape(-1, WIDTH))
    for w, m, v, d in zip(weights, first, second, [dt, e.T @ dh, h.T @ dg, g.T @ p]):
        m += 0.1 * (d - m)
        v += 0.001 * (d * d - v)
        w -= rate * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
    return loss


def write(name):
    with open(name, "wb") as f:
        for w in weights:
            bits = w.view(np.uint32)
            f.write(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes())


steps = 40
for n in range(1, steps + 21):
    loss = step(n)
    if n - steps in (0, 1, 20):
        write(f"{sys.argv[1]}.{n - steps}")
        print(f"weights after {n} steps, loss {loss:.2f}")
