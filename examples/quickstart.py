"""The smallest complete use: a mask in Python, compiled, called and compared with its definition."""

import torch

import attnlang as al

window = al.compile(al.program(mask=lambda b, h, q, k: (k <= q) & (q - k < 256)))

q, k, v = (torch.randn(1, 8, 2048, 64) for _ in range(3))
out = window(q, k, v)

program = al.program(mask=lambda b, h, q, k: (k <= q) & (q - k < 256))
print("greatest difference from the definition:", (out - al.reference(program, q, k, v)).abs().max().item())
