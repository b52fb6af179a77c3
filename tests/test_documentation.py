"""Every page of Markdown: each block is accounted for by its language, every command is one that its own parser
accepts, every link and file is there, Python runs."""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from torch.distributed.run import get_args_parser
from warm import warm_python

import hf_poolformer_cli
from hf_poolformer import PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.export import FORMATS


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/hf_poolformer"
PLACES = ("*.md", "docs/**/*.md", "benchmarks/*.md", "model_cards/*.md")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for place in PLACES for path in sorted(ROOT.glob(place))}
# What has a page to itself, but for the reference, whose pages consist of docstrings.
GUIDES = {page: text for page, text in PAGES.items() if re.fullmatch(r"docs/[\w-]+\.md", page)}
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def shell_lines(text: str) -> list[str]:
    joined = "\n".join(blocks(text, "bash", "sh", "console")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


# Blocks

# What is done with a block of each language.
KINDS = {
    "bash": "bash reads it; its lines are ours, make's, pip's, or those of another program that is named here",
    "python": "it compiles, what it imports of ours exists, and some are run",
    "json": "it is parsed",
    "yaml": "it is parsed",
    "toml": "shown",
    "text": "shown: what a program prints, a tree, a formula",
    "js": "node reads it, and what it imports of ours exists",
    "kotlin": "the files that it names are those that are written; there is no compiler here",
    "swift": "the files that it names are those that are written; there is no compiler here",
}


def unaccounted(text: str) -> list[str]:
    """What is wrong with the blocks of a page."""
    wrong = [f"a block of {kind or 'no kind'}" for kind, _ in FENCE.findall(text) if kind not in KINDS]
    wrong += [
        f"a fence inside or outside of a block: {line}" for line in re.findall(r"^ *(?:```|~~~).*", prose(text), re.M)
    ]
    # Python-Markdown and GitHub make a block of these, too, whose language nobody knows.
    wrong += [
        f"an indented block: {line}" for line in re.findall(r"\n\n( {4,}\S.*)", prose(text)) if ":::" not in text
    ]
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_accounted_for(page):
    assert unaccounted(PAGES[page]) == []


@pytest.mark.parametrize(
    "text", ["```\nx\n```", "```rust\nx\n```", "```bash\nls", "~~~\nx\n~~~", "  ```bash\n  ls\n  ```", "a\n\n    b"]
)
def test_a_block_of_another_kind_would_be_noticed(text):
    assert unaccounted(text)


def test_bash_reads_what_is_said_to_be_bash():
    for page, text in PAGES.items():
        done = subprocess.run(["bash", "-n"], input="\n".join(blocks(text, "bash")), capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {done.stderr}"


def test_data_is_what_it_is_said_to_be():
    for text in PAGES.values():
        for body in blocks(text, "json"):
            json.loads(body)
        for body in blocks(text, "yaml"):
            yaml.safe_load(body)


def test_javascript_imports_what_there_is(tmp_path):
    written = {path.name: path.read_text() for path in (PACKAGE / "export/page").glob("*.js")}
    scripts = [body for text in PAGES.values() for body in blocks(text, "js")]
    assert scripts
    for number, script in enumerate(scripts):
        for names, file in re.findall(r'import \{([^}]+)\} from "[^"]*?([\w.]+)"', script):
            exported = re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", written[file], re.MULTILINE)
            assert {name.strip() for name in names.split(",")} <= set(exported)
        if shutil.which("node"):
            (tmp_path / f"{number}.mjs").write_text(script)
            done = subprocess.run(["node", "--check", tmp_path / f"{number}.mjs"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_programs_for_phones_open_the_file_that_is_written():
    name, _, ending = FORMATS["executorch"].file.partition(".")
    kotlin = "".join(blocks(PAGES["docs/phones.md"], "kotlin"))
    assert set(re.findall(r"\bmodel\.\w{3}\b", kotlin)) == {f"{name}.{ending}"}
    swift = "".join(blocks(PAGES["docs/phones.md"], "swift"))
    assert re.findall(r'forResource: "(\w+)", ofType: "(\w+)"', swift) == [(name, ending)]


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
    r"^(?:[A-Z_]+=\S+ )*"
    r"(?:hf-poolformer|(?:python|accelerate launch|torchrun|hf jobs uv run|uv run)(?: .*)? "
    r"(?:-m hf_poolformer|[\w/]+\.py)) "
)
# Others in blocks of bash. What follows make and pip is looked at below, and whether scripts are there.
OTHERS = re.compile(
    r"(python (scripts|examples)/\w+\.py$|make|pip install|apt install|export [A-Z_]+=|curl|hf auth login|trtexec"
    r"|git|cd|ruff|pytest|docker (build|run)|python3? -m (http\.server|venv|build|pip|pytest)|sbatch|trackio show"
    r"|[\w.]+/bin/pip install|source) ?"
)


def ours(line: str) -> list[str]:
    """The words of such a command from its program on; the parser of what launches it reads what is for that."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "accelerate":
        launched = launch_command_parser().parse_args(words[2:])
        words = [*(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args]
    elif words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        words = [*(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args]
    elif "examples/hf_job.py" in words and words[0] in (
        "hf",
        "uv",
    ):  # it has the flags of train, and gives it a folder
        flags = words[words.index("examples/hf_job.py") + 1 :]
        return ["hf-poolformer", "train", "--output_dir", "outputs/job", *flags]
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
        if "--config_file" in words:  # an earlier line writes it
            place = words.index("--config_file")
            del words[place : place + 2]
        assert complaint(words, capsys) is None


def test_every_line_of_bash_is_a_command_that_is_known():
    for page, text in PAGES.items():
        for line in shell_lines(text):
            if code := re.match(r"python -c (.*)", line):
                compile(shlex.split(code[1])[0], page, "exec")
            else:
                assert PROGRAM.match(line) or OTHERS.match(line), f"{page}: {line}"


def test_commands_in_sentences_and_tables_are_accepted_too(capsys):
    """There, `...` stands for the rest, and what is required may be missing."""
    codes = {code for text in PAGES.values() for code in inline_code(text) if PROGRAM.match(f"{code} ")}
    codes = {code for code in codes if " " in code and "COMMAND" not in code and "--help" not in code}
    assert len(codes) > 20
    for code in sorted(codes):
        words = ours(re.sub(r"( [^-\s]\S*) \.\.\.$", r"\1", code.replace(" ... -m ", " -m ")))
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


@pytest.mark.parametrize("page", PAGES)
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
    linked = set(re.findall(r"\]\((docs/[\w.-]+\.md)[)#]", PAGES["README.md"]))
    assert linked == set(GUIDES)
    listed = set(re.findall(r"\]\((reference/[\w.-]+\.md)[)#]", PAGES["docs/reference.md"]))
    assert {f"docs/{name}" for name in listed} == {page for page in PAGES if page.startswith("docs/reference/")}


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
    for page, text in GUIDES.items():
        if page == "docs/versions.md":  # `make versions` writes it
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


@pytest.fixture
def prepared(tmp_path, poolformer_config, monkeypatch):
    """A folder with what the snippets open, as the one that they run in; gives the names that they count on."""
    model = PoolFormerForImageClassification(poolformer_config).eval()
    model.save_pretrained(tmp_path / "outputs/pets")
    poolformer_config.problem_type = "multi_label_classification"
    PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path / "outputs/outfits")
    for name in ("pets", "outfits"):
        PoolFormerImageProcessor().save_pretrained(tmp_path / "outputs" / name)
    Image.new("RGB", (300, 240), (200, 10, 10)).save(tmp_path / "photo.jpg")
    doubted = {"path": ["a.png"], "label": ["cat"], "suggested": ["dog"], "score": [0.9], "more": [1]}
    (tmp_path / "reports/pets").mkdir(parents=True)
    pq.write_table(pa.table(doubted), tmp_path / "reports/pets/label_errors.parquet")
    monkeypatch.chdir(tmp_path)
    return {"model": model, "inputs": {"pixel_values": torch.randn(2, 3, 64, 64)}}


@pytest.mark.parametrize(
    ("page", "number", "check"),
    [
        ("docs/evaluate.md", 0, "found.maps.shape == (2, 2, 64, 64)"),
        ("docs/kernels.md", 0, "logits.shape == (1, 10)"),
        ("docs/models.md", 0, "caformer.config.num_labels == 10 and len(hybrid.depths) == 4"),
        ("docs/predict.md", 0, "len(classify('photo.jpg', top_k=3)) == 3"),
        ("docs/report.md", 0, "len(doubted) == 1"),
    ],
)
def test_python_of_the_pages_runs(page, number, check, prepared):
    names = dict(prepared)
    exec(compile(blocks(PAGES[page], "python")[number], page, "exec"), names)
    assert eval(check, names)


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
