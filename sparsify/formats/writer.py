"""Writing checkpoint directories: block by block, so that a killed run can go on, and under the final name only when whole."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify._version import __version__
from sparsify.distributed import is_main
from sparsify.errors import CheckpointError
from sparsify.files import PARTIAL, atomic_write, beside, publish, read_json, write_json
from sparsify.formats import get_format
from sparsify.formats.reader import HEADS, is_head, natural, tensors_of
from sparsify.formats.scheme import Format, ModuleScheme
from sparsify.formats.tensor_file import LazyTensor, read_tensor, write_shards, write_tensors, writing
from sparsify.manifest import UNSEALED, keep, missing, refuse_damaged, seal, unsound
from sparsify.model.checkpoint import Checkpoint, TensorInfo, read_header
from sparsify.model.decoder import meta_model
from sparsify.model.experts import FusedTensor, is_expert, stored_fused
from sparsify.model.linear import LinearWeights
from sparsify.model.sidecars import secrets
from sparsify.phases import phase
from sparsify.progress import say, stage, warn

RECORD = "writer.json"
FINAL = UNSEALED  # the finished directory until it gets its name
COMPLETE = "complete"  # a file that says that the finished directory was about to get it
CONFIG_FILES = ("quantize_config.json", "quant_config.json")  # of AutoGPTQ and GPTQModel: what the source was
STALE = ("quantization_config", "compression_config", "sparsity_config", "torch_dtype", "_name_or_path")


@dataclass(frozen=True)
class _Record:
    """What a part file says of the linears in it, in the metadata of its header.

    packed: linears in the encoding of the format; plain: linears that were written as a dense `weight`, whose codes and
    scales are kept beside it so that nothing is lost for a resumed run; hidden: names of those extra tensors;
    reasons: why linears stayed dense although they were to be packed.
    """

    format: str
    packed: dict[str, ModuleScheme]
    plain: dict[str, ModuleScheme]
    hidden: list[str]
    reasons: dict[str, str]

    def to_metadata(self) -> dict[str, str]:
        return {"sparsify": json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, file: Path, metadata: Mapping[str, str]) -> _Record:
        try:
            record = json.loads(metadata["sparsify"])
            for key in ("packed", "plain"):
                record[key] = {module: _scheme(scheme) for module, scheme in record[key].items()}
            whole = cls(**record)
            if not (
                isinstance(whole.hidden, list) and isinstance(whole.reasons, dict) and isinstance(whole.format, str)
            ):
                raise TypeError
            if not all(isinstance(text, str) for text in (*whole.hidden, *whole.reasons.values())):
                raise TypeError
            return whole
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            work = file.parent.parent
            raise CheckpointError(f"{file} is no part of a sparsify run; remove {work} and start again") from None


def _scheme(given: Mapping[str, Any]) -> ModuleScheme:
    """A scheme as `to_metadata` wrote it. Raises TypeError or ValueError for anything else."""
    outputs, inputs = given["shape"]
    scheme = ModuleScheme(**{**given, "shape": (outputs, inputs)})
    if not all(isinstance(number, int) for number in (scheme.bits, scheme.group_size, outputs, inputs)):
        raise TypeError
    if not isinstance(scheme.pattern, str) or not isinstance(scheme.symmetric, bool):
        raise TypeError
    return scheme


class CheckpointWriter:
    """Writes a checkpoint directory in parts that survive a kill.

    Everything happens in `work`, which is `output` + ".partial" beside it; `output` itself appears in one rename at
    the end of `finish`. The same parts give the same bytes, in whatever order and by however many runs they came.

    source: the dense model, whose config.json and tokenizer the result carries.
    resume: go on with the finished parts of an earlier run; without it such parts are refused.
    identity: any text that must be equal for a run to be resumed, such as the recipe.
    inputs: the digest of every file that the run reads, by name; they must be equal too.
    """

    def __init__(
        self,
        output: str | Path,
        format: str,
        source: Checkpoint,
        resume: bool = False,
        identity: str = "",
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.output = Path(output)
        self.format: Format = get_format(format)
        self.source = source
        self.work = partial_directory(self.output)
        self.stage = max((int(d.name.rpartition("-")[2]) for d in self.work.glob("parts-*")), default=0)
        if is_published(self.output):
            say(f"{self.work} was left behind by the run that wrote {self.output}; it is removed")
            self.discard()
        if self.output.exists():
            raise CheckpointError(f"{self.output} exists already; choose another output or remove it first")
        self._refuse_foreign()
        self._sidecars()  # what is wrong with these files is better known before a run than after it
        self.inputs = dict(inputs or {})
        record = {"version": __version__, "format": format, "identity": identity, "inputs": self.inputs}
        finished = list(self._parts.glob("*.safetensors"))
        if finished and not resume:
            raise CheckpointError(
                f"{self.work} holds {len(finished)} finished parts of an interrupted run; "
                "continue it with --resume, or remove that directory"
            )
        if finished or (resume and (self.work / RECORD).exists()):
            self._refuse_other_run(record)
            if is_main():
                with stage(f"comparing what {self.work} holds with its manifests"):
                    self._check_finished()
        with writing(self.work):
            self._parts.mkdir(parents=True, exist_ok=True)
            for stale in self._parts.glob(f".*{PARTIAL}"):
                stale.unlink()
            write_json(self.work / RECORD, record)

    def _refuse_foreign(self) -> None:
        """CheckpointError where the work directory is none of ours: `finish` removes it with everything that is in it."""
        if not self.work.is_dir() or (self.work / RECORD).exists():
            return
        ours = re.compile(
            rf"parts|\.{re.escape(RECORD)}\..*"
        )  # what a run leaves that was killed before it wrote its record
        if foreign := sorted(entry.name for entry in self.work.iterdir() if not ours.fullmatch(entry.name)):
            raise CheckpointError(
                f"{self.work} is no work directory of sparsify (it holds {foreign[0]}); move it away, or choose another output"
            )

    def _refuse_other_run(self, record: Mapping[str, Any]) -> None:
        """CheckpointError where the work directory is not of this run, or where the files that it reads have changed since."""
        found = _read_record(self.work)
        for key, what in (("version", "version of sparsify"), ("format", "format"), ("identity", "recipe")):
            if record[key] != found.get(key):
                raise CheckpointError(
                    f"{self.work} was begun with another {what}; resume with the same one, or remove that directory"
                )
        if problem := _changed(found.get("inputs"), self.inputs):
            raise CheckpointError(
                f"{self.work} was begun with another source: {problem}; put it back as it was, or remove that directory"
            )

    def _check_finished(self) -> None:
        """Remove parts that are not what was written, so that they are made again; CheckpointError for other files."""
        for folder in (self.work, self.work / "notes", *sorted(self.work.glob("training-*"))):
            refuse_damaged(folder)
        while self.stage and (damaged := [*unsound(self._parts, "*.safetensors"), *missing(self._parts)]):
            say(f"{damaged[0]} is damaged or gone; training {self.stage} is concluded again")
            shutil.rmtree(self._parts)
            self.stage = max(0, self.stage - 1)
        if not self.stage:
            for file in unsound(self._parts, "*.safetensors"):
                say(f"{file} is damaged; it is made again")
                file.unlink()

    def refuse_changed(self, now: Mapping[str, str]) -> None:
        """CheckpointError where one of these files that the run has read is not the one any more that it began with."""
        if problem := _changed({name: self.inputs.get(name) for name in now}, now):
            raise CheckpointError(
                f"the source was changed while it was read: {problem}; remove {self.work} and start again"
            )

    @property
    def _parts(self) -> Path:
        """The parts as the last finished stage left them."""
        return self.work / (f"parts-{self.stage}" if self.stage else "parts")

    @contextmanager
    def next_stage(self) -> Iterator[Callable[[str, Mapping[str, LinearWeights], Mapping[str, Tensor]], None]]:
        """Write every part again, as training changed it. Yields what writes one; the new parts count when all are there.

        A kill before that leaves the parts of the stage before, to which the same stage can be applied again.
        """
        after = self.work / f"parts-{self.stage + 1}"
        aside = self.work / f".{after.name}{PARTIAL}"
        with writing(aside):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        yield partial(self._write, aside)
        if {file.stem for file in aside.glob("*.safetensors")} != self.parts():
            raise CheckpointError(f"{aside} holds other parts than {self._parts}; this is a bug in sparsify")
        with writing(after):
            publish(aside, after)
        self.stage += 1

    def parts(self) -> set[str]:
        """Names of the finished parts."""
        return {file.stem for file in self._parts.glob("*.safetensors")}

    def write_part(self, part: str, linears: Mapping[str, LinearWeights], tensors: Mapping[str, Tensor]) -> None:
        """Write one part, such as one decoder block.

        linears: compressed linears by module name; tensors: all other tensors of the part by full name.
        A linear that the format cannot hold is written dense and listed in `dense_modules`.
        """
        with phase("writing"):
            self._write(self._parts, part, linears, tensors)

    def _write(
        self, directory: Path, part: str, linears: Mapping[str, LinearWeights], tensors: Mapping[str, Tensor]
    ) -> None:
        encoded: dict[str, Tensor] = {}
        record = _Record(self.format.name, {}, {}, [], {})
        for module, linear in linears.items():
            linear.validate(module)
            reason = self.format.supports(linear)
            if reason is None and self.format.suffixes:
                record.packed[module] = ModuleScheme.of(linear)
                new = self.format.encode(linear)
            else:
                record.plain[module] = ModuleScheme.of(linear)
                record.reasons.update({module: reason} if reason else {})
                extra = {"codes": linear.codes, "scale": linear.scale, "zero_point": linear.zero_point}
                kept = {suffix: tensor for suffix, tensor in extra.items() if tensor is not None}
                record.hidden.extend(f"{module}.{suffix}" for suffix in kept)
                new = {**get_format("dense").encode(linear), **kept}
            encoded |= {f"{module}.{suffix}": tensor for suffix, tensor in new.items()}
        for name in sorted(set(encoded) & set(tensors)):
            raise CheckpointError(f"part {part} holds {name} twice, as a compressed linear and as a plain tensor")
        file = directory / self._file(part).name
        aside = file.with_name(f".{file.name}.{os.getpid()}{PARTIAL}")
        lazy = {name: LazyTensor.of(tensor) for name, tensor in {**encoded, **tensors}.items()}
        try:
            digest = write_tensors(aside, lazy, record.to_metadata())
            with writing(file):
                keep(aside, file, digest)
        finally:
            aside.unlink(missing_ok=True)

    def read_part(self, part: str) -> tuple[dict[str, LinearWeights], dict[str, Tensor]]:
        """Give back what `write_part` was given, to the bit. A 2:4 linear in dense format keeps its codes too."""
        file = self._file(part)
        infos, metadata = read_header(file)
        record = _Record.from_metadata(file, metadata)
        linears: dict[str, LinearWeights] = {}
        taken: set[str] = set()
        for module, scheme in {**record.packed, **record.plain}.items():
            mine = tensors_of(module, infos, self.format.suffixes | {"weight", "codes", "scale", "zero_point"})
            taken |= {f"{module}.{suffix}" for suffix in mine}
            tensors = {suffix: read_tensor(file, f"{module}.{suffix}") for suffix in mine}
            if module in record.packed:
                linears[module] = self.format.decode(module, tensors, scheme)
            else:
                linears[module] = _plain_linear(module, tensors, scheme)
        return linears, {name: read_tensor(file, name) for name in infos if name not in taken}

    def dense_modules(self) -> dict[str, str]:
        """Linears that were to be packed and had to stay dense, with the reason."""
        return {module: reason for _, record, _ in self._records() for module, reason in record.reasons.items()}

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of every tensor that the finished parts will put into the checkpoint, by name."""
        return {n: i.nbytes for _, record, infos in self._records() for n, i in infos.items() if n not in record.hidden}

    def linears(self) -> dict[str, ModuleScheme]:
        """The compressed linears of the finished parts, those too that are written as a dense weight."""
        return {module: s for _, record, _ in self._records() for module, s in (record.packed | record.plain).items()}

    def linear_bytes(self) -> dict[str, int]:
        """Bytes of each compressed linear; a bias, which is never compressed, is not counted."""
        found = dict.fromkeys(self.linears(), 0)
        for name, nbytes in self.tensor_bytes().items():
            module, _, suffix = name.rpartition(".")
            if module in found and suffix != "bias":
                found[module] += nbytes
        return found

    def discard(self) -> None:
        """Remove everything that was written so far. What cannot be removed is named, and is no error."""
        last = {RECORD, COMPLETE}  # what says whose directory this is, should the removal be killed
        with suppress(OSError):
            for entry in self.work.iterdir() if self.work.is_dir() else ():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name not in last:
                    entry.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        if self.work.exists():
            warn(f"{self.work} could not be removed; remove it")

    def finish(
        self,
        config_updates: Mapping[str, Any] | None = None,
        extra_files: Mapping[str, str | bytes] | None = None,
        measure: Callable[[Path], Mapping[str, str | bytes]] | None = None,
    ) -> Path:
        """Merge the parts, add config.json, the files beside the weights and `extra_files`, and let `output` appear.

        A kill at any moment leaves either the parts, so that `finish` can be called again, or the finished directory.
        measure: is given the directory before it appears and returns files that take the place of `extra_files`.
        """
        final = self.work / FINAL
        shutil.rmtree(final, ignore_errors=True)
        with writing(final):
            final.mkdir()
        modules, tensors, linears = self._collect()
        digests = write_shards(final, tensors)
        config = self._config(modules, tensors, linears)
        config.update(config_updates or {})
        if behind := secrets(self.source.directory):
            say(f"left out, as it looks like a credential: {', '.join(behind)}")
        with writing(final):
            write_json(final / "config.json", config, allow_nan=True)
            if self.format.config_file is not None and "quantization_config" in config:
                write_json(final / self.format.config_file, config["quantization_config"])
            for name, sidecar in self._sidecars().items():
                (final / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sidecar, final / name)
            _write_files(final, extra_files or {})
        measured = {} if measure is None else measure(final)
        with writing(final):
            _write_files(final, measured)
            seal(final, digests)
            if self.output.exists():
                raise CheckpointError(f"{self.output} appeared meanwhile; remove it and continue with --resume")
            atomic_write(self.work / COMPLETE, "")
            publish(final, self.output)
        self.discard()
        return self.output

    def _sidecars(self) -> dict[str, Path]:
        beside = self.source.sidecar_files(apart_from=(self.output, self.work))
        return {name: file for name, file in beside.items() if name not in CONFIG_FILES}

    def _file(self, part: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", part):
            raise CheckpointError(f"part name {part!r} must consist of letters, digits, '.', '_' and '-'")
        return self._parts / f"{part}.safetensors"

    def _records(self) -> Iterator[tuple[Path, _Record, dict[str, TensorInfo]]]:
        for part in sorted(self.parts(), key=natural):
            file = self._file(part)
            infos, metadata = read_header(file)
            yield file, _Record.from_metadata(file, metadata), infos

    def _collect(self) -> tuple[dict[str, ModuleScheme], dict[str, LazyTensor], dict[str, ModuleScheme]]:
        """All parts together: packed modules, tensors in order of parts, linears that were packed or written plainly."""
        modules: dict[str, ModuleScheme] = {}
        tensors: dict[str, LazyTensor] = {}
        linears: dict[str, ModuleScheme] = {}
        for file, record, infos in self._records():
            modules |= record.packed
            linears |= record.packed | record.plain
            for name in sorted(set(infos) - set(record.hidden), key=natural):
                if name in tensors:
                    problem = f"{name} is in two parts, one of them {file.name}"
                    raise CheckpointError(f"{problem}; remove {self.work} and start again")
                info = infos[name]
                tensors[name] = LazyTensor(info.shape, info.dtype, partial(read_tensor, file, name))
        if not tensors:
            raise CheckpointError(f"{self.work} holds no finished part; nothing can become {self.output}")
        return modules, self._as_stored(self._assembled(modules, tensors)), linears

    def _assembled(self, modules: Mapping[str, ModuleScheme], tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Dense experts of a model whose published files hold them in one tensor: put together again, none being packed."""
        if not any(is_expert(name.rpartition(".")[0]) for name in tensors) or any(map(is_expert, modules)):
            return tensors
        whole: dict[str, LazyTensor] = {}
        taken: set[str] = set()
        for name, fused in stored_fused(meta_model(self.source, torch.bfloat16)).items():
            members = {member: tensors[member] for member in fused.names() if member in tensors}
            if len(members) == len(fused.names()):
                dtype = next(iter(members.values())).dtype
                whole[name] = LazyTensor(fused.shape, dtype, partial(_put_together, fused, members))
                taken |= members.keys()
        return {name: tensor for name, tensor in tensors.items() if name not in taken} | whole

    def _as_stored(self, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The weights of linears that the class of the model stores as [K, N] as it does."""
        return tensors | {name: tensors[name].turned() for name in self.source.stored_transposed(tensors)}

    def _config(
        self,
        modules: Mapping[str, ModuleScheme],
        tensors: Mapping[str, LazyTensor],
        linears: Mapping[str, ModuleScheme],
    ) -> dict[str, Any]:
        config = copy.deepcopy(self.source.config)
        text = config.get("text_config")
        for level in (config, text if isinstance(text, dict) else {}):
            for stale in STALE:
                level.pop(stale, None)
            if "dtype" in level or level is config:
                level["dtype"] = str(_main_dtype(modules, tensors)).removeprefix("torch.")
            # a head with weights of its own is not the embedding any more
            if any(is_head(module, scheme, config) for module, scheme in linears.items()):
                level["tie_word_embeddings"] = False
        matrices = [name for name, tensor in tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2]
        ignore = {name.removesuffix(".weight") for name in matrices}
        # a tied head is in no file, but it is a linear that transformers and vLLM would look for
        ignore |= set() if (ignore | set(modules)) & set(HEADS) else {"lm_head"}
        described = self.format.quantization_config(modules, sorted(ignore - set(modules), key=natural))
        if described is not None:
            config["quantization_config"] = described
        return config


def _put_together(fused: FusedTensor, members: Mapping[str, LazyTensor]) -> Tensor:
    return fused.assembled({name: tensor.load() for name, tensor in members.items()})


def partial_directory(output: Path) -> Path:
    """Where the unfinished state of `output` lives."""
    return beside(output, PARTIAL)


def is_published(output: Path) -> bool:
    """Whether a run was ended after its output had appeared and before its work directory was removed."""
    work = partial_directory(output)
    return output.exists() and (work / COMPLETE).exists() and not (work / FINAL).exists()


def _write_files(directory: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"extra file {name!r} must lie inside the directory")
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _read_record(work: Path) -> dict[str, Any]:
    record = read_json(work / RECORD)
    if not isinstance(record, dict):
        raise CheckpointError(f"{work / RECORD} is damaged; remove {work} and start again")
    return record


def _changed(before: Any, now: Mapping[str, str]) -> str | None:
    """Which files differ between two sets of digests, in words; None where none does."""
    if not isinstance(before, dict):
        return "it does not say which files it read"
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if not changed:
        return None
    name = changed[0]
    how = "is new" if name not in before else "is gone" if name not in now else "has changed"
    more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
    return f"{name} {how}{more}"


def _plain_linear(module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
    """A linear of a part that was written dense: from its values, or from the codes kept beside them."""
    values = tensors["weight"] if scheme.bits == 16 else None
    linear = LinearWeights(
        scheme.bits, scheme.pattern, scheme.group_size,
        codes=tensors.get("codes"), scale=tensors.get("scale"), values=values, bias=tensors.get("bias"),
        zero_point=tensors.get("zero_point"),
    )  # fmt: skip
    return linear.validate(module)


def _main_dtype(modules: Mapping[str, ModuleScheme], tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The floating type of most bytes that are not part of a packed linear; that of the scales when there are none."""
    floating = {name: t for name, t in tensors.items() if t.dtype.is_floating_point}
    outside: Counter[torch.dtype] = Counter()
    for name, tensor in floating.items():
        if name.rpartition(".")[0] not in modules:
            outside[tensor.dtype] += tensor.nbytes
    if modules and any(dtype.itemsize == 2 for dtype in outside):  # a packed model is no float32 one, whatever stays so
        outside = Counter({dtype: nbytes for dtype, nbytes in outside.items() if dtype.itemsize <= 2})
    if not outside:
        outside.update(tensor.dtype for tensor in floating.values())
    return outside.most_common(1)[0][0] if outside else torch.bfloat16
