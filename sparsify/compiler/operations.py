"""The arithmetic of a run, counted from its plan before anything runs: what its time can be held against.

A multiply-add counts as two operations. Only what the methods need is counted, in the formulas beside each part: a symmetric
product on one triangle, causal attention without the pairs that the mask removes, the solver without the passes that only
move data. Norms, activation functions, softmax, sampling, the reading of weights and the packing of codes are not counted:
they are a few operations per token and feature or per weight, where products have hundreds. Experts
count for the share of the tokens that they are given on average; of those that stay fused nothing is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsify.basis.residual import SAMPLED
from sparsify.compiler.plan_experts import mixture_of
from sparsify.compiler.shorten import SEARCHED_ROWS
from sparsify.model.experts import is_expert
from sparsify.model.pretrained import setting
from sparsify.model.sequential import DENSE_FORWARD, FORWARD
from sparsify.recipe.methods import needs_of
from sparsify.recipe.schema import Basis, SelfText
from sparsify.recipe.sources import SELF
from sparsify.solver.coordinate_descent import BLOCKSIZE
from sparsify.solver.grid import SHRINK
from sparsify.solver.head_quantization import ROWS
from sparsify.solver.masks.alps import ITERATIONS, rows_together, takes_inverse
from sparsify.solver.solve import Scheme, factor_is_kept

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan, Planned
    from sparsify.compiler.shorten import PlannedDepth

SOLVER = (
    "factors",
    "masks",
    "sweep",
    "coordinate descent",
    "errors",
)  # parts that are computed in float32 whatever the model is computed in
TRY_SCALE = 7  # operations per weight and clipping ratio: divide, round, two clamps, multiply, subtract, square-and-add
CHOOSE_TWO = 100  # per weight and pass: 12 ordered supports of every four inputs, each about 32 operations
CHOOSE_ONE = 12  # per weight and pass, where the mask is fixed: the better value and whether it helps


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor. shapes: (outputs N, inputs K) with the scheme of each; K is the same for all.

    expert: of one of several experts, which is given a share of the tokens
    outputs: of the dense model its outputs are followed, not its inputs (`Walk.dense_outputs`)
    """

    members: tuple[tuple[tuple[int, int], Scheme], ...]
    expert: bool = False
    outputs: bool = False

    @property
    def inputs(self) -> int:
        return self.members[0][0][1]

    @property
    def followed(self) -> int:
        """Features per token of the dense model in the statistics; 0 where it is not followed."""
        if not any(scheme.error_propagation > 0 for _, scheme in self.members):
            return 0
        return self.members[0][0][0] if self.outputs else self.inputs


def count_operations(plan: Plan) -> dict[str, int]:
    """Operations of every part of a run up to its training passes; parts that a recipe does not have are left out. Parts have
    the names of the phases that `sparsify.phases` times.

    "self-written text": what the model computes to write its calibration text, where that is not in the cache yet
    "routing": the pass by which rows of text are chosen for experts
    "forward", "dense forward": both streams through the blocks; "statistics": X'X and Xd'X of every group, and X'X of the head
    "factors", "masks", "sweep", "coordinate descent", "errors": the solver, linears and head together; "tune": the training of
    blocks
    "basis": the forward pass and statistics that a basis is chosen by, and the steps of the residual stream's rotation
    "depth": the scores of a depth pass
    """
    tokens = plan.recipe.calibration.samples * plan.recipe.calibration.sequence_length
    share = 1.0 if plan.depth is None else plan.depth.share
    parts: dict[str, float] = {}
    if plan.needs_data or (plan.depth is not None and plan.depth.settings.needs_data):
        parts["self-written text"] = _writing(plan)
    walk = 0.0
    if plan.needs_data:
        if plan.recipe.calibration.experts is not None:
            drawn = plan.recipe.calibration.drawn
            parts["routing"] = _forward(plan, drawn.samples * drawn.sequence_length)
        walk = _forward(plan, tokens)  # experts once more, to see what their down projections read
        walk += 2.0 * tokens * expert_share(plan) * sum(p.weights for m, p in plan.linears.items() if is_expert(m))
        parts[FORWARD] = share * walk
        if plan.needs_dense_reference:
            parts[DENSE_FORWARD] = share * walk
    given = expert_share(plan)
    for group, count in Counter(groups_of(plan)).items():
        schemes = [scheme for _, scheme in group.members]
        if any(scheme.needs_data for scheme in schemes):
            read = round(tokens * given) if group.expert else tokens
            _add(parts, {"statistics": count * share * _statistics(group.inputs, read, group.followed)})
        for scheme in dict.fromkeys(schemes):
            outputs = sum(n for (n, _), own in group.members if own == scheme)
            work_of = solving(outputs, group.inputs, scheme).items()
            _add(parts, {name: count * share * work for name, work in work_of})
    if plan.head is not None:
        n, k = plan.head.head.shape
        scheme = plan.head.scheme
        if scheme.needs_data:
            _add(parts, {"statistics": _statistics(k, tokens)})
        for start in range(0, n, ROWS):  # each piece factors the Hessian again
            piece = min(ROWS, n - start)
            _add(parts, solving(piece, k, scheme, measured=scheme.needs_data))
    if plan.recipe.tune is not None:  # forward, and backward to inputs and to weights
        parts["tune"] = 3 * plan.recipe.tune.epochs * share * walk + share * walk
    if plan.recipe.basis is not None:
        parts["basis"] = _basis(plan, plan.recipe.basis, walk)
    if plan.depth is not None:
        parts["depth"] = _depth(plan, plan.depth, tokens)
    return {name: round(work) for name, work in parts.items() if work}


