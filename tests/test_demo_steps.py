import signal
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
DEMO = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from demo_steps import run, start
start(lambda: run(sys.argv[1:]) or 0)
"""
TRAINING = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
time.sleep(60)
"""


def test_whoever_stops_a_demo_stops_its_training_too():
    command = [sys.executable, "-c", DEMO, sys.executable, "-c", TRAINING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout.readline() == "training\n"
        demo.send_signal(signal.SIGTERM)
        assert demo.stdout.readline() == "saved\n"
    assert demo.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_demo_ends_with_the_status_of_its_training(code, status):
    done = subprocess.run([sys.executable, "-c", DEMO, sys.executable, "-c", code])
    assert done.returncode == status
