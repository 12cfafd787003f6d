"""The layer-wise solver: masks (SparseGPT, ALPS, Wanda, magnitude), codes (GPTQ) and both together on one Hessian.

Read `solve.py` first; `column_sweep.py` is the SparseGPT and GPTQ papers' loop, `coordinate_descent.py` what follows it.
"""
