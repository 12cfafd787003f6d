"""What is fuzzed: each target runs one input through a reader of sparsify.

What must hold is the same for all (`run`): a result, or an error of `sparsify.errors` in a message that a person can read,
within seconds and without much memory. Each target makes in a folder what its inputs belong to, once, and gives the inputs
that sparsify itself writes, from which fuzzing starts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsify import progress
from sparsify.bench.shapes import parse_shape, shape_of_config
from sparsify.bench.targets import Target as BenchTarget
from sparsify.bench.targets import check_fits
from sparsify.bench.workload import ThroughputWorkload
from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.data.calibration import calibration_tokens
from sparsify.data.chat import conversation_rows
from sparsify.data.given import read_tokens
from sparsify.errors import SparsifyError
from sparsify.evaluation.load import load_tokenizer
from sparsify.evaluation.task_files import read_tasks
from sparsify.evaluation.text import file_chunks
from sparsify.files import read_json
from sparsify.formats.foreign import open_dense
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.formats.tensor_file import LazyTensor, write_tensors
from sparsify.formats.writer import partial_directory
from sparsify.manifest import MANIFEST, file_sha256, missing, refuse_damaged, seal, verify, write_manifest
from sparsify.matching import pattern_problem
from sparsify.memory import parse_size
from sparsify.model.checkpoint import open_checkpoint, read_header
from sparsify.native.build_cuda import parse_archs
from sparsify.recipe import Columns, dump_recipe, ignored_by, load_recipe, parse_recipe, ready_recipes
from sparsify.recipe.schema import Calibration
from sparsify.recipe.sources import parse_source, source_problem
from sparsify.report import report_on
from sparsify.search.budget import parse_budget
from sparsify.search.choices import choice_named
from sparsify.search.measure import _read as measured
from sparsify.training.loss_monitor import LossWatch
from tests.helpers import bitmask
from tests.helpers.compressed import compress, make_dense
from tests.helpers.foreign import awq, compressed_tensors, fp8, gptq, quantized_checkpoint
from tests.helpers.tiny import save_tiny, tiny_tokenizer
from tests.report.sample import sample_bench, sample_evaluations, sample_metrics, sample_search, sample_tasks

SECONDS = 10.0  # of computing for one input
NBYTES = 400_000_000  # by which one input may raise the memory of the process
LONGEST_MESSAGE = 8000  # characters; a recipe's problems are told on up to 21 lines
PEAK = Path("/proc/self/clear_refs")  # 5 written to it starts the peak of memory anew (proc(5))
CORPUS = Path(__file__).with_name("corpus")
RECIPE = "version: 1\npasses:\n  - prune: {method: magnitude}\n  - quantize: {method: rtn, bits: 4, group_size: 32}\n"

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """prepare: given an empty folder, what one input is run through, and inputs as sparsify or others write them.

    words: that mean something in its inputs
    """

    prepare: Callable[[Path], tuple[Run, list[bytes]]]
    words: tuple[str, ...] = ()


class Broken(AssertionError):
    """What must hold does not."""


def run(function: Run, data: bytes) -> bool:
    """Whether one input is accepted. Raises Broken, or what should not have been raised."""
    before, started = _memory("VmRSS"), time.process_time()
    PEAK.write_text("5")
    accepted = True
    try:
        function(data)
    except SparsifyError as error:
        accepted = False
        if not 0 < len(str(error).strip()) <= LONGEST_MESSAGE:
            raise Broken(f"a message of {len(str(error))} characters: {str(error)[:300]}") from None
    took = time.process_time() - started
    grown = _memory("VmHWM") - before
    if took > SECONDS or grown > NBYTES:
        raise Broken(f"it took {took:.1f} s and {grown / 1e6:.0f} MB")
    return accepted


def _memory(name: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most since PEAK was written (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def corpus(name: str) -> list[bytes]:
    """The inputs of a target that are kept in the repository."""
    return [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def read(data: bytes, *names: str) -> list[Any]:
    """These entries of an input that is a JSON object; of anything else, and where they are missing, None."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    return [found.get(name) if isinstance(found, dict) else None for name in names]


# ------------------------------------------------------------------------------------------------------------ recipes


