"""`hf-poolformer app`, as somebody at a terminal meets it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from hf_poolformer.commands.app import default_examples, main


COMMAND = "import sys; from hf_poolformer.commands.app import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/missing"], "missing"),
        (["{root}/classifier", "--port", "99999"], "--port 99999 is no port"),
        (["{root}/classifier", "--max_file_size", "large"], "--max_file_size large is not a size"),
        (["{root}/classifier", "--max_megapixels", "0"], "--max_megapixels"),
        (["{root}/classifier", "--examples", "{root}/nothing"], "no such file or folder"),
        (["{root}/classifier", "--report", "{root}/nothing"], "there is no report.html"),
        ([], "MODEL"),
    ],
)
def test_mistakes_are_one_line(saved_models, capsys, words, message):
    pytest.importorskip("gradio", minversion="6.20", reason="needs gradio: pip install 'hf-poolformer[app]'")
    assert main([word.format(root=saved_models) for word in words]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_examples_beside_the_model(tmp_path):
    assert default_examples(str(tmp_path)) == []
    (tmp_path / "examples").mkdir()
    assert default_examples(str(tmp_path)) == [tmp_path / "examples"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_serves_until_interrupted(saved_models, number, status):
    pytest.importorskip("gradio", minversion="6.20", reason="needs gradio: pip install 'hf-poolformer[app]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(saved_models / "classifier"), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, process.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer:
            assert "classifier: try it" in answer.read().decode()
        second = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status
    assert "Traceback" not in errors
