"""What Triton's compiler makes of the kernels, where it differs from the Python that the interpreter runs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_poolformer.kernels


HERE = Path(__file__).parent
MODULES = sorted(Path(hf_poolformer.kernels.__file__).parent.glob("*.py"))


def shared_names(source: str) -> list[str]:
    """
    `line: name` of variables of loops that began as another name's value, in Triton's functions.

    In `for ...: a = b` Triton takes a for constant, and drops it, if its next value is the very tensor that it had
    before the loop, as it is where both began as one. `static_range` is unrolled: it has no such variables.
    """
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not {"triton.jit", "kernel"}.intersection(map(called, function.decorator_list)):
            continue
        for loop in ast.walk(function):
            if isinstance(loop, ast.For) and not called(loop.iter).endswith("static_range"):
                assigned = {name for node in loop.body for name in stored(node)}
                before = [
                    node for node in ast.walk(function) if isinstance(node, ast.Assign) and node.lineno < loop.lineno
                ]
                found += [f"{node.lineno}: {name}" for node in before for name in aliases(node) if name in assigned]
    return found


def called(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def stored(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def aliases(node: ast.Assign) -> list[str]:
    """Names that an assignment makes another word for what has one, the first of `a = b = ...` aside."""
    pairs = [(target, node.value) for target in node.targets]
    if isinstance(node.value, ast.Tuple):
        tuples = [target for target in node.targets if isinstance(target, ast.Tuple)]
        pairs = [pair for target in tuples for pair in zip(target.elts, node.value.elts, strict=True)]
    names = [target.id for target, value in pairs if isinstance(target, ast.Name) and isinstance(value, ast.Name)]
    return names + [
        target.id for target in node.targets[1:] if isinstance(target, ast.Name) and target.id not in names
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_variables_of_a_loop_begin_as_tensors_of_their_own(path):
    assert shared_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("start", ["b = zeros(); a = b", "a = b = zeros()", "b = zeros(); a, c = b, zeros()"])
def test_a_shared_start_is_found(start):
    program = "@triton.jit\ndef kernel(n):\n    {}\n    for i in {}(n):\n        a = b\n        b = i\n"
    assert shared_names(program.format(start, "range"))
    assert not shared_names(program.format(start, "tl.static_range"))
    assert not shared_names(program.format("a, b = zeros(), zeros()", "range"))
    assert not shared_names(program.format(start, "range").replace("@triton.jit", ""))


CASES = "(result_and_gradients or more_channels or bands_of_rows)"


# float16 makes of no kernel what bfloat16 does not, and float32 less: nothing is rounded on the way.
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_what_the_frontend_makes_computes_the_same(dtype):
    """The small cases of the interpreter, by Triton's IR; see triton_ir.py."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch has no CUDA, so its Triton may not compile for it")
    files = [HERE / f"test_{name}.py" for name in ("pool_mixer", "channel_mlp", "separable_conv")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "triton_ir", "-p", "no:cacheprovider", *files]
    command += ["-k", f"{CASES} and {'dtype1' if dtype == 'bfloat16' else 'dtype0'}"]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 7
