"""An equal model in another basis, in which 2:4 sparsity removes less.

Three changes leave what a decoder computes as it is, and change what its matrices look like:

residual   one orthogonal matrix Q turns the residual stream: what reads it becomes W Q, what writes it Q'W. The gains of
           norms go into the linears behind them first, since a norm with equal gains commutes with Q (QuaRot,
           arXiv 2404.00456; SliceGPT, arXiv 2401.15024).
heads      one orthogonal matrix for each key-value head turns its values: rows of the value projection, columns of the
           output projection.
channels   a permutation orders the channels of the feed-forward: rows of what comes before the activation, columns of
           what comes after it (channel permutation, Pool and Yu, NeurIPS 2021).

They are chosen so that the weights which 2:4 drops matter least (`objective.py`), as DenoiseRotator does with rotations of
its own in every layer (arXiv 2505.23049); these here cost nothing when the model runs.
"""
