"""A folder belongs to one run: who comes second is told at once, whatever became of the first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import warm_python

from hf_poolformer.foundation import folders
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction import predict
from hf_poolformer.training.loop import train


pytestmark = pytest.mark.skipif(folders.fcntl is None, reason="there are no such locks here")

HOLD = """
import sys, time
from pathlib import Path
import hf_poolformer_cli
hf_poolformer_cli.without_importing_the_package()  # seconds
from hf_poolformer.foundation.folders import hold
with hold(Path(sys.argv[1])):
    if sys.argv[2] == "fork":
        import os
        if os.fork() == 0:
            print("held", flush=True)
            time.sleep(60)
            os._exit(0)
    else:
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds `tmp_path / "run"`, and returns it once it does."""
    started = []

    def start(how="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), how], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("resume", "overwrite"), [(None, True), ("latest", False)])
def test_a_second_run_is_refused_and_changes_nothing(holder, make_settings, tmp_path, resume, overwrite):
    process = holder()
    settings = make_settings(resume_from_checkpoint=resume, overwrite_output_dir=overwrite)
    with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*, at work since 2\d\d\d-"):
        train(settings)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folders.LOCK]


def test_the_command_ends_with_status_2(holder, digits, tmp_path):
    process = holder()
    command = [warm_python(), "-m", "hf_poolformer", "ablate", "--rows", "identity", "--recipe", "demo"]
    command += ["--dataset_name", str(digits), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and str(process.pid) in done.stderr


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_run_frees_its_folder_even_where_a_child_outlives_it(holder, tmp_path, how):
    process = holder(how)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with folders.hold(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / folders.LOCK).read_text()
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_failed_run_frees_its_folder(make_settings, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="nowhere"):
            train(make_settings(dataset_name=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run" / folders.LOCK).exists()


def test_without_locks_it_works_and_says_so(tmp_path, monkeypatch, caplog):
    class Without:
        LOCK_EX = LOCK_NB = 0

        def flock(self, *_):
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders, "fcntl", Without())
    with folders.hold(tmp_path / "run"):
        (tmp_path / "run" / "model").touch()
    assert "no file locks" in caplog.text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_who_ends_does_not_take_away_the_lock_of_who_came_next(tmp_path):
    first, _ = folders.take(tmp_path / "lock")
    (tmp_path / "lock").unlink()  # as a person may, or a clean-up
    second, locked = folders.take(tmp_path / "lock")
    folders.give_back(tmp_path / "lock", first)
    assert locked and (tmp_path / "lock").exists()
    with pytest.raises(folders.Taken, match=str(os.getpid())):
        folders.take(tmp_path / "lock")
    folders.give_back(tmp_path / "lock", second)
    assert not (tmp_path / "lock").exists()


def test_two_predictions_of_one_share_exclude_each_other_and_two_shares_do_not(make_checkpoint, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    where = {"part_size": 1, "num_workers": 0, "progress": False, "num_processes": 2}
    arguments = [make_checkpoint(), [tmp_path / "images"], tmp_path / "out"]
    with folders.hold(tmp_path / "out", ".process-0.lock"):
        with pytest.raises(UserError, match="is in use by process"):
            predict(*arguments, process_index=0, **where)
        assert predict(*arguments, process_index=1, **where).predicted == 1
    assert predict(*arguments, process_index=0, **where).complete


def test_the_lock_stays_here_when_the_run_is_published():
    from hf_poolformer.hub.contents import EVERYWHERE_LEFT_OUT

    assert Path(folders.LOCK).match("*.lock") and "*.lock" in EVERYWHERE_LEFT_OUT
    assert time.strptime(folders.describe_process().rpartition("since ")[2], "%Y-%m-%d %H:%M:%S")