def solving(n: int, k: int, scheme: Scheme, measured: bool = True) -> dict[str, float]:
    """Operations to bring N stacked outputs with K inputs to a scheme, by part. measured: their error is taken afterwards."""
    weights, cube = n * k, k**3
    parts: dict[str, float] = {}
    if scheme.sweeps or scheme.error_propagation > 0:
        # Cholesky K^3/3 and the inverse of a triangle K^3/3; once more in the order of the activations, or after a mask
        again = scheme.activation_order or (scheme.prune == "alps" and not factor_is_kept(k))
        times = 2 if scheme.sweeps and again else 1
        parts["factors"] = times * 2 * cube / 3
    if scheme.error_propagation > 0:
        parts["factors"] += 4 * weights * k  # one product, and two with a triangle
    if scheme.prune == "alps":
        # W H, and in every iteration a Cholesky factor, K^3/3, or the inverse, K^3, and a product or two triangles
        rows = rows_together(n, k)
        factors = (cube if takes_inverse(rows, k) else cube / 3) * n / rows
        parts["masks"] = 2 * weights * k + ITERATIONS * (factors + 2 * weights * k)
    if scheme.sweeps:
        parts["sweep"] = weights * k  # every input is repaired by the K/2 after it, on average
    if (grid := scheme.grid(k)) is not None:
        ratios = len(SHRINK) if grid.search else 1
        parts["sweep"] = parts.get("sweep", 0) + TRY_SCALE * ratios * weights
    if scheme.sweeps and scheme.coordinate_descent:
        choice = CHOOSE_TWO if needs_of(scheme.prune, None).sweep else CHOOSE_ONE
        group = 0 if grid is None else grid.group_size
        scales = 2 * weights * (group if group <= 2 * BLOCKSIZE else BLOCKSIZE)  # H @ codes inside every group
        parts["coordinate descent"] = scheme.coordinate_descent * (2 * weights * k + choice * weights + scales)
    if scheme.needs_data and measured:
        parts["errors"] = 2 * weights * k  # <W'W, H> of W - What and of W, one triangle each
    return parts


def _statistics(k: int, tokens: int, followed: int = 0) -> float:
    """X'X on one triangle, and Xd'X or Yd'X in full where the dense model is followed."""
    return tokens * k * (k + 1) + 2 * tokens * followed * k


def _forward(plan: Plan, tokens: int) -> float:
    """Operations of one forward pass of the blocks over the calibration tokens."""
    length = plan.recipe.calibration.sequence_length
    return 2.0 * tokens * _block_weights(plan) + tokens * len(plan.model.blocks) * _attention(plan, length)


def _basis(plan: Plan, settings: Basis, walk: float) -> float:
    """A forward pass with X'X of every group; then, every step, W Q, H^-1 Q and their gradients for sampled rows of it."""
    tokens = plan.recipe.calibration.samples * plan.recipe.calibration.sequence_length
    groups = groups_of(plan)
    found = walk + sum(_statistics(group.inputs, tokens) + 4 * group.inputs**3 / 3 for group in groups)
    width = hidden_size(plan)
    step = 4 * SAMPLED * width**2 + 3 * width**3  # H^-1 Q for every second group: the others write the stream
    return found + (settings.steps * len(groups) * step if settings.residual else 0)


