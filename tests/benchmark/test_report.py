"""Tables, files, charts and the targets, from figures that are made up."""

import json
import math

import pytest
from PIL import Image

from hf_poolformer.benchmark.case import TINY, Case
from hf_poolformer.benchmark.comparison import Comparison, Result, summarise
from hf_poolformer.benchmark.first_step import FirstSteps
from hf_poolformer.benchmark.floor import Ceilings
from hf_poolformer.benchmark.growth import Growth
from hf_poolformer.benchmark.loop import LoopReport
from hf_poolformer.benchmark.processors import Processing, ProcessorResult
from hf_poolformer.benchmark.report import Report, comparison_table, table, targets, write
from hf_poolformer.foundation.timing import Deadline, Timing


def comparison(case: Case, seconds: dict[str, float], memory: dict[str, int] | None = None) -> Comparison:
    results = [Result(name, name.split()[0], "passed", logits_error=1e-6) for name in seconds]
    for result in results:
        result.working_memory = (memory or {}).get(result.name)
    made = Comparison(case, results, floor_seconds=0.1)
    summarise(made, {name: Timing([value] * 3) for name, value in seconds.items()})
    return made


@pytest.fixture
def report() -> Report:
    case = Case("infer")
    seconds = {"ours fused": 0.2, "built-in eager NCHW": 0.5, "built-in compile": 0.3, "OpenVINO": 0.25}
    report = Report("python scripts/benchmark.py", "cpu", Deadline(None))
    report.ceilings["float32"] = Ceilings(2e11, 3e10)
    report.comparisons = [comparison(case, seconds), comparison(case.change(mode="latency", batch_size=1), seconds)]
    report.comparisons[0].results.append(Result("timm eager", "timm", "failed", "logits are off by 1.0e+00"))
    report.comparisons[0].results.append(Result("timm compile", "timm", "skipped", "no time left in the budget"))
    results = [
        ProcessorResult("built-in PIL", "built-in", "PIL", "passed", "", 0.0, 0.4, 0.1, 20.0, 1.0),
        ProcessorResult("ours PIL", "ours", "PIL", "passed", "", 1.0, 0.2, 0.1, 40.0, 2.0),
    ]
    report.processing = [Processing((500, 375), 8, "cpu", results)]
    return report


def test_ratios_follow_from_seconds(report):
    rows = {result.name: result for result in report.comparisons[0].results}
    assert rows["ours fused"].images_per_second == pytest.approx(80)
    assert rows["ours fused"].times_built_in_eager == pytest.approx(2.5)
    assert rows["ours fused"].times_fastest_peer == pytest.approx(1.5)  # OpenVINO is no PyTorch peer
    assert rows["ours fused"].floor_share == pytest.approx(0.5)
    assert rows["timm eager"].seconds is None