def recipe(folder: Path) -> tuple[Run, list[bytes]]:
    """A recipe's YAML; what is accepted is the same when it is written and read again."""

    def accept(data: bytes) -> None:
        (folder / "recipe.yaml").write_bytes(data)
        read = load_recipe(folder / "recipe.yaml")
        if parse_recipe(dump_recipe(read)) != read:
            raise Broken("a recipe that is another one when it is written and read again")

    foreign = (Path(__file__).parent.parent / "recipe" / "llmcompressor_list.yaml").read_bytes()
    return accept, [RECIPE.encode(), foreign, *(file.read_bytes() for file in ready_recipes().values())]


def overrides(folder: Path) -> tuple[Run, list[bytes]]:
    """`--set`, one a line."""

    def accept(data: bytes) -> None:
        load_recipe("2of4-w4a16", data.decode("utf-8", "replace").split("\n"))

    lines = (
        "calibration.samples=64\npasses.prune.method=wanda",
        "solver={damping: 0.1}",
        "ignore=[lm_head]\nignore.0=re:a",
    )
    return accept, [
        line.encode() for line in (*lines, "passes.1.quantize.bits=8", "overrides=[{match: a, prune: null}]")
    ]


def plan(folder: Path) -> tuple[Run, list[bytes]]:
    """The plan of a recipe on a tiny model."""
    model = str(save_tiny(folder / "model", num_hidden_layers=2))

    def accept(data: bytes) -> None:
        make_plan(parse_recipe(data.decode("utf-8", "replace")), model)

    more = (
        "ignore: ['re:.*q_proj', 'model.layers.0.*']\nexport: {format: pack-quantized}\n",
        "overrides:\n  - match: ['*.down_proj']\n    quantize: {bits: 8, group_size: 64}\n    prune: null\n",
        "export: {format: sparse24, head: {bits: 8, group_size: 32}}\n",
        "export: {format: marlin-24}\n",
    )
    return accept, [RECIPE.encode(), *(f"{RECIPE}{one}".encode() for one in more)]


def spellings(folder: Path) -> tuple[Run, list[bytes]]:
    """Sizes, budgets, shapes, architectures, choices, sources: the name of the reader, and what it reads."""
    readers: dict[str, Callable[[str], object]] = {
        "size": lambda text: parse_size(text, "--memory"), "budget": parse_budget, "shape": parse_shape, "archs": parse_archs,
        "choice": choice_named, "source": lambda text: source_problem(text) or parse_source(text),
    }  # fmt: skip

    def accept(data: bytes) -> None:
        name, _, text = data.decode("utf-8", "replace").partition(" ")
        readers.get(name, readers["size"])(text)

    seeds = ("size 16GB", "size 1.5 MiB", "budget bits=3.5", "budget bytes=90MB", "budget speed=1.8x", "budget kl=2e-1")
    more = (
        "shape 14336x4096",
        "archs 80,9.0,sm_120",
        "choice 2:4-4",
        "source hub:allenai/c4:en:train",
        "source file:a",
    )
    return accept, [seed.encode() for seed in (*seeds, *more)]


def paths(folder: Path) -> tuple[Run, list[bytes]]:
    """What a user names as a model, a recipe, a text or tasks: the reader, and the path."""
    readers: dict[str, Callable[[str], object]] = {
        "model": open_checkpoint, "recipe": load_recipe, "tasks": read_tasks,
        "text": lambda text: file_chunks(text, tiny_tokenizer(), 4, 1),
        "source": lambda text: calibration_tokens(load_recipe({"passes": [], "calibration": {"source": text}}).calibration, None),
    }  # fmt: skip

    def accept(data: bytes) -> None:
        name, _, text = data.decode("utf-8", "replace").partition(" ")
        readers.get(name, readers["model"])(text)

    seeds = (
        "model org/name",
        "model embedded:a",
        "model a.gguf",
        "recipe 2of4",
        "recipe ~nobody/a.yaml",
        "tasks file:a",
        "text ~/a",
    )
    return accept, [seed.encode() for seed in (*seeds, "source file:~a/b.txt", "source self", "text " + "a/" * 150)]


