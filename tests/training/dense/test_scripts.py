"""scripts/train_dense.py as people run it: in processes of its own, through torchrun."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from shapes import COUNTS, NAMES, TINY_MODEL
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, AutoModelForSemanticSegmentation
from warm import warm_python

from hf_poolformer.data.dense.datasets import open_dense_datasets
from hf_poolformer.evaluation.dense import evaluate
from hf_poolformer.evaluation.processes import named_results
from hf_poolformer.training.dense.task import make_dense_loader


ROOT = Path(__file__).parents[3]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*words, where=ROOT):
    python = warm_python()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    environment["ACCELERATE_USE_CPU"] = "1"
    command = [python, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=where)


@pytest.mark.parametrize(
    "task", ["semantic-segmentation", pytest.param("instance-segmentation", marks=pytest.mark.slow)]
)
def test_two_processes_train_and_evaluate_exactly(make_settings, tmp_path, task):
    # Batches of five leave an incomplete one, and 11 images do not divide by two.
    # After three steps no detection is sure of itself: all of them are taken.
    overrides = json.dumps({**TINY_MODEL, "score_threshold": 0.001})
    changes = {"per_device_eval_batch_size": 5, "max_train_steps": 3, "config_overrides": overrides}
    make_settings(task, **changes).save(tmp_path / "settings.yaml")
    script = [ROOT / "scripts/train_dense.py", "--config_file", tmp_path / "settings.yaml"]
    done = run(*LAUNCH, *script)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and done.stdout.count("Result: ") == 1
    two = json.loads((tmp_path / "run/all_results.json").read_text())
    assert two["eval_samples"] == COUNTS["validation"] and two["step"] == 3

    settings = make_settings(task, per_device_eval_batch_size=1)
    auto = AutoModelForSemanticSegmentation if task == "semantic-segmentation" else AutoModelForInstanceSegmentation
    model = auto.from_pretrained(tmp_path / "run").to(memory_format=torch.channels_last)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    accelerator = Accelerator(cpu=True)
    dataset = open_dense_datasets(settings)["validation"]
    loader = make_dense_loader(dataset, settings, accelerator, processor, training=False)
    one, _ = evaluate(
        model,
        loader,
        task=task,
        processor=processor,
        accelerator=accelerator,
        num_labels=len(dataset.label_names),
    )
    named = named_results(one, dataset.label_names)
    # Convolutions over batches of other sizes sum in another order; a pixel at a boundary may fall to the other side.
    for name, value in named.items():
        if value is None or isinstance(value, int):
            assert two[name] == value, name
        elif name.startswith("eval_m"):
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    if task == "semantic-segmentation":  # three steps need not make a detector find anything
        assert named["eval_miou"] > 0


UNSEEN = """
import sys
from hf_poolformer.commands.train_dense import main
from hf_poolformer.training.dense import task

task.check_annotations = lambda datasets, *_: (datasets, [])
sys.exit(main())
"""


@pytest.mark.slow
def test_a_fault_that_one_process_meets_ends_all_and_leaves_the_model(make_settings, late_damage, tmp_path):
    """Two broken images of one shard, which one process reads, in its evaluation."""
    (tmp_path / "unseen.py").write_text(UNSEEN)
    make_settings("semantic-segmentation", dataset_name=str(late_damage), max_skipped=1).save(tmp_path / "run.yaml")
    script = [tmp_path / "unseen.py", "--config_file", tmp_path / "run.yaml"]
    done = run(*LAUNCH, *script)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and all("--max_skipped" in line and "so far is in" in line for line in errors), done.stderr
    assert load_file(tmp_path / "run/model.safetensors")


@pytest.mark.slow
def test_other_precision_workers_and_device_layout(make_settings, tmp_path):
    settings = make_settings("object-detection", max_train_steps=2, num_workers=2, mixed_precision="bf16")
    settings.save(tmp_path / "settings.yaml")
    flags = ["--gradient_checkpointing", "true", "--memory_format", "contiguous_format"]
    done = run(ROOT / "scripts/train_dense.py", "--config_file", tmp_path / "settings.yaml", *flags)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run/model.safetensors")
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights.values())
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert list(config["id2label"].values()) == NAMES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--task"),
        (
            ["--task", "object-detection", "--recipe", "demo", "--dataset_name", "/nowhere", "--output_dir", "x"],
            "nowhere",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    done = run(ROOT / "scripts/train_dense.py", *flags, where=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