def test_table_lines_up():
    lines = table(("", "images/s"), [("ours", "12.0"), ("a longer name", "1234.5")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|---------------|---------:|"
    assert lines[2].split("|")[2] == "     12.0 "


def test_rows_that_were_not_timed_are_in_the_table(report):
    text = comparison_table(report.comparisons[0])
    assert "failed: logits are off" in text and "skipped: no time left" in text
    assert "80.0" in text and "Floor: 100 ms, 160 images/s." in text
    assert "200.00" in comparison_table(report.comparisons[1])  # latency in milliseconds


def test_targets_are_judged(report):
    found = {(row["case"].split(",")[0], row["what"]): row for row in targets(report)}
    fastest = found["infer", "speed against fastest peer"]
    assert fastest["reached"] == pytest.approx(1.5) and fastest["ok"] and fastest["wanted"] == ">= 1.25"
    assert found["infer", "speed against OpenVINO"]["reached"] == pytest.approx(1.25)
    latency = found["latency", "seconds against fastest peer"]
    assert latency["reached"] == pytest.approx(2 / 3) and latency["ok"] and latency["wanted"] == "<= 0.8"
    assert found["process", "speed against built-in"]["ok"]


def test_targets_of_a_gpu():
    seconds = {"ours auto NCHW": 0.2, "ours fused": 0.1, "built-in eager NCHW": 0.5, "built-in compile": 0.3}
    memory = {"ours auto NCHW": 60, "built-in compile": 100}
    case = Case("train", dtype="bfloat16", batch_size=256, device="cuda")
    report = Report("", "cpu", Deadline(None))
    report.first_steps = FirstSteps(case, cold=25.0, warm=4.0)
    report.comparisons = [
        comparison(case, seconds, memory),
        comparison(case.change(image_size=512), seconds, memory),
        comparison(case.change(variant="tiny", mode="latency"), seconds, memory),  # there is no target for that
        comparison(case.change(mode="infer"), seconds),
        comparison(case.change(mode="infer", variant="caformer_s18"), {"ours fused": 0.2, "timm compile": 0.3}),
        comparison(
            case.change(mode="latency", batch_size=1),
            {**seconds, "ours fused graph": 0.1, "built-in graph": 0.4, "timm graph": 0.35},
        ),
    ]
    found = [(row["what"], row["wanted"], round(row["reached"], 3), row["ok"]) for row in targets(report)]
    assert found == [
        ("speed of ours auto NCHW against fastest compiled peer", ">= 1.4", 1.5, True),
        ("working memory of ours auto NCHW against fastest compiled peer", "<= 0.5", 0.6, False),
        ("speed of ours auto NCHW against fastest compiled peer", ">= 1.26", 1.5, True),
        ("working memory of ours auto NCHW against fastest compiled peer", "<= 0.55", 0.6, False),
        ("speed against fastest compiled peer", ">= 2.1", 3.0, True),
        ("speed of ours auto NCHW against built-in eager NCHW", ">= 3.5", 2.5, False),
        ("share of the floor", ">= 0.5", 1.0, True),
        ("speed against fastest compiled peer", ">= 1.3", 1.5, True),
        ("speed of ours fused graph against fastest graph", ">= 3.6", 3.5, False),
        ("speed of ours auto NCHW against built-in eager NCHW", ">= 1.5", 2.5, True),
        ("seconds to the first step, cold cache", "<= 20", 25.0, False),
        ("seconds to the first step, warm cache", "<= 5", 4.0, True),
    ]


def test_files_are_written(report, tmp_path):
    report.comparisons[0].results[-1].spread = math.inf
    written = write(report, tmp_path / "new" / "cpu")
    assert [path.name for path in written] == ["cpu.json", "cpu.md", "cpu.png"]
    content = json.loads(written[0].read_text(), parse_constant=pytest.fail)
    assert content["environment"]["versions"]["torch"] and content["environment"]["date"]
    assert content["comparisons"][0]["case"]["variant"] == "poolformer_s12"
    assert content["comparisons"][0]["results"][0]["images_per_second"] == pytest.approx(80)
    assert content["ceilings"]["float32"]["flop_per_second"] == 2e11
    text = written[1].read_text()
    assert (
        text.count("**infer, poolformer_s12, float32, batch 16, 224 px**") == 1
        and "**Targets, our best row against others**" in text
    )
    with Image.open(written[2]) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_growth_and_loop_are_reported(tmp_path):
    report = Report("", "cpu", Deadline(None))
    case = Case("infer")
    points = [
        comparison(case.change(batch_size=size), {"ours fused": 0.01 * size, "built-in eager": 0.02 * size})
        for size in (1, 4)
    ]
    report.growth = Growth({"batch": points, "pixels": [], "model": points}, ["batch: 512"])
    rates = {"loader alone": 40.0, "device stage alone": 5e7, "loop, synthetic images": 10.0, "loop, photographs": 8.0}
    said = {"bottleneck": "loader and compute", "explanation": "they share the cores."}
    report.loop = LoopReport(Case("train"), 2, dealt="6 files", rates=rates, data_wait_share=0.013, **said)
    written = write(report, tmp_path / "growth")
    assert written[-1].name == "growth.png"
    text = written[1].read_text()
    assert "growth with batch: infer, poolformer_s12, float32, 224 px" in text
    assert "Left out, no time in the budget: batch: 512." in text
    assert "Data: 6 files. Waiting for data with photographs: 1.3% of the time." in text
    assert "Bottleneck: loader and compute; they share the cores." in text and "nothing to do" in text
    assert not report.failures()
    assert json.loads(written[0].read_text())["loop"]["rates"]["loader alone"] == 40.0


def test_a_loop_that_was_not_steady_is_a_failure():
    report = Report("", "cpu", Deadline(None))
    report.loop = LoopReport(Case("train"), bottleneck="not steady", explanation="the data ended.")
    assert report.failures() == ["training loop: not steady: the data ended."]


def test_failures_are_listed(report):
    assert report.failures() == [
        "infer, poolformer_s12, float32, batch 16, 224 px: timm eager: logits are off by 1.0e+00"
    ]


def test_case_knows_the_tiny_model():
    assert Case("infer", "tiny").config().hidden_sizes == TINY["hidden_sizes"]
