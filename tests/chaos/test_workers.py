"""Data workers whose main process is killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest


# Started as a file of its own: `spawn` and `forkserver` import the main module again.
MAIN = """
import sys, time
from torch.utils.data import DataLoader
from hf_poolformer.foundation.workers import prepare_worker

if __name__ == "__main__":
    how = {"num_workers": 2, "worker_init_fn": prepare_worker, "multiprocessing_context": sys.argv[1]}
    batches = iter(DataLoader(range(1000), batch_size=4, **how))
    next(batches)
    print(*[worker.pid for worker in batches._workers], flush=True)
    time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_do_not_outlive_their_main_process(tmp_path, method):
    """Promised: kill -9 of a main process leaves no workers behind, however they were started."""
    (tmp_path / "main.py").write_text(MAIN)
    main = subprocess.Popen([sys.executable, tmp_path / "main.py", method], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 2 and all(map(runs, workers))
    main.kill()
    main.wait()
    deadline = time.monotonic() + 60
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, workers))
