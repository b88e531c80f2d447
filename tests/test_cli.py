"Bad input ends with exit code 2 and one line; good input does what it says, on scenes saved as files and on real photographs."
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import CHECKPOINTS, fails_in_one_line, run
from lvlm_research.benchmarks import load_suite
from lvlm_research.config import exclusive
from lvlm_research.reproduce import IN_GRAPH, results_folder
from lvlm_research.scenes import sample_scenes, scene_images, short_caption

MODEL = str(CHECKPOINTS / "llava-micro")


@pytest.fixture
def folder(tmp_path):
    "Eight scenes as a user's folder."
    rng = np.random.default_rng(0)
    scenes = sample_scenes(8, rng, "test", counts=(2, 3))
    (tmp_path / "images").mkdir()
    lines = []
    for i, (picture, scene) in enumerate(zip(scene_images(scenes, 90), scenes)):
        Image.fromarray(picture).save(tmp_path / f"images/{i}.png")
        lines.append(json.dumps({"image": f"images/{i}.png", "captions": [short_caption(scene, rng)], "label": f"class {i % 3}", "split": ("train", "test")[i % 2]}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_evaluate_embed_and_search_a_folder(folder):
    result = run("evaluate", "--model", MODEL, "--data", str(folder), "--label", "label", "--out", str(folder / "rows.csv"))
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(folder / "rows.csv")
    assert set(rows.benchmark) == {"retrieval", "classification"} and rows.value.between(0, 100).all()
    result = run("embed", MODEL, str(folder), "--out", str(folder / "index.parquet"))
    assert result.returncode == 0 and "8 pictures, 8 captions, 128 dimensions" in result.stdout, result.stderr
    result = run("search", str(folder / "index.parquet"), str(folder / "images/5.png"), "a red star", "--top", "3", "--csv", str(folder / "hits.csv"))
    query, first, *rest = result.stdout.splitlines()
    assert query == str(folder / "images/5.png") and first.split()[::2] == ["1", "images/5.png"] and float(first.split()[1]) == pytest.approx(1, abs=1e-4)
    assert rest[2] == "a red star" and len(rest) == 6
    hits = pd.read_csv(folder / "hits.csv")
    assert hits["rank"].tolist() == [1, 2, 3] * 2 and hits.id[0] == "images/5.png"
    other = str(CHECKPOINTS / "clip-micro")  # of the same width, so only its signature tells
    fails_in_one_line("search", str(folder / "index.parquet"), "a star", "--model", other, says="was not made with")
    (folder / "index.parquet").write_bytes((folder / "index.parquet").read_bytes()[:100])
    fails_in_one_line("search", str(folder / "index.parquet"), "a star", says="not whole, or not written by lvlm-research embed")


def test_train_and_evaluate_by_a_config(folder):
    (folder / "mine.json").write_text(json.dumps({"model": MODEL, "data": ".", "output": "adapter", "split": "train", "steps": 2, "batch": 4, "lr": 4e-3}))
    result = run("train", "--config", str(folder / "mine.json"))
    assert result.returncode == 0 and "4 records" in result.stdout and f"adapter -> {folder / 'adapter'}" in result.stdout, result.stderr
    assert run("evaluate", "--model", str(folder / "adapter"), "--data", str(folder), "--split", "test").returncode == 0
    fails_in_one_line("train", "--config", str(folder / "mine.json"), says="holds a finished model")


def test_what_is_left_out_is_said_in_one_line(folder):
    (folder / "images/3.png").write_bytes(b"no picture")
    result = run("embed", MODEL, str(folder), "--out", str(folder / "index"), "--skip-broken")
    assert result.returncode == 0 and "7 pictures, 8 captions" in result.stdout and "1 left out" in result.stdout, result.stderr
    line, = result.stderr.strip().splitlines()
    assert line.startswith("lvlm-research: left out: ") and "3.png: not a readable image" in line


def test_data_is_read_before_a_model_is_asked_for(folder):
    fails_in_one_line("evaluate", "--data", str(folder), says="no model: give its folder with --model")


@pytest.mark.parametrize("line, says", [
    ('{"image": "images/none.png", "captions": ["x"]}', "line 9: image 'images/none.png' does not exist"),
    ('{"image": "images/0.png"', "line 9: not valid JSON"),
    ("", "line 9: empty"),
    ('{"image": "images/0.png", "captions": "x"}', "field 'captions'"),
    ('{"captions": ["x"]}', "field 'image'"),
    ('{"image": "/etc/hostname", "captions": ["x"]}', "outside the folder"),
])
def test_bad_lines_of_captions(folder, line, says):
    with open(folder / "captions.jsonl", "a") as f:
        f.write(line + "\n")
    fails_in_one_line("evaluate", "--model", MODEL, "--data", str(folder), "--out", str(folder / "rows.csv"), says=says)
    assert not (folder / "rows.csv").exists()


def test_a_broken_image_is_named(folder):
    (folder / "images/3.png").write_bytes((folder / "images/3.png").read_bytes()[:60])
    fails_in_one_line("evaluate", "--model", MODEL, "--data", str(folder), says="3.png: not a readable image")
    fails_in_one_line("embed", MODEL, str(folder), "--out", str(folder / "i.parquet"), says="3.png: not a readable image")
    assert not list(folder.glob("*i.parquet*"))


@pytest.mark.parametrize("argv, says", [
    (("reproduce", "--profile", "tiny"), "unknown profile 'tiny': use one of smoke, cpu, gpu, paper"),
    (("reproduce", "--profile", "tiny", "--check"), "unknown profile 'tiny'"),
    (("reproduce", "--profile", "smoke", "--cluster", "nowhere"), "needs snakemake (Python 3.11 or newer), and a folder with its config.yaml"),
    (("reproduce", "--profile", "smoke", "--twice", "--cluster", "workflow/slurm"), "leave out --cluster"),
    (("reference", "--results", "nowhere"), "nowhere: holds no finished run"),
    (("evaluate", "--model", "no/model", "--data", "."), "captions.jsonl: no such file"),
    (("stage", "tab99"), "unknown stage 'tab99'"),
    (("stage", "tab2", "-p", "bogus=1"), "unknown parameter 'bogus'"),
    (("stage", "tab2", "-p", "profile=3"), "must be str"),
    (("search", "none.parquet", "x"), "none.parquet: no such file"),
    (("embed", "m", "none", "--out", "x"), "none: no such file"),
    (("train", "--config", "none.json"), "none.json: cannot be read"),
    (("embed", "m", "n", "--out", "\u202e" + 300 * "x"), f"\\u202e{300 * 'x'} cannot be used: File name too long; check the path"),
])
def test_bad_arguments(argv, says):
    fails_in_one_line(*argv, says=says)


def test_a_profile_of_ones_own(tmp_path):
    profile = tmp_path / "quick.json"
    profile.write_text('{"extends": "smoke", "train_step": 2}')
    fails_in_one_line("reproduce", "--profile", str(profile), says="quick.json: unknown key 'train_step'")
    profile.write_text('{"extends": "smoke", "retrieval_images": 20}')
    run("stage", "benchmarks", "--profile", str(profile), "--results", str(tmp_path / "results"))
    assert len(load_suite(tmp_path / "results/benchmarks/suite.npz")[0].images) == 20
    assert json.loads((tmp_path / "results/profile.json").read_text())["profile"] == "quick"
    (tmp_path / "other").mkdir()
    shutil.copy(profile, tmp_path / "other")  # of the same name, but another file
    fails_in_one_line("stage", "benchmarks", "--profile", str(tmp_path / "other/quick.json"), "--results", str(tmp_path / "results"), says="holds results of profile")


def test_a_model_folder_that_is_none(folder):
    fails_in_one_line("evaluate", "--model", str(folder), "--data", str(folder), says="without config.json")
    fails_in_one_line("evaluate", "--model", str(folder / "none"), "--data", str(folder), says="does not exist")


@pytest.mark.parametrize("source, damage", [
    ("clip-micro", lambda d: (d / "model.safetensors").unlink()),
    ("clip-micro", lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000])),
    ("llava-micro", lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")),
    ("llava-micro", lambda d: (d / "tokenizer.json").unlink()),
    ("llava-micro", lambda d: (d / "config.json").write_text("{}")),
    ("llava-micro", lambda d: (d / "config.json").write_text("[]")),
    ("vladva-micro", lambda d: (d / "discriminative.json").write_text('{"base": "data/checkpoints/llava-micro"}')),
    ("vladva-micro", lambda d: (d / "adapter_model.safetensors").unlink()),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_damaged_model_folder(folder, tmp_path, source, damage):
    shutil.copytree(CHECKPOINTS / source, tmp_path / "model")
    damage(tmp_path / "model")
    fails_in_one_line("evaluate", "--model", str(tmp_path / "model"), "--data", str(folder), says="not a model")


def test_a_results_folder_of_another_profile(tmp_path):
    (tmp_path / "profile.json").write_text('{"profile": "cpu"}')
    fails_in_one_line("update", "--profile", "smoke", "--results", str(tmp_path), says="holds results of profile 'cpu'")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    fails_in_one_line("reproduce", "--profile", "smoke", "--results", str(tmp_path / "other"), says="not a results folder")
    assert (tmp_path / "other/thesis.tex").exists()
    (tmp_path / "hidden/.git").mkdir(parents=True)
    fails_in_one_line("reproduce", "--profile", "smoke", "--results", str(tmp_path / "hidden"), says="not a results folder")
    assert (tmp_path / "hidden/.git").exists()


def test_two_runs_in_one_results_folder_are_refused(tmp_path):
    with exclusive((tmp_path / "results").resolve()):
        fails_in_one_line("update", "--profile", "smoke", "--results", str(tmp_path / "results"), says="another run is at work")


def test_a_stage_that_a_killed_run_has_left_on_a_cluster_is_not_run_beside_it(tmp_path):
    results_folder("smoke", str(tmp_path / "results"))
    with exclusive((tmp_path / "results/status/tab1").resolve()):
        result = run("stage", "tab1", "--profile", "smoke", "--results", str(tmp_path / "results"), **{IN_GRAPH: str(os.getpid())})
        assert result.returncode == 2 and "status/tab1: another run is at work here" in result.stderr


def test_two_trainings_or_embeddings_in_one_place_are_refused(folder):
    (folder / "mine.json").write_text(json.dumps({"model": MODEL, "data": ".", "output": "adapter"}))
    before = sorted(folder.iterdir())
    with exclusive(folder / "adapter"), exclusive(folder / "index"):
        fails_in_one_line("train", "--config", str(folder / "mine.json"), says="adapter: another run is at work")
        fails_in_one_line("embed", MODEL, str(folder), "--out", str(folder / "index"), says="index: another run is at work")
    assert sorted(folder.iterdir()) == before


def test_real_photographs(real_data, tmp_path):
    "The path is proven; the micro model knows nothing of photographs and is said to be near chance."
    result = run("evaluate", "--model", MODEL, "--data", str(real_data / "real_pairs/coco_cc"), "--out", str(tmp_path / "rows.csv"))
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "rows.csv").set_index("metric")
    assert rows.n["t2i R@1"] == 190 and rows.n["i2t R@1"] == 38
    assert rows.chance["t2i R@1"] == pytest.approx(100 / 38, abs=0.01)
    assert "know" in result.stdout
