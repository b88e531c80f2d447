"Every broken input gives one line that names it, quickly, through the public reader and through the command; nothing is written, nothing runs."
import json
import tempfile
import time
from pathlib import Path

import pytest

from broken_inputs import CASES, PNG, Case, make, write
from conftest import CHECKPOINTS, ROOT
from lvlm_research.benchmarks import load_suite
from lvlm_research.cli import main
from lvlm_research.config import InputError, check_card, profile_of
from lvlm_research.datasets import read_folder
from lvlm_research.embedder import open_image
from lvlm_research.evaluation import load_embedder, load_scores
from lvlm_research.formats import read_records
from lvlm_research.prompts import read_prompts
from lvlm_research.public_benchmarks import TASKS, read_captions
from lvlm_research.reproduce import results_folder
from lvlm_research.verify import verify


def verified(folder: Path) -> None:
    if problems := verify(folder).problems:
        raise InputError(f"{folder}: {problems[0]}")


READERS = {"records": read_records, "folder": read_folder, "image": open_image, "captions": read_captions, "profile": lambda p: profile_of(str(p)), "results": verified,
           "mark": lambda p: results_folder("smoke", str(p)), "card": check_card, "prompts": read_prompts, "suite": load_suite, "scores": load_scores, "model": load_embedder,
           **{name: lambda p, task=task: task.read(p, p if p.is_dir() else p.parent) for name, task in TASKS.items()}}
MODEL = str(CHECKPOINTS / "clip-micro")
COMMANDS = {"folder": lambda p, good: ["evaluate", "--model", MODEL, "--data", p], "model": lambda p, good: ["evaluate", "--model", p, "--data", good],
            "profile": lambda p, good: ["reproduce", "--profile", p], "results": lambda p, good: ["verify", p], "mark": lambda p, good: ["update", "--profile", "smoke", "--results", p],
            **{name: lambda p, good, name=name: ["evaluate", "--task", name, "--model", MODEL, "--data", p, "--images", str(Path(p).parent)] for name in TASKS}}


def contents(folder: Path) -> dict[str, tuple]:
    "Everything below a folder, files with their size and time of change."
    return {str(p): p.is_dir() or (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    "A folder to write a case into; what Python calls temporary lies beside it."
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_input_is_named_in_one_line(case: Case, place):
    given = make(case, place / "input")
    before, start = contents(place), time.process_time()
    with pytest.raises(InputError) as error:
        READERS[case.reader](given)
    message = str(error.value)
    assert case.says in message and message.isprintable(), message
    assert time.process_time() - start < 2  # of this process: the machine may have other work
    assert contents(place) == before


@pytest.mark.parametrize("case", [case for case in CASES if case.reader in COMMANDS], ids=lambda case: case.name)
def test_the_command_ends_with_two_and_one_line(case: Case, place, capsys):
    given = make(case, place / "input")
    write(place / "good/a.png", PNG)
    write(place / "good/captions.jsonl", json.dumps({"image": "a.png", "captions": ["a star"]}).encode())
    before, results = contents(place), sorted((ROOT / "results").glob("*"))
    assert main(COMMANDS[case.reader](str(given), str(place / "good"))) == 2
    said = capsys.readouterr().err
    assert said.startswith("lvlm-research: ") and said.count("\n") == 1 and case.says in said, said
    assert contents(place) == before and sorted((ROOT / "results").glob("*")) == results


def test_there_are_enough_of_them_and_their_names_differ():
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)
    assert {"records", "folder", "image", "profile", "results", "model", "suite", *TASKS} - {case.reader for case in CASES} <= {"flickr30k", "nocaps", "sugarcrepe_pp"}
