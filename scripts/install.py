"""Installs this checkout with an extra, in the versions that CI last passed with, where the index has them.

python scripts/install.py dev constraints.txt      what `make test` runs, in its environment
python scripts/install.py --freeze                 prints what is installed here, as such a file
"""

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# Drivers differ by system and device, and torch names its own; pip is who installs.
LEFT_OUT = re.compile(r"(nvidia-|cuda-|triton$|pip$|hf-poolformer$)")


def install(extra: str, constraints: str | None = None) -> int:
    """pip's exit status, of this checkout with an extra."""
    return pip_install(sys.executable, ["-e", f".[{extra}]"], constraints)


def pip_install(python: str, what: list[str], constraints: str | None = None) -> int:
    """pip's exit status. If the constraints do not hold here, one line says why, and pip chooses freely."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    if constraints:
        done = subprocess.run([*command, "-c", constraints], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if not done.returncode:
            return 0
        print(f"{constraints} does not hold here ({reason(done.stderr)}): installing what the index gives", flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def reason(stderr: str) -> str:
    """pip's last error that says something, else its last line."""
    said = re.findall(r"^ERROR: (?!ResolutionImpossible|Exception:)(.+)", stderr, re.MULTILINE)
    return (said or stderr.strip().splitlines() or ["pip says nothing"])[-1].strip()


def freeze() -> str:
    """What is installed here as constraints, for any system."""
    found = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version.split("+")[0] for one in distributions()}
    lines = [f"{name}=={found[name]}" for name in sorted(found) if not LEFT_OUT.match(name)]
    head = "# What CI last passed with, on Python {}.{}; `make constraints` writes it.".format(*sys.version_info)
    return "\n".join([head, *lines])


if __name__ == "__main__":
    if sys.argv[1:] == ["--freeze"]:
        print(freeze())
    elif len(sys.argv) in (2, 3) and not sys.argv[1].startswith("-"):
        sys.exit(install(*sys.argv[1:]))
    else:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
