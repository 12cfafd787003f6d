"""Run in two gloo processes: FSDP2 shards a student, and its loss and gradients are those of one process."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsify.distributed import of_main
from sparsify.recipe import LossWeights
from sparsify.training.eight_bits import EightBits
from sparsify.training.optimizer import TensorwiseAdamW, load_states, save_gathered, states_by_name
from sparsify.training.sharding import share_of
from sparsify.training.student import Student, Teacher, trainable_parameters
from tests.helpers.tiny import tiny_model
from tests.training.test_student import batch, compressed, stored


def student_of(weights: LossWeights) -> Student:
    model = tiny_model(seed=1, tie_word_embeddings=True)
    linears = compressed(model)
    trainable_parameters(model, linears, ["linears", "norms", "embedding"], stored(model))
    model.gradient_checkpointing_enable()
    return Student(model, weights, 1.0, torch.float32).train()


def steps_in_8_bits(alone: Student, sharded: Student, gradients: dict[str, torch.Tensor]) -> None:
    """The same gradients move both students alike, and states that were gathered into a file go on where they were."""
    file = Path(of_main(tempfile.mkdtemp)) / "states.safetensors"
    for student in (alone, sharded):
        trained = {name: p for name, p in student.named_parameters() if name in gradients}
        for name, parameter in trained.items():
            parameter.grad = share_of(gradients[name], parameter)
        for step in range(2):
            optimizer = TensorwiseAdamW(trained.values(), lr=0.01, weight_decay=0.0, eight_bits=True)
            if step:
                load_states(optimizer, trained, file, 1)
            optimizer.step()
            dist.barrier()
            save_gathered(states_by_name(optimizer, trained), file)
            dist.barrier()
    eight = [state for state in optimizer.state.values() if isinstance(state["exp_avg"], EightBits)]
    assert len(eight) > 5 and all(state["exp_avg"].count < 6144 for state in eight)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(sharded.get_parameter(name).full_tensor(), parameter, rtol=1e-5, atol=1e-7)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    weights = LossWeights(squarehead=0.0, kl=1.0, cross_entropy=0.5)
    teacher = Teacher(tiny_model(seed=2), True, True)
    ids, labels = batch(2 * processes)
    items = labels.ne(-100).sum()

    alone = student_of(weights)
    expected = alone(ids, labels, items, teacher(ids))["loss"]
    expected.backward()
    whole = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}

    sharded = student_of(weights)
    mesh = init_device_mesh("cpu", (processes,))
    for block in sharded.outputs.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    mine = slice(2 * rank, 2 * rank + 2)
    loss = sharded(ids[mine], labels[mine], items, teacher(ids[mine]))["loss"] * processes
    loss.backward()
    total = loss.detach() / processes
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert found.keys() == whole.keys() and len(found) > 40, set(found) ^ set(whole)
    assert all(p.to_local().numel() < p.numel() for p in sharded.parameters() if p.numel() >= 2 * processes)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    steps_in_8_bits(alone, sharded, whole)
    dist.barrier()
    if rank == 0:
        print("equal:", len(found), "gradients")
    dist.destroy_process_group()
