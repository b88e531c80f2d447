"What a kill costs: a training goes on from its last state and ends with the same weights."
import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from conftest import CHECKPOINTS, ROOT, run
from lvlm_research.reproduce import results_folder


def kill_when(process: subprocess.Popen, file) -> None:
    "SIGKILL for the command and all it started, as soon as the file is there."
    deadline = time.monotonic() + 300
    while not file.is_file():
        assert process.poll() is None and time.monotonic() < deadline, "the training ended before it could be killed"
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


@pytest.mark.parametrize("damage", [None, 1000])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, damage):
    profile = tmp_path / "quick.json"
    profile.write_text(json.dumps({"extends": "smoke", "train_steps": 30, "keep_seconds": 0.001}))
    stage = lambda folder: ("stage", "train-both", "--profile", str(profile), "--results", str(tmp_path / folder))
    adapter, state = "models/both/adapter_model.safetensors", tmp_path / "killed/unfinished/both/state.ckpt"
    for folder in ("whole", "killed"):  # what earlier stages write
        results = results_folder(str(profile), str(tmp_path / folder))
        shutil.copytree(CHECKPOINTS / "llava-micro", results / "models/base")
        shutil.copytree(ROOT / "data/reference/cpu/prompts", results / "prompts")
    assert run(*stage("whole")).returncode == 0
    with subprocess.Popen([sys.executable, "-m", "lvlm_research.cli", *stage("killed")], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        kill_when(process, state)
    assert not (tmp_path / "killed" / adapter).exists()
    if damage:
        os.truncate(state, damage)
    result = run(*stage("killed"))
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "killed/notebooks/train-both.ipynb").read_text()
    assert ("not a state to go on from" if damage else "going on from step") in log
    assert (tmp_path / "killed" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    assert not state.exists()  # what is finished needs no state
