"""What the decorator makes of the ways in which a command can end."""

import errno
import os
import signal

import pytest

from hf_poolformer.commands import CommandParser, UserError, command
from hf_poolformer.conversion.weights import ConversionError
from hf_poolformer.hub.contents import PublishError
from hf_poolformer.hub.metadata import CardError


def ending(error):
    @command
    def main(argv=None, prog=None):
        if error is not None:
            raise error
        return int(argv[0])

    return main


def test_a_status_comes_through():
    assert ending(None)(["0"]) == 0
    assert ending(None)(["1"]) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("no\nsuch  thing\x1b[31m"), 2, "error: no such thing\\x1b[31m\n"),
        (ConversionError("unknown key"), 2, "error: unknown key\n"),
        (CardError("no licence"), 2, "error: no licence\n"),
        (PublishError("offline.\nTo go on: again"), 3, "error: offline.\nTo go on: again\n"),
        (
            ModuleNotFoundError("No module named 'datasets.x'", name="datasets.x"),
            2,
            "error: datasets is not installed: pip install 'hf-poolformer[train]'\n",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 2, "error: a.png: No such file\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "error: the disk is full\n"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 2, "error: the network cannot be reached: "),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_expected_errors(error, status, message, capsys):
    assert ending(error)([]) == status
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and bool(printed.err) == bool(message)
    assert printed.out == ""


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), OSError("odd")])
def test_faults_of_ours_keep_their_traceback(error):
    with pytest.raises(type(error)):
        ending(error)([])


@pytest.mark.parametrize("importer", ["hf_poolformer.hub", "gradio.routes"])
def test_imports_that_fail(importer, capsys):
    @command
    def main(argv=None, prog=None):
        exec("import nowhere_at_all", {"__name__": importer})

    if importer.startswith("hf_poolformer"):
        with pytest.raises(ModuleNotFoundError):
            main([])
    else:
        assert main([]) == 2
        assert capsys.readouterr().err.startswith("error: gradio needs nowhere_at_all, which is not installed")


def test_sigterm_clears_up_and_is_told_from_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    cleared = []

    @command
    def main(argv=None, prog=None):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not interrupted")
        finally:
            cleared.append(True)

    assert main([]) == 143
    assert cleared and signal.getsignal(signal.SIGTERM) == before


def test_mistakes_in_flags_are_user_errors():
    parser = CommandParser(prog="hf-poolformer test")
    parser.add_argument("--number", type=int)
    for words, message in [
        (["--numbr", "3"], "did you mean --number"),
        (["--number", "three"], "invalid int value.*hf-poolformer test --help"),
        (["--num", "3"], "unrecognized arguments: --num 3"),
    ]:
        with pytest.raises(UserError, match=message):
            parser.parse_args(words)
