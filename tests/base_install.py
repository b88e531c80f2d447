"""What `pip install lvlm-research` can do without an extra, and what it says where one is needed: run by tests/test_api.py in an environment of the base
requirements alone, or by hand in a fresh one, offline: `python tests/base_install.py NEW_FOLDER`."""
import contextlib
import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lvlm_research import cli, finetuning, reference, verify  # noqa: F401
from lvlm_research.config import InputError, root
from lvlm_research.embedder import DiscriminativeLVLM
from lvlm_research.mteb_model import MtebEncoder

EXTRAS = {"papermill": "reproduce", "ipykernel": "reproduce", "snakemake": "reproduce", "sentence_transformers": "export", "mteb": "export", "faiss": "search", "nbdev": "dev", "pytest": "dev"}


def command(*argv: object, code: int = 0) -> str:
    "What a verb prints, or the one line that it ends with."
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as error:
        found = cli.main([str(a) for a in argv])
    assert found == code, f"{argv}: {found}, {error.getvalue()}"
    if code:
        assert error.getvalue().count("\n") == 1, error.getvalue()
    return error.getvalue() if code else said.getvalue()


def main(out: Path) -> None:
    assert not [name for name in EXTRAS if find_spec(name)], "this environment has more than the base requirements"
    model, noise = root() / "data/checkpoints/vladva-micro", np.random.default_rng(0)
    (out / "data").mkdir(parents=True)
    pictures = [Image.fromarray(noise.integers(0, 256, (60, 60, 3), np.uint8)) for _ in range(3)]
    for i, picture in enumerate(pictures):
        picture.save(out / f"data/{i}.png")
    (out / "data/captions.jsonl").write_text("".join(f'{{"image": "{i}.png", "captions": ["thing {i}"]}}\n' for i in range(3)))

    embedder = DiscriminativeLVLM.from_pretrained(model)
    image = embedder.encode_image(pictures)
    assert embedder.similarity(image, embedder.encode_text("a star")).shape == (3, 1)
    assert torch.equal(DiscriminativeLVLM.from_pretrained(embedder.save_pretrained(out / "adapter")).encode_image(pictures), image)
    assert "pip install 'lvlm-research[export]'" in command("export", model, out / "export")
    assert torch.allclose(DiscriminativeLVLM.from_pretrained(out / "export").encode_image(pictures), image, atol=1e-4)
    assert "llava" in command("doctor", out / "export")
    assert "t2i R@1" in command("evaluate", "--model", model, "--data", out / "data")
    command("embed", model, out / "data", "--out", out / "index")
    assert "0.png" in command("search", out / "index", out / "data/0.png", "--top", 1)
    (out / "mine.json").write_text(f'{{"model": "{root() / "data/checkpoints/llava-micro"}", "data": "data", "output": "mine", "steps": 1, "batch": 2}}')
    assert "adapter ->" in command("train", "--config", out / "mine.json")
    assert "nothing is run" in command("reproduce", "--profile", "paper", "--dry-run")

    lines = {"faiss": command("search", out / "index", "a star", "--engine", "faiss", code=2), "papermill": command("reproduce", "--profile", "smoke", "--results", out / "r", code=2)}
    try:
        MtebEncoder(model)
    except InputError as error:
        lines["mteb"] = str(error)
    for name, line in lines.items():
        assert f"{name} is not installed: pip install 'lvlm-research[{EXTRAS[name]}]'" in line, line
    assert len(lines) == 3 and not (out / "r").exists()
    print(*map(str.strip, lines.values()), "the base install does what it should", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
