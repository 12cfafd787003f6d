"""The Python interface: what the command line does, for paths, hub ids and models that are loaded already.

    import sparsify

    result = sparsify.apply("2of4-w4a16", model, calibration=["some text", ...])
    result.model.generate(...)

Everything here is reached as `sparsify.NAME`, which imports it on first use.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsify.errors import RecipeError, SparsifyError
from sparsify.files import cache_directory

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsify.compiler.apply import Evaluate
    from sparsify.compiler.plan import Plan
    from sparsify.evaluation import EvaluationResult
    from sparsify.formats.inspect import Inspection
    from sparsify.manifest import Verification
    from sparsify.recipe import Recipe

__all__ = ["Result", "apply", "evaluate", "export", "inspect", "load_recipe", "plan", "verify"]

RecipeLike: TypeAlias = "str | Path | Mapping[str, Any] | Recipe | Sequence[Any]"


@dataclass
class Result:
    """A finished compression.

    metrics: what metrics.json holds: sizes, the error of every linear, what stayed dense and why, the evaluation
    output:  the checkpoint directory; None where none was named
    record:  what run.json holds: versions, threads, seconds, memory
    """

    metrics: dict[str, Any]
    output: Path | None
    record: dict[str, Any] = field(default_factory=dict, repr=False)
    _model: Any = field(default=None, repr=False)
    _trusts: bool = field(default=False, repr=False)

    @property
    def model(self) -> Any:
        """The compressed model, ready to generate, to save and to be served: of the class of the dense model, its compressed
        linears `Sparse24Linear` (format sparse24). Read from `output` on first use where the recipe was given a path."""
        if self._model is None:
            assert self.output is not None
            with _allowing(self._trusts, False):
                self._model = _loaded(self.output, "auto", None)
        return self._model

    def table(self) -> Table:
        """The summary that the command line shows."""
        from sparsify.compiler.summary import summary

        return summary(self.metrics, str(self.output or "in memory"), self.record)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the output directory, the metrics, and under `run` the record."""
        return {"output": str(self.output), **self.metrics, "run": self.record}


