"""What holds for every input: packing, masks, formats, shards and runs that go on, on inputs that Hypothesis makes up."""

import itertools
import random
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("hypothesis", reason="Hypothesis is not installed; make setup installs it")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.formats import get_format, gptq_packing, packing, tensor_file, written_formats
from sparsify.formats.scheme import ModuleScheme
from sparsify.formats.tensor_file import LazyTensor, write_shards
from sparsify.formats.writer import CheckpointWriter
from sparsify.manifest import file_sha256, verify
from sparsify.model.checkpoint import Checkpoint, open_checkpoint
from sparsify.model.linear import is_two_four
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.solver.masks.wanda import wanda_mask

# The same inputs in every run, so that a failure is one of the change that is tested.
settings.register_profile(
    "sparsify", max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
settings.load_profile("sparsify")

BITS = st.sampled_from([4, 8])


def codes(bits):
    """int8 [N, C] in the range of the bits, C a whole number of words."""
    per_word, offset = 32 // bits, 1 << bits - 1
    number = st.integers(-offset, offset - 1)
    return st.tuples(st.integers(1, 3), st.integers(1, 4)).flatmap(
        lambda shape: st.lists(
            st.lists(number, min_size=shape[1] * per_word, max_size=shape[1] * per_word),
            min_size=shape[0],
            max_size=shape[0],
        )
    )


@given(st.data(), BITS)
def test_words_are_what_python_integers_are(data, bits):
    rows = data.draw(codes(bits))
    words = packing.pack_words(torch.tensor(rows, dtype=torch.int8), bits)
    offset, per_word = 1 << bits - 1, 32 // bits
    for row, stored in zip(rows, words.tolist(), strict=True):
        assert sum((q + offset) << bits * i for i, q in enumerate(row)) == sum(
            (word % 2**32) << 32 * i for i, word in enumerate(stored)
        )
        assert len(stored) == len(row) // per_word
    assert packing.unpack_words(words, bits).tolist() == rows


@given(st.data(), BITS, st.sampled_from([1, 2]))
def test_zero_points_of_gptq_are_what_python_integers_are(data, bits, version):
    columns = data.draw(codes(bits))  # of every group the zero points of all outputs
    zeros = torch.tensor(columns, dtype=torch.int8).t().contiguous()
    packed = gptq_packing.pack_zero_points(zeros, bits, version)
    offset = 1 << bits - 1
    for column, stored in zip(columns, packed.tolist(), strict=True):
        written = [(z + offset - (version == 1)) % 2**bits for z in column]
        assert sum(z << bits * i for i, z in enumerate(written)) == sum(
            (word % 2**32) << 32 * i for i, word in enumerate(stored)
        )
    assert torch.equal(gptq_packing.unpack_zero_points(packed, bits, version), zeros)


quads = st.tuples(st.sampled_from(list(itertools.combinations(range(4), 2))), st.integers(-8, 7), st.integers(-8, 7))


@given(st.lists(quads, min_size=2, max_size=8).filter(lambda found: len(found) % 2 == 0))
def test_positions_come_back(found):
    """Of weights that are 2:4, zeros among the kept ones included."""
    weight = torch.zeros(1, 4 * len(found), dtype=torch.int8)
    for number, (places, *values) in enumerate(found):
        for place, value in zip(places, values, strict=True):
            weight[0, 4 * number + place] = value
    nibbles = packing.kept_nibbles(weight)
    meta = packing.pack_nibbles(nibbles)
    assert torch.equal(packing.unpack_nibbles(meta), nibbles) and packing.nibbles_ascend(nibbles)
    assert meta.tolist()[0] == [a | b << 4 for a, b in zip(*[iter(nibbles.tolist()[0])] * 2, strict=True)]
    assert torch.equal(packing.put_kept(packing.take_kept(weight, nibbles), nibbles), weight)


@given(st.lists(st.floats(-4, 4, width=16), min_size=8, max_size=32).filter(lambda row: len(row) % 4 == 0), st.data())
def test_masks_keep_the_two_of_every_four_that_weigh_most(row, data):
    W = torch.tensor([row])
    energy = torch.tensor(data.draw(st.lists(st.floats(0.25, 4, width=16), min_size=len(row), max_size=len(row))))
    H = torch.diag(energy)
    for mask, weight in ((magnitude_mask(W, None), W.abs()), (wanda_mask(W, H), W.abs() * energy.sqrt())):
        assert mask.sum().item() == len(row) // 2
        for kept, weights in zip(mask.reshape(-1, 4), weight.reshape(-1, 4), strict=True):
            most = max(weights[[i, j]].sum().item() for i, j in itertools.combinations(range(4), 2))
            assert kept.sum() == 2 and weights[kept].sum().item() == pytest.approx(most, rel=1e-6)
        assert is_two_four(W * mask)


@settings(max_examples=60)
@given(
    format=st.sampled_from(written_formats()),
    bits=st.sampled_from([4, 8, 16]),
    pattern=st.sampled_from(["2:4", "dense"]),
    symmetric=st.booleans(),
    group=st.sampled_from([32, 64, 128, 256]),
    n=st.sampled_from([8, 64, 72]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_what_a_format_holds_comes_back_to_the_bit(
    same, make_linear, format, bits, pattern, symmetric, group, n, bias, seed
):
    if bits == 16 and (pattern == "dense" or not symmetric):
        return  # no compressed linear
    linear = make_linear(n, 256, bits, group, pattern, bias, seed=seed, symmetric=symmetric)
    encoding = get_format(format)
    if not encoding.suffixes or encoding.supports(linear) is not None:
        return
    back = encoding.decode("x", encoding.encode(linear), ModuleScheme.of(linear))
    assert same(back, linear)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 120))
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(sizes, limit):
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "SHARD_BYTES", limit)
        digests = write_shards(Path(place), {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})
        files = sorted(Path(place).glob("*.safetensors"))
        assert digests == {file.name: file_sha256(file) for file in files}
        held = [load_file(file) for file in files]
        (Path(place) / "config.json").write_text("{}")
        opened = Checkpoint("x", Path(place))
        assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in tensors.items())
    assert sorted(name for shard in held for name in shard) == sorted(tensors)
    assert all(sum(t.nbytes for t in shard.values()) <= limit or len(shard) == 1 for shard in held)


@settings(max_examples=12)
@given(st.permutations(range(5)), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**32 - 1))
def test_wherever_a_run_was_ended_it_ends_with_the_same_bytes(llama, make_linear, order, ends, seed):
    """Ended after some parts, any number of times, one finished part damaged meanwhile."""
    source, chance = open_checkpoint(llama()), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "out"

        def write(writer, parts):
            for i in parts:
                linears = {f"model.layers.{i}.up": make_linear(seed=i)}
                writer.write_part(f"block.{i}", linears, {f"model.layers.{i}.n": torch.ones(i + 1)})

        straight = CheckpointWriter(Path(place) / "straight", "sparse24", source)
        write(straight, range(5))
        straight.finish()
        for end in [*sorted(ends), 5]:
            writer = CheckpointWriter(output, "sparse24", source, resume=True)
            left = [i for i in order[:end] if f"block.{i}" not in writer.parts()]
            write(writer, left)
            if end < 5 and (finished := sorted((writer.work / "parts").glob("*.safetensors"))):
                file = chance.choice(finished)
                content = bytearray(file.read_bytes())
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                file.write_bytes(content)
        writer.finish()
        one, other = ({f.name: f.read_bytes() for f in p.iterdir()} for p in (Path(place) / "straight", output))
        assert one == other and verify(output).good
