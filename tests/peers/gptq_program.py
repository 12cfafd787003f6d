"""Run by the Python of a peer: what AutoGPTQ or GPTQModel makes of a gptq checkpoint.

python gptq_program.py autogptq|gptqmodel CHECKPOINT DENSE TOKENS.safetensors RESULT.safetensors

CHECKPOINT: in gptq; DENSE: the same weights as an ordinary model. RESULT gets

    logits            of the checkpoint as the package loads it, on the CPU in bfloat16
    expected          of DENSE in the same environment, in bfloat16
    MODULE.qweight, MODULE.qzeros, MODULE.scales, MODULE.g_idx
                      what the package's own packer makes of the dense weight of a linear and its scales
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def loaded(package: str, checkpoint: str) -> torch.nn.Module:
    if package == "autogptq":
        from auto_gptq import AutoGPTQForCausalLM

        model = AutoGPTQForCausalLM.from_quantized(
            checkpoint, device="cpu", use_safetensors=True, torch_dtype=torch.bfloat16, use_triton=False,
            disable_exllama=True, disable_exllamav2=True, inject_fused_attention=False,
        )  # fmt: skip
        return model.model
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(checkpoint, device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model


def packed(package: str, bits: int, scales: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """weight: float32 [N, K], each a whole multiple of its scale; scales: float32 [N, K/G]."""
    (n, k), group_size = weight.shape, weight.shape[1] // scales.shape[1]
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    zeros = torch.full_like(scales, 1 << bits - 1)
    g_idx = torch.arange(k, dtype=torch.int32) // group_size
    if package == "autogptq":
        from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

        module = QuantLinear(bits, group_size, k, n, bias=False, weight_dtype=torch.float32)
        module.pack(linear, scales.clone(), zeros, g_idx)
    else:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        module = TorchLinear(
            bits=bits, group_size=group_size, sym=True, desc_act=False, in_features=k, out_features=n, bias=False
        )
        module.pack_original(linear, scales.clone(), zeros, g_idx)
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(module, name).detach().contiguous() for name in names}


def main(package: str, checkpoint: str, dense: str, tokens: str, result: str) -> None:
    ids = load_file(tokens)["tokens"]
    with torch.no_grad():
        found = {"logits": loaded(package, checkpoint)(input_ids=ids).logits.float()}
        reference = AutoModelForCausalLM.from_pretrained(dense, torch_dtype=torch.bfloat16)
        found["expected"] = reference(ids).logits.float()
    stored = load_file(Path(checkpoint) / "model.safetensors")
    for name in sorted(stored):
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            qweight, scales = stored[name], stored[f"{module}.scales"].float()
            inputs = stored[f"{module}.g_idx"].numel()
            bits = 32 * qweight.shape[0] // inputs
            shifts = torch.arange(0, 32, bits, dtype=torch.int32)[None, :, None]
            codes = (qweight[:, None, :] >> shifts & (1 << bits) - 1).reshape(inputs, -1) - (1 << bits - 1)
            weight = codes * scales[stored[f"{module}.g_idx"].long()]
            again = packed(package, bits, scales.t().contiguous(), weight.t().contiguous())
            found |= {f"{module}.{suffix}": tensor for suffix, tensor in again.items()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, result)


main(*sys.argv[1:])
