"The batch, end to end at the smoke profile in a copy of the repository: what reruns, what does not, and what a failure leaves."
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from conftest import ROOT
from lvlm_research.reproduce import ROWS
from lvlm_research.verify import verify


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
    for name in (*(f"tables/tab{i}.{s}" for i in range(1, 10) for s in ("csv", "md")), *(f"figures/fig{i}.{s}" for i in range(1, 8) for s in ("svg", "png")),
                 "rows.csv", "claims.csv", "report.html", "manifest.json"):
        assert (results / name).stat().st_size > 0, name
    manifest = json.loads((results / "manifest.json").read_text())
    assert all(s["state"] == "ok" for s in manifest["stages"].values()) and "tab4" in manifest["stages"]
    rows = pd.read_csv(results / "rows.csv")
    assert set(rows.model.str.split(":").str[0]) == set(ROWS)
    claims = pd.read_csv(results / "claims.csv")
    assert len(claims) >= 12 and claims.name.is_unique and set(claims.verdict) <= {"reproduced", "not reproduced", "undecided"}
    page = (results / "report.html").read_text()
    assert "missing:" not in page and all(claim in page for claim in claims.claim.map(html.escape)) and page.count("<svg") == 7
    assert "<script" not in page and "://" not in page.split("</head>")[0] and "default-src 'none'" in page.split("</head>")[0]


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
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == ["claims", "fig6", "report"]


def test_a_failing_notebook_is_kept_with_its_error_and_leaves_nothing_stale(clone):
    path = clone / "nbs" / "paper" / "tab2.ipynb"
    before = path.read_text()
    edit(path, "code", lambda s: s + "\nraise ValueError('on purpose')")
    result = lvlm(clone, "update", "--profile", "smoke")
    results = clone / "results" / "smoke"
    assert result.returncode == 2 and "on purpose" in result.stdout + result.stderr
    assert json.loads((results / "failures/tab2.json").read_text())["state"] == "failed"
    assert "on purpose" in (results / "notebooks/tab2.ipynb").read_text()
    assert not (results / "tables/tab2.csv").exists() and not (results / "manifest.json").exists()
    page = (results / "report.html").read_text()
    assert "missing: " in page and "on purpose" in page and "Table 3" in page  # what failed is said, what did not is shown
    path.write_text(before)
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == ["report", "tab2"]


@pytest.mark.parametrize("name,made_again", [("figures/fig5.png", ["claims", "fig5", "report"]), ("models/soft/soft_prompts.safetensors", None), ("claims.csv", ["claims", "report"])])
def test_what_was_deleted_is_made_again(clone, name, made_again):
    path = clone / "results" / "smoke" / name
    before = path.read_bytes()
    path.unlink()
    ran = finished(lvlm(clone, "update", "--profile", "smoke"))
    assert ran == (made_again or ["claims", "evaluate-soft", "report", *(f"tab{i}" for i in (1, 2, 3, 4, 8, 9)), "train-soft"])
    assert path.read_bytes() == before


def test_one_item_alone_runs_just_what_it_needs(clone, tmp_path):
    result = lvlm(clone, "reproduce", "--profile", "smoke", "--only", "fig5", "--results", str(tmp_path / "one"), "--twice", "--cores", "1")
    assert finished(result) == sorted(2 * ["base", "dual-clip", "fig5", "prompts"])
    assert re.search(r"twice    0 of \d+ files differ$", result.stdout.strip()) and not (tmp_path / "one.second").exists()
    assert (tmp_path / "one/figures/fig5.svg").read_bytes() == (clone / "results/smoke/figures/fig5.svg").read_bytes()
    refused = lvlm(clone, "reproduce", "--profile", "smoke", "--only", "fig99")
    assert refused.returncode == 2 and "fig99" in refused.stderr and (clone / "results/smoke/report.html").exists()


def test_what_a_second_run_writes_otherwise_is_named(clone, tmp_path):
    path = clone / "nbs/paper/31_benchmarks.ipynb"
    before = path.read_text()
    edit(path, "code", lambda s: s + "\n(out / 'benchmarks/suite.npz').write_bytes(__import__('os').urandom(9))")
    result = lvlm(clone, "reproduce", "--profile", "smoke", "--only", "benchmarks", "--results", str(tmp_path / "one"), "--twice")
    path.write_text(before)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-2:] == ["twice    benchmarks/suite.npz: differs (stage benchmarks)", f"twice    1 of 1 files differ; the second run is in {tmp_path / 'one.second'}"]