def patterns(folder: Path) -> tuple[Run, list[bytes]]:
    """A pattern of a list of modules on the first line, names on the others."""

    def accept(data: bytes) -> None:
        pattern, *names = data.decode("utf-8", "replace").split("\n")
        if not (pattern.startswith("re:") and pattern_problem(pattern[3:])):
            for name in names[:20]:
                ignored_by(name, [pattern])

    seeds = (
        "*.mlp.*\nmodel.layers.0.mlp.up_proj",
        "re:^model\\.layers\\.(0|1[0-2]?)\\..*(?<!q)_proj$\nmodel.layers.10.k_proj",
    )
    more = ("re:(a+)+$\naaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "[!a]?[b-c]*\nlm_head", "re:(?P<x>a)(?P=x){2,3}|\\Z\naaa")
    return accept, [seed.encode() for seed in (*seeds, *more)]


# -------------------------------------------------------------------------------------------------------- checkpoints

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FOREIGN: dict[str, Callable[[], tuple[Any, Any]]] = {
    "ct-int4": lambda: compressed_tensors("pack-quantized", **INT4),
    "ct-asymmetric": lambda: compressed_tensors("pack-quantized", **{**INT4, "symmetric": False}),
    "ct-ordered": lambda: compressed_tensors("pack-quantized", **INT4, actorder="group"),
    "ct-int8": lambda: compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"),
    "ct-block": lambda: compressed_tensors(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]
    ),
    "ct-nvfp4": lambda: compressed_tensors(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
    "autogptq": lambda: ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}, gptq()),
    "gptq-ordered": lambda: (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}, gptq(order=True)
    ),
    "awq": lambda: ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq()),
    "fp8": lambda: ({"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8((32, 32))),
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "sparse24": {"bits": 4}, "pack-quantized": {"bits": 4, "pattern": "dense"}, "gptq": {"bits": 4, "pattern": "dense"},
    "marlin-24": {"bits": 4, "scale_dtype": torch.float16, "group_size": 0},
}  # fmt: skip


@cache
def formats(folder: Path) -> dict[str, Path]:
    """A tiny checkpoint of every format, by name; its config.json lies in `kept.json` too."""
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    dense = make_dense("llama", folder / "dense", **small)
    made = {"dense": dense}
    for name, scheme in OWN.items():
        made[name] = compress(dense, folder / name, name, **{"group_size": 32, **scheme})
    for kind in ("none", "int8"):
        made[f"bitmask-{kind}"] = folder / f"bitmask-{kind}"
        bitmask.checkpoint(dense, made[f"bitmask-{kind}"], kind)
    for name, of in FOREIGN.items():
        made[name] = folder / name
        quantized_checkpoint(made[name], *of(), num_hidden_layers=1)
    for directory in made.values():
        shutil.copyfile(directory / "config.json", directory / "kept.json")
    return made


def configs(directories: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: json.loads((directory / "kept.json").read_text()) for name, directory in directories.items()}


def whole(directory: Path) -> None:
    """Every tensor of a checkpoint, as it is compressed and as it is dequantized."""
    opened = open_compressed(directory)
    for module in opened.modules:
        opened.linear(module)
        opened.dtype(module)
    opened.dense_shapes()
    dense = open_dense(directory)
    for name in dense.names():
        if len(dense.tensor(name).shape) == 2:
            dense.first_rows(name, 5)


def changed(directories: dict[str, Path], data: bytes) -> tuple[Path, Any]:
    """The checkpoint that an input is about, its config.json replaced where the input has another one, and the rest of the
    input."""
    name, config, quantization, rest = read(data, "of", "config", "quantization", "rest")
    directory = directories.get(name) if isinstance(name, str) else None
    directory = directory or directories["sparse24"]
    found = json.loads((directory / "kept.json").read_text())
    if quantization is not None:
        found["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(found if config is None else config))
    return directory, rest


def quantization(folder: Path) -> tuple[Run, list[bytes]]:
    """The quantization_config of every format, with all tensors read."""
    directories = formats(folder.parent / "formats")
    seeds = [
        {"of": name, "quantization": found.get("quantization_config")} for name, found in configs(directories).items()
    ]
    return lambda data: whole(changed(directories, data)[0]), list(map(as_json, seeds))


def config(folder: Path) -> tuple[Run, list[bytes]]:
    """The whole config.json of every format, compared with the tensors and inspected; and as plans and benchmarks read it."""
    directories, asked = formats(folder.parent / "formats"), parse_recipe(RECIPE)

    def accept(data: bytes) -> None:
        directory, _ = changed(directories, data)
        inspect(directory, quiet=True)
        if directory.name == "dense":
            make_plan(asked, str(directory))
        opened = open_checkpoint(directory)
        shape_of_config(opened.spec, opened.config)
        check_fits(BenchTarget("a", directory, "dense", 1), None, ThroughputWorkload(input_len=8, output_len=8))

    seeds = [{"of": name, "config": found} for name, found in configs(directories).items()]
    return accept, list(map(as_json, seeds))


def tensors(folder: Path) -> tuple[Run, list[bytes]]:
    """Bytes of the weights of every format changed at some offsets, and the file cut."""
    directories = formats(folder.parent / "formats")
    kept = {name: (path / "model.safetensors").read_bytes() for name, path in directories.items()}

    def accept(data: bytes) -> None:
        directory, rest = changed(directories, data)
        name = next(name for name, path in directories.items() if path == directory)
        content = bytearray(kept[name])
        changes = rest if isinstance(rest, list) else []
        for at, value in zip(changes[::2], changes[1::2], strict=False):
            if isinstance(at, int) and isinstance(value, int):
                content[at % len(content)] = value % 256
        if len(changes) % 2 and isinstance(changes[-1], int):
            del content[changes[-1] % len(content) :]
        (directory / "model.safetensors").write_bytes(content)
        try:
            whole(directory)
        finally:
            (directory / "model.safetensors").write_bytes(kept[name])

    seeds = [{"of": name, "rest": [8, 65, 2000, 3, 60_000, 255, 70_000]} for name in directories]
    return accept, list(map(as_json, [*seeds, *({"of": name, "rest": [5_000, 255]} for name in directories)]))


def header(folder: Path) -> tuple[Run, list[bytes]]:
    """The header of a safetensors file, and one that is the whole file."""
    model = save_tiny(folder / "model", num_hidden_layers=1)
    file = model / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    body = content[8 + length :]

    def accept(data: bytes) -> None:
        bare = data.startswith(b"file")
        file.write_bytes(data[4:] if bare else len(data).to_bytes(8, "little") + data + body)
        read_header(file)
        for name in (opened := open_checkpoint(model)).names():
            if len(opened.tensor(name).shape):
                opened.first_rows(name, 2)

    return accept, [content[8 : 8 + length], b"file" + content[:400], b"file\x02\0\0\0\0\0\0\0{}", b"{}"]


def index(folder: Path) -> tuple[Run, list[bytes]]:
    """model.safetensors.index.json beside two shards, and the files that say how older quantized weights are to be read."""
    model = save_tiny(folder / "model", num_hidden_layers=1)
    opened = open_checkpoint(model)
    names = opened.names()
    weights = {name: opened.tensor(name) for name in names}
    (model / "model.safetensors").unlink()
    half = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(half.values())):
        lazy = {name: LazyTensor.of(weights[name]) for name in names if half[name] == file}
        write_tensors(model / file, lazy, {})

    def accept(data: bytes) -> None:
        (model / "model.safetensors.index.json").write_bytes(data)
        for name in (found := open_dense(model)).names():
            found.tensor(name)
        found.digests()

    return accept, [as_json({"metadata": {"total_size": 1}, "weight_map": half})]


# ------------------------------------------------------------------------------------------------------------ records


def report(folder: Path) -> tuple[Run, list[bytes]]:
    """The records that the report draws: metrics.json, run.json, evaluation, benchmark, search."""
    directory = save_tiny(folder / "model", num_hidden_layers=1)
    names = ("metrics", "run", "evaluation", "bench", "search")

    def accept(data: bytes) -> None:
        metrics, ran, *others = read(data, *names)
        (directory / "metrics.json").write_text(json.dumps(metrics))
        (directory / "run.json").write_text(json.dumps(ran))
        files = [directory / f"{name}-given.json" for name in names[2:]]
        for file, other in zip(files, others, strict=True):
            file.write_text(json.dumps(other))
        given = [read_json(file) if other is not None else None for file, other in zip(files, others, strict=True)]
        report_on(directory, folder / "report.html", *given[:2], search=given[2])

    metrics = {**sample_metrics(1), "base_model": str(directory)}
    depth = {
        "method": "angular", "layers_before": 3, "layers_after": 2, "layers": [[0, 0], [2, 2]], "removed": [[1, "attention"]],
        "measure": "angular distance", "matrix": [[0.1, 0.2, 0.3], [0.1, 0.2], [0.1]], "first": 1, "count": 1, "score": 0.1,
        "parameters": {"before": 1000, "after": 700}, "speedup_estimate": 1.4,
    }  # fmt: skip
    training = {
        "kind": "distill", "steps": 4, "rows": 8, "tokens": 100, "teacher": "a", "first": {"loss": 1.2, "kl": 0.7},
        "last": {"loss": 0.5, "kl": 0.3}, "curve": [[1, 1.2], [4, 0.5]],
    }  # fmt: skip
    head = {
        "module": "lm_head",
        "shape": [96, 64],
        "bits": 8,
        "group_size": 32,
        "relative_error": 0.1,
        "pattern": "dense",
    }
    ran = {"seconds": 3.2, "peak_memory_bytes": 10**9, "sparsify": "0.1", "torch": "2"}
    found = sample_search(1)
    found["units"] = found["units"][:2]
    seeds = [
        {"metrics": metrics, "run": ran, "evaluation": {**sample_evaluations()[0], **sample_tasks()}},
        {"metrics": {**metrics, "depth": depth, "training": [training], "head": head}, "bench": sample_bench()},
        {"metrics": {**metrics, "layers": []}, "search": found, "evaluation": sample_evaluations()},
    ]
    return accept, list(map(as_json, seeds))


def resume(folder: Path) -> tuple[Run, list[bytes]]:
    """The records of an interrupted run, which `--resume` reads: those of the writer, of blocks and of the arithmetic."""
    model = str(save_tiny(folder / "model", num_hidden_layers=1, dtype=torch.bfloat16))
    asked = parse_recipe(RECIPE)
    work, kept = partial_directory(folder / "out"), folder / "kept"
    interrupted(asked, model, folder / "out", kept)
    texts = {str(file.relative_to(kept)): file.read_text() for file in sorted(kept.rglob("*.json"))}

    def accept(data: bytes) -> None:
        files, metadata = read(data, "files", "metadata")
        for path in (work, folder / "out"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kept, work)
        for name, value in files.items() if isinstance(files, dict) else ():
            if name in texts:
                (work / name).write_text(json.dumps(value))
        part = next(iter(sorted(work.glob("parts*/*.safetensors"))))
        if metadata is not None:
            replace_metadata(part, {"sparsify": json.dumps(metadata)})
        for sums in work.rglob(MANIFEST):  # who changes a file on purpose changes its digest too
            files = [file for file in sums.parent.iterdir() if file.is_file() and file != sums]
            write_manifest(sums.parent, {file.name: {file_sha256(file)} for file in files})
        apply(asked, model, folder / "out", resume=True, quiet=True)

    part = next(iter(sorted(kept.glob("parts*/*.safetensors"))))
    record = json.loads(read_header(part)[1]["sparsify"])
    seeds: list[Any] = [{"files": {name: json.loads(text)}} for name, text in texts.items()]
    return accept, list(map(as_json, [*seeds, {"metadata": record}]))


def interrupted(recipe: Any, model: str, output: Path, kept: Path) -> None:
    """Keep the work directory of a run as it is when all parts are finished and nothing is published yet."""
    from sparsify.formats.writer import CheckpointWriter

    finish = CheckpointWriter.finish

    def copy(writer: CheckpointWriter, *_: object, **__: object) -> Path:
        shutil.copytree(writer.work, kept)
        raise KeyboardInterrupt

    CheckpointWriter.finish = copy  # type: ignore[method-assign,assignment]
    try:
        apply(recipe, model, output, quiet=True)
    except KeyboardInterrupt:
        pass
    finally:
        CheckpointWriter.finish = finish  # type: ignore[method-assign]


def replace_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Another `__metadata__` in the header of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = {**json.loads(content[8 : 8 + length]), "__metadata__": metadata}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def manifest(folder: Path) -> tuple[Run, list[bytes]]:
    """SHA256SUMS of a finished directory and of the folders of a run."""
    directory = folder / "directory"
    (directory / "inside").mkdir(parents=True)
    for name in ("a.json", "b c.txt", "inside/d.bin"):
        (directory / name).write_text(name)
    seal(directory)

    def accept(data: bytes) -> None:
        (directory / MANIFEST).write_bytes(data)
        verify(directory, quiet=True).to_json()
        missing(directory)
        refuse_damaged(directory)

    return accept, [(directory / MANIFEST).read_bytes()]


def measurements(folder: Path) -> tuple[Run, list[bytes]]:
    """What a search has measured of a block, which `--resume` reads."""

    def accept(data: bytes) -> None:
        (folder / "block-0000.json").write_bytes(data)
        measured([folder / "block-0000.json"])

    return accept, [as_json({"a.q_proj": {"2:4-4": {"kl": 0.1, "error": None}, "dense-16": {"kl": 0.0, "error": 0.0}}})]


def losses(folder: Path) -> tuple[Run, list[bytes]]:
    """The losses that a training run remembers, which `--resume` reads."""

    def accept(data: bytes) -> None:
        (folder / "watch.json").write_bytes(data)
        watch = LossWatch.from_json(read_json(folder / "watch.json"))
        watch.add({"loss": 1.0})
        watch.summary()

    watch = LossWatch(2)
    for loss in (3.0, 2.5, 2.0):
        watch.add({"loss": loss, "kl": loss / 2})
    return accept, [as_json(watch.to_json())]


# -------------------------------------------------------------------------------------------------------------- texts


def text(folder: Path) -> tuple[Run, list[bytes]]:
    """Calibration text, conversations and evaluation text: the suffix of the file on the first line, then the file."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"

    def accept(data: bytes) -> None:
        suffix, _, content = data.partition(b"\n")
        known = {".txt", ".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".safetensors"}
        given = suffix.decode("utf-8", "replace")
        file = folder / f"text{given if given in known else '.txt'}"
        file.write_bytes(content)
        if file.suffix == ".safetensors":
            read_tokens(file, 1, 4)
            return
        asked = Calibration(source=f"file:{file}", samples=1, sequence_length=4)
        readers: list[Callable[[], object]] = [
            lambda: calibration_tokens(asked, tokenizer, quiet=True, vocabulary=96),
            lambda: conversation_rows(f"file:{file}", None, tokenizer, 64, None, 0, 96),
            lambda: conversation_rows(
                f"file:{file}", Columns(prompt="question", answer="answer"), tokenizer, 64, 3, 0, 96
            ),
            lambda: file_chunks(file, tokenizer, 4, 1, 96),
        ]
        refused = None
        for one in readers:
            try:
                one()
            except SparsifyError as error:
                refused = error
        if refused is not None:
            raise refused

    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    lines = [{"text": "abcdefgh"}, {"messages": talk}, {"question": "a", "answer": "b"}, {"messages": json.dumps(talk)}]
    seeds = [b".jsonl\n" + as_json(line) + b"\n" for line in lines]
    seeds += [b".txt\nabc def ghi\n", b".txt\n\xff\xfea\0b\0", b".safetensors\n" + _tokens(folder)]
    return accept, [*seeds, *(b".parquet\n" + one for one in _parquet(folder, lines))]


def _tokens(folder: Path) -> bytes:
    write_tensors(folder / "t.safetensors", {"tokens": LazyTensor.of(torch.arange(8).reshape(2, 4))}, {})
    return (folder / "t.safetensors").read_bytes()


def _parquet(folder: Path, records: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    for record in records[:3]:
        parquet.write_table(pa.Table.from_pylist([record]), folder / "t.parquet", store_schema=False)
        yield (folder / "t.parquet").read_bytes()


def tokenizer(folder: Path) -> tuple[Run, list[bytes]]:
    """The files beside the weights that say how text becomes tokens: the name of the file on the first line, then the file."""
    model = save_tiny(folder / "model", num_hidden_layers=1)
    names = (
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    kept = {name: (model / name).read_bytes() for name in names if (model / name).exists()}
    kept["tokenizer_config.json"] = as_json(
        {
            **json.loads(kept["tokenizer_config.json"]),
            "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        }
    )
    talk = folder / "talk.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    talk.write_text(json.dumps({"messages": messages}))

    def accept(data: bytes) -> None:
        first, _, content = data.partition(b"\n")
        for name in names:
            (model / name).unlink(missing_ok=True)
        for name, text in kept.items():
            (model / name).write_bytes(text)
        name = first.decode("utf-8", "replace")
        (model / (name if name in names else names[0])).write_bytes(content)
        tokenizer = load_tokenizer(model)
        calibration_tokens(Calibration(source=f"file:{talk}", samples=1, sequence_length=2), tokenizer, quiet=True)

    seeds = [name.encode() + b"\n" + text for name, text in kept.items()]
    return accept, [*seeds, b"chat_template.jinja\n{{ messages[0]['content'] }}", b"special_tokens_map.json\n{}"]


def tasks(folder: Path) -> tuple[Run, list[bytes]]:
    """A file of multiple-choice questions."""

    def accept(data: bytes) -> None:
        (folder / "tasks.jsonl").write_bytes(data)
        for task in read_tasks(folder / "tasks.jsonl"):
            task.definition()
            _ = task.chance

    items = [
        {"question": "a", "choices": ["b", "c"], "answer": 1},
        {"context": "a", "endings": ["b", "c", "d"], "answer": 0},
    ]
    return accept, [as_json(item) for item in items] + [b"\n".join(as_json(items[0]) for _ in range(2))]


SCHEMA_WORDS = (
    "version", "model", "calibration", "source", "sources", "samples", "sequence_length", "seed", "solver", "damping",
    "error_propagation", "coordinate_descent", "passes", "prune", "quantize", "method", "pattern", "2:4", "sparsegpt", "wanda",
    "magnitude", "alps", "gptq", "rtn", "bits", "group_size", "symmetric", "ignore", "overrides", "match", "export", "format", "head",
    "sparse24", "pack-quantized", "marlin-24", "dense", "distill", "tune", "lora", "finetune", "depth", "target", "ratio", "layers",
    "learning_rate", "tokens", "loss", "kl", "evaluation", "llm_compressor", "null", "self", "file:", "hub:", "re:", "basis",
)  # fmt: skip
CONFIG_WORDS = (
    "quant_method", "compressed-tensors", "config_groups", "group_0", "weights", "num_bits", "group_size", "strategy", "group",
    "channel", "tensor", "block", "block_structure", "symmetric", "type", "int", "float", "targets", "Linear", "ignore", "lm_head",
    "format", "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
    "sparsity_config", "sparse-24-bitmask", "dense", "gptq", "awq", "fp8", "sparse24", "bits", "sym", "desc_act", "checkpoint_format",
    "weight_block_size", "modules_to_not_convert", "dynamic", "zero_point", "version", "transform_config", "text_config", "dtype",
    "torch_dtype", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "model_type", "quantization_config",
    "of", "rest", "re:", "actorder",
)  # fmt: skip

TARGETS: dict[str, Target] = {
    "recipe": Target(recipe, SCHEMA_WORDS),
    "overrides": Target(overrides, (*SCHEMA_WORDS, "=", ".", "passes.0.", "overrides.0.")),
    "plan": Target(plan, (*SCHEMA_WORDS, "q_proj", "model.layers.0", "*.mlp.*")),
    "spellings": Target(spellings, ("GB", "MiB", "bits=", "kl=", "speed=", "x", "sm_", "²", "٣", "e", "dense-16")),
    "paths": Target(paths, ("~", "~root", "file:", "hub:", "embedded:", ".gguf", "/", "..", "\0", "a" * 300, ".jsonl")),
    "patterns": Target(patterns, ("(?:", "(?=", "(?<!", "){1,9}", "[^", "\\b", "\\p{L}", "(?i)", "*", "+?", "(?R)", "(?1)", "{e}")),
    "quantization": Target(quantization, CONFIG_WORDS),
    "config": Target(config, CONFIG_WORDS),
    "tensors": Target(tensors, ("of", "rest")),
    "header": Target(header, ("__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16", "F8_E4M3", "I64", "BOOL", "U16", "F4")),
    "index": Target(index, ("metadata", "weight_map", "total_size", "model-00001-of-00002.safetensors", "../a.safetensors")),
    "report": Target(report, ("layers", "sizes", "perplexity", "units", "choices", "texts", "tasks", "failure", "models", "<b>")),
    "resume": Target(resume, ("files", "writer.json", "metadata", "packed", "plain", "hidden", "layers", "skipped", "module")),
    "manifest": Target(manifest, ("a.json", "  ", "\\\\", "\\n", "..", "/", "inside/", "0" * 64)),
    "measurements": Target(measurements, ("kl", "error", "2:4-4")),
    "losses": Target(losses, ("window", "losses", "smoothed", "loss")),
    "text": Target(text, (".jsonl", ".parquet", "messages", "text", "role", "content", "assistant", "question", "answer", "PAR1")),
    "tokenizer": Target(tokenizer, ("chat_template", "tokenizer_class", "added_tokens_decoder", "eos_token", "{{", "{%", "range(")),
    "tasks": Target(tasks, ("question", "choices", "context", "endings", "answer")),
}  # fmt: skip


def prepare(name: str, folder: Path) -> tuple[Run, list[bytes], tuple[str, ...]]:
    """A target ready to run: its function, the inputs to start from, its words."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with progress.silenced(True):
        function, seeds = TARGETS[name].prepare(folder)
    return function, [*seeds, *corpus(name)], TARGETS[name].words
