"""Run by a Python whose first import path is the wheel of compressed-tensors 0.12.2: packs what a file holds.

python bitmask_oracle.py [GIVEN.safetensors KIND OUTPUT.safetensors] ...

GIVEN holds weight and, for KIND int8 or float8, weight_scale. OUTPUT gets what the wheel writes for a linear that is
quantized and then compressed as sparse-24-bitmask, and `expected`, the weight that the wheel makes of it again.
"""

import sys

import compressed_tensors
import torch
from compressed_tensors.compressors.quantized_compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskCompressor
from compressed_tensors.config import Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

assert compressed_tensors.__version__ == "0.12.2", compressed_tensors.__version__
sparse = Sparse24BitMaskCompressor(config=Sparse24BitMaskConfig())
for given, kind, output in zip(*(iter(sys.argv[1:]),) * 3, strict=True):
    state = {f"linear.{name}": tensor for name, tensor in load_file(given).items()}
    if kind != "none":
        strategy = "tensor" if state["linear.weight_scale"].numel() == 1 else "channel"
        kinds = {"int8": "int", "float8": "float"}
        arguments = QuantizationArgs(num_bits=8, type=kinds[kind], symmetric=True, strategy=strategy)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        naive = NaiveQuantizationCompressor(config=QuantizationConfig(config_groups={"group_0": scheme}))
        state = naive.compress(state, {"linear": scheme})
    packed = sparse.compress(dict(state), {"linear"})
    expected = dict(sparse.decompress_from_state_dict(packed))["linear.weight"]
    if kind != "none":
        expected = naive.decompress_weight(
            {"weight": expected, "weight_scale": packed["linear.weight_scale"]}, arguments
        )
    packed = {name.removeprefix("linear."): tensor.contiguous() for name, tensor in packed.items()}
    save_file({**packed, "expected": expected.to(torch.float32)}, output)
