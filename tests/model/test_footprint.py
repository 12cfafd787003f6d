"""Bytes that a suspended forward holds, counted by hand."""

import pytest
import torch
from torch import nn

from sparsify.model.capture import BlockCall, capture_calls, without_numbers
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import open_blocks
from sparsify.model.footprint import Footprint, footprint
from tests.helpers.tiny import save_tiny

TOKENS, WIDTH, WIDE = 6, 8, 32


class Block(nn.Module):
    """x + down(relu(up(x)))"""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDE, bias=False)
        self.down = nn.Linear(WIDE, WIDTH, bias=False)

    def forward(self, x):
        wide = self.up(x)
        return x + self.down(wide.relu())


def test_counts_what_is_alive_and_no_view_nor_input():
    block = Block()
    found = footprint(block, [block.up, block.down], torch.zeros(2, 3, WIDTH), BlockCall((), {}))
    wide, narrow = TOKENS * WIDE * 4, TOKENS * WIDTH * 4
    assert found.waiting == (0, wide)  # behind relu; `wide` has a name still, but is never read again
    assert found.peak == 2 * wide + 2 * narrow  # and what `down` gives, and the sum


def test_fake_tensors_are_counted_as_real_ones(tmp_path):
    model = open_blocks(open_checkpoint(save_tiny(tmp_path / "m")))
    tokens = torch.zeros(2, 24, dtype=torch.long)
    model.load(None)
    model.load(0)
    block = model.block(0)
    stops = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    hidden, calls = capture_calls(model, tokens)
    real = footprint(block, [block.get_submodule(name) for name in stops], hidden, calls[0])
    with without_numbers(model) as hollow:
        hidden, calls = capture_calls(hollow, torch.zeros(2, 24, dtype=torch.long))
        block = hollow.block(0)
        fake = footprint(block, [block.get_submodule(name) for name in stops], hidden, calls[0])
    state = 2 * 24 * 4  # bytes of one number per token
    assert real.waiting[0] == 64 * state  # the input of q, k and v after its norm; the residual is no tensor of its own
    assert len(real.waiting) == 4 and real.waiting[3] >= (64 + 128) * state
    assert abs(fake.peak - real.peak) <= 0.1 * real.peak
    assert all(abs(a - b) <= 0.1 * max(b, 1) for a, b in zip(fake.waiting, real.waiting, strict=True))


@pytest.mark.parametrize(
    ("waiting", "leaves", "most"),
    [
        ((10, 34, 20, 40), True, 68),  # at the second linear
        ((10, 14, 20, 60), True, 60),  # at the last one, which the dense forward leaves
        ((10, 34, 20, 40), False, 80),  # at the last one both wait
        ((10,), True, 10),
        ((), True, 0),
    ],
)
def test_with_the_forward_of_the_dense_model(waiting: tuple[int, ...], leaves: bool, most: int) -> None:
    assert Footprint(waiting, 100).with_dense(leaves) == most
