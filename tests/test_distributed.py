"Several processes against one: the same gradients from the same batch, whatever share each has."
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conftest import CHECKPOINTS
from lvlm_research.config import InputError
from lvlm_research.datasets import joint_batches, scene_pairs
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.large_batches import own_share
from lvlm_research.training import VARIANTS, Discriminative, prepare


def gradients(cache_rows: int, short: range, records: int) -> dict[str, torch.Tensor]:
    "Of one joint step on a batch in which only some records have a short caption, averaged over the processes as DistributedDataParallel does."
    torch.manual_seed(0)
    embedder = prepare(DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "llava-micro"), VARIANTS["vladva"])
    with torch.no_grad():
        for name, p in embedder.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    module = Discriminative(embedder, 0.7, cache_rows)
    module.note = lambda **values: None  # it asks the trainer for the step
    pairs = lambda step: [pair if i in short else replace(pair, short=None) for i, pair in enumerate(scene_pairs(records, 60, 0)(step))]
    module.training_step(joint_batches(embedder.templates, pairs)(0), 0).backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    if dist.is_initialized():
        for grad in found.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return found


def worker(rank: int, port: int, cases: list, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with pytest.raises(InputError, match="cannot be shared by 2 processes"):
        own_share(["one"])
    for number, case in enumerate(cases):
        torch.save(gradients(*case), f"{folder}/{number}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path):
    everyone, some, none = range(9), range(0, 8, 2), range(0)  # an uneven share; one process without short captions; no short caption at all
    cases = [(cache_rows, short, 9) for short in (everyone, some, none) for cache_rows in (0, 2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, cases, str(tmp_path)), nprocs=2)
    for number, case in enumerate(cases):
        expected = gradients(0, *case[1:])
        for rank in range(2):
            found = torch.load(tmp_path / f"{number}-{rank}.pt")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                assert torch.allclose(found[name], gradient, atol=1e-5 * max(gradient.abs().max().item(), 1e-3)), (case, name)