def apply(
    recipe: RecipeLike,
    model: str | Path | PreTrainedModel | None = None,
    output: str | Path | None = None,
    calibration: str | Path | Sequence[str] | Tensor | Dataset | None = None,
    evaluate: str | Path | None = None,
    inplace: bool = False,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    spill: bool = False,
    memory: str | None = None,
    gpu_memory: str | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
    allow_unknown_tensors: bool = False,
) -> Result:
    """Compress `model` by `recipe`.

    recipe:      the name of a built-in recipe, a file, a dict of the same keys, a `Recipe`, or a list of llm-compressor's modifiers
    model:       a directory, hub id, *.gguf file or embedded:NAME; or a live transformers model, which is left as it was.
                 Default: the one that the recipe names
    output:      the checkpoint directory to write; without it the result holds the model only
    calibration: instead of the recipe's: a text file (.txt, .jsonl, .parquet) or another source as in a recipe, a list of
                 documents, a `datasets.Dataset` with a column `text` or `messages`, or token ids, int64 [rows, length]
    evaluate:    a text file to score the result on, never one that it was calibrated on
    inplace:     put the compressed linears into the live model instead of into a copy of it
    tokenizer:   of a live model, where it was not loaded from a directory that has one; for text only
    resume:      go on with an interrupted run into the same `output`
    spill:       keep hidden states of the calibration text in a file beside the output, whatever memory there is
    memory:      what the walk may take of it, `16GB`; default nine tenths of what is free. Changes no byte of the result
    gpu_memory:  the same on a GPU
    trust_remote_code: run Python code that comes with a model or its tokenizer (auto_map)
    allow_unknown_tensors: carry over tensors that the model's class does not know, which are an error otherwise

    Raises SparsifyError for what the command line refuses, with the same words.
    """
    from sparsify.compiler.apply import apply as run
    from sparsify.compiler.memory import Limits
    from sparsify.recipe import Evaluation

    limits = Limits(memory, gpu_memory, spill)
    asked = load_recipe(recipe)
    if inplace and (model is None or isinstance(model, str | Path)):
        raise SparsifyError("inplace=True changes a live model; pass the model object, or leave inplace out for a path")
    if resume and output is None:
        raise SparsifyError("resume=True goes on with the run of an output directory; name it with output=")
    if inplace:
        _refuse_inplace(asked)
    with ExitStack() as stack:
        stack.enter_context(_allowing(trust_remote_code, allow_unknown_tensors))
        spec = stack.enter_context(_on_disk(_named(asked, model), tokenizer, dense=True))
        if calibration is not None:
            from sparsify.data.given import write_calibration

            folder = Path(stack.enter_context(_scratch()))
            given = write_calibration(calibration, asked.calibration, folder)
            asked = asked.model_copy(update={"calibration": given})
        if evaluate is not None:
            text = str(evaluate) if str(evaluate).startswith("file:") else f"file:{evaluate}"
            asked = asked.model_copy(update={"evaluation": Evaluation(text=text)})
        asked = asked.model_copy(update={"model": spec})
        if calibration is not None or evaluate is not None:
            asked = load_recipe(asked.model_dump(mode="json"))  # all checks once more
        where = Path(output) if output is not None else Path(stack.enter_context(_scratch())) / "model"
        live = not isinstance(model, str | Path | None)
        called = (getattr(model, "name_or_path", "") or type(model).__name__) if live else None
        done = run(
            asked,
            spec,
            where,
            resume=resume,
            quiet=quiet,
            evaluate=_measure(asked, quiet),
            limits=limits,
            called=called,
        )
        metrics = done.metrics if called is None else {**done.metrics, "base_model": called}
        result = Result(metrics, done.output if output is not None else None, done.record, _trusts=trust_remote_code)
        if model is not None and not isinstance(model, str | Path):
            loaded = _loaded(done.output, model.dtype, model.device)
            result._model = _put_into(model, loaded) if inplace else loaded
        elif output is None:
            result._model = _loaded(done.output, "auto", None)
    return result


def plan(
    recipe: RecipeLike,
    model: str | Path | PreTrainedModel | None = None,
    *,
    spill: bool = False,
    memory: str | None = None,
    gpu_memory: str | None = None,
    config_only: bool = False,
    processes: int | None = None,
    trust_remote_code: bool = False,
    allow_unknown_tensors: bool = False,
) -> Plan:
    """What a recipe will do to every linear of a model, and what it costs; computes nothing. `print` its `.table()` with rich.

    spill, memory, gpu_memory: as for `apply`
    config_only: the model is a config.json alone, or its directory, or a Hub id, of which only that file is fetched
    processes: how many torchrun will start, by default those that there are
    """
    from sparsify.compiler.memory import Limits
    from sparsify.compiler.planning import make_plan
    from sparsify.training.processes import refuse_processes

    asked = load_recipe(recipe)
    if processes is not None and processes < 1:
        raise SparsifyError(f"--processes {processes}: how many processes torchrun starts, at least 1")
    stack = ExitStack()
    try:
        spec = stack.enter_context(_on_disk(_named(asked, model), None, dense=True))
        with _allowing(trust_remote_code, allow_unknown_tensors):
            made = make_plan(asked.model_copy(update={"model": spec}), spec, config_only=config_only)
            made = replace(made, limits=Limits(memory, gpu_memory, spill, processes))
            for planned in made.training:
                refuse_processes(planned.settings, made.limits.among)
    except BaseException:
        stack.close()
        raise
    weakref.finalize(made, stack.close)  # the plan reads the checkpoint's headers when asked
    return made


