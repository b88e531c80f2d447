"Several processes against one: the same gradients from the same batch, whatever share each has."
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from PIL import Image

from conftest import CHECKPOINTS, ROOT
from lvlm_research.backbones import world_tokenizer
from lvlm_research.config import InputError
from lvlm_research.datasets import joint_batches, scene_pairs, text_batches
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.evaluation import load_embedder
from lvlm_research.formats import read_records, record_pairs
from lvlm_research.large_batches import own_share
from lvlm_research.scenes import long_caption, sample_scenes, scene_images, short_caption
from lvlm_research.training import VARIANTS, Discriminative, TextContrastive, prepare


def averaged(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    "Gradients, as DistributedDataParallel averages them."
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    if dist.is_initialized():
        for grad in found.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return found


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
    pairs = lambda step: [pair if i in short else replace(pair, short=None) for i, pair in zip(own_share(range(records)), scene_pairs(records, 60, 0)(step))]
    module.training_step(joint_batches(embedder.templates, pairs)(0), 0).backward()
    return averaged(module)


def text_gradients() -> dict[str, torch.Tensor]:
    "Of one step on captions alone, averaged over the processes."
    torch.manual_seed(0)
    embedder = prepare(DiscriminativeLVLM.from_pretrained(CHECKPOINTS / "llava-micro"), VARIANTS["e5v"])
    module, noted = TextContrastive(embedder), {}
    module.note = lambda **values: noted.update(values)  # it asks the trainer for the step
    module.training_step(text_batches(embedder.templates, 7, 0)(0), 0).backward()
    assert noted["pairs"] == 7
    return averaged(module)


def worker(rank: int, port: int, cases: list, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with pytest.raises(InputError, match="cannot be shared by 2 processes"):
        own_share(["one"])
    with pytest.raises(InputError, match="no picture of the training data can be read"), pytest.warns(UserWarning, match="left out") as said:
        record_pairs(read_records(f"{folder}/broken"), 4, world_tokenizer(), 0)(0)
    assert len(said) == 2  # of the four pictures each process opens its share
    for number, case in enumerate(cases):
        torch.save(gradients(*case) if case else text_gradients(), f"{folder}/{number}-{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path):
    (tmp_path / "broken").mkdir()
    for number in range(4):
        (tmp_path / f"broken/{number}.png").write_bytes(b"no picture")
    (tmp_path / "broken/captions.jsonl").write_text("".join(json.dumps({"image": f"{number}.png", "captions": ["a star"]}) + "\n" for number in range(4)))
    everyone, some, none = range(9), range(0, 8, 2), range(0)  # an uneven share; one process without short captions; no short caption at all
    cases = [(cache_rows, short, 9) for short in (everyone, some, none) for cache_rows in (0, 2)] + [()]  # the last: captions alone
    mp.spawn(worker, (free_port(), cases, str(tmp_path)), nprocs=2)
    for number, case in enumerate(cases):
        expected = gradients(0, *case[1:]) if case else text_gradients()
        for rank in range(2):
            found = torch.load(tmp_path / f"{number}-{rank}.pt")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                assert torch.allclose(found[name], gradient, atol=1e-5 * max(gradient.abs().max().item(), 1e-3)), (case, name)


@pytest.fixture
def own_data(tmp_path):
    "A folder with twelve pictures, of which two have no short caption, and a config file for each set of settings."
    rng = np.random.default_rng(0)
    scenes = sample_scenes(12, rng)
    for number, picture in enumerate(scene_images(scenes, 60)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{n}.png", "captions": [short_caption(s, rng), long_caption(s, rng)][n in (3, 7) :]}) for n, s in enumerate(scenes)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    shared = {"model": str(CHECKPOINTS / "llava-micro"), "data": ".", "steps": 3, "batch": 6, "lr": 1e-3, "dropout": 0}
    for name, more in (("one", {}), ("two", {}), ("tasks", {}), ("cached", {"cache_rows": 2}), ("spread", {"strategy": "fsdp", "cache_rows": 2}),
                       ("five", {"batch": 5}), ("uneven", {"batch": 5, "strategy": "fsdp"}), ("uneven parts", {"batch": 5, "strategy": "fsdp", "cache_rows": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(shared | more | {"output": name}))
    return tmp_path


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def started(*command: str) -> str:
    "What a process and those that it starts print."
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "LVLM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("parameters are trained") == result.stdout.count("cost: ") == 1  # one process speaks
    return result.stdout


def same_training(one, other) -> None:
    found, expected = (pd.read_csv(folder / "curves.csv") for folder in (other, one))
    assert found.pairs.tolist() == expected.pairs.tolist() and found.negatives.tolist() == expected.negatives.tolist()
    assert np.allclose(found[["contrastive", "next_token"]], expected[["contrastive", "next_token"]], atol=1e-3)
    assert torch.allclose(load_embedder(other).encode_text("a red star"), load_embedder(one).encode_text("a red star"), atol=1e-3)


def slurm_tasks(*command: str) -> list[int]:
    "Exit states of two processes that see what `srun` would tell them."
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
    shared = os.environ | job | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "LVLM_THREADS": "1"}
    tasks = [subprocess.Popen([sys.executable, *command], cwd=ROOT, env=shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")]
    return [task.wait(300) for task in tasks]


def test_several_processes_train_what_one_trains(own_data):
    train = lambda name: ("-m", "lvlm_research.cli", "train", "--config", str(own_data / f"{name}.json"))
    for name, start in (("one", ()), ("two", TORCHRUN), ("cached", TORCHRUN)):
        started(*start, *train(name))
    assert slurm_tasks(*train("tasks")) == [0, 0]
    for name in ("two", "cached", "tasks"):
        same_training(own_data / "one", own_data / name)


SPREAD = """
import sys
import lightning as L
import torch
from torch.distributed.tensor import DTensor
from lvlm_research.finetuning import fine_tune, read_fine_tuning


class InParts(L.Callback):
    def on_before_backward(self, trainer, module, loss):
        layers = module.embedder.model.get_decoder().layers
        assert all(isinstance(p, DTensor) for p in layers.parameters() if not p.requires_grad), "a layer is still whole after its forward pass"


torch.set_num_threads(1)
module = fine_tune(read_fine_tuning(sys.argv[1]), callbacks=[InParts()])
frozen = [p for p in module.embedder.model.get_decoder().layers.parameters() if not p.requires_grad]
print("held", sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen), "of", sum(p.numel() for p in frozen))
"""


def test_spread_over_two_processes_it_trains_what_one_process_trains(own_data):
    (own_data / "spread.py").write_text(SPREAD)
    held = started(*TORCHRUN, str(own_data / "spread.py"), str(own_data / "spread.json"))
    started("-m", "lvlm_research.cli", "train", "--config", str(own_data / "one.json"))
    same_training(own_data / "one", own_data / "spread")
    shares = sorted(tuple(map(int, line.split()[1::2])) for line in held.splitlines() if line.startswith("held"))
    whole = shares[0][1]
    assert shares == [(whole // 2, whole), (whole, whole)]  # the second process still holds its half; the first made a whole model to save


def test_spread_processes_with_uneven_shares_make_equally_many_passes(own_data):
    "Three records against two, of which some have no short caption: each layer is put together by all, or all wait for ever."
    (own_data / "spread.py").write_text(SPREAD)
    started("-m", "lvlm_research.cli", "train", "--config", str(own_data / "five.json"))
    for name in ("uneven", "uneven parts"):
        started(*TORCHRUN, str(own_data / "spread.py"), str(own_data / f"{name}.json"))
        same_training(own_data / "five", own_data / name)


NOISY = """
import os
import signal
import sys
import lightning as L
import torch
from lvlm_research.fitting import FitModule, fit

folder, killed_after = sys.argv[1], int(sys.argv[2])
rank = int(os.environ["RANK"])


class Noisy(FitModule):
    def __init__(self):
        super().__init__(lr=0.1)
        self.w, self.masks = torch.nn.Parameter(torch.zeros(4, 4)), []

    def training_step(self, batch, index):
        self.masks.append(torch.rand(4, 4) < 0.5)
        return ((self.w * self.masks[-1] - batch) ** 2).mean()


class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if rank == 1 and trainer.global_step == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(0)
draw = lambda step: torch.full((4, 4), float(step + 1))
module = fit(Noisy(), draw, 6, keep=f"{folder}/state.ckpt", every=1000.0 * rank, callbacks=[Kill()])  # by the clock of the second process no state is due
torch.save([module.w.data, torch.stack(module.masks), torch.rand(4)], f"{folder}/{rank}.pt")
"""


def test_two_processes_that_were_killed_go_on_with_the_random_numbers_of_each(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    run = lambda folder, killed_after: subprocess.run([sys.executable, *TORCHRUN, tmp_path / "noisy.py", tmp_path / folder, str(killed_after)], cwd=ROOT,
                                                      env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert run("whole", 0).returncode == 0 and run("killed", 4).returncode != 0
    assert torch.load(tmp_path / "killed/state.ckpt", weights_only=True)["global_step"] == 3
    again = run("killed", 0)
    assert again.returncode == 0 and again.stdout.count("going on from step 3 of 6") >= 1, again.stderr[-2000:]
    whole, rest = ([torch.load(tmp_path / folder / f"{rank}.pt", weights_only=True) for rank in range(2)] for folder in ("whole", "killed"))
    for (w, masks, after), (other_w, other_masks, other_after) in zip(whole, rest):
        assert torch.equal(w, other_w) and torch.equal(masks[3:], other_masks) and torch.equal(after, other_after)
    assert torch.equal(whole[0][0], whole[1][0]) and not (whole[0][1] == whole[1][1]).all((1, 2)).any()  # averaged gradients, masks of their own
