"""Kernels for the CPU in C++, where XLA has no form for what decoding needs. They are optional, and nothing but speed.

    build      the host's compiler makes a library of the .cc files, once, for the processor at hand
    library    loads it into JAX, and says whether there is one; `serving` switches the kernels on while tracing
    products   a few rows times a weight matrix
    experts    the experts that rows have chosen, packed as they are stored
    attention  queries over a cache, of which only what they see is read: a few a row, or a chunk of a prompt

All of it lies behind `core.layers`, `core.moe` and `core.attention`, which have XLA's forms as well.
"""

from core.native.attention import attend_cache, attend_prompt, attends
from core.native.experts import mix_experts, mixes
from core.native.library import available, is_serving, name, serving
from core.native.products import ROWS, product, rounded_product, serves

__all__ = [
    "ROWS",
    "attend_cache",
    "attend_prompt",
    "attends",
    "available",
    "is_serving",
    "mix_experts",
    "mixes",
    "name",
    "product",
    "rounded_product",
    "serves",
    "serving",
]
