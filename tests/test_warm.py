"""Processes that start warm are, for whoever starts them, like processes that are started anew."""

import os
import signal
import subprocess
import sys
import time

import pytest
from warm import warm_python


pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux: other systems start anew")


def run(*words, **options):
    return subprocess.run([warm_python(), *words], capture_output=True, text=True, timeout=120, **options)


def test_what_a_process_is_given_and_gives(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print(sys.argv, sys.path[0]); sys.exit(3)")
    (tmp_path / "module.py").write_text("import os, sys; print(sys.stdin.read(), os.environ['GIVEN'], __spec__.name)")
    done = run("script.py", "a b", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"['script.py', 'a b'] {tmp_path}\n", "")
    done = run("-m", "module", cwd=tmp_path, input="typed", env={**os.environ, "GIVEN": "é"})
    assert (done.returncode, done.stdout) == (0, "typed é module\n")
    done = run("-c", "import sys; sys.exit('why')")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "why\n")
    done = run("-c", "import atexit; atexit.register(print, 'the end'); 1 / 0")
    assert (done.returncode, done.stdout) == (1, "the end\n") and "ZeroDivisionError" in done.stderr


def test_this_package_is_not_there_before_it_is_imported_and_libraries_are():
    code = "import sys; print('torch' in sys.modules, 'hf_poolformer' in sys.modules, len(sys.argv))"
    assert run("-c", code).stdout == "True False 1\n"
    # What the libraries read is read anew where it is another.
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    assert run("-c", code, env={**os.environ, "HF_HUB_CACHE": "/elsewhere"}).stdout == "/elsewhere\n"
    code = "import sys; print('torch' in sys.modules)"
    assert run("-c", code, env={**os.environ, "OMP_NUM_THREADS": "7"}).stdout == "False\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_arrive_and_nothing_outlives_who_called(number, tmp_path):
    # In short sleeps: an interrupt that comes just before one is noticed at its end, in any Python.
    code = "import os, time; print(os.getpid(), flush=True); [time.sleep(0.1) for _ in range(1000)]"
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen([warm_python(), "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True)
        inner = int(process.stdout.readline())
        process.send_signal(number)
        code = process.wait(60)
    assert code == -number
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{inner}"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert inner != process.pid and sys.executable != warm_python()
