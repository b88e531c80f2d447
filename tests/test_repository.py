"The repository keeps its own rules: sync, parameters cells, one place for requirements, a fast command line."
import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from conftest import ROOT
from lvlm_research.claims import RECALL, Evidence, judge
from lvlm_research.config import sha256
from lvlm_research.benchmarks import Score
from lvlm_research.evaluation import load_scores, tidy_rows
from lvlm_research.reference import reference_folder, with_results
from lvlm_research.reproduce import ROWS, declared_parameters, fingerprint, stages
from lvlm_research.speed import DATA, RACES, code_of, run_of, with_speed
from lvlm_research.tables import readme_table

PAPER = sorted((ROOT / "nbs" / "paper").glob("*.ipynb"))
NOTEBOOKS = sorted(ROOT.glob("nbs/**/*.ipynb"))


def settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def test_export_and_clean_change_nothing(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "results", "data", "__pycache__", ".hypothesis", ".pytest_cache", "*.egg-info"))
    present = lambda: {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb")}
    before = present()
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / tool], cwd=copy, check=True, capture_output=True)
    after = present()
    assert [str(p.relative_to(copy)) for p in before | after if before.get(p) != after.get(p)] == []


@pytest.mark.parametrize("path", [*PAPER, *sorted((ROOT / "nbs" / "performance").glob("*.ipynb"))], ids=lambda p: p.stem)
def test_every_parameter_is_flat_commented_and_read(path):
    declared = declared_parameters(path)
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert all(" # " in line for line in source.splitlines())
    below = [c for c in cells if "parameters" not in c["metadata"].get("tags", [])]
    read = {n.id for c in below for n in ast.walk(ast.parse("".join(c["source"]))) if isinstance(n, ast.Name)}
    assert set(declared) <= read
    assert declared["profile"] == "smoke" and declared["results"] == ""


def test_the_graph_uses_only_declared_parameters():
    for stage in stages("cpu"):
        declared = declared_parameters(ROOT / "nbs" / "paper" / f"{stage.notebook}.ipynb")
        assert set(stage.parameters) <= set(declared)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="snakemake needs Python 3.11")
