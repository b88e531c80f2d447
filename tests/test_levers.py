"What a training step leaves out or computes once changes neither its loss nor its gradients."
import platform
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

from lvlm_research.config import InputError
from lvlm_research.datasets import joint_batches
from lvlm_research.fused import FusedLora, FusedNorm
from lvlm_research.large_batches import _random_states, _restore
from lvlm_research.levers import PLAIN, Levers
from lvlm_research.rivals import FAMILIES, made_pairs, proportioned
from lvlm_research.training import Discriminative

SWITCHES = [f.name for f in fields(Levers) if isinstance(f.default, bool)]


@pytest.fixture(scope="module", params=FAMILIES)
def step(request):
    "A joint step on captions of very unequal length, two of them equal and one record without a short one: loss and gradients."
    torch.manual_seed(0)
    lvlm = proportioned(request.param, shrink=2)
    with torch.no_grad():
        for name, p in lvlm.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    pairs = made_pairs(7)
    pairs[3], pairs[5] = replace(pairs[3], short=pairs[1].short), replace(pairs[5], short=None)
    batch = joint_batches(lvlm.templates, lambda number: pairs)(0)

    def run(levers: Levers, cache_rows: int = 0, half: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
        lvlm.to(torch.float32 if half else torch.float64).levers = levers  # in double precision, but for the losses and the fused norm: rounding is another on every machine
        module = Discriminative(lvlm, 0.7, cache_rows)
        module.note = lambda **values: None  # it asks the trainer for the step
        with torch.autocast("cpu", torch.bfloat16, enabled=half):  # as a trainer does, which takes gradients outside
            loss = module.training_step(batch, 0)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))

    run.batch, run.lvlm = batch, lvlm
    return run


@pytest.fixture(scope="module")
def plain(step):
    return step(PLAIN)


