"""Other settings for some linears: `down_proj` keeps all its weights, the first layer gets 8 bits.

python examples/overrides.py MODEL OUTPUT
"""

import sys

import sparsify

RECIPE = {
    "version": 1,
    "calibration": {"source": "self", "samples": 4, "sequence_length": 32},
    "passes": [{"prune": {"method": "sparsegpt"}}, {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}],
    "overrides": [  # per setting the last match wins
        {"match": "*down_proj", "prune": None},
        {"match": "re:.*layers[.]0[.].*", "quantize": {"bits": 8}},
    ],
}


def main(model: str, output: str) -> dict[str, str]:
    sparsify.apply(RECIPE, model, output)
    found = {}
    for tensor in sparsify.inspect(output).tensors:
        if tensor.compressed:
            found[tensor.name] = f"{'2:4' if tensor.two_four else 'dense'}, {tensor.bits} bits"
            print(f"{tensor.name}: {found[tensor.name]}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