@pytest.mark.parametrize("cluster,lies", [("slurm", "."), ("kubernetes", ".snakemake/storage/fs/results/gpu/")])
def test_on_a_cluster_a_training_asks_for_a_gpu_and_a_table_does_not(tmp_path, cluster, lies):
    command = ["-m", "snakemake", "--snakefile", "workflow/Snakefile", "--directory", str(tmp_path), "--profile", f"workflow/{cluster}", "--config", "profile=gpu", "--dry-run", "--printshellcmds"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    jobs = {block.split(":")[0]: block for block in re.split(r"^rule ", result.stdout + result.stderr, flags=re.M)[1:]}
    assert {s.name for s in stages("gpu")} <= set(jobs)
    for name, gpus in (("train-vladva", 1), ("tab4", 0)):
        assert f"gpu={gpus}" in jobs[name] and f"cli stage {name} --profile gpu --results {lies}\n" in jobs[name]
    assert "models/base/model.safetensors" in jobs["train-vladva"].split("output:")[0]  # the weights are carried to the node, not only their card


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_use_the_plain_kernel_and_store_no_error_and_no_large_picture(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert not any(o["output_type"] == "error" for o in outputs)
    pictures = [value for o in outputs for kind, value in o.get("data", {}).items() if kind.startswith("image/")]
    assert all(len("".join(picture)) * 3 / 4 < 200e3 for picture in pictures)  # base64; read on a web page


def test_requirements_lock_and_environment_agree():
    lock = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {}
    for r in lock:
        pinned.setdefault(r.name.lower().replace("_", "-"), []).append(r.specifier)
    for group in ("requirements", "reproduce_requirements", "export_requirements", "search_requirements", "dev_requirements"):
        for wanted in map(Requirement, settings()[group].split()):
            versions = [str(s).removeprefix("==") for s in pinned[wanted.name.lower()]]
            assert versions and all(wanted.specifier.contains(v) for v in versions), wanted.name
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e ."]  # lines of a requirements file, which knows no --no-deps
    assert any(d.startswith("python=3.") for d in plain) and "pip" in plain


@pytest.mark.parametrize("card", sorted(ROOT.glob("data/checkpoints/*/card.json")), ids=lambda p: p.parent.name)
def test_committed_weights_are_those_of_their_card(card):
    weights = json.loads(card.read_text())["sha256"]
    assert weights == {p.name: sha256(p) for p in card.parent.glob("*.safetensors")} and weights


def test_the_table_of_the_readme_is_that_of_the_reference():
    readme = (ROOT / "README.md").read_text()
    assert with_results(readme, ROOT / "data/reference/cpu") == readme


def test_the_table_of_speed_is_that_of_the_measured_rows():
    readme, measured = (ROOT / "README.md").read_text(), ROOT / "data/reference/performance"
    assert with_speed(readme, measured) == readme
    assert all((measured / f"{name}.svg").is_file() for name in RACES if (measured / f"{name}.csv").is_file())


def test_measured_rows_say_which_revision_and_machine_they_are_of():
    runs = json.loads((ROOT / "data/reference/performance/manifest.json").read_text())
    notebooks = {name: json.loads((ROOT / f"nbs/performance/{name}.ipynb").read_text()) for name in runs}
    of = lambda name: {key: value for key, value in runs[name].items() if key not in ("code", "data")}
    assert set(runs) >= set(RACES) and all(of(name) == run_of(notebook) for name, notebook in notebooks.items())
    assert [name for name, notebook in notebooks.items() if runs[name]["code"] != code_of(notebook)] == []  # edited after the run: run it again
    assert {name: list(run["data"]) for name, run in runs.items() if "data" in run} == {name: sorted(data) for name, data in DATA.items()}
    assert all({"revision", "versions", "machine", "cores"} <= set(run) for run in runs.values())


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "performance").glob("*.ipynb")), ids=lambda p: p.stem)
def test_what_a_measured_cell_shows_is_there(path):
    "A cell that was added after the run has nothing below it."
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and isinstance(ast.parse(source).body[-1], ast.Expr) and not source.rstrip().endswith(";"):
            assert cell["outputs"], source.splitlines()[-1]


def test_every_row_of_the_readme_says_what_its_training_cost_and_how_it_is_made():
    lines = [line.split("|")[1:-1] for line in readme_table(ROOT / "data/reference/cpu").splitlines() if line.startswith("| ")]
    header = [cell.strip() for cell in lines[0]]
    for line in lines[1:]:
        row = dict(zip(header, map(str.strip, line), strict=True))
        assert float(row["minutes"]) >= 0 and float(row["tolerance"]) >= 1 and "--only evaluate-" in row["made by `lvlm-research`"], row["model"]


def test_the_rows_and_claims_of_the_reference_follow_from_the_items_beside_them():
    folder = reference_folder("cpu")
    rows = pd.read_csv(folder / "rows.csv").set_index(["model", "benchmark", "subset", "metric"])
    for model in set(ROWS) - {"blind"}:
        scores = {}
        for (benchmark, subset, metric), (values, groups) in load_scores(folder / "items" / f"{model}.npz").items():
            scores.setdefault(benchmark, []).append(Score(subset, metric, values, 0.0, groups))
        again = tidy_rows(scores, model=model).set_index(["model", "benchmark", "subset", "metric"])
        kept, columns = rows.xs(model, drop_level=False), ["value", "n", "ci_low", "ci_high"]
        assert set(again.index) == set(kept.index)  # the means over categories too
        assert again.loc[kept.index, columns].to_numpy() == pytest.approx(kept[columns].to_numpy(), abs=1e-3)
    claims, kept = judge(Evidence(folder)), pd.read_csv(folder / "claims.csv")
    assert claims.verdict.tolist() == kept.verdict.tolist()
    assert claims[["value", "ci_low", "ci_high"]].to_numpy() == pytest.approx(kept[["value", "ci_low", "ci_high"]].to_numpy(), abs=1e-3)


