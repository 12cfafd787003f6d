"""Run in two gloo processes: FSDP2 shards a student, and its loss and gradients are those of one process."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsify.recipe import LossWeights
from sparsify.training.student import Student, Teacher, trainable_parameters
from tests.helpers.tiny import tiny_model
from tests.training.test_student import batch, compressed, stored


def student_of(weights: LossWeights) -> Student:
    model = tiny_model(seed=1, tie_word_embeddings=True)
    linears = compressed(model)
    trainable_parameters(model, linears, ["linears", "norms", "embedding"], stored(model))
    model.gradient_checkpointing_enable()
    return Student(model, weights, 1.0, torch.float32).train()


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
    dist.barrier()
    if rank == 0:
        print("equal:", len(found), "gradients")
    dist.destroy_process_group()