def export(
    source: str | Path,
    format: str,
    output: str | Path,
    head: int | None = None,
    calibration: str | None = None,
    *,
    head_group_size: str | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
    allow_unknown_tensors: bool = False,
) -> Path:
    """Write a checkpoint in another format: sparse24, pack-quantized, gptq, dense or marlin-24. Returns the directory.

    head: 4 or 8 quantizes the output head on the way, 16 dequantizes it; head_group_size: "32", "64", "128" or "channel"
    calibration: self, file:PATH or hub:ID, the text on which the head is solved; it is rounded to nearest without
    """
    from sparsify.compiler.convert import export as convert

    if head not in (None, 4, 8, 16):
        raise SparsifyError(f"head={head}: 4 or 8 quantizes the output head, 16 dequantizes it")
    bits: Any = head
    with _allowing(trust_remote_code, allow_unknown_tensors):
        return convert(source, format, output, bits, head_group_size, quiet, calibration)


def inspect(
    source: str | Path,
    *,
    quiet: bool = False,
    trust_remote_code: bool = False,
    allow_unknown_tensors: bool = False,
) -> Inspection:
    """Check that the tensors of a checkpoint are those of its config.json, and every compressed one, and say what it holds."""
    from sparsify.formats.inspect import inspect as look

    with _allowing(trust_remote_code, allow_unknown_tensors):
        return look(source, quiet=quiet)


def evaluate(
    model: str | Path | PreTrainedModel,
    dense: str | Path | PreTrainedModel | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    sequence_length: int | Sequence[int] | None = None,
    chunks: int | None = None,
    *,
    tasks: str | Path | None = None,
    limit: int | None = None,
    preset: str | None = None,
    backend: str = "transformers",
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
    allow_unknown_tensors: bool = False,
) -> EvaluationResult:
    """Perplexity on texts and accuracy on tasks, and with `dense` the distance from it.

    text:  one or several files, or "self" for text that the dense model writes, which is also what None means without tasks
    sequence_length: tokens of a chunk, or several lengths to read every text at
    tasks: a folder of multiple-choice tasks, or one file; limit: the first so many items of each
    preset: a set of tasks of lm-evaluation-harness, `openllm-v1` or `zero-shot-7`, of which `tasks` is the folder of the data
    backend: what computes tasks, `transformers` or `vllm`, which scores no text
    """
    from sparsify.evaluation import evaluate as score

    with ExitStack() as stack:
        stack.enter_context(_allowing(trust_remote_code, allow_unknown_tensors))
        specs = [None if m is None else stack.enter_context(_on_disk(m, tokenizer)) for m in (model, dense)]
        assert specs[0] is not None
        if backend == "vllm":
            from sparsify.bench import prepare_engine

            prepare_engine(one for one in specs if one is not None)
        return score(
            specs[0], specs[1], text, sequence_length, chunks,
            tasks=tasks, limit=limit, preset=preset, backend=backend, quiet=quiet,
        )  # fmt: skip


def verify(directory: str | Path, *, quiet: bool = False) -> Verification:
    """Compare every file of a directory that sparsify has written with the SHA-256 in its manifest."""
    from sparsify.manifest import verify as compare

    return compare(directory, quiet=quiet)


def load_recipe(recipe: RecipeLike) -> Recipe:
    """A recipe from a built-in name, a file, a dict or an object, validated. Raises RecipeError."""
    from sparsify.recipe import load_recipe as load

    return load(recipe)


@contextmanager
def _allowing(code: bool, tensors: bool) -> Iterator[None]:
    """Code that comes with models, or tensors that their class does not know, are allowed inside of the block."""
    from sparsify.model.permissions import allowing_unknown, trusting

    with trusting(code), allowing_unknown(tensors):
        yield


# ---------------------------------------------------------------------------------------------------- live models


def _named(recipe: Recipe, model: Any) -> Any:
    if model is None and recipe.model is None:
        raise RecipeError(
            "the recipe names no model: add --model (in Python the argument model) with a directory, a Hub id or embedded:NAME"
        )
    return recipe.model if model is None else model


@contextmanager
def _on_disk(model: Any, tokenizer: Any, dense: bool = False) -> Iterator[str]:
    """The spec of a model: itself, or for a live one a directory that lasts as long as this. dense: it must not be compressed."""
    if isinstance(model, str | Path):
        yield str(model)
        return
    _refuse_live(model, dense)
    with _scratch() as folder:
        from sparsify.progress import without_bars

        directory = Path(folder) / "model"
        with without_bars():
            model.save_pretrained(directory)
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        yield str(directory)


