"""README.md and docs/: every command is one that its own parser accepts, every link and file is there, Python runs."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from warm import warm_python

import hf_poolformer_cli
from hf_poolformer import PoolFormerForImageClassification, PoolFormerImageProcessor


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/hf_poolformer"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def shell_lines(text: str) -> list[str]:
    joined = "\n".join(blocks(text, "bash", "sh", "console")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


# Commands


class Accepted(BaseException):
    """The command's own parser knows all its words; no Exception, which commands would explain."""


def complaint(words: list[str], capsys: pytest.CaptureFixture) -> str | None:
    """What a command of ours says to these words; None if its parser takes them all. Nothing is run."""
    source = (ROOT / words[0]).read_text() if words[0].endswith(".py") else ""
    if "sys.argv[" in source and "Parser" not in source:  # it has no flags
        return next((word for word in words if word.startswith("-")), None)
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse(parser, *positional, **named):
        namespace, unknown = parse_known_args(parser, *positional, **named)
        # One that looks ahead has no help, and one that knows a part of the flags leaves the others to the next.
        if parser.add_help and not unknown:
            raise Accepted
        return namespace, unknown

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        try:
            if words[0] == "hf-poolformer":
                status = hf_poolformer_cli.main(words[1:])
            else:
                patch.setattr(sys, "argv", words)
                patch.setattr(sys, "path", [*sys.path])
                if find_spec("ray") is None:  # no test needs it, and its flags can be read without
                    patch.setitem(sys.modules, "ray", mock.MagicMock())
                status = runpy.run_path(str(ROOT / words[0]), run_name="__main__") and 0
        except Accepted:
            return None
        except SystemExit as left:
            status = left.code
    said = capsys.readouterr()
    return f"exit status {status}: {said.err or said.out}"


# A program of this repository, whatever launches it.
PROGRAM = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:hf-poolformer|(?:python|accelerate launch)(?: .*)? (?:-m hf_poolformer|[\w/]+\.py)) "
)


