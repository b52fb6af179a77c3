"""The contestants: what they compute, which are chosen, and that the gate keeps out who computes something else."""

import functools
import os

import pytest
import torch

from hf_poolformer import MetaFormerConfig
from hf_poolformer.backends import VARIABLE
from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.comparison import Runner
from hf_poolformer.benchmark.gate import gradient_error, logits_error, standard
from hf_poolformer.benchmark.rows import (
    Contestant,
    Unavailable,
    all_rows,
    build,
    choose_rows,
    kernels,
    make_weights,
)
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.timing import Deadline


def tiny(mode: str = "infer", **fields) -> Case:
    return Case(mode, **{"variant": "tiny", "batch_size": 2, "image_size": 64, **fields})


def runner(deadline: float | None = None) -> Runner:
    return Runner({}, Deadline(deadline), seconds=0.0, rounds=1)


def compare(case: Case, *patterns: str):
    return {result.name: result for result in runner().compare(case, choose_rows(case, patterns)).results}


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        ("float32", "infer"),
        ("bfloat16", "train"),
        pytest.param("float32", "train", marks=pytest.mark.slow),
        pytest.param("bfloat16", "infer", marks=pytest.mark.slow),
    ],
)
def test_every_uncompiled_contestant_passes_the_gate(mode, dtype):
    results = compare(tiny(mode, dtype=dtype), "ours reference", "ours fused", "*eager*", "onnxruntime", "OpenVINO")
    for name in ("ours reference", "ours fused", "built-in eager", "built-in eager NCHW", "timm eager"):
        assert results[name].status == "passed", results[name]
        assert results[name].images_per_second > 0 and results[name].working_memory > 0
        assert (results[name].gradient_error is None) == (mode == "infer")
    for name in {"onnxruntime", "OpenVINO"} & set(results):  # development extras
        assert results[name].status == "passed" or "not installed" in results[name].note
    assert ("onnxruntime" in results) == (mode == "infer" and dtype == "float32")
    assert results["built-in eager NCHW"].times_built_in_eager == 1.0
    assert min(row.times_fastest_peer for row in results.values() if row.library in ("built-in", "timm")) <= 1.0


@pytest.mark.parametrize("mode", [pytest.param("infer", marks=pytest.mark.slow), "train"])
def test_families_of_the_second_paper_are_held_against_timm(mode, monkeypatch):
    # The real ones take minutes on a CPU: of each stage one block.
    pytest.importorskip("timm")
    from timm.models import metaformer

    config = MetaFormerConfig.from_variant("caformer_s18")
    config.depths = (1, 1, 1, 1)
    monkeypatch.setattr(Case, "config", lambda case: config)
    made = metaformer.MetaFormer.__init__
    monkeypatch.setattr(
        metaformer.MetaFormer,
        "__init__",
        lambda self, *args, **kwargs: made(self, *args, **kwargs | {"depths": (1,) * 4}),
    )
    case = tiny(mode, variant="caformer_s18")
    results = compare(case, "ours auto", "timm eager")
    assert {result.status for result in results.values()} == {"passed"}, results
    assert not any(row.library == "built-in" for row in all_rows(case))