@contextmanager
def _scratch() -> Iterator[str]:
    """A directory that goes away. In the cache, which is on a disk, where the temporary directory may be memory."""
    root = cache_directory() / "live"
    root.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_live(model: Any, dense: bool) -> None:
    """Name what is wrong with a live model before anything is written."""
    from transformers import PreTrainedModel

    from sparsify.runtime.module import Sparse24Linear

    if not isinstance(model, PreTrainedModel):
        raise SparsifyError(
            f"model is a {type(model).__name__}; pass a path, a hub id or a transformers model (PreTrainedModel)"
        )
    name = type(model).__name__
    ours = any(isinstance(module, Sparse24Linear) for module in model.modules())
    if (dense and ours) or (not ours and getattr(model, "is_quantized", False)):
        raise SparsifyError(f"this {name} is quantized already; pass the dense model it was made from")
    if meta := next((n for n, p in model.named_parameters() if p.is_meta), None):
        raise SparsifyError(f"this {name} is on the meta device ({meta} has no values); load its weights first")
    if model.training and any(p.requires_grad for p in model.parameters()):
        raise SparsifyError(f"this {name} is in training mode with gradients on; call model.eval() first")


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer of the directory that a live model was loaded from; None where there is none on this machine."""
    from sparsify.model.pretrained import load_tokenizer

    if not (source := getattr(model, "name_or_path", "")):
        return None
    try:
        return load_tokenizer(source, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _measure(recipe: Recipe, quiet: bool) -> Evaluate | None:
    """The `evaluation` section of a recipe as a call on the finished directory."""
    asked = recipe.evaluation
    if asked is None:
        return None
    from sparsify.evaluation import check_inputs
    from sparsify.evaluation import evaluate as score

    sizes = (asked.sequence_length, asked.chunks)
    if recipe.model is not None:  # not after hours of compressing
        check_inputs(recipe.model, asked.text, *sizes, asked.tasks, asked.limit)
    return lambda directory: score(
        directory, recipe.model, asked.text, *sizes, tasks=asked.tasks, limit=asked.limit, quiet=quiet
    ).to_json()


def _loaded(directory: Path, dtype: torch.dtype | str, device: torch.device | None) -> Any:
    from sparsify.model.pretrained import load_causal_lm
    from sparsify.progress import without_bars

    with without_bars():
        model = load_causal_lm(directory, dtype=dtype)
    return model.to(device) if device is not None else model


def _refuse_inplace(recipe: Recipe) -> None:
    if recipe.depth is not None:
        raise SparsifyError(
            "inplace=True keeps the layers of the live model, and this recipe removes some; leave it out"
        )
    if recipe.llm_compressor:
        raise SparsifyError(
            "inplace=True keeps what is not compressed of the live model, and llm-compressor changes that too; leave it out"
        )
    if recipe.export.format in ("pack-quantized", "gptq"):
        raise SparsifyError(
            f"inplace=True needs export.format sparse24 or dense; {recipe.export.format} has linears of another package"
        )


def _put_into(model: Any, compressed: Any) -> Any:
    """Give a live model the modules and tensors of its compressed copy, which is taken apart. Returns the live model."""
    import torch

    from sparsify.runtime.module import Sparse24Linear

    for name, module in list(compressed.named_modules()):
        if isinstance(module, Sparse24Linear):
            model.set_submodule(name, module)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in compressed.named_parameters(remove_duplicate=False):
            if name in parameters:
                parameters[name].copy_(parameter)
    for key in ("quantization_config", "tie_word_embeddings"):
        if hasattr(compressed.config, key):
            setattr(model.config, key, getattr(compressed.config, key))
    for key in ("hf_quantizer", "is_quantized", "quantization_method", "_is_quantized"):
        if hasattr(compressed, key):
            setattr(model, key, getattr(compressed, key))
    return model
