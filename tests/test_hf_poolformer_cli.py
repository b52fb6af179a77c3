"""`hf-poolformer` as a person meets it: what it offers, how fast it says so, and what it makes of a wrong word."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import hf_poolformer
import hf_poolformer_cli
from hf_poolformer_cli import COMMANDS


ROOT = Path(__file__).resolve().parents[1]


def run(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, **options)


def test_help_takes_less_than_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("-m", "hf_poolformer_cli", "--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert set(re.findall(r"^  ([\w-]+)  ", done.stdout, re.MULTILINE)) == set(COMMANDS)
    assert min(seconds) < 1.0


def test_every_command_is_a_module_and_every_module_a_command():
    folder = Path(hf_poolformer.__file__).parent / "commands"
    assert {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")} == set(COMMANDS)
    for name in COMMANDS:
        assert callable(import_module(f"hf_poolformer.commands.{name.replace('-', '_')}").main)


def test_help_of_a_command_does_not_wait_for_torch():
    """All in one process, so that none of them brings what another one is blamed for."""
    code = """
        import contextlib, io, json, sys
        import hf_poolformer_cli
        shown = {}
        for name in json.loads(sys.argv[1]):
            text = io.StringIO()
            with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                hf_poolformer_cli.main([name, "--help"])
            assert "torch" not in sys.modules, name
            shown[name] = text.getvalue()
        print(json.dumps(shown))
    """
    code = "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())
    done = run("-c", code, json.dumps(list(COMMANDS)))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    for name in COMMANDS:
        assert f"usage: hf-poolformer {name} " in shown[name], name


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean train"), ("evalute", "did you mean evaluate"), ("x", "--help shows")]
)
def test_a_wrong_command(word, hint, capsys):
    assert hf_poolformer_cli.main([word, "--output_dir", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: there is no command '{word}'") and hint in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_version_and_help_as_a_word(capsys):
    assert hf_poolformer_cli.main(["--version"]) == 0
    assert re.fullmatch(r"hf-poolformer (\d+\.\d+\.\d+|\(not installed\))\n", capsys.readouterr().out)
    for argv in ([], ["help"], ["-h"]):
        assert hf_poolformer_cli.main(argv) == 0
        assert "publish" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        hf_poolformer_cli.main(["help", "env"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: hf-poolformer env")


def test_a_script_runs_the_command_it_is_named_after(monkeypatch, tmp_path):
    """Without its folder in front of the libraries: scripts/evaluate.py would be taken for `evaluate`."""
    monkeypatch.setattr("hf_poolformer.commands.evaluate.main", lambda: 7)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    with pytest.raises(SystemExit) as left:
        hf_poolformer_cli.run_script(str(tmp_path / "evaluate.py"))
    assert left.value.code == 7
    assert not {str(tmp_path), ""} & set(sys.path)


def test_python_m_hf_poolformer_is_the_same_and_a_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "hf_poolformer", "env"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_torchvision_that_does_not_fit_is_told(tmp_path):
    """As pip leaves it where torch alone is replaced; transformers speaks of a module of its own then."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("-m", "hf_poolformer_cli", "env", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"error: torchvision \S+ was not built for torch \S+: install the two together, pip install --upgrade torch "
        r"torchvision \(operator torchvision::nms does not exist\)\n",
        done.stderr,
    )
