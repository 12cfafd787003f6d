"""Run by the Python of llm-compressor's environment: what its own code makes of recipes. Reads JSON on stdin, writes JSON.

Input: {"recipes": [recipe as data, ...], "model": directory}. Output per recipe: {linear: [method, bits, group size or "channel",
order of columns]} for the linears whose weights it would quantize.
"""

import json
import sys
from importlib import import_module
from typing import Any


def main() -> None:
    job = json.load(sys.stdin)
    torch, transformers = import_module("torch"), import_module("transformers")
    recipes, state = import_module("llmcompressor.recipe"), import_module("llmcompressor.core")
    config = transformers.AutoConfig.from_pretrained(job["model"])
    answers = []
    for data in job["recipes"]:
        with torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        methods = {}
        for modifier in recipes.Recipe.from_dict(data).modifiers:
            kind = type(modifier).__name__
            if kind not in ("GPTQModifier", "QuantizationModifier"):
                continue
            modifier.on_initialize(state.State(model=model))
            matched = import_module("compressed_tensors.utils").match_named_modules(
                model, modifier.resolved_targets, modifier.ignore
            )
            methods |= {name: "gptq" if kind == "GPTQModifier" else "rtn" for name, _ in matched}
        answers.append(
            {
                name: scheme_of(methods[name], module.quantization_scheme.weights)
                for name, module in model.named_modules()
                if getattr(module, "quantization_scheme", None) is not None and module.quantization_scheme.weights
            }
        )
    print(json.dumps(answers))


def scheme_of(method: str, weights: Any) -> list[object]:
    strategy, order = str(weights.strategy).lower(), weights.actorder
    group = "channel" if strategy.endswith("channel") else weights.group_size
    return [method, weights.num_bits, group, bool(order) and method == "gptq"]


if __name__ == "__main__":
    main()
