"What a kill, a torn file and a full disk cost: a run goes on from its last state and ends with the same bytes."
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import lightning as L
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from conftest import CHECKPOINTS, ROOT, run
from lvlm_research.backbones import world_tokenizer
from lvlm_research.cli import main
from lvlm_research.config import InputError
from lvlm_research.faults import kill
from lvlm_research.finetuning import FineTuning, fine_tune
from lvlm_research.formats import read_records, record_pairs
from lvlm_research.reproduce import has_snakemake, processes_of, results_folder
from lvlm_research.scenes import sample_scenes, scene_images, short_caption
from lvlm_research.warm_kernels import copies_kernels


def kill_when(process: subprocess.Popen, file) -> None:
    "SIGKILL for the command and all it started, as soon as the file is there."
    deadline = time.monotonic() + 300
    while not file.is_file():
        assert process.poll() is None and time.monotonic() < deadline, "the training ended before it could be killed"
        time.sleep(0.02)
    kill(process)


@contextmanager
def full_disk(size: int):
    "No file of this process may grow beyond so many bytes."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def files_in(folder) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def data(tmp_path):
    "Eight scenes as a folder of pictures with captions."
    rng = np.random.default_rng(0)
    scenes = sample_scenes(8, rng)
    (tmp_path / "data").mkdir()
    for number, picture in enumerate(scene_images(scenes, 60)):
        Image.fromarray(picture).save(tmp_path / f"data/{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "captions": [short_caption(scene, rng)]}) + "\n" for number, scene in enumerate(scenes)]
    (tmp_path / "data/captions.jsonl").write_text("".join(lines))
    return tmp_path / "data"


def soft(data, output, **more) -> FineTuning:
    "A short training of soft prompts, which keeps a state after every step."
    given = {"model": str(CHECKPOINTS / "llava-micro"), "data": str(data), "output": str(output), "variant": "soft", "steps": 5, "batch": 4, "lr": 4e-3, "keep_seconds": 0.001}
    return FineTuning(**given | more)


class Killed(L.Callback):
    "Ends a training before a step."

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("damage", [None, 1000])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, damage):
    profile = tmp_path / "quick.json"
    profile.write_text(json.dumps({"extends": "smoke", "train_steps": 30, "keep_seconds": 0.001}))
    stage = lambda folder: ("stage", "train-both", "--profile", str(profile), "--results", str(tmp_path / folder))
    adapter, state = "models/both/adapter_model.safetensors", tmp_path / "killed/unfinished/both/state.ckpt"
    before = state.with_stem("state.before")
    for folder in ("whole", "killed"):  # what earlier stages write
        results = results_folder(str(profile), str(tmp_path / folder))
        shutil.copytree(CHECKPOINTS / "llava-micro", results / "models/base")
        shutil.copy(ROOT / "data/reference/cpu/models/base/facts.json", results / "models/base")
        shutil.copytree(ROOT / "data/reference/cpu/prompts", results / "prompts")
    assert run(*stage("whole")).returncode == 0
    with subprocess.Popen([sys.executable, "-m", "lvlm_research.cli", *stage("killed")], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        kill_when(process, before)
    assert not (tmp_path / "killed" / adapter).exists()
    if damage:
        os.truncate(state, damage)
    result = run(*stage("killed"))
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "killed/notebooks/train-both.ipynb").read_text()
    assert "going on from step" in log and (f"going on from the state before, {before}" in log) == bool(damage)
    assert (tmp_path / "killed" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    assert not state.exists() and not before.exists()  # what is finished needs no state


def test_a_torn_state_never_takes_the_place_of_a_good_one(data, tmp_path, capsys):
    "Torn, then killed again before a new state was written: the good one is still there."
    fine_tune(soft(data, tmp_path / "whole"))
    state, before = (tmp_path / "killed/unfinished" / name for name in ("state.ckpt", "state.before.ckpt"))
    for step, every in ((3, 0.001), (4, 100.0)):
        with pytest.raises(RuntimeError, match="killed"):
            fine_tune(soft(data, tmp_path / "killed", keep_seconds=every), callbacks=[Killed(step)])
        if step == 3:
            assert torch.load(state, weights_only=True)["global_step"] == 3
            content = state.read_bytes()
            state.write_bytes(content[: len(content) // 2])
        assert torch.load(before, weights_only=True)["global_step"] == 2
    fine_tune(soft(data, tmp_path / "killed"))
    said = capsys.readouterr().out
    assert said.count(f"{state}: not a state to go on from") == 2 and said.count("going on from step 2 of 5") == 2
    assert (tmp_path / "killed/soft_prompts.safetensors").read_bytes() == (tmp_path / "whole/soft_prompts.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["nothing", "frozen base", "dropout", "later record", "later picture"])
def test_a_killed_training_goes_on_only_with_the_same_base_dropout_and_data(data, tmp_path, capsys, change):
    base = shutil.copytree(CHECKPOINTS / "llava-micro", tmp_path / "base")
    config = soft(data, tmp_path / "killed", model=str(base), variant="lora", batch=2)
    with pytest.raises(RuntimeError, match="killed"):
        fine_tune(config, callbacks=[Killed(2)])
    records = read_records(data)
    first = {pair.where for pair in record_pairs(records, 2, world_tokenizer(), 0)(0)}
    later = next(i for i, record in enumerate(records) if record["where"] not in first)
    if change == "frozen base":
        weights = load_file(base / "model.safetensors")
        weights[max(weights)].flat[0] += 1
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    elif change == "dropout":
        config = replace(config, dropout=0.2)
    elif change == "later record":
        file = data / "captions.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        lines[later] = json.dumps(json.loads(lines[later]) | {"captions": ["a star"]}) + "\n"
        file.write_text("".join(lines))
    elif change == "later picture":
        Image.new("RGB", (9, 9)).save(records[later]["image"])
    fine_tune(config)
    assert ("going on from step 2" in capsys.readouterr().out) == (change == "nothing")


def test_what_ran_before_in_the_process_changes_nothing(data, tmp_path):
    fine_tune(soft(data, tmp_path / "first"))
    torch.manual_seed(77)
    np.random.seed(77)
    fine_tune(soft(data, tmp_path / "other", seed=3, steps=2))
    fine_tune(soft(data, tmp_path / "second"))
    first, second = ((tmp_path / name / "soft_prompts.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second != (tmp_path / "other/soft_prompts.safetensors").read_bytes()


def test_a_full_disk_ends_a_training_in_one_line_and_it_goes_on_once_there_is_room(data, tmp_path, capsys):
    fine_tune(soft(data, tmp_path / "whole"))
    config = vars(soft(data, tmp_path / "full"))
    (tmp_path / "full.json").write_text(json.dumps({key: config[key] for key in ("model", "data", "output", "variant", "steps", "batch", "lr", "keep_seconds")}))
    with full_disk(8 << 10):
        assert main(["train", "--config", str(tmp_path / "full.json")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "training stopped after step 1" in said and "state.ckpt cannot be written (File too large); no state was kept" in said
    assert files_in(tmp_path / "full") == set()

    class Fills(L.Callback):
        "After the training: the disk is full when the adapter is written."

        def on_train_end(self, trainer, module):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with full_disk(1 << 30), pytest.raises(InputError, match="the adapter cannot be written.*the last state of the training is kept"):
        fine_tune(soft(data, tmp_path / "full"), callbacks=[Fills()])
    assert files_in(tmp_path / "full") == {"unfinished/state.ckpt", "unfinished/state.before.ckpt"}
    assert main(["train", "--config", str(tmp_path / "full.json")]) == 0
    assert (tmp_path / "full/soft_prompts.safetensors").read_bytes() == (tmp_path / "whole/soft_prompts.safetensors").read_bytes()


# A disk of one megabyte ($1), which another fills while the command runs, and which then has room again; the output ends in $2.
SMALL_DISK = """
mount -t tmpfs -o size=1m tmpfs "$1" || exit 3
disk=$1 kept=$2; shift 2
"$@" & while [ ! -e "$disk/out/unfinished/state.ckpt" ] && kill -0 $!; do sleep 0.01; done
head -c 2m /dev/zero > "$disk/fill" 2>/dev/null
wait $!; echo "ended with $?"; find "$disk/out" -type f; rm "$disk/fill"
"$@"; echo "ended with $?"; cp -r "$disk/out" "$kept"
"""
NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


@pytest.mark.skipif(not shutil.which("unshare") or bool(subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode), reason="no disk can be mounted here")
def test_a_small_disk_that_another_fills_ends_a_training_in_one_line_and_it_goes_on(data, tmp_path):
    config, disk, kept = vars(soft(data, tmp_path / "whole", steps=60)), tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    given = {key: config[key] for key in ("model", "data", "variant", "steps", "batch", "lr", "keep_seconds")}
    (tmp_path / "whole.json").write_text(json.dumps(given | {"output": config["output"]}))
    (tmp_path / "disk.json").write_text(json.dumps(given | {"output": str(disk / "out")}))
    assert run("train", "--config", str(tmp_path / "whole.json")).returncode == 0
    command = [*NAMESPACE, "bash", "-c", SMALL_DISK, "bash", str(disk), str(kept), sys.executable, "-m", "lvlm_research.cli", "train", "--config", str(tmp_path / "disk.json")]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    first, second = said.split("ended with 2\n")
    assert "No space left on device" in first.splitlines()[-1] and "Traceback" not in said and ".part" not in second, said
    assert "going on from step" in second and second.endswith("ended with 0\n"), said
    assert (kept / "soft_prompts.safetensors").read_bytes() == (tmp_path / "whole/soft_prompts.safetensors").read_bytes()


@pytest.mark.parametrize("size, says, kept", [(2 << 10, "free some space", 0), (8 << 10, "4 shards are kept", 4)])
def test_a_full_disk_ends_an_embedding_in_one_line_and_it_goes_on_once_there_is_room(data, tmp_path, capsys, size, says, kept):
    embed = lambda name: main(["embed", str(CHECKPOINTS / "clip-micro"), str(data), "--out", str(tmp_path / name), "--shard", "2"])
    assert embed("whole.npy") == 0
    capsys.readouterr()
    with full_disk(size):
        assert embed("full.npy") == 2
    line, = capsys.readouterr().err.splitlines()
    assert says in line and "File too large" in line
    assert not [name for name in files_in(tmp_path) if ".part" in name.replace(".parts/", "/")] and not (tmp_path / "full.npy").exists()
    assert len(list((tmp_path / ".full.npy.parts").glob("*.parquet"))) == kept
    assert embed("full.npy") == 0
    assert (tmp_path / "full.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert np.load(tmp_path / "full.npy").shape == (16, 128)
    assert not (tmp_path / ".full.npy.parts").exists()


def victims(folder) -> dict:
    "The processes of a run, by what they are."
    kinds, found = {"--snakefile": "scheduler", "ipykernel_launcher": "kernel", "stage": "stage", "ask": "asker", "serve": "original"}, {}
    for process in processes_of(folder):
        with suppress(psutil.NoSuchProcess):  # gone since
            words = process.cmdline()
            kind = next((kind for word, kind in kinds.items() if word in words), None)
            found["copy" if kind == "original" and "serve" in process.parent().cmdline() else kind] = process
    return found


@pytest.mark.skipif(not has_snakemake(), reason="the scheduler is not installed")
def test_a_killed_run_leaves_no_process_and_update_goes_on(tmp_path):
    folder = (tmp_path / "results").resolve()
    command = ["update", "--profile", "smoke", "--only", "dual-clip", "--results", str(folder), "--cores", "1"]
    for victim, says in (("command", ""), ("scheduler", "the scheduler was killed"), ("stage", "the run stopped: stage dual-clip was killed"), ("kernel", "the process of the notebook was killed, perhaps because memory ran out")):
        with subprocess.Popen([sys.executable, "-m", "lvlm_research.cli", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            deadline = time.monotonic() + 300
            while "kernel" not in (found := victims(folder)) or (victim == "kernel" and found[victim].cpu_times().user < 2):  # one that dies at once is started anew
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            (process if victim == "command" else found[victim]).kill()
            said = process.stdout.read()  # to the end: when nobody is left who could say something
            process.wait()
        assert says in said and process.returncode == (-9 if victim == "command" else 2), said
        while processes_of(folder):  # the last ones may still be on their way out
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not (folder / "status/dual-clip.json").exists() and not (folder / "manifest.json").exists()
    result = run(*command)  # nothing had to be unlocked or removed
    assert result.returncode == 0 and (folder / "models/clip/model.safetensors").read_bytes() == (CHECKPOINTS / "clip-micro/model.safetensors").read_bytes(), result.stderr
    assert not [name for name in files_in(folder) if ".part" in name]


def interruptible() -> None:
    "A shell ignores Ctrl-C for what it runs in the background."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_a_training_in_one_line_and_other_settings_do_not_go_on_from_it(data, tmp_path):
    file, state = tmp_path / "mine.json", tmp_path / "out/unfinished/state.ckpt"
    config = {"model": str(CHECKPOINTS / "llava-micro"), "data": str(data), "output": "out", "variant": "soft", "steps": 500, "batch": 4, "keep_seconds": 0.001}
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "lvlm_research.cli", "train", "--config", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible) as process:
        deadline = time.monotonic() + 300
        while not state.is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and [line.partition(":")[0] for line in said.splitlines()] == ["lvlm-research"] and "interrupted" in said, said
    file.write_text(json.dumps(config | {"steps": 2, "lr": 1e-3}))
    result = run("train", "--config", str(file))
    assert result.returncode == 0 and "of another training (settings, data, base or code have changed)" in result.stdout and "training starts anew" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(not has_snakemake() or not copies_kernels(), reason="kernels are not copied here")
def test_ctrl_c_ends_a_run_in_one_line_and_leaves_no_process(tmp_path):
    folder = (tmp_path / "results").resolve()
    command = [sys.executable, "-m", "lvlm_research.cli", "update", "--profile", "smoke", "--results", str(folder), "--cores", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                          preexec_fn=interruptible) as process:
        deadline = time.monotonic() + 300
        while "copy" not in (found := victims(folder)) or found["copy"].cpu_times().user < 0.8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that the command has started in its group
        said = process.stdout.read()
    assert process.returncode == 130 and said.count("interrupted; what was finished is there") >= 1 and "Traceback" not in said, said
    while processes_of(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not has_snakemake() or not copies_kernels(), reason="kernels are not copied here")
def test_a_killed_run_with_warm_kernels_leaves_no_process_and_goes_on(tmp_path):
    for victim in ("command", "original", "asker", "copy"):
        folder = (tmp_path / victim).resolve()
        command = ["update", "--profile", "cpu", "--results", str(folder), "--cores", "1", "--only"]
        with subprocess.Popen([sys.executable, "-m", "lvlm_research.cli", *command, "evaluate-clip-large"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 300
            while "copy" not in (found := victims(folder)) or found["copy"].cpu_times().user < 0.8:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            (process if victim == "command" else found[victim]).kill()
            assert not psutil.wait_procs([found["asker"], found["copy"]], timeout=30)[1]
            process.kill()
        while processes_of(folder):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    result = run(*command, "dual-clip")
    assert result.returncode == 0 and (folder / "models/clip/card.json").is_file(), result.stderr
