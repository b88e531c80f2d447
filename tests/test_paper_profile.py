"A profile that brings checkpoints, pairs and public benchmarks runs the same notebooks; here with toy models of the real classes and ten made records."
import json
import re
import shutil

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import CHECKPOINTS, ROOT, fails_in_one_line
from lvlm_research.backbones import world_tokenizer
from lvlm_research.config import InputError, find_model, profile_of, sha256
from lvlm_research.dry_run import check_sources, model_size, plan
from lvlm_research.embedder import DiscriminativeLVLM, adapter_config
from lvlm_research.public_benchmarks import validation_gallery
from lvlm_research.reproduce import check_parameters, fingerprint, is_current, notebook_path, results_folder, signatures, stages
from lvlm_research.scenes import NEGATIVE_TYPES, long_caption, sample_scenes, scene_images, short_caption
from lvlm_research.zoo import micro_family

ROWS = {"zero-shot", "soft", "lora", "both", "vladva", "zero-shot-qwen2-vl", "vladva-qwen2-vl"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    "The file of a profile that brings a LLaVA, a Qwen2-VL, ten pairs, a validation set and five public benchmarks."
    folder = tmp_path_factory.mktemp("world")
    tokenizer, rng = world_tokenizer(), np.random.default_rng(0)
    for name in ("llava", "qwen2_vl"):
        torch.manual_seed(0)
        for part in micro_family(name, tokenizer):
            part.save_pretrained(folder / name)
    scenes, others = (sample_scenes(10, rng, split, counts=(2, 3)) for split in ("test", "validation"))
    short, long, *validation = ([caption(scene, rng) for scene in drawn] for drawn in (scenes, others) for caption in (short_caption, long_caption))
    names = [f"{i}.png" for i in range(10)]
    pictures = folder / "pictures"
    for i, pixels in enumerate(scene_images(scenes, 40)):
        for path in (pictures / names[i], pictures / f"ex_{i}.png", pictures / f"n{i % 2}/{i}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (folder / "validation").mkdir()
    for name, pixels in zip(names, scene_images(others, 40)):
        Image.fromarray(pixels).save(folder / "validation" / name)
    write(pictures / "captions.jsonl", "".join(json.dumps({"image": n, "captions": [s, l]}) + "\n" for n, s, l in zip(names, short, long)))
    write(folder / "val.json", [{"image": n, "caption": [s, l]} for n, s, l in zip(names, *validation)])
    write(folder / "flickr30k_test.json", [{"image": n, "caption": [s]} for n, s in zip(names, short)])
    items = [{"id": i, "filename": names[i], "caption": short[i], "caption2": long[i], "negative_caption": short[i - 1]} for i in range(3)]
    for kind in NEGATIVE_TYPES:
        write(folder / f"sugarcrepe/{kind}.json", {str(i): item for i, item in enumerate(items)})
        write(folder / f"sugarcrepe_pp/{kind}.json", items)
    write(folder / "examples.jsonl", "".join(json.dumps({"image_0": f"ex_{2 * i}", "image_1": f"ex_{2 * i + 1}", "caption_0": short[2 * i], "caption_1": short[2 * i + 1],
                                                         "collapsed_tag": "Object"}) + "\n" for i in range(3)))
    write(folder / "imagenet/classnames.json", ["star", "ring"])
    write(folder / "imagenet/templates_openai80.json", ["a {}.", "the {}."])
    write(folder / "imagenet/wnids_sorted.txt", "n0\nn1\n")
    places = {"flickr30k": "flickr30k_test.json", "sugarcrepe": "sugarcrepe", "sugarcrepe_pp": "sugarcrepe_pp", "winoground": "examples.jsonl", "imagenet": "imagenet"}
    write(folder / "toy.json", {
        "extends": "paper", "models": {"base": "llava", "qwen2-vl": "qwen2_vl"}, "training": {"data": "pictures"},
        "validation": {"task": "flickr30k", "data": "val.json", "images": "validation"}, "benchmarks": {task: {"data": data, "images": "pictures"} for task, data in places.items()},
        "train_steps": 2, "train_batch": 4, "cache_rows": 2, "precision": "32-true", "study_images": 6, "draws": 50})
    return folder / "toy.json"


def run_here(stage, profile: str, results) -> dict:
    "The code cells of a stage's notebook in this process, parameters set as papermill sets them; a kernel for each would take minutes."
    parameters = {"profile": profile, "results": str(results), **stage.parameters}
    check_parameters(notebook_path(stage.notebook), parameters)
    names = {}
    for cell in json.loads(notebook_path(stage.notebook).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), stage.notebook, "exec"), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}
    return names


