"""Run by a Python whose first import path is the wheel of compressed-tensors 0.12.2: packs what a file holds as marlin-24.

python marlin24_oracle.py [GIVEN.safetensors BITS GROUP OUTPUT.safetensors] ..., with GIVEN holding weight and weight_scale.
"""

import sys

import compressed_tensors
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import Marlin24Compressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

assert compressed_tensors.__version__ == "0.12.2", compressed_tensors.__version__
for given, bits, group, output in zip(*(iter(sys.argv[1:]),) * 4, strict=True):
    strategy = {"strategy": "channel"} if group == "0" else {"strategy": "group", "group_size": int(group)}
    arguments = QuantizationArgs(num_bits=int(bits), type="int", symmetric=True, **strategy)
    state = {f"linear.{name}": tensor for name, tensor in load_file(given).items()}
    packed = Marlin24Compressor().compress(state, {"linear": QuantizationScheme(targets=["Linear"], weights=arguments)})
    save_file({name.removeprefix("linear."): tensor.contiguous() for name, tensor in packed.items()}, output)
