"""Kernels for the CPU in C++, where XLA has no form for what decoding needs. They are optional, and nothing but speed.

    build      the host's compiler makes a library of the .cc files, once, for the processor at hand
    library    loads it into JAX, and says whether there is one; `serving` switches the kernels on while tracing
    products   a few rows times a weight matrix

All of it lies behind `core.layers`, `core.moe` and `core.attention`, which have XLA's forms as well.
"""

from core.native.library import available, is_serving, serving
from core.native.products import product

__all__ = ["available", "is_serving", "product", "serving"]
