"""Several processes that solve the outputs of one group of linears."""

from pathlib import Path

import pytest
import torch

from sparsify.distributed import divided, join, rank
from sparsify.errors import NumericalError
from sparsify.solver.hessian import Statistics
from sparsify.solver.solve import Scheme, solve_layer
from tests.helpers.ranks import in_ranks

SCHEME = Scheme("alps", "gptq", 4, 32, damping=0.01, error_propagation=0.4, coordinate_descent=2)


def problem(least: float) -> tuple[dict[str, torch.Tensor], Statistics]:
    """Two linears, and a Hessian of mean diagonal 1 with a least eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    a, b, noise, random = (
        torch.randn(*shape, generator=generator) for shape in ((40, 64), (7, 64), (64, 64), (64, 64))
    )
    Q, _ = torch.linalg.qr(random)
    H = (Q * torch.linspace(least, 2 - least, 64)) @ Q.t()
    return {"a": a, "b": b}, Statistics(H, H + 0.05 * noise)


def tasks_are_divided(folder: str) -> None:
    join()
    done = []

    def first() -> list[torch.Tensor]:
        done.append("first")
        return [torch.arange(5.0), torch.ones(2, 3).t()]

    def second() -> list[torch.Tensor]:
        done.append("second")
        return [torch.full((3,), 7)]

    (numbers, ones), (sevens,) = divided(first, second)
    assert done == [["first"], ["second"]][rank()]
    assert torch.equal(numbers, torch.arange(5.0)) and torch.equal(ones, torch.ones(3, 2))
    assert torch.equal(sevens, torch.full((3,), 7)) and sevens.dtype == torch.int64

    def fails() -> list[torch.Tensor]:
        raise NumericalError("mlp: no factor")

    with pytest.raises(NumericalError, match="no factor"):
        divided(first, fails)
    Path(folder, f"divided-{rank()}").touch()


def solved_together(folder: str, least: float) -> None:
    join()
    weights, statistics = problem(least)
    parts, errors = solve_layer(weights, SCHEME, statistics, together=True)
    damaged = Statistics(statistics.H.clone(), statistics.C)
    damaged.H[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        solve_layer(weights, SCHEME, damaged, together=True)
    torch.save(({name: part.dense(torch.float32) for name, part in parts.items()}, errors), f"{folder}/{rank()}.pt")


def test_each_task_is_done_by_one_process_and_known_to_all(tmp_path: Path) -> None:
    ended = in_ranks(tmp_path, tasks_are_divided, str(tmp_path), count=2)
    assert ended.codes == [0, 0], ended.said
    assert all((tmp_path / f"divided-{number}").exists() for number in range(2))


@pytest.mark.parametrize("least", [0.1, -0.03])  # the second one has no factor before its damping is raised
def test_processes_together_solve_as_one_alone(tmp_path: Path, least: float) -> None:
    ended = in_ranks(tmp_path, solved_together, str(tmp_path), least, count=2)
    assert ended.codes == [0, 0], ended.said
    (one, errors), (other, same_errors) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    weights, statistics = problem(least)
    alone, errors_alone = solve_layer(weights, SCHEME, statistics)
    for name, part in alone.items():
        assert torch.equal(one[name], other[name]) and errors[name] == same_errors[name]
        apart = (one[name] != part.dense(torch.float32)).float().mean()
        assert apart < 0.02  # rounding may decide a tie
        assert errors[name] == pytest.approx(errors_alone[name], rel=0.02)
