"""Run by the Python of a peer: what AutoGPTQ, GPTQModel or AutoAWQ packs from a weight, and what it makes of that again.

python source_program.py autogptq|gptqmodel|autoawq GIVEN.safetensors RESULT.safetensors [BITS VERSION]

GIVEN: weight [N, K], scales and zeros [N, K / G], all float32, and g_idx int32 [K]. RESULT: the tensors of the package's format,
and `dequantized`, float32 [N, K], by its own code. VERSION: 1 as GPTQModel saves it, 2 as it packs.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Given = dict[str, Tensor]


def linear_of(given: Given) -> torch.nn.Linear:
    n, k = given["weight"].shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = given["weight"]
    return linear


def autogptq(given: Given, bits: int, version: int) -> dict[str, Tensor]:
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    (n, k), groups = given["weight"].shape, given["scales"].shape[1]
    module = QuantLinear(bits, k // groups, k, n, bias=False, weight_dtype=torch.float32)
    module.pack(linear_of(given), given["scales"].clone(), given["zeros"].clone(), given["g_idx"])
    module.autogptq_cuda_available = False
    identity = torch.eye(k)
    stored = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return {**stored, "dequantized": module(identity).t()}


def gptqmodel(given: Given, bits: int, version: int) -> dict[str, Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    (n, k), groups = given["weight"].shape, given["scales"].shape[1]
    module = TorchLinear(
        bits=bits, group_size=k // groups, sym=False, desc_act=True, in_features=k, out_features=n, bias=False
    )
    module.pack_original(linear_of(given), given["scales"].clone(), given["zeros"].clone(), given["g_idx"])
    if version == 1:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=k // groups))
    stored = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if version == 1:
        convert_gptq_v1_to_v2_format_module(module, bits, module.pack_dtype)
    module.scales = module.scales.float()
    module.post_init()
    return {**stored, "dequantized": module.dequantize_weight().float().t()}


def autoawq(given: Given, bits: int, version: int) -> dict[str, Tensor]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    size = given["weight"].shape[1] // given["scales"].shape[1]
    scales, zeros = given["scales"].t().contiguous(), given["zeros"].t().contiguous()
    module = WQLinear_GEMM.from_linear(linear_of(given), bits, size, scales=scales, zeros=zeros)
    stored = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    dense = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].float(), bits, size)
    return {**stored, "dequantized": dense.t()}


def main(package: str, given: str, result: str, bits: str = "4", version: str = "1") -> None:
    with torch.no_grad():
        found = globals()[package](load_file(given), int(bits), int(version))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}, result)


main(*sys.argv[1:])
