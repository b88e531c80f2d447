"The batch, end to end at the smoke profile in a copy of the repository: what reruns, what does not, and what a failure leaves."
import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from conftest import ROOT
from lvlm_research.config import available_cores


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A copy in which the smoke profile has been reproduced."
    copy = tmp_path_factory.mktemp("clone") / "repo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "results", "__pycache__", ".hypothesis", ".pytest_cache", "*.egg-info"))
    result = lvlm(copy, "reproduce", "--profile", "smoke")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return copy


def lvlm(copy, *argv):
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, "-m", "lvlm_research.cli", *argv], cwd=copy, env=environment, capture_output=True, text=True)


def finished(result) -> list[str]:
    "Stages that ran."
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return sorted(line.split()[0] for line in result.stdout.splitlines() if line.endswith(" s"))


def edit(path, kind, change):
    notebook = json.loads(path.read_text())
    cell = next(c for c in notebook["cells"][::-1] if c["cell_type"] == kind)
    cell["source"] = change("".join(cell["source"])).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1))


def test_everything_is_there(clone):
    results = clone / "results" / "smoke"
    for name in (*(f"tables/tab{i}.{s}" for i in (1, 2, 3, 4, 8, 9) for s in ("csv", "md")), *(f"figures/fig{i}.{s}" for i in (1, 6) for s in ("svg", "png")),
                 "rows.csv", "report.html", "manifest.json"):
        assert (results / name).stat().st_size > 0, name
    manifest = json.loads((results / "manifest.json").read_text())
    assert all(s["state"] == "ok" for s in manifest["stages"].values()) and "tab4" in manifest["stages"]
    rows = pd.read_csv(results / "rows.csv")
    assert {"clip", "negclip", "zero-shot", "soft", "lora", "both", "vladva"} <= set(rows.model)
    assert "<script" not in (results / "report.html").read_text() and "http" not in (results / "report.html").read_text().split("</head>")[0]


def test_nothing_reruns_when_nothing_changed(clone):
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == []


def test_prose_reruns_nothing_and_code_reruns_its_readers(clone):
    path = clone / "nbs" / "paper" / "tab2.ipynb"
    edit(path, "markdown", lambda s: s + "\nOne more sentence.")
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == []
    edit(path, "code", lambda s: s + "\nassert len(table) > 1")
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == ["report", "tab2"]


def test_without_the_scheduler_an_update_runs_the_same_stages(clone):
    path = clone / "nbs" / "paper" / "tab1.ipynb"
    edit(path, "code", lambda s: s + "\nassert len(table) > 2")
    hidden = "import sys; sys.modules['snakemake'] = None; from lvlm_research.cli import main; sys.exit(main(['update', '--profile', 'smoke']))"
    result = subprocess.run([sys.executable, "-c", hidden], cwd=clone, env=os.environ | {"PYTHONPATH": str(clone)}, capture_output=True, text=True)
    assert finished(result) == ["report", "tab1"]
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == ["report", "tab1"]  # the scheduler trusts only its own records


def test_what_was_made_with_other_parameters_is_made_again(clone):
    result = lvlm(clone, "stage", "fig6", "--profile", "smoke", "-p", "seed=7")
    assert result.returncode == 0 and json.loads((clone / "results/smoke/status/fig6.json").read_text())["parameters"] == {"seed": 7}
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == ["fig6", "report"]


def test_a_failing_notebook_is_kept_with_its_error_and_leaves_nothing_stale(clone):
    path = clone / "nbs" / "paper" / "tab2.ipynb"
    before = path.read_text()
    edit(path, "code", lambda s: s + "\nraise ValueError('on purpose')")
    result = lvlm(clone, "update", "--profile", "smoke")
    results = clone / "results" / "smoke"
    assert result.returncode == 2 and "on purpose" in result.stdout + result.stderr
    assert json.loads((results / "status/tab2.json").read_text())["state"] == "failed"
    assert "on purpose" in (results / "notebooks/tab2.ipynb").read_text()
    assert not (results / "tables/tab2.csv").exists() and not (results / "report.html").exists()
    path.write_text(before)
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == ["report", "tab2"]


def test_a_rerun_gives_byte_equal_rows(clone):
    rows = clone / "results" / "smoke" / "rows.csv"
    before = rows.read_bytes()
    result = lvlm(clone, "stage", "train-vladva", "--profile", "smoke", "--threads", str(available_cores()))
    assert result.returncode == 0 and not rows.exists()  # what hangs on it is gone until it is made again
    finished(lvlm(clone, "update", "--profile", "smoke"))
    assert rows.read_bytes() == before
