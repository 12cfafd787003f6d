"""The basis pass: write the model in a basis that suits 2:4 as a directory of its own, from which the rest of a recipe starts.

Two passes over the blocks. The first runs the calibration text through the dense model and keeps of each block what the
choice of a basis needs; the second rewrites block after block, checks that each computes what it did, and writes it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.basis import rewrite
from sparsify.basis.channels import channel_order
from sparsify.basis.heads import head_blocks, head_rotations
from sparsify.basis.objective import dropped
from sparsify.basis.residual import SAMPLED, Reading, Writing, residual_rotation
from sparsify.basis.structure import TOLERANCE, Norm, Structure, find_structure, gain, is_centred
from sparsify.compiler.checkpoint_names import OUTSIDE, part_name
from sparsify.compiler.plan import Plan
from sparsify.distributed import device, is_main
from sparsify.errors import CheckpointError
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.capture import BlockCall, capture_calls, head_inputs, run_block
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import BlockModel, open_blocks
from sparsify.model.linear_groups import PROBE_TOKENS
from sparsify.model.output_head import find_head
from sparsify.model.pretrained import setting
from sparsify.model.sequential import GroupVisit, Walk
from sparsify.progress import Task, progress_bar
from sparsify.recipe import Basis
from sparsify.solver.hessian import accumulated, factor

DAMPING = 0.004  # of the inverse Hessians that the objective reads


@dataclass
class _Block:
    """What is kept of a block between the two passes.

    inverse_diagonals: of H^-1 of what a linear reads, by its name; head_inverse: blocks as of `heads.head_blocks`
    """

    structure: Structure
    parts: list[Reading | Writing] = field(default_factory=list)
    inverse_diagonals: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    head_inverse: Tensor | None = None


def rebase(settings: Basis, plan: Plan, tokens: Tensor, output: Path, quiet: bool) -> dict[str, Any] | None:
    """Write an equal model of `plan` to the directory `output`; returns what metrics.json says, None in a helping process.

    tokens: calibration text of this process, int64 [samples, T]. Raises CheckpointError, naming the module, for a model
    that has no such basis.
    """
    exact = open_blocks(plan.checkpoint, torch.float32)
    exact.load_outside(device())
    hidden, calls = capture_calls(exact, tokens[:1, :PROBE_TOKENS].to(device()))
    outside = _outside(exact) if settings.residual else None
    blocks = range(len(exact.blocks))
    generator = torch.Generator().manual_seed(plan.recipe.calibration.seed)
    with progress_bar("basis", 2 * len(blocks) + (settings.steps + 1 if settings.residual else 0), quiet=quiet) as bar:
        bar.describe("basis: calibration text through the embeddings")
        walk = Walk(plan.model, tokens, device=device())
        found = []
        for index in blocks:
            bar.describe(f"basis: reading {exact.blocks[index]}")
            found.append(_read(settings, exact, index, hidden, calls[index], walk, generator))
            bar.advance()
        del walk
        if not is_main():
            return None
        _refuse_impossible(settings, found, plan.checkpoint.spec)
        Q = _rotation(settings, found, hidden.shape[-1], outside, bar) if outside is not None else None
        writer = CheckpointWriter(output, "dense", _untied(plan.checkpoint, Q is not None))
        notes = []
        for index in blocks:
            bar.describe(f"basis: writing {exact.blocks[index]}")
            notes.append(_write(settings, exact, index, found[index], Q, hidden, calls[index], writer, generator))
            bar.advance()
        _write_outside(exact, outside, Q, tokens[:1, :PROBE_TOKENS].to(device()), hidden, writer)
        writer.finish()
    return _note(settings, found, notes)


def _read(
    settings: Basis,
    exact: BlockModel,
    index: int,
    hidden: Tensor,
    call: BlockCall,
    walk: Walk,
    generator: torch.Generator,
) -> _Block:
    """Take the calibration text through one block and keep what choosing a basis needs of it."""
    exact.load(index)
    block = exact.block(index).to(device())
    query, value = _head_counts(exact)
    structure = find_structure(block, hidden, call, exact.blocks[index], query, value, settings.residual)
    kept = _Block(structure)
    norms = {name: norm for norm in structure.norms for name in norm.readers}
    prefix = exact.blocks[index] + "."

    def read(visit: GroupVisit) -> dict[str, Any]:
        names = [name.removeprefix(prefix) for name in visit.names]
        H = accumulated(visit.batches).H
        if settings.residual and names[0] in norms:
            kept.parts.append(_reading(block, norms[names[0]], H, prefix, generator))
        for name in names:
            if name in structure.writers:
                _keep_writer(kept, block, name, H, prefix, generator)
        return {}

    wanted = {*structure.writers, *(norms if settings.residual else ())}
    walk.visit(index, lambda name: name.removeprefix(prefix) in wanted, read)
    exact.unload(index)
    return kept


def _head_counts(exact: BlockModel) -> tuple[int, int]:
    config: Any = exact.model.config
    text = config.get_text_config(decoder=True)
    query = int(setting(text, "num_attention_heads") or 1)
    return query, int(setting(text, "num_key_value_heads") or query)


def _reading(block: nn.Module, norm: Norm, H: Tensor, prefix: str, generator: torch.Generator) -> Reading:
    """Rows of what reads a norm, as they will be when its gain is folded into them."""
    width = H.shape[0]
    g = gain(block.get_submodule(norm.name), width)[0].to(H)
    usable = g.abs() > 1e-6 * g.abs().max()
    scale = torch.where(usable, 1 / torch.where(usable, g, torch.ones_like(g)), torch.zeros_like(g))
    H = H * scale[:, None] * scale
    weights: list[Any] = [block.get_submodule(name).weight for name in norm.readers]
    W = torch.cat(weights).detach() * g
    if W.shape[0] > SAMPLED:
        W = W[torch.randperm(W.shape[0], generator=generator)[:SAMPLED].to(W.device)]
    inverse = factor(H, DAMPING, prefix + norm.readers[0]).inverse
    return Reading(W, inverse, _energy(W, H))


def _keep_writer(kept: _Block, block: nn.Module, name: str, H: Tensor, prefix: str, generator: torch.Generator) -> None:
    linear: Any = block.get_submodule(name)
    W: Tensor = linear.weight.detach()
    inverse = factor(H, DAMPING, prefix + name).inverse
    diagonal = inverse.diagonal().clone()
    kept.inverse_diagonals[name], kept.totals[name] = diagonal, _energy(W, H)
    heads = kept.structure.heads
    if heads is not None and name == heads.output:
        kept.head_inverse = head_blocks(inverse, heads.query_heads)
    fours = W.shape[1] // 4
    if fours > SAMPLED // 4:
        chosen = torch.randperm(fours, generator=generator)[: SAMPLED // 4].to(W.device)
        columns = (chosen[:, None] * 4 + torch.arange(4, device=W.device)).flatten()
        kept.parts.append(Writing(W[:, columns].clone(), diagonal[columns], kept.totals[name] * SAMPLED / W.shape[1]))
    else:
        kept.parts.append(Writing(W.clone(), diagonal, kept.totals[name]))


def _energy(W: Tensor, H: Tensor) -> float:
    """tr(W H W')"""
    return float(((W @ H) * W).sum())


def _refuse_impossible(settings: Basis, found: list[_Block], spec: str) -> None:
    """CheckpointError when nothing that was asked for can be done."""
    heads = settings.heads and any(block.structure.heads is not None for block in found)
    channels = settings.channels and any(block.structure.channels is not None for block in found)
    if not (settings.residual or heads or channels):
        raise CheckpointError(
            f"{spec}: basis can change nothing: no block has linears of their own for the values of its heads, or a "
            "feed-forward of plain linears; leave the pass out"
        )


def _rotation(settings: Basis, found: list[_Block], width: int, outside: _Outside, bar: Task) -> Tensor:
    parts = [part for block in found for part in block.parts]
    centred = outside.norm.centred or any(norm.centred for block in found for norm in block.structure.norms)

    def tick(share: float) -> None:
        bar.describe(f"basis: turning the residual stream, 2:4 drops {share:.2%}")
        bar.advance()

    return residual_rotation(parts, width, settings.steps, centred, tick)


@dataclass(frozen=True)
class _Outside:
    """What lies outside of the blocks and meets the residual stream. embeddings: names of the tables that write it."""

    embeddings: tuple[str, ...]
    norm: Norm
    head: str


def _outside(exact: BlockModel) -> _Outside:
    """Find it; CheckpointError names a module that does not allow the stream to be turned."""
    model: Any = exact.model
    width = int(model.get_input_embeddings().embedding_dim)
    names = {module: name for name, module in exact.model.named_modules()}
    head = find_head(exact.checkpoint, exact.model, exact.sources)
    embeddings, norms = [], []
    for name, module in exact.model.named_modules():
        own = [*module.parameters(recurse=False)]
        if not own or exact.owner(f"{name}.x") is not None or module is model.get_output_embeddings():
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            embeddings.append(name)
        elif all(p.shape == (width,) for p in own):
            norms.append(name)
        elif any(width in p.shape for p in own):
            raise CheckpointError(
                f"{name} stands between the embeddings and the residual stream, so the stream cannot be turned; "
                "set basis.residual: false"
            )
    if len(norms) != 1:
        raise CheckpointError(
            f"{exact.checkpoint.spec} has {len(norms)} norms outside of its blocks ({', '.join(norms) or 'none'}), and turning "
            "the residual stream knows one, before the output head; set basis.residual: false"
        )

    head_name = names[model.get_output_embeddings()]
    norm = exact.model.get_submodule(norms[0])
    assert head.shape[1] == width
    return _Outside(tuple(embeddings), Norm(norms[0], (head_name,), is_centred(norm, width)), head_name)


def _untied(checkpoint: Checkpoint, untie: bool) -> Checkpoint:
    """The checkpoint with a config that says that the output head has weights of its own."""
    changed = Checkpoint(checkpoint.spec, checkpoint.directory)
    config = copy.deepcopy(checkpoint.config)
    if untie:
        for level in (config, config.get("text_config")):
            if isinstance(level, dict):
                level["tie_word_embeddings"] = False
    vars(changed)["config"] = config
    return changed


def _write(
    settings: Basis,
    exact: BlockModel,
    index: int,
    kept: _Block,
    Q: Tensor | None,
    hidden: Tensor,
    call: BlockCall,
    writer: CheckpointWriter,
    generator: torch.Generator,
) -> dict[str, float]:
    """Rewrite one block, check it, write it; returns the share that 2:4 drops of its writers, before and after."""
    exact.load(index)
    block = exact.block(index).to(device())
    with torch.no_grad():
        wanted = run_block(block, hidden, call)
    shares = {f"{name} before": _share(block, kept, name) for name in kept.inverse_diagonals}
    structure, changed = kept.structure, set[str]()
    if Q is not None:
        changed |= _turn(block, structure, Q)
    if settings.heads and structure.heads is not None and kept.head_inverse is not None:
        changed |= _turn_heads(block, kept, settings.steps)
    if settings.channels and structure.channels is not None:
        name = structure.channels.after
        weight: Any = block.get_submodule(name).weight
        order = channel_order(weight.detach(), kept.inverse_diagonals[name], generator)
        rewrite.order_channels(block, structure.channels, order)
        kept.inverse_diagonals[name] = kept.inverse_diagonals[name][order]
        changed |= {*structure.channels.before, name}
    with torch.no_grad():
        entering = hidden if Q is None else (hidden.double() @ Q).to(hidden)
        leaving = run_block(block, entering, call)
        leaving = leaving if Q is None else (leaving.double() @ Q.t()).to(hidden)
    _refuse_other(wanted, leaving, exact.blocks[index])
    shares |= {f"{name} after": _share(block, kept, name) for name in kept.inverse_diagonals}
    _write_part(exact, index, changed, writer)
    exact.unload(index)
    return shares


def _share(block: nn.Module, kept: _Block, name: str) -> float:
    weight: Any = block.get_submodule(name).weight
    return float(dropped(weight.detach(), kept.inverse_diagonals[name])) / kept.totals[name]


def _turn(block: nn.Module, structure: Structure, Q: Tensor) -> set[str]:
    for norm in structure.norms:
        rewrite.fold_norm(block, norm, Q)
    for name in structure.writers:
        rewrite.turn_writer(block.get_submodule(name), Q)
    readers = {name for norm in structure.norms for name in norm.readers}
    return readers | {norm.name for norm in structure.norms} | set(structure.writers)


def _turn_heads(block: nn.Module, kept: _Block, steps: int) -> set[str]:
    heads = kept.structure.heads
    assert heads is not None and kept.head_inverse is not None
    weight: Any = block.get_submodule(heads.output).weight
    turns = head_rotations(weight.detach(), kept.head_inverse, heads.value_heads, steps)
    rewrite.turn_heads(block, heads, turns)
    each = turns.repeat_interleave(heads.query_heads // heads.value_heads, 0).to(kept.head_inverse)
    kept.inverse_diagonals[heads.output] = (each * (kept.head_inverse @ each)).sum(-2).flatten()
    return {heads.values, heads.output}


def _refuse_other(wanted: Tensor, found: Tensor, name: str) -> None:
    error = float((wanted - found).abs().max() / wanted.abs().max())
    if not error < TOLERANCE:
        raise CheckpointError(
            f"{name} does not compute the same in another basis (off by {error:.1e} of its largest value): something in it "
            "works on single features; leave out residual, heads or channels of the basis pass"
        )


def _write_part(exact: BlockModel, index: int | None, changed: set[str], writer: CheckpointWriter) -> None:
    """The tensors of one block, or of what lies outside, as they are now: in the type that each has in the checkpoint."""
    tensors: dict[str, Tensor] = {}
    prefix = "" if index is None else exact.blocks[index] + "."
    for source in exact.source_names(index):
        target, same = exact.sources[source]
        if target.removeprefix(prefix).rpartition(".")[0] not in changed:
            tensors[source] = exact.checkpoint.tensor(source)
            continue
        if not same:
            raise CheckpointError(
                f"{target} is assembled from several tensors of the checkpoint; its basis cannot be changed"
            )
        value = exact.model.get_parameter(target).detach().cpu()
        tensors[source] = value.to(exact.checkpoint.dtype(source)).contiguous()
    writer.write_part(OUTSIDE if index is None else part_name(index), {}, tensors)


def _write_outside(
    exact: BlockModel,
    outside: _Outside | None,
    Q: Tensor | None,
    tokens: Tensor,
    hidden: Tensor,
    writer: CheckpointWriter,
) -> None:
    """Embeddings, last norm and output head, the latter with weights of its own."""
    carried = {name: exact.checkpoint.tensor(name) for name in exact.checkpoint.names() if name not in exact.sources}
    if carried:
        writer.write_part("carried", {}, carried)
    if outside is None or Q is None:
        return _write_part(exact, None, set(), writer)
    model: Any = exact.model
    head = model.get_output_embeddings()
    found = find_head(exact.checkpoint, exact.model, exact.sources)
    with torch.no_grad():
        wanted = head(head_inputs(exact, tokens, hidden))
        if found.tied:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        rewrite.fold_norm(exact.model, outside.norm, Q)
        for name in outside.embeddings:
            rewrite.turn_embedding(exact.model.get_submodule(name), Q)
        logits = head(head_inputs(exact, tokens, (hidden.double() @ Q).to(hidden)))
    _refuse_other(wanted, logits, outside.head)
    if found.tied:
        own = head.weight.detach().cpu().to(exact.checkpoint.dtype(found.source))
        writer.write_part("head", {}, {f"{found.module}.weight": own})
    _write_part(exact, None, {*outside.embeddings, outside.norm.name, outside.head}, writer)


def _note(settings: Basis, found: list[_Block], shares: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What metrics.json says of the pass. dropped: mean share of tr(W H W') that 2:4 drops, by linear, before and after."""
    names = {key.rpartition(" ")[0] for block in shares for key in block}
    means = {
        name: [
            round(sum(values) / len(values), 6)
            for when in ("before", "after")
            for values in [[block[f"{name} {when}"] for block in shares if f"{name} {when}" in block]]
        ]
        for name in sorted(names)
    }
    return {
        "residual": settings.residual,
        "heads": sum(settings.heads and block.structure.heads is not None for block in found),
        "channels": sum(settings.channels and block.structure.channels is not None for block in found),
        "dropped": means,
    }