def test_both_directions_of_retrieval_are_about_the_same_pictures():
    evidence = Evidence(reference_folder("cpu"))
    width = lambda: np.subtract(*evidence.contrast({"clip": 1, "zero-shot": -1}, RECALL)[2:0:-1])
    together = width()
    for scores in evidence.scores.values():
        values, groups = scores[RECALL[1]]
        scores[RECALL[1]] = values, np.char.add("another ", groups)
    assert together > 1.1 * width()  # what is hard in one direction is hard in the other


def test_the_tutorial_shows_the_reference_as_it_is():
    shown = (ROOT / "nbs/tutorials/read_the_results.ipynb").read_text()
    revision = json.loads((reference_folder("cpu") / "manifest.json").read_text())["run"]["revision"]
    counts = pd.read_csv(reference_folder("cpu") / "claims.csv").verdict.value_counts().to_dict()
    assert revision in shown and str(counts) in shown


def test_a_changed_profile_file_changes_every_stage(tmp_path):
    file = tmp_path / "quick.json"
    prints = []
    for steps in (2, 3):
        file.write_text(json.dumps({"extends": "smoke", "train_steps": steps}))
        prints.append({s.name: fingerprint(s) for s in stages(str(file))})
    assert prints[0].keys() == prints[1].keys() and not any(prints[0][name] == prints[1][name] for name in prints[0])


def test_no_file_names_a_path_of_a_machine():
    texts = [p for folder in ("nbs", "data", "lvlm_research", "workflow") for p in (ROOT / folder).rglob("*") if p.suffix in (".ipynb", ".py", ".json", ".csv", ".md", ".yaml", ".svg")]
    assert len(texts) > 60
    assert [str(p.relative_to(ROOT)) for p in [*texts, ROOT / "README.md"] if re.search(r"(?<![\w.~])/(tmp|home|root|work|Users)/", p.read_text(encoding="utf-8"))] == []


def test_every_test_and_notebook_that_the_reliability_page_names_exists():
    cells = json.loads((ROOT / "nbs/18_reliability.ipynb").read_text())["cells"]
    rows = [line for c in cells if c["cell_type"] == "markdown" for line in "".join(c["source"]).splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20
    for row in rows:
        tests, notebooks = re.findall(r"`(test_\w+)::(test_\w+)`", row), re.findall(r"notebook `([\w/]+)`", row)
        assert tests or notebooks, row
        for file, name in tests:
            names = [n.name for n in ast.walk(ast.parse((ROOT / "tests" / f"{file}.py").read_text())) if isinstance(n, ast.FunctionDef)]
            assert name in names, f"{file}::{name}"
        assert all((ROOT / "nbs" / f"{name}.ipynb").is_file() for name in notebooks), row
    named = re.findall(r"`(\w+/)?(\d\d\w*)(?:\.ipynb)?`", (ROOT / "SECURITY.md").read_text())
    assert named and all((ROOT / "nbs" / f"{name}.ipynb").is_file() for _, name in named)


def test_the_installed_versions_are_the_locked_ones():
    for name in ("torch", "transformers", "peft", "lightning", "papermill", "nbdev"):
        assert f"{name}=={version(name).split('+')[0]}" in (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("code", ["import lvlm_research", "import lvlm_research.cli as c; c.parser().format_help()", "import lvlm_research.reproduce"])
def test_light_imports(code):
    check = f"{code}; import sys; print([m for m in ('torch', 'transformers', 'pandas', 'datasets', 'papermill', 'fastcore') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_modules_import_only_in_one_direction():
    modules = [p.stem for p in (ROOT / "lvlm_research").glob("*.py") if not p.stem.startswith("_")]
    imports = {m: {n.module for n in ast.walk(ast.parse((ROOT / "lvlm_research" / f"{m}.py").read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1} for m in modules}
    while imports:
        leaves = [m for m, needs in imports.items() if not needs & set(imports)]
        assert leaves, f"a cycle among {sorted(imports)}"
        for leaf in leaves:
            del imports[leaf]
