"What a training needs and costs: the loss of a large batch, the memory budget, the cost card."
import itertools
import json
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from conftest import CHECKPOINTS, ROOT
from lvlm_research.budget import Needs, free_memory, naming_what_fits, needs, suggestion, too_large
from lvlm_research.config import InputError
from lvlm_research.costs import CostMeter, FlopsByPart, parts_of
from lvlm_research.datasets import joint_batches, scene_pairs
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.finetuning import FineTuning, fine_tune
from lvlm_research.fitting import fit
from lvlm_research.levers import length_groups
from lvlm_research.losses import info_nce
from lvlm_research.training import VARIANTS, Discriminative, prepare

LLAVA = CHECKPOINTS / "llava-micro"


class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that is made inside."

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t))])
        return result


@pytest.mark.parametrize("most", [1, 3000, 2**22])
def test_the_loss_of_a_large_batch_never_holds_all_similarities(most):
    size, extra = 300, 40
    generator = torch.Generator().manual_seed(0)
    inputs = [F.normalize(torch.randn(n, 4, generator=generator), dim=1).requires_grad_() for n in (size, size, extra)]
    scale, caption = torch.tensor(12.0, requires_grad=True), torch.arange(size) // 2 * 2  # every caption comes twice
    with Largest() as held:
        loss = info_nce(inputs[0], inputs[1], scale, caption, inputs[2], most=most)
        found = torch.autograd.grad(loss, [*inputs, scale])
    logits = scale * inputs[0] @ torch.cat(inputs[1:]).T
    same = (caption[:, None] == caption) & ~torch.eye(size, dtype=torch.bool)
    to_text, to_image = logits.masked_fill(F.pad(same, (0, extra)), -torch.inf), logits[:, :size].T.masked_fill(same, -torch.inf)
    plain = F.cross_entropy(to_text, torch.arange(size)) + F.cross_entropy(to_image, torch.arange(size))
    assert abs(loss.item() - plain.item()) < 1e-6 * plain.item()
    for gradient, expected in zip(found, torch.autograd.grad(plain, [*inputs, scale]), strict=True):
        assert (gradient - expected).abs().max() < 1e-6
    assert held.numbers <= max(most, 4 * (size + extra)) or most > size * (size + extra)  # the embeddings themselves are 4 * 340 numbers


def cost(groups: list, lengths: list[int], price: int) -> int:
    return sum(max(lengths[i] for i in group) * len(group) + price for group in groups)


@pytest.mark.parametrize("price, most", itertools.product((0, 3, 10, 100), (None, 1, 2, 3)))
def test_groups_of_rows_are_the_cheapest_of_all_partitions(price, most):
    rng = np.random.default_rng(0)
    for count in range(1, 8):
        lengths = rng.integers(1, 9, count).tolist()
        order = sorted(range(count), key=lambda i: -lengths[i])
        cuts = (c for k in range(count) for c in itertools.combinations(range(1, count), k))
        all_of_them = ([order[a:b] for a, b in itertools.pairwise((0, *c, count))] for c in cuts)
        cheapest = min(cost(groups, lengths, price) for groups in all_of_them if not most or max(map(len, groups)) <= most)
        found = length_groups(lengths, price, most)
        assert sorted(np.concatenate(found)) == list(range(count)) and (not most or max(map(len, found)) <= most)
        assert cost(found, lengths, price) == cheapest


# The memory budget


@pytest.mark.parametrize("free", [150, 300, 1000, 3000, 10**5])
def test_what_is_suggested_fits_and_twice_as_much_would_not(free):
    need = Needs(fixed=100, pair=50, row=40, stored=1, pairs=64)
    words = suggestion(need, free).split()
    if words[0] == '"cache_rows":':
        rows = int(words[1])
        assert need.of(64, rows) <= 0.8 * free and (rows == 64 or need.of(64, 2 * rows) > 0.8 * free)
    elif words[0] == '"batch":':
        pairs = int(words[1])
        assert need.of(pairs, 1) <= 0.8 * free < need.of(64, 1) and need.of(2 * pairs, 1) > 0.8 * free
    else:
        assert words[:2] == ["not", "even"] and need.of(1, 1) > 0.8 * free
    assert (too_large(need, free) is None) == (need.of(64) <= free)


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:   8000 kB\n")
    for name, text in (("memory.max", "5000000\n"), ("memory.current", "3000000\n"), ("memory.stat", "anon 1\ninactive_file 1000000\n")):
        (tmp_path / name).write_text(text)
    measured = lambda: free_memory(torch.device("cpu"), tmp_path, tmp_path / "meminfo")
    assert measured() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert measured() == 8000 * 1024
    (tmp_path / "memory.max").unlink()
    assert measured() == 8000 * 1024 and free_memory(torch.device("cpu"), tmp_path, tmp_path / "none") is None


