"""Modifiers of llm-compressor on a model: run as a file by the Python of llm-compressor's environment.

    PYTHON llmcompressor_stage.py JOB.json

That environment lacks sparsify, so nothing of it is imported here. JOB.json holds

    source:     directory of the dense model
    output:     directory to write: weights alone, as safetensors, and of a whole recipe what llm-compressor saves
    whole:      whether the modifiers are all that is done; otherwise they leave a dense model
    dtype:      type to load the model in, or auto
    modifiers:  [{NAME: settings}, ...]
    rows:       safetensors file with `tokens`, int64 [rows, length], or null for modifiers that read no text
    trust:      whether Python code that comes with the model may run

Where they are not all that is done, a QuantizationModifier among them tells AWQModifier what it prepares for: weights are
saved as they are before it rounds them.
The last line of stdout is a JSON object with the version of llm-compressor.
"""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUANTIZED = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")


def main(job_file: str) -> None:
    """Run a job and write its weights."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch, transformers = import_module("torch"), import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["source"], dtype=job["dtype"], trust_remote_code=job["trust"]
    )
    if not torch.accelerator.is_available():
        _pin_nothing()
    groups = {f"{index}_modifiers": entry for index, entry in enumerate(job["modifiers"])}
    recipe = import_module("llmcompressor.recipe").Recipe.from_dict({"default_stage": groups})
    text = {} if job["rows"] is None else _text(torch, job["rows"])
    # the processor is only asked for text that is not tokenized yet
    import_module("llmcompressor").oneshot(model=model, processor=object(), recipe=recipe, **text)
    if job["whole"]:
        _save_as_it_is(model, job["output"])
        print(json.dumps({"llmcompressor": version("llmcompressor")}))
        return
    _without_quantization(model)
    type(model).save_pretrained(model, job["output"])
    print(json.dumps({"llmcompressor": version("llmcompressor")}))


def _save_as_it_is(model: Any, output: str) -> None:
    """As llm-compressor saves it, but for its recipe.yaml, which it would append to one beside the source."""
    saving: Any = import_module("llmcompressor.transformers.compression.compressed_tensors_utils")
    saving.update_and_save_recipe = lambda *_: None
    model.save_pretrained(output)


def _text(torch: Any, file: str) -> dict[str, Any]:
    """The calibration text, row by row, as `oneshot` takes it."""
    rows = import_module("safetensors.torch").load_file(file)["tokens"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    loader = torch.utils.data.DataLoader(samples, batch_size=1)
    return {"dataset": loader, "num_calibration_samples": len(rows), "max_seq_length": rows.shape[1]}


def _pin_nothing() -> None:
    """llm-compressor 0.14 pins memory for AWQ on machines without an accelerator too, where torch refuses it."""
    cache = import_module("llmcompressor.pipelines.cache").IntermediatesCache
    cache.pin_memory = lambda *_: None


def _without_quantization(model: Any) -> None:
    """Take away what a QuantizationModifier adds; it has changed no weight."""
    for module in model.modules():
        for name in [*module._parameters, *module._buffers]:
            if name in QUANTIZED:
                delattr(module, name)
        for name in ("quantization_scheme", "quantization_status", "quantization_enabled"):
            if name in vars(module):
                delattr(module, name)


if __name__ == "__main__":
    main(sys.argv[1])