def test_verify_names_an_edited_table_and_a_swapped_checkpoint(clone):
    results = clone / "results" / "smoke"
    assert finished(lvlm(clone, "update", "--profile", "smoke")) == []
    result = lvlm(clone, "verify", str(results))
    assert result.returncode == 0 and "verified" in result.stdout, result.stdout + result.stderr
    for name in ("tables/tab2.csv", "figures/fig3.svg", "rows.csv", "report.html", "models/vladva/adapter_model.safetensors", "models/clip/tokenizer.json", "prompts/best.json"):
        before = (results / name).read_bytes()
        (results / name).write_bytes(before + b" ")
        result = lvlm(clone, "verify", str(results))
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and name in result.stderr, name
        (results / name).write_bytes(before)
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=results).returncode == 0
    for name in ("manifest.json", "profile.json", "status/report.json", "status/tab2.json", "notebooks/tab2.ipynb", "failures/tab2.json", "tables/tab10.csv", "SHA256SUMS"):
        before = (results / name).read_bytes() if (results / name).is_file() else None
        (results / name).write_bytes((before or b"") + b" ")
        problem, = verify(results).problems
        assert name in problem
        (results / name).unlink() if before is None else (results / name).write_bytes(before)
    status = results / "status/fig6.json"
    before = status.read_text()
    status.write_text(before.replace('"parameters": {}', '"parameters": {"seed": 7}'))
    assert "status/fig6.json: is not the entry of the manifest" in lvlm(clone, "verify", str(results)).stderr
    status.write_text(before)
    assert lvlm(clone, "verify", str(results)).returncode == 0


def test_a_run_is_checked_against_the_reference(clone):
    reference = clone / "data" / "reference" / "smoke"
    assert lvlm(clone, "update", "--profile", "smoke", "--check").returncode == 2  # there is no reference of this profile yet
    assert lvlm(clone, "stage", "report", "--profile", "smoke").returncode == 0
    assert "needs a clean commit" in lvlm(clone, "reference", "--profile", "smoke").stderr
    for command in (("init", "-q"), ("add", "-A"), ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x")):
        subprocess.run(["git", *command], cwd=clone, check=True)
    assert lvlm(clone, "stage", "report", "--profile", "smoke").returncode == 0
    try:
        assert lvlm(clone, "reference", "--profile", "smoke").returncode == 0
        assert lvlm(clone, "update", "--profile", "smoke", "--check").returncode == 0
        verified = lvlm(clone, "verify", str(reference))
        assert verified.returncode == 0 and "note" not in verified.stdout, verified.stdout  # on its own revision parameters and code are compared too
        rows = pd.read_csv(reference / "rows.csv")
        rows.loc[3, ["value", "ci_low", "ci_high"]] += 80.0
        rows.to_csv(reference / "rows.csv", index=False)
        result = lvlm(clone, "update", "--profile", "smoke", "--check")
        assert result.returncode == 2 and "1 rows" in result.stderr and rows.model[3] in result.stdout
        manifest = json.loads((reference / "manifest.json").read_text())
        (reference / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
        result = lvlm(clone, "update", "--profile", "smoke", "--check")
        assert result.returncode == 2 and "format 1" in result.stderr
    finally:
        shutil.rmtree(reference)
        shutil.rmtree(clone / ".git")


def test_a_changed_checkpoint_is_refused_by_name(clone, tmp_path):
    weights = clone / "data" / "checkpoints" / "clip-micro" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-8])
    try:
        result = lvlm(clone, "update", "--profile", "smoke", "--only", "dual-clip", "--results", str(tmp_path / "new"))
        assert result.returncode == 2 and "clip-micro/model.safetensors: differs from its card.json" in result.stdout + result.stderr
    finally:
        weights.write_bytes(before)


def test_a_rerun_gives_byte_equal_rows(clone):
    rows = clone / "results" / "smoke" / "rows.csv"
    before = rows.read_bytes()
    result = lvlm(clone, "stage", "train-vladva", "--profile", "smoke")
    assert result.returncode == 0 and not rows.exists()  # what hangs on it is gone until it is made again
    finished(lvlm(clone, "update", "--profile", "smoke"))
    assert rows.read_bytes() == before
