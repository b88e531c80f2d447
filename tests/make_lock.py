"Resolve the requirements of settings.ini for all supported Pythons into requirements.lock (needs uv)."
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = (
    "# exact versions of everything, for Python >= 3.10; made by `make lock` from settings.ini. "
    "torch brings its own CUDA packages where its build needs them.\n"
)


def main() -> None:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    names = ("requirements", "reproduce_requirements", "export_requirements", "search_requirements", "dev_requirements")
    torch = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))
    wanted = [torch, *(r for name in names for r in config["DEFAULT"][name].split())]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version", "3.10", "--no-header", "--no-annotate", "-"]
    solved = subprocess.run(command, input="\n".join(wanted), capture_output=True, text=True, check=True).stdout
    kept = [line for line in solved.splitlines() if not line.startswith(("nvidia-", "cuda-", "triton"))]
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
