"""The objective and the three changes of basis, against their definitions written out in float64."""

import itertools

import pytest
import torch

from sparsify.basis.channels import channel_order
from sparsify.basis.heads import head_blocks, head_rotations
from sparsify.basis.objective import dropped, rotated_diagonal, two_smallest
from sparsify.basis.residual import Reading, Writing, keeping_ones, orthogonal, residual_rotation


def hessian(size, seed=0):
    """A Hessian with a few strong directions, as calibration inputs have them, in float32."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return X.t() @ X / (4 * size)


def lost(W, H):
    """What dropping two of each four by Optimal Brain Surgeon's saliency costs: loops over groups and pairs."""
    inverse = torch.linalg.inv(H.double()).diagonal()
    total = 0.0
    for row in W.double():
        costs = (row.square() / inverse).tolist()
        for first in range(0, len(costs), 4):
            total += min(a + b for a, b in itertools.combinations(costs[first : first + 4], 2))
    return total


def test_dropped_is_the_sum_of_the_cheapest_pair_of_every_group():
    W, H = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), hessian(16)
    inverse = torch.linalg.inv(H)
    assert float(dropped(W, inverse.diagonal())) == pytest.approx(lost(W, H), rel=1e-3)
    assert float(two_smallest(torch.tensor([[3.0, 1.0, 2.0, 5.0], [4.0, 4.0, 4.0, 4.0]]))) == 11.0


def test_rotated_diagonal_is_that_of_the_inverse_of_the_rotated_hessian():
    H = hessian(12).double()
    Q = orthogonal(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(rotated_diagonal(torch.linalg.inv(H), Q), torch.linalg.inv(Q.t() @ H @ Q).diagonal())


@pytest.mark.parametrize("centred", [False, True])
def test_the_residual_rotation_is_orthogonal_and_drops_less(centred):
    width, generator = 32, torch.Generator().manual_seed(5)
    H, W = hessian(width, 6), torch.randn(64, width, generator=generator)
    V, G = torch.randn(width, 48, generator=generator), hessian(48, 7)
    parts = [
        Reading(W, torch.linalg.inv(H), float(((W @ H) * W).sum())),
        Writing(V, torch.linalg.inv(G).diagonal(), float(((V @ G) * V).sum())),
    ]
    shares = []
    Q = residual_rotation(parts, width, 40, centred, shares.append)
    torch.testing.assert_close(Q.t() @ Q, torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    if centred:
        ones = torch.ones(width, dtype=torch.float64)
        torch.testing.assert_close(Q @ ones, ones, atol=1e-12, rtol=0)
    R = Q.float()
    before, after = lost(W, H) + lost(V, G), lost(W @ R, R.t() @ H @ R) + lost(R.t() @ V, G)
    assert after < 0.9 * before, (before, after)
    assert min(shares) < 0.9 * shares[0]


def test_keeping_ones_starts_with_the_vector_of_ones():
    Q = keeping_ones(5)
    torch.testing.assert_close(Q[:, 0], torch.full((5,), 5**-0.5, dtype=torch.float64))
    torch.testing.assert_close(Q.t() @ Q, torch.eye(5, dtype=torch.float64))


def test_head_rotations_drop_less_of_the_output_projection():
    heads, shared, size = 4, 2, 8
    W, H = torch.randn(24, heads * size, generator=torch.Generator().manual_seed(8)), hessian(heads * size, 9)
    blocks = head_blocks(torch.linalg.inv(H), heads)
    torch.testing.assert_close(blocks[1], torch.linalg.inv(H)[8:16, 8:16])
    Q = head_rotations(W, blocks, shared, 60)
    assert Q.shape == (shared, size, size)
    torch.testing.assert_close(
        Q.mT @ Q, torch.eye(size, dtype=torch.float64).expand(shared, -1, -1), atol=1e-12, rtol=0
    )
    whole = torch.block_diag(*Q.repeat_interleave(heads // shared, 0)).float()
    assert lost(W @ whole, whole.t() @ H @ whole) < 0.95 * lost(W, H)


def test_channel_order_is_a_permutation_that_drops_less():
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(10)) * torch.linspace(0.1, 3, 64)
    H = hessian(64, 11)
    order = channel_order(W, torch.linalg.inv(H).diagonal(), torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(64))
    assert lost(W[:, order], H[order][:, order]) < 0.9 * lost(W, H)
