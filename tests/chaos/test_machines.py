"""Two machines, here two launchers with their own working directories, of which one dies and comes back."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ENOUGH, free_port


ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 60  # of 300 images


class Machine:
    """A launcher and its process, which are killed together."""

    def __init__(self, folder: Path, port: int, digits: Path, output: Path, *flags: str):
        self.log = folder / f"{len(list(folder.glob('*.log')))}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
        command += ["--max_restarts", "5", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
        command += ["--rdzv_id", "job", "--rdzv_conf", "last_call_timeout=3"]
        command += [str(ROOT / "scripts/train.py"), "--recipe", "demo", "--dataset_name", str(digits)]
        command += ["--output_dir", str(output), "--num_train_epochs", str(EPOCHS), "--num_workers", "0"]
        command += ["--checkpointing_steps", "10", "--save_total_limit", "0", "--resume_from_checkpoint", "latest"]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "src"),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *flags], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        # The group first: a launcher starts its processes in it, and they would outlive it.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def start(digits, tmp_path):
    """Starts a machine by its name."""
    port, output, machines = free_port(), tmp_path / "shared", []

    def begin(name: str, *flags: str) -> Machine:
        (tmp_path / name).mkdir(exist_ok=True)
        machines.append(Machine(tmp_path / name, port, digits, output, *flags))
        return machines[-1]

    yield begin
    for machine in machines:
        if machine.process.poll() is None:
            machine.kill()


def wait_for(condition, *machines: Machine) -> None:
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline, "\n\n".join(machine.said()[-3000:] for machine in machines)
        time.sleep(0.1)


def test_a_machine_dies_comes_back_and_dies_for_good(start, tmp_path):
    """Promised: the run goes on with one machine, with both again, and with one; a step has as many images throughout,
    the schedule goes through all its steps, and what is left of an epoch is dealt anew."""
    flags = ("--total_train_batch_size", "64", "--per_device_train_batch_size", "32")

    def reached(step: int) -> bool:
        return (tmp_path / f"shared/checkpoints/step-{step}/complete.json").is_file()

    def count(text: str) -> int:
        return first.said().count(text)

    first = start("first", *flags)
    time.sleep(5)  # it is the meeting point
    second = start("second", *flags)
    wait_for(lambda: reached(20), first, second)
    assert count("2 x cpu") == 1
    second.kill()
    wait_for(lambda: reached(50), first)
    assert count("1 x cpu") == 1
    second = start("second", *flags)
    wait_for(lambda: count("2 x cpu") == 2, first, second)
    now = max(int(path.name.split("-")[1]) for path in (tmp_path / "shared/checkpoints").glob("step-*"))
    wait_for(lambda: reached(now // 10 * 10 + 20), first, second)
    second.kill()
    assert first.process.wait(ENOUGH) == 0, first.said()[-3000:]

    said = first.said()
    # Four starts; 300 images are four whole steps of 64 images.
    starts = re.findall(r"(\d+) steps of (\d+) images.*?(\d) x cpu", said)
    assert starts == [(str(EPOCHS * 4), "64", number) for number in "2121"]
    assert said.count("are dealt anew, each once") == 3
    results = json.loads((tmp_path / "shared/all_results.json").read_text())
    assert results["eval_samples"] == 60 and results["num_processes"] == 1
    assert "Traceback" not in said


def test_machines_that_do_not_share_their_output(start, tmp_path):
    """Promised: a warning at the start; resuming is refused on all machines, in one line."""
    first = start("first", "--output_dir", "outputs")
    time.sleep(5)
    second = start("second", "--output_dir", "outputs")
    wait_for(lambda: "is not there on" in first.said(), first, second)
    wait_for(lambda: list((tmp_path / "first/outputs/checkpoints").glob("step-*/complete.json")), first, second)
    for machine in (second, first):
        machine.kill()
    first = start("first", "--output_dir", "outputs")
    time.sleep(5)
    second = start("second", "--output_dir", "outputs")
    for machine in (first, second):
        wait_for(lambda said=machine.said: "must be a folder that they share" in said(), first, second)