def test_rows_are_not_compiled_into_one_another(monkeypatch):
    # torch.compile keeps what it compiled with the code; a row that found another's there would run its operations.
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda forward, mode, dynamic: compile_with(forward, dynamic=dynamic))
    case = tiny()
    weights, (images, _) = make_weights(case.config()), case.batch()
    with torch.no_grad():
        for row in choose_rows(case, ["ours reference compile", "ours fused compile", "built-in compile"]):
            contestant = build(row, case, weights)
            contestant(contestant.prepare(images))
    fused = [any("hf_poolformer" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert fused == [False, True, False]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_contestants_pass_the_gate():
    results = compare(tiny("train"), "ours fused compile", "built-in compile", "timm compile")
    assert {result.status for result in results.values()} == {"passed"}, results
    results = compare(tiny(), "built-in frozen", "built-in max-autotune")
    assert {result.status for result in results.values()} == {"passed"}, results


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("infer", "poolformer.encoder.block.2.1.layer_scale_1"),
        ("train", "classifier.bias"),
        ("train", "norm.weight"),
        pytest.param("train", "poolformer.encoder.block.2.1.layer_scale_1", marks=pytest.mark.slow),
        pytest.param("infer", "classifier.bias", marks=pytest.mark.slow),
        pytest.param("infer", "norm.weight", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_model_is_reported_and_not_timed(mode, name, monkeypatch):
    # Slightly wrong in one parameter, wherever it is: the layer scales of a fresh model would hide a branch.
    def build_wrong(row, case, weights):
        if row.library == "ours":
            weights = {**weights, name: weights[name] * 1.1}
        return build(row, case, weights)

    monkeypatch.setattr("hf_poolformer.benchmark.comparison.build", build_wrong)
    results = compare(tiny(mode), "ours fused", "built-in eager")
    assert results["ours fused"].status == "failed" and "off by" in results["ours fused"].note
    assert results["ours fused"].seconds is None and results["built-in eager"].seconds > 0


def test_wrong_gradients_are_seen_where_the_logits_are_right():
    case = tiny("train")
    weights = make_weights(case.config())
    right = standard(case, weights, *case.batch(), pools_first=False)
    assert gradient_error(right.gradients, right.gradients) == 0
    for change in (1.01, 0.0, float("nan")):
        name = "poolformer.encoder.block.1.0.output.conv1.weight"
        wrong = {**right.gradients, name: right.gradients[name] * change}
        assert not gradient_error(wrong, right.gradients) <= 1e-3
    assert gradient_error({**right.gradients, name: None}, right.gradients) == float("inf")


def test_the_standard_is_the_same_in_chunks(monkeypatch):
    case = tiny("train", batch_size=5)
    weights = make_weights(case.config())
    whole = standard(case, weights, *case.batch(), pools_first=True)
    monkeypatch.setattr("hf_poolformer.benchmark.gate.CHUNK", 2)
    parts = standard(case, weights, *case.batch(), pools_first=True)
    assert logits_error(parts.logits, whole.logits) < 1e-5
    assert gradient_error(parts.gradients, whole.gradients) < 1e-4


def test_what_is_not_finite_does_not_pass(monkeypatch):
    def build_nan(row, case, weights):
        contestant = build(row, case, weights)
        return Contestant(row, lambda images: contestant(images) * float("nan"), contestant.prepare, contestant.module)

    monkeypatch.setattr("hf_poolformer.benchmark.comparison.build", build_nan)
    assert compare(tiny(), "ours fused")["ours fused"].status == "failed"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["infer", "train", "latency"])
def test_contestants_on_a_gpu(mode, dtype):
    graphs = ["*graph"] if mode == "latency" else []
    results = compare(tiny(mode, dtype=dtype, device="cuda"), "ours reference", "ours fused", "*eager*", *graphs)
    assert {result.status for result in results.values()} <= {"passed", "skipped"}, results  # timm may be missing
    assert results["ours fused"].working_memory > 0
    assert ("built-in graph" in results) == (mode == "latency")


def test_errors_and_missing_libraries_leave_the_others_alone(monkeypatch):
    def build_some(row, case, weights):
        if row.library == "timm":
            raise Unavailable("timm missing: pip install 'hf-poolformer[benchmark]'")
        if row.library == "ours":
            raise RuntimeError("no kernel\nfor this\ndevice")
        return build(row, case, weights)

    monkeypatch.setattr("hf_poolformer.benchmark.comparison.build", build_some)
    results = compare(tiny(), "ours fused", "timm eager", "built-in eager")
    assert (results["ours fused"].status, results["ours fused"].note) == ("failed", "RuntimeError: no kernel")
    assert results["timm eager"].status == "skipped" and "hf-poolformer[benchmark]" in results["timm eager"].note
    assert results["built-in eager"].status == "passed"


def test_the_budget_leaves_out_compilations_first():
    case = tiny()
    rows = choose_rows(case, ["built-in compile", "built-in eager"])
    compiled, eager = runner(deadline=8.0).compare(case, rows).results
    assert (compiled.status, compiled.note) == ("skipped", "no time left in the budget")
    assert eager.status == "passed"


def test_rows_are_chosen_by_name():
    case = tiny()
    everything = [row.name for row in all_rows(case)]
    assert len(everything) == len(set(everything))
    assert [row.name for row in choose_rows(case, ["all"])] == everything
    assert [row.name for row in choose_rows(case, ["timm*", "ours fused"])][-1] == "ours fused"
    assert choose_rows(tiny("train"), ["OpenVINO"]) == []
    for device in ("cpu", "cuda"):
        for mode in ("infer", "train", "latency"):
            known = {row.name for row in all_rows(tiny(mode, device=device))}
            assert {row.name for row in choose_rows(tiny(mode, device=device), ["default"])} <= known
    with pytest.raises(UserError, match="ours fast"):
        choose_rows(case, ["ours fast"])


def test_kernels_are_chosen_for_the_call_only(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    with kernels("cpu"):
        assert os.environ[VARIABLE] == "cpu"
    with kernels(None):
        assert os.environ[VARIABLE] == "reference"
    monkeypatch.delenv(VARIABLE)
    with kernels("cpu"):
        pass
    assert VARIABLE not in os.environ