def test_a_batch_that_is_too_large_is_announced_with_rows_that_fit():
    module = step_module()
    draw = lambda pairs: joint_batches(module.embedder.templates, scene_pairs(pairs, 60, 0))(0)
    of = lambda pairs: needs(module, draw(pairs), torch.device("cpu"))
    large, row = of(32), of(2)
    assert 0.8 < large.pair / row.pair < 1.25 and large.row > large.pair / 2  # captions differ in length
    line = too_large(large, large.of(32) // 4)
    assert '"cache_rows": ' in line and large.of(32, int(line.split('"cache_rows": ')[1].split()[0])) < large.of(32) // 4
    assert too_large(large, large.of(32) // 4, cache_rows=4) is None


NO_ROOM_FOR_A_KERNEL = """
import resource
from pathlib import Path
import torch
from lvlm_research.budget import naming_what_fits
from lvlm_research.config import InputError
pictures, kernel = torch.rand(16, 3, 60, 60), torch.rand(32, 3, 10, 10)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
try:
    with naming_what_fits(None, None):
        torch.conv2d(pictures, kernel, stride=10)
except InputError as error:
    print("said:", error)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="a limit of memory is Linux's, and kernels are made on the way by oneDNN for x86")
def test_a_kernel_without_room_for_its_code_is_out_of_memory():
    result = subprocess.run([sys.executable, "-c", NO_ROOM_FOR_A_KERNEL], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "said: out of memory" in result.stdout
    with pytest.raises(RuntimeError, match="primitive descriptor"), naming_what_fits(None, None):
        raise RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive")


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from lvlm_research.config import InputError
from lvlm_research.finetuning import FineTuning, fine_tune
torch.set_num_threads(1)
run = lambda name, **more: fine_tune(FineTuning(model=sys.argv[1], output=f"{sys.argv[2]}/{name}", variant="both", batch=128, steps=1, lr=1e-3, **more))
run("warm", cache_rows=8)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20, resource.RLIM_INFINITY))
try:
    run("again", cache_rows=int(sys.argv[3]))
    print("trained")
except InputError as error:
    print("said:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of memory is Linux's")
def test_out_of_memory_names_what_to_try_until_it_fits(tmp_path):
    rows, said = 0, []
    while len(said) < 5 and "trained" not in said:  # each in a process of its own: what one has freed is not all given back
        command = [sys.executable, "-W", "ignore", "-c", OUT_OF_MEMORY, str(LLAVA), str(tmp_path / str(rows)), str(rows)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        said.append(result.stdout.splitlines()[-1])
        if named := re.search(r'with (\d+) rows at a time: "cache_rows": (\d+) in the config is the next to try', said[-1]):
            rows = int(named[2])
            assert rows <= int(named[1]) // 2
    assert "out of memory with 128 rows at a time" in said[0] and said[-1] == "trained"


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), naming_what_fits(None, None):
        torch.ones(2, 3) @ torch.ones(2, 3)


# The cost card


def step_module(cache_rows: int = 0) -> Discriminative:
    torch.manual_seed(0)
    return Discriminative(prepare(DiscriminativeLVLM.from_pretrained(LLAVA), VARIANTS["vladva"]), 1.0, cache_rows, lr=1e-3)


def test_cached_gradients_run_the_trunk_again_but_not_the_tower():
    flops = {}
    for cache_rows in (0, 4):
        module = step_module(cache_rows)
        batch = joint_batches(module.embedder.templates, scene_pairs(8, 60, 0))(0)
        with FlopsByPart(parts_of(module.embedder.model)) as counted:
            module.training_step(batch, 0).backward()
        flops[cache_rows] = counted.flops
    assert flops[4]["vision"] == flops[0]["vision"] > 0 and flops[4]["head"] == flops[0]["head"] > 0
    assert 1.1 < flops[4]["trunk"] / flops[0]["trunk"] < 1.5  # forward twice, backward once; the first pass without the captions


def test_a_fine_tuning_writes_what_it_cost(tmp_path, capsys):
    fine_tune(FineTuning(model=str(LLAVA), output=str(tmp_path / "out"), batch=4, steps=3, lr=1e-3))
    cost, card = (json.loads((tmp_path / "out" / name).read_text()) for name in ("cost.json", "card.json"))
    assert capsys.readouterr().out.count("cost: ") == 1
    assert cost["steps"] == 2 and cost["pairs_per_second"] == pytest.approx(8 / cost["seconds"], rel=0.02)  # of three digits each
    assert cost["tokens_per_second"] > 10 * cost["pairs_per_second"] and cost["peak_memory_bytes"] > 2**27
    assert set(cost["flops_of_first_step"]) == {"vision", "trunk", "head", "loss"} and min(cost["flops_of_first_step"].values()) > 0
    assert cost["share_of_matmul"] > 0 and not {"pairs_per_second", "flops_per_second"} & set(card)


def test_operations_are_counted_to_the_last():
    module, meter = step_module(), CostMeter()
    meter.flops = counted = {"vision": 2**53 + 1, "trunk": 2**24 + 1}
    meter.on_train_end(None, module)
    assert meter.flops == counted and {type(number) for number in meter.flops.values()} == {int}


def test_a_training_that_is_lost_in_its_first_step_leaves_no_counter_behind():
    module, meter = step_module(), CostMeter()
    with torch.no_grad():
        module.embedder.soft_prompts.vectors["image"].fill_(torch.nan)
    with pytest.raises(InputError, match="the loss is nan"):
        fit(module, joint_batches(module.embedder.templates, scene_pairs(4, 60, 0)), 2, callbacks=[meter])
    assert _get_current_dispatch_mode() is None and meter.card() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for part in parts_of(module.embedder.model).values() for m in part)
