"Shared fixtures: the repository, the committed models, a place for real data."
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "data" / "checkpoints"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The batch first: it takes longest, and where several workers share the files the others run beside it."
    items.sort(key=lambda item: item.path.stem != "test_reproduce")


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("LVLM_REAL_DATA")
    if not folder:
        pytest.skip("LVLM_REAL_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session", params=["llava", "qwen2-vl"])
def base_folder(request, tmp_path_factory) -> Path:
    "A base LVLM of each family: the committed LLaVA, and a Qwen2-VL with random weights, which every property of the method must survive too."
    if request.param == "llava":
        return CHECKPOINTS / "llava-micro"
    import torch
    from lvlm_research.backbones import micro_qwen2vl, world_tokenizer

    folder = tmp_path_factory.mktemp("qwen2-vl")
    torch.manual_seed(0)
    for part in micro_qwen2vl(world_tokenizer()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder):
    "The base LVLM as a zero-shot embedder."
    from lvlm_research.embedder import DiscriminativeLVLM

    return DiscriminativeLVLM.from_pretrained(base_folder)


@pytest.fixture
def trainable(base_folder):
    "A fresh copy of the base with everything that VladVA trains."
    from lvlm_research.embedder import DiscriminativeLVLM
    from lvlm_research.training import VARIANTS, prepare

    return prepare(DiscriminativeLVLM.from_pretrained(base_folder), VARIANTS["vladva"])


def run(*argv: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    "The command line in a process of its own."
    environment = os.environ | env
    return subprocess.run([sys.executable, "-m", "lvlm_research.cli", *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def fails_in_one_line(*argv: str, says: str) -> None:
    "Exit code 2, one line on stderr that says what is wrong, no traceback."
    result = run(*argv)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], result.stderr
