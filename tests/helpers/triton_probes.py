"""Triton kernels around the functions of ours that round, for the interpreter.

Load this anew (`importlib.reload`) once they are interpreted: Triton decides that when it decorates a function, and looks up
the names that it uses among the globals of its module.
"""

import triton
import triton.language as tl

from sparsify.runtime.backends import triton_kernels
from sparsify.solver import triton_sweep


@triton.jit
def convert(numbers, rounded, widened, COUNT: tl.constexpr):
    """float32 numbers -> bfloat16 rounded -> float32 widened."""
    at = tl.arange(0, COUNT)
    found = triton_kernels._round(tl.load(numbers + at), tl.bfloat16)
    tl.store(rounded + at, found)
    tl.store(widened + at, triton_kernels._wide(found))


@triton.jit
def store(numbers, stored, COUNT: tl.constexpr):
    """float32 numbers -> float32 numbers that bfloat16 holds."""
    at = tl.arange(0, COUNT)
    x = tl.load(numbers + at)
    tl.store(stored + at, triton_sweep._stored(x, x, 0.0, 0.0, False, True))
