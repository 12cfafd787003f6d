"""Two processes train as one does: FSDP2 over gloo, on the CPU."""

from tests.helpers.ranks import in_ranks
from tests.training.sharded import main


def test_fsdp_gives_the_loss_and_the_gradients_of_one_process(tmp_path):
    """Tied embedding, checkpointed blocks and parametrized norms included: whatever FSDP2 could trip over."""
    ended = in_ranks(tmp_path, main)
    assert ended.codes == [0, 0], ended.said
    assert "equal: 50 gradients" in ended.said[0]
