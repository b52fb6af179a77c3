"""Training from a Hub whose line is bad and whose files are damaged."""

import copy
import json
import os
import subprocess
import sys

from faulty_hub import KINDS, FaultyHub


# As `hf-poolformer train`, with many requests of which to let some fail.
TRAIN = """
import sys
from hf_poolformer.commands.train import main
from hf_poolformer.data import hub_files

hub_files.SHARE, hub_files.BLOCK = {share}, 2_000
sys.exit(main())
"""
SHARDS, EPOCHS, BATCH = 10, 6, 16
CARD = """---
dataset_info:
  splits:
  - name: train
    num_examples: 1500
  - name: test
    num_examples: 297
---
"""


def corrupted(rows, share=100):
    """The rows with one image in a hundred broken, in several ways, and how many these are."""
    rows = copy.deepcopy(rows)
    victims = range(share // 2, len(rows), share)
    for count, number in enumerate(victims):
        whole = rows[number]["image"]["bytes"]
        rows[number]["image"]["bytes"] = [b"", b"<html>", whole[: len(whole) // 2], whole[:20]][count % 4]
    return rows, len(victims)


def files_of(parts, write_parquet, folder):
    """Split -> list of shards -> files of a Hub repository."""
    files = {"README.md": CARD.encode()}
    for split, shards in parts.items():
        for number, rows in enumerate(shards):
            name = f"data/{split}-{number:05d}-of-{len(shards):05d}.parquet"
            files[name] = write_parquet(rows, folder / "shard.parquet", group=50).read_bytes()
    return files


def train(hub, folder, *flags, share=0):
    """With `share`, what was fetched is kept."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",  # seconds until a stalled answer counts as none
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-c",
        TRAIN.format(share=share),
        "--recipe",
        "demo",
        "--dataset_name",
        "me/digits",
        "--output_dir",
        folder / "run",
    ]
    command += ["--config_overrides", json.dumps({"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]})]
    command += ["--num_train_epochs", EPOCHS, "--per_device_train_batch_size", BATCH, "--num_workers", 2]
    command += ["--eval_epochs", 0, "--num_warmup_epochs", 1, "--shuffle_buffer_size", 100, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500, env=environment)


def results_of(done, folder):
    assert done.returncode == 0, done.stderr
    progress = max((folder / "run/checkpoints").glob("step-*/progress.json"), key=os.path.getmtime)
    return json.loads((folder / "run/all_results.json").read_text()), json.loads(progress.read_text())


def test_failures_on_the_line_broken_images_and_a_truncated_shard(digit_rows, write_parquet, tmp_path):
    """Promised: requests that fail are asked again, and change nothing at all: the weights are those of a good line.
    Broken images and a truncated shard are left out and counted, exactly, and cost no more than their share."""
    size = 1500 // SHARDS
    shards = [digit_rows[number * size : (number + 1) * size] for number in range(SHARDS)]
    tests = [digit_rows[1500:1650], digit_rows[1650:1797]]
    clean = files_of({"train": shards, "test": tests}, write_parquet, tmp_path)
    shards, tests = ([corrupted(rows) for rows in part] for part in (shards, tests))
    lost = 7
    damaged = files_of(
        {"train": [rows for rows, _ in shards], "test": [rows for rows, _ in tests]}, write_parquet, tmp_path
    )
    victim = f"data/train-{lost:05d}-of-{SHARDS:05d}.parquet"
    damaged[victim] = damaged[victim][: len(damaged[victim]) * 6 // 10]

    outcomes = {}
    cases = [("clean", clean, 0.0, 0), ("damaged", damaged, 0.0, 0), ("bad line", damaged, 0.05, 0)]
    for name, files, rate, share in [*cases, ("bad line, kept", damaged, 0.1, 0.1)]:
        folder = tmp_path / name.replace(" ", "-").replace(",", "")
        with FaultyHub(rate=rate, seed=1, stall=2.5) as hub:
            hub.add_dataset("me/digits", files)
            flags = ["--max_skipped", "0.05", "--max_skipped_shards", "1"] if name != "clean" else []
            outcomes[name] = results_of(train(hub, folder, *flags, share=share), folder)
            print(f"{name}: {hub.asked} requests for files, failed {dict(hub.injected)}, {outcomes[name][0]}")
            if rate:
                assert sum(hub.injected.values()) > 0.02 * hub.asked and (share or len(hub.injected) >= len(KINDS) - 1)
    results, progress = outcomes["bad line"]
    broken = sum(count for number, (_, count) in enumerate(shards) if number != lost)
    readable = 1500 - size - broken
    assert results["skipped_images"] == EPOCHS * broken
    assert len(results["skipped_shards"]) == 1 and results["skipped_shards"][0].startswith("shard 7 ends after 0 rows")
    assert progress["images"] == EPOCHS * (readable // BATCH) * BATCH
    assert results["eval_skipped_images"] == sum(count for _, count in tests)
    assert results["eval_samples"] == 297 - results["eval_skipped_images"]
    listed = (tmp_path / "bad-line/run/skipped.csv").read_text().splitlines()
    assert len(listed) == EPOCHS * broken and listed[0].startswith("1,")
    same = (tmp_path / "damaged/run/model.safetensors").read_bytes()
    assert (tmp_path / "bad-line/run/model.safetensors").read_bytes() == same
    assert (tmp_path / "bad-line-kept/run/model.safetensors").read_bytes() == same
    # 297 images: a standard deviation of one point and a half.
    assert results["eval_accuracy"] > outcomes["clean"][0]["eval_accuracy"] - 0.05


def test_a_damaged_shard_stops_the_run_unless_tolerated(digit_rows, write_parquet, tmp_path):
    """Promised: nothing is left out silently. Without --max_skipped_shards, one line says what is damaged."""
    shards = [digit_rows[number * 150 : (number + 1) * 150] for number in range(SHARDS)]
    files = files_of({"train": shards, "test": [digit_rows[1500:1650]]}, write_parquet, tmp_path)
    victim = f"data/train-00004-of-{SHARDS:05d}.parquet"
    files[victim] = files[victim][:1000]
    with FaultyHub() as hub:
        hub.add_dataset("me/digits", files)
        done = train(hub, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: me/digits (train) is damaged: shard 4 ends after 0 rows")
    assert "--max_skipped_shards 1" in error


def test_shards_that_disappear(digit_rows, write_parquet, tmp_path):
    """Promised: files that are gone are told from a line that is down, and are not waited for; more of them than
    tolerated end the run with one line that names them."""
    shards = [digit_rows[number * 150 : (number + 1) * 150] for number in range(SHARDS)]
    files = files_of({"train": shards, "test": [digit_rows[1500:1650]]}, write_parquet, tmp_path)
    with FaultyHub() as hub:
        hub.add_dataset("me/digits", files)
        hub.fail("GET", rf"data/train-0000[5-9]-of-{SHARDS:05d}", 404)
        done = train(hub, tmp_path, "--max_skipped_shards", "2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: me/digits (train) is damaged: shard ") and "--max_skipped_shards 3" in error