def hidden_size(plan: Plan) -> int:
    """Width of the residual stream, as the config says; 0 where it does not."""
    config: Any = plan.model.model.config
    return int(getattr(config.get_text_config(decoder=True), "hidden_size", 0))


def expert_share(plan: Plan) -> float:
    """The share of the tokens that one expert is given on average; 1 where there are none."""
    mixture = mixture_of(plan.model)
    return 1.0 if mixture is None else mixture.share


def _block_weights(plan: Plan) -> float:
    """Weights that a token is multiplied with, on average."""
    given = expert_share(plan)
    return sum(planned.weights * (given if is_expert(name) else 1) for name, planned in plan.linears.items())


def _attention(plan: Plan, length: int) -> float:
    """Scores and their products with the values: operations per token and block, averaged over a causal sequence."""
    config: Any = plan.model.model.config
    text = config.get_text_config(decoder=True)
    heads, hidden = setting(text, "num_attention_heads") or 0, setting(text, "hidden_size") or 0
    width = setting(text, "head_dim") or (hidden // heads if heads else 0)
    return 4.0 * heads * width * (length + 1) / 2


def _writing(plan: Plan) -> float:
    """What the model computes to write: every token of every candidate row but the last goes through all of it once."""
    calibration = plan.recipe.calibration.drawn
    candidates = (calibration.self or SelfText()).candidates
    own = zip(calibration.mixture, calibration.rows, strict=True)
    rows = sum(math.ceil(count * candidates) for (source, _), count in own if source == SELF)
    steps = calibration.sequence_length - 1
    weights = _block_weights(plan) + plan.model.head_weights()
    return rows * steps * (2.0 * weights + len(plan.model.blocks) * _attention(plan, steps))


def _depth(plan: Plan, depth: PlannedDepth, tokens: int) -> float:
    """A forward pass for a method that scores blocks of layers; FinerCut runs half the model for every candidate."""
    if not depth.settings.needs_data:
        return 0.0
    calibration, settings, weights = plan.recipe.calibration, depth.settings, depth.weights
    rows = min(settings.samples or calibration.samples, calibration.samples)
    if settings.method != "finercut":
        return 2.0 * (tokens * weights.blocks * rows // max(calibration.samples, 1))
    judged = min(rows, settings.samples or SEARCHED_ROWS) * calibration.sequence_length
    steps = round((1 - depth.share) * 2 * weights.layers)
    return 2.0 * (steps * 2 * weights.layers * judged * (weights.blocks // 2 + weights.head))


def groups_of(plan: Plan) -> list[Group]:
    """The linears to compress by what they read, told by where they stand: those of one parent with as many inputs.

    Of a parent with several linears, the last that writes as many outputs as the model is wide leaves the sublayer, and reads
    what the others made, even where that is as wide as what they read.
    """
    hidden = hidden_size(plan)
    siblings: dict[str, list[Planned]] = {}
    for planned in plan.linears.values():
        siblings.setdefault(planned.module.rpartition(".")[0], []).append(planned)
    groups: dict[tuple[str, int, bool], list[Planned]] = {}
    for parent, members in siblings.items():
        leaving = [planned for planned in members if planned.shape[0] == hidden][-1:] if len(members) > 1 else []
        for planned in members:
            groups.setdefault((parent, planned.shape[1], planned in leaving), []).append(planned)
    compressed = [group for group in ([p for p in group if p.scheme is not None] for group in groups.values()) if group]
    last = {group[0].block: group for group in compressed}
    found = []
    for group in compressed:
        expert = is_expert(group[0].module)
        outputs = group is last[group[0].block] and not expert and len(group) == 1 and _is_narrow(plan, group[0])
        found.append(Group(tuple((p.shape, p.scheme) for p in group if p.scheme is not None), expert, outputs))
    return found


def _is_narrow(plan: Plan, planned: Planned) -> bool:
    """As `linear_groups.is_narrow` says of a loaded linear."""
    linear: Any = plan.model.model.get_submodule(planned.module)
    return linear.bias is None and planned.shape[0] < planned.shape[1]


def _add(parts: dict[str, float], more: Mapping[str, float]) -> None:
    for name, work in more.items():
        parts[name] = parts.get(name, 0) + work


def in_words(total: float) -> str:
    """A count of operations: `12 TFLOP`."""
    for size, unit in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP")):
        if total >= size:
            return f"{total / size:.2g} {unit}" if total < 100 * size else f"{total / size:.0f} {unit}"
    return f"{total:.0f} operations"
