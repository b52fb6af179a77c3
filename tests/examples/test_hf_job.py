"""examples/hf_job.py: what `hf jobs` would start, what it refuses at once, and a whole run by uv.

Python is started cold here: the Hub's client and the refusals import none of the large libraries.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "hf_job.py"


@pytest.fixture
def hub():
    with hub_server.HubServer() as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": str(tmp_path / "hf-home"),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def documented():
    """The words behind `hf` of each job in docs/jobs.md."""
    text = (ROOT / "docs" / "jobs.md").read_text().replace("\\\n", " ")
    return [line.split()[1:] for line in text.splitlines() if line.startswith("hf jobs uv run")]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_the_jobs_of_the_page_are_jobs(words, environment, tmp_path):
    """By the Hub's own client, which would send them."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "examples").mkdir()
    shutil.copy(SCRIPT, tmp_path / "examples")
    hf = "from huggingface_hub.cli.hf import main; import sys; sys.argv[0] = 'hf'; main()"
    done = subprocess.run(
        [sys.executable, "-c", hf, *words[:3], "--dry-run", *words[3:]],
        env=environment | {"HF_TOKEN": hub_server.TOKEN, "NO_COLOR": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "not submitted" in done.stdout
    assert re.search(r"flavor +a10g-small", done.stdout) and "HF_TOKEN=***" in done.stdout
    assert hub_server.TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "token", "reason"),
    [
        (["--hub_model_id", "me/x"], None, "there is no token"),
        (["--hub_model_id", "me/x"], "hf_" + "w" * 34, "does not accept the token (401)"),
        ([], hub_server.TOKEN, "--hub_model_id USER/NAME"),
    ],
)
def test_what_could_not_be_published_is_not_trained(words, token, reason, environment, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dataset_name", "me/photos", *words],
        env=environment | ({"HF_TOKEN": token} if token else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and reason in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "hf-home"])


def photos(rows):
    """Bright above or bright below."""
    generator, images = np.random.default_rng(0), []
    for row in range(rows):
        slope = (1 - 2 * (row % 2)) * np.linspace(60, -60, 24)[:, None, None]
        pixels, buffer = 128 + slope + generator.normal(0, 20, (24, 24, 3)), io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{row}.png"})
    file = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [["up", "down"][row % 2] for row in range(rows)]}), file)
    return file.getvalue()


@pytest.fixture
def by_uv(tmp_path):
    """The words before the script, and the environment that lets uv find the wheel of this very tree.

    That wheel says that it needs nothing, and finds its libraries here: to install PyTorch anew would take gigabytes.
    """
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is not installed")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "docs", "examples", "benchmarks", "model_cards"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "outputs")
        )
    project = (tree / "pyproject.toml").read_text()
    project = re.sub(r"^dependencies = \[.*?^\]", "dependencies = []", project, flags=re.MULTILINE | re.DOTALL)
    extras = re.compile(r"(?<=\[project.optional-dependencies\]\n).*?(?=\n\[)", re.DOTALL)
    (tree / "pyproject.toml").write_text(extras.sub("train = []\n", project))
    built = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", tree]
    done = subprocess.run(built, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [uv, "run", "--no-project", "--no-index", "--python", sys.executable], {
        "UV_FIND_LINKS": str(tmp_path / "dist"),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("site-packages")),
    }


@pytest.mark.slow
def test_uv_installs_trains_publishes_and_goes_on(by_uv, hub, environment, tmp_path):
    launcher, settings = by_uv
    files = {"data/train-00000-of-00001.parquet": photos(96), "data/test-00000-of-00001.parquet": photos(32)}
    hub.repos["datasets", "me/photos"] = hub_server.Repo(
        branches={"main": [hub_server.Commit("1" * 40, "photos", files)]}
    )
    flags = ["--recipe", "demo", "--dataset_name", "me/photos", "--hub_model_id", "me/slopes", "--num_workers", "0"]
    flags += ["--per_device_train_batch_size", "16", "--affine_degrees", "0", "--num_warmup_steps", "1"]
    flags += ["--checkpointing_steps", "3"]

    def run(*more):
        return subprocess.run(
            [*launcher, str(SCRIPT), *flags, *more],
            env=environment | settings | {"HF_TOKEN": hub_server.TOKEN},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    done = run("--max_train_steps", "6")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Checkpoints are in outputs/slopes and end with this machine" in done.stdout
    assert f"Published to {hub.url}/me/slopes" in done.stdout
    published = hub.files("me/slopes")
    assert {"config.json", "model.safetensors", "README.md", ".eval_results/hf-poolformer.yaml"} <= set(published)
    assert json.loads(published["all_results.json"])["evaluated_split"] == "test"
    # The job is started again: on the same disk, as if it were a bucket.
    (checkpoint,) = (tmp_path / "outputs" / "slopes" / "checkpoints").glob("step-6")
    done = run("--max_train_steps", "9")
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.name in done.stdout + done.stderr, "it says from where it goes on"
    assert json.loads(hub.files("me/slopes")["all_results.json"])["step"] == 9
