"""Compress a model that is loaded already, and generate with the result.

    python examples/compress_live_model.py [MODEL]

MODEL is a directory or hub id of a dense transformers model; without one, the small model embedded in a package is unpacked.
"""

import sys
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify

TEXT = [  # far too little for a good model; take a few hundred documents like those that the model will see
    "The sea covers most of the planet, and its currents carry heat from the equator toward the poles.",
    "A good recipe says what is done, how much of it, and why; a bad one leaves the reader to guess.",
    "Trains leave the station every ten minutes, except on Sundays, when there is one an hour.",
]


def main(model_name: str | None = None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if model_name is None:
            model_name = str(sparsify.export("embedded:smollm2-135m-instruct", "dense", f"{folder}/dense"))
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        dense = AutoModelForCausalLM.from_pretrained(model_name)

        recipe = sparsify.load_recipe("2of4-w4a16").model_copy(
            update={"calibration": sparsify.Calibration(source="self", samples=2, sequence_length=16)}
        )
        result = sparsify.apply(recipe, dense, calibration=TEXT, tokenizer=tokenizer)  # `dense` stays as it was

        sizes = result.metrics["sizes"]
        print(f"{sizes['dense_bytes'] / 1e6:.1f} MB -> {sizes['compressed_bytes'] / 1e6:.1f} MB")
        prompt = tokenizer("The sea", return_tensors="pt")
        tokens = result.model.generate(**prompt, max_new_tokens=8, do_sample=False)
        text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
        print(text)
        return text


if __name__ == "__main__":
    main(*sys.argv[1:2])