def agree(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        size = gradient.norm() if gradient.ndim else max(gradient.abs().item(), expected[0])  # that of the temperature is a sum of logits of both signs, which may come to nothing
        assert (found[1][name] - gradient).norm() <= 1e-5 * size, name


@pytest.mark.parametrize("switches", [*[[s] for s in SWITCHES], SWITCHES], ids=lambda s: "all" if len(s) > 1 else s[0])
def test_a_lever_changes_neither_loss_nor_gradients(step, plain, switches):
    agree(step(replace(PLAIN, pass_price=1, **dict.fromkeys(switches, True))), plain)


@pytest.mark.parametrize("levers", [PLAIN, Levers(pass_price=1)], ids=["plain", "levers"])
@pytest.mark.parametrize("cache_rows", [1, 3, 7])
def test_cached_gradients_are_those_of_one_graph(step, plain, cache_rows, levers):
    agree(step(levers, cache_rows), plain)


@pytest.mark.parametrize("kind, of", [("cuda", "_all"), ("xpu", "_all"), ("mps", "")])
def test_what_a_device_drew_it_draws_again(kind, of, monkeypatch):
    "Of all devices of a kind, or of the one that there is."
    states = [7, 9]
    monkeypatch.setattr(getattr(torch, kind), f"get_rng_state{of}", lambda: list(states))
    monkeypatch.setattr(getattr(torch, kind), f"set_rng_state{of}", lambda kept: states.__setitem__(slice(None), kept))
    kept = _random_states(kind)
    states[:], drawn = [8, 10], torch.rand(3)
    _restore(kept, kind)
    assert states == [7, 9] and torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("cache_rows", [0, 3])
def test_logits_of_a_few_tokens_at_a_time_are_those_of_all(step, plain, cache_rows):
    agree(step(Levers(logits=10 * step.lvlm.model.lm_head.out_features), cache_rows), plain)


def test_cached_gradients_are_taken_outside_autocast_and_as_good_as_those_of_one_graph(step):
    (_, exact), (_, at_once) = step(Levers()), step(Levers(), half=True)
    parameter, inside = step.lvlm.model.get_parameter(next(name for name, p in step.lvlm.model.named_parameters() if p.requires_grad)), []
    hook = parameter.register_hook(lambda gradient: inside.append(torch.is_autocast_enabled("cpu")))
    _, cached = step(Levers(), 3, half=True)
    hook.remove()
    assert inside and not any(inside)
    error = lambda found: max(float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in exact.items())
    assert error(cached) < 1.2 * error(at_once) < 0.1


def test_the_levers_do_what_they_say(step):
    "Otherwise the tests above would hold for doing nothing."
    lvlm, batch, seen = step.lvlm, step.batch, []
    hooks = [module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, args[0].shape[:-1].numel())))
             for name, module in (("last", lvlm.model.get_decoder().layers[-1].mlp), ("first", lvlm.model.get_decoder().layers[0].mlp), ("head", lvlm.model.lm_head))]
    tokens = lambda name: sum(count for n, count in seen if n == name)
    counts = {}
    for label, levers in (("plain", PLAIN), *((s, replace(PLAIN, pass_price=0, **{s: True})) for s in SWITCHES)):
        seen.clear()
        with torch.no_grad():
            lvlm.levers = levers
            lvlm.embed_and_predict(batch.image), lvlm.embed(batch.text, "text")
        counts[label] = {name: tokens(name) for name in ("first", "last", "head")}
    for hook in hooks:
        hook.remove()
    read = int((batch.image.labels != -100).sum()) + len(batch.text.last)  # the read-out of a picture predicts the first token of its caption
    assert counts["read_rows"]["last"] == read < counts["plain"]["last"] and counts["read_rows"]["first"] == counts["plain"]["first"]
    assert counts["head_rows"]["head"] == int((batch.image.labels != -100).sum()) < counts["plain"]["head"]
    written = {"llava": 1, "qwen2_vl": 14}[lvlm.model.config.model_type]  # tokens that the template writes before the content
    assert counts["plain"]["first"] - counts["shared_prefix"]["first"] == written * (len(batch.image.last) + len(batch.text.last) - 2)
    real = int(batch.image.attention_mask.sum() + batch.text.attention_mask.sum())
    assert counts["packed"]["first"] == counts["length_groups"]["first"] == real < counts["plain"]["first"]  # a pass costs next to nothing here, so groups pad nothing either
    assert counts["plain"]["first"] - counts["unique"]["first"] == batch.text.input_ids.shape[1]
    for on, kind in ((True, FusedLora), (False, LoraLinear)):
        lvlm.levers = replace(PLAIN, fused_lora=on)
        assert {type(module) for module in lvlm.modules() if isinstance(module, LoraLinear)} == {kind}
    norms = [module for module in lvlm.model.get_decoder().modules() if type(module).__name__.endswith("RMSNorm")]
    for on in (True, False):
        lvlm.levers = replace(PLAIN, fused_norm=on)
        assert len(norms) == 13 and {isinstance(module, FusedNorm) for module in norms} == {on}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_pass_uses_the_memory_of_the_one_before():
    said = """
import resource, torch
from dataclasses import replace
from lvlm_research.levers import PLAIN
from lvlm_research.rivals import made_pairs, proportioned
lvlm = proportioned("llava").eval()
batch = lvlm.templates.image([p.image for p in made_pairs(24)])
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.inference_mode(): [lvlm.read_out(batch, "image") for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
lvlm.levers = replace(lvlm.levers, kept_heap=False)
pages(), print(pages())
lvlm.levers = replace(lvlm.levers, kept_heap=True)
pages(), print(pages())
"""
    anew, kept = map(int, subprocess.run([sys.executable, "-c", said], check=True, capture_output=True, text=True).stdout.split())
    assert kept < anew / 2


@pytest.mark.parametrize("cache_rows", [0, 3])
def test_the_number_of_negatives_leaves_equal_captions_out(step, cache_rows):
    noted = {}
    module = Discriminative(step.lvlm, 0.7, cache_rows)
    module.note = noted.update
    module.training_step(step.batch, 0)
    assert noted["pairs"] == 6 and noted["negatives"] == pytest.approx((4 * 5 + 2 * 4) / 6)  # two of six captions are equal


def test_pictures_go_through_the_frozen_tower_once(step):
    calls = []
    tower = next(module for name, module in step.lvlm.model.named_modules() if name.endswith(("vision_tower", "visual")))
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    step(Levers(), cache_rows=3)
    hook.remove()
    assert len(calls) == 3  # three parts of a batch of seven, each embedded twice


def test_a_batch_that_cannot_be_cut_is_refused(step):
    batch = replace(step.batch.image, vision={"pixel_values": torch.zeros(5, 3, 4, 4)})
    with pytest.raises(InputError, match="without cache_rows"):
        step.lvlm.chunks(batch, 3)