def ours(line: str) -> list[str]:
    """The words of such a command from its program on; accelerate's own parser reads what is for accelerate."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "accelerate":
        launched = launch_command_parser().parse_args(words[2:])
        words = [*(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args]
    elif words[0] == "python":
        words = words[1:]
    return ["hf-poolformer", *words[2:]] if words[:2] == ["-m", "hf_poolformer"] else words


COMMANDS = sorted({line for text in PAGES.values() for line in shell_lines(text) if PROGRAM.match(line)})


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_that_its_parser_accepts(line, capsys):
    words = ours(line)
    if "--help" in words:
        words.remove("--help")
        assert words[1] in hf_poolformer_cli.COMMANDS
    else:
        assert complaint(words, capsys) is None


def test_commands_in_sentences_and_tables_are_accepted_too(capsys):
    """There, `...` stands for the rest, and what is required may be missing."""
    codes = {code for text in PAGES.values() for code in inline_code(text) if PROGRAM.match(f"{code} ")}
    codes = {code for code in codes if " " in code and "COMMAND" not in code and "--help" not in code}
    assert len(codes) > 20
    for code in sorted(codes):
        words = ours(re.sub(r"( [^-\s]\S*) \.\.\.$", r"\1", code))
        said = complaint(words, capsys) if len(words) > 1 else None
        assert said is None or "required" in said, f"{code}: {said}"


@pytest.mark.parametrize(
    "line",
    [
        "hf-poolformer train --train_dir photos --output_dir outputs/pets --leraning_rate 1",
        "hf-poolformer evaluate outputs/pets --dataset photos",
        "hf-poolformer export outputs/pets outputs/x --format tflite",
        "hf-poolformer predict outputs/pets photos",
        "hf-poolformer publish outputs/pets --repo_id me/pets --dryrun",
        "hf-poolformer ablate --rows all --epochs 3",
        "hf-poolformer benchmark latency --loop",
        "hf-poolformer trian",
        "accelerate launch --num_processes 2 scripts/train_dense.py --task detection",
        "python examples/serve.py outputs/pets --prot 8000",
        "python -m hf_poolformer app outputs/pets --ports 80",
    ],
)
def test_a_wrong_flag_or_value_would_be_noticed(line, capsys):
    assert complaint(ours(line), capsys)


def test_make_has_the_targets_that_are_named():
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [*(line for text in PAGES.values() for line in shell_lines(text))]
    lines += [code for text in PAGES.values() for code in inline_code(text)]
    named = {
        word
        for line in lines
        if line.startswith("make ")
        for word in line.split("#")[0].split()[1:]
        if "=" not in word
    }
    assert {"demo", "test"} <= named <= known


def test_extras_that_are_named_exist():
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = ", table, re.MULTILINE))
    named = {
        extra
        for text in PAGES.values()
        for extras in re.findall(r"pip install '(?:\.|hf-poolformer)\[([\w,\- ]+)\]'", text)
        for extra in extras.split(",")
    }
    assert {"train", "export"} <= named <= known | {"NAME"}


# Links and files


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (path.parent / name).resolve() if name else path
        assert goal.is_relative_to(ROOT) and goal.exists(), target
        assert not anchor or anchor in anchors(goal.read_text()), target


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.]+\.md)[)#]", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = PAGES[page]
    named = set(re.findall(r"\b((?:scripts|examples|tests|src|model_cards)/[\w./\-]*\w)", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    rooms = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir())
    inside = {code for code in inline_code(text) if re.fullmatch(rf"(?:{rooms})/[\w/]*(?:\.py)?", code)}
    assert {name for name in inside if not (PACKAGE / name).exists()} == set()


def test_the_tree_of_the_house_is_the_house():
    tree, *_ = blocks(PAGES["docs/house.md"], "text")
    folder, shown = [], set()
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folder = [*folder[: len(indent) // 2], name.rstrip("/")]
        assert ROOT.joinpath(*folder).exists(), line
        shown.add(ROOT.joinpath(*folder))
    inside = {path for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"}
    assert inside <= shown


def test_the_readme_is_short_and_the_pages_say_what_they_are_for():
    assert len(PAGES["README.md"].splitlines()) <= 250
    for page, text in PAGES.items():
        if page in ("README.md", "docs/versions.md"):  # `make versions` writes that one
            continue
        first, second, *_ = text.split("\n\n")
        assert first.startswith("# ") and second[0].isalpha(), page
        assert blocks("\n\n".join(text.split("\n\n## ")[:1]), "bash"), f"{page} does not begin with commands"


# Python

PYTHON = [(page, number, code) for page, text in PAGES.items() for number, code in enumerate(blocks(text, "python"))]


@pytest.mark.parametrize(("page", "number", "code"), PYTHON, ids=[f"{page}-{number}" for page, number, _ in PYTHON])
def test_python_compiles_and_what_it_imports_of_ours_exists(page, number, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in modules:
            if module.partition(".")[0] == "hf_poolformer":
                found = importlib.import_module(module)
                assert name is None or hasattr(found, name), f"{module}.{name}"


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([warm_python(), "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_readme_s_python_runs(tmp_path, poolformer_config):
    PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path / "outputs" / "demo")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "outputs" / "demo")
    Image.new("L", (8, 8), 200).save(tmp_path / "digit.png")
    (code,) = blocks(PAGES["README.md"], "python")
    done = run(code + "assert [shape[1] for shape in shapes] == list(model.config.hidden_sizes)\n", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LABEL_")


@pytest.mark.slow
def test_the_mixer_of_the_pages_works(tmp_path):
    mixer, _ = blocks(PAGES["docs/extend.md"], "python")
    done = run(mixer + "assert model(torch.randn(2, 3, 64, 64)).logits.shape == (2, 10)\n", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_mixer_of_the_pages_learns_the_digits(tmp_path):
    write = f"import sys; sys.path.append({str(ROOT / 'scripts')!r})\nimport demo, pathlib\n"
    write += "demo.write_digits(pathlib.Path('outputs/demo-data'))\n"
    mixer, training = blocks(PAGES["docs/extend.md"], "python")
    done = run(write + mixer + training + "\nassert results['eval_accuracy'] >= 0.97, results\n", tmp_path)
    assert done.returncode == 0, done.stderr