@pytest.fixture(scope="module")
def results(profile, tmp_path_factory):
    "Its results folder, every stage run."
    matplotlib.use("Agg")
    folder = results_folder(str(profile), str(tmp_path_factory.mktemp("results") / "toy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LVLM_STAGE", "toy")  # what is missing is an error, not the committed reference
        for stage in stages(str(profile)):
            run_here(stage, str(profile), folder)
            assert [name for name in stage.writes if not (folder / name).is_file()] == [], stage.name
            matplotlib.pyplot.close("all")
    return folder


def test_train_evaluate_and_tables_run_on_what_the_profile_brings(profile, results):
    rows = pd.read_csv(results / "rows.csv")
    assert set(rows.model) == ROWS and set(rows.benchmark) == {"flickr30k", "sugarcrepe", "sugarcrepe_pp", "winoground", "imagenet"}
    assert set(rows.profile) == {"toy"} and rows.value.between(0, 100).all()
    for name, base in (("vladva", "llava"), ("soft", "llava"), ("vladva-qwen2-vl", "qwen2_vl")):
        assert adapter_config(results / "models" / name)["base"] == str(profile.parent / base)
        card = json.loads((results / "models" / name / "card.json").read_text())
        assert card["data"] == str(profile.parent / "pictures") and card["steps"] == 2 and card["pairs_seen"] == 8
    prompts = pd.read_csv(results / "prompts/prompts.csv")
    assert len(prompts) == 50 and prompts.recall.between(0, 100).all()


@pytest.mark.parametrize("name, column, models", [
    ("tab1", "Flickr30K: t2i R@1", 5), ("tab2", "swap_att", 5), ("tab3", "swap_att TOT", 5), ("tab4", "t2i R@1", 5), ("tab5", "Flickr30K: i2t R@10", 4),
    ("tab6", "add_obj", 4), ("tab7", "replace_rel ITT", 4), ("tab8", "group", 5), ("tab9", "top-1", 5)])
def test_ours_stand_in_the_tables_beside_the_reported(results, name, column, models):
    table = pd.read_csv(results / f"tables/{name}.csv")
    ours = table[table.source == "ours"]
    assert len(ours) == models and ours[column].notna().all()
    assert name == "tab7" or table[table.source == "reported"][column].notna().any()  # the same column as the paper's
    if name == "tab4":
        assert set(ours["starts from"].dropna()) == {"a checkpoint that the profile brings"}


def test_the_report_says_what_is_left_out_and_shows_the_rest(results):
    page = (results / "report.html").read_text()
    assert "checkpoints, training data and public benchmarks that the profile names" in page and "missing:" not in page
    assert "fig6: draws made scenes" in page and "classification of ImageNet" in page and "Figure 6" not in page and "Claims</h2>" not in page
    assert not [line for line in page.split("Left out")[0].split("<h2>") if "scenes" in line.split("</p>")[0]]  # no note speaks of the made world


@pytest.mark.parametrize("file, brought, stage", [
    ("llava/model.safetensors", "model base", "train-vladva"), ("llava/tokenizer_config.json", "model base", "evaluate-zero-shot"), ("qwen2_vl/chat_template.jinja", "model qwen2-vl", "train-vladva-qwen2-vl"),
    ("pictures/3.png", "training|benchmark .*", "train-soft"), ("validation/3.png", "validation", "prompts"), ("val.json", "validation", "prompts"), ("sugarcrepe/swap_att.json", "benchmark sugarcrepe", "benchmarks")])
def test_a_stage_is_stale_when_what_the_profile_brings_has_changed(profile, tmp_path, file, brought, stage):
    world, results = shutil.copytree(profile.parent, tmp_path / "world"), tmp_path / "results"
    graph = [s for s in stages(str(world / "toy.json")) if s.brought]
    for s in graph:
        for name in (*s.reads, *s.writes):
            write(results / name, "x")
        hashes = lambda names: {name: sha256(results / name) for name in names}
        write(results / f"status/{s.name}.json", {"fingerprint": fingerprint(s), "reads": hashes(s.reads), "writes": hashes(s.writes), "brought": signatures(s)})
    assert all(is_current(s, results) for s in graph)
    changed = bytearray((world / file).read_bytes())
    changed[len(changed) // 2] ^= 1
    (world / file).write_bytes(changed)
    stale = {s.name for s in graph if not is_current(s, results)}
    assert stage in stale and stale == {s.name for s in graph if any(re.fullmatch(brought, name) for name in s.brought)} != {s.name for s in graph}


def test_a_dry_run_counts_what_is_there_and_names_what_is_not(profile, tmp_path):
    found = plan(str(profile))
    assert not found.missing and not any(line.missing for line in found.lines) and "nothing is missing" in str(found)
    evaluated = next(line for line in found.lines if line.stage.name == "evaluate-zero-shot")
    assert evaluated.gpu_hours > 0 and evaluated.gpu_bytes > 4 * model_size(str(profile.parent / "llava")).parameters
    shutil.copytree(profile.parent, tmp_path / "world")
    broken = tmp_path / "world/toy.json"
    for folder in ("pictures", "validation"):
        (tmp_path / "world" / folder / "3.png").unlink()
    shutil.rmtree(tmp_path / "world/qwen2_vl")
    found = plan(str(broken))
    assert set(found.missing) == {"model qwen2-vl", "validation", "benchmark flickr30k"}  # the pairs are not read through
    assert "1 of 10 pictures are missing, first" in found.missing["benchmark flickr30k"].why
    lacks = {line.stage.name: line.missing for line in found.lines}
    assert lacks["train-vladva-qwen2-vl"] == ("model qwen2-vl",) and lacks["prompts"] == ("validation",) and lacks["train-vladva"] == ()
    with pytest.raises(InputError, match="3 things are missing or not to be used, first model qwen2-vl: model '.*qwen2_vl' does not exist"):
        check_sources(str(broken))


def test_prompts_are_not_chosen_on_what_is_scored(profile, tmp_path):
    world = shutil.copytree(profile.parent, tmp_path / "world")
    shutil.copy(world / "pictures/4.png", world / "validation/7.png")  # one picture under two names
    with pytest.raises(InputError, match="1 of 10 pictures are also in benchmark flickr30k, first .*7.png'; prompts must not be chosen on them"):
        validation_gallery(profile_of(str(world / "toy.json")), 0)
    found = plan(str(world / "toy.json")).missing
    assert set(found) == {"validation"} and not found["validation"].bytes  # nothing has to be fetched


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu"])
def test_a_profile_of_the_made_world_misses_nothing(name):
    found = plan(name)
    assert found.missing == {} and len(found.lines) == len(stages(name)) and "nothing is missing" in str(found)
    assert all(line.gpu_hours is None for line in found.lines) and (name != "cpu" or sum(line.minutes or 0 for line in found.lines) > 10)


def test_estimates_follow_from_what_is_assumed():
    hours = lambda **options: {line.stage.name: line.gpu_hours for line in plan("paper", **options).lines if line.gpu_hours}
    at, half = hours(), hours(share=0.2)
    assert all(half[name] == pytest.approx(2 * at[name]) for name in at) and hours(gpu="H100")["train-vladva"] < at["train-vladva"] / 3
    seven, thirteen, two = (model_size(profile_of("paper").models[name]) for name in ("base", "llava-large", "qwen2-vl"))
    tokens = 576 + 30 + 100 + 30 + 30  # picture, its surroundings, a long caption; a short one and its surroundings
    pairs = 55_000 * 1024
    least = 3 * 2 * (seven.counts["trunk"] - 32064 * 4096) * tokens * pairs / (0.4 * 312e12) / 3600  # three passes through the trunk's matrices alone
    assert least < at["train-vladva"] < 1.2 * least
    assert at["train-vladva-llava-large"] > 1.8 * at["train-vladva"] > 1.8 * 3 * at["train-vladva-qwen2-vl"] and at["train-soft"] < at["train-vladva"]
    assert [round(size.parameters / 1e9, 2) for size in (seven, thirteen, two)] == [7.06, 13.35, 2.21]


def test_what_cannot_run_is_said_before_anything_does(tmp_path):
    fails_in_one_line("reproduce", "--profile", "paper", "--results", str(tmp_path / "r"), says="things are missing or not to be used, first model base")
    fails_in_one_line("reproduce", "--profile", "paper", "--dry-run", "--share", "0", says="--share is 0")
    assert not (tmp_path / "r").exists()


def test_a_model_in_the_cache_of_the_hub_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place, commit = tmp_path / "models--toy--llava", "0" * 40
    shutil.copytree(CHECKPOINTS / "llava-micro", place / "snapshots" / commit)
    write(place / "refs/main", commit)
    assert find_model("toy/llava").resolve() == (place / "snapshots" / commit).resolve()
    assert DiscriminativeLVLM.from_pretrained("toy/llava").encode_text("a star").shape == (128,)
    with pytest.raises(InputError, match="hf download toy/other"):
        find_model("toy/other")


def test_the_built_in_profile_looks_in_the_repository():
    paper = profile_of("paper")
    assert paper.training["data"] == str(ROOT / "data/paper/train") and paper.models["qwen2-vl"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert {s.name for s in stages("paper")} >= {"train-vladva", "train-vladva-llava-large", "evaluate-vladva-qwen2-vl", "tab9"}
    assert all(s.gpu for s in stages("paper") if s.notebook in ("20_train_discriminative", "30_evaluate", "40_prompt_study"))
