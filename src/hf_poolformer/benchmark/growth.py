"""How cost grows: with the batch, with the pixels, with the depth and width of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .case import Case
from .comparison import Comparison, Result, Runner
from .floor import operations
from .rows import choose_rows


BATCHES = (1, 4, 16, 64, 256, 512)
PIXELS = (128, 224, 384, 512, 768, 1024)
VARIANTS = ("poolformer_s12", "poolformer_s24", "poolformer_s36", "poolformer_m36", "poolformer_m48")


@dataclass
class Growth:
    """Comparisons along each axis, "batch", "pixels" and "model"; what did not fit into the budget is named."""

    axes: dict[str, list[Comparison]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def failures(self) -> list[Result]:
        return [
            result
            for comparisons in self.axes.values()
            for comparison in comparisons
            for result in comparison.results
            if result.status == "failed"
        ]


def measure_growth(base: Case, patterns: Sequence[str], runner: Runner) -> Growth:
    """
    Compares along three axes through `base`, cheap points first, so that a short budget loses the dear ones.

    Args:
        base: mode, precision, device, and the batch and image size of the two other axes.
        patterns: rows, as `choose_rows` takes them.
        runner: with the budget. A point is left out if the work it takes, at the pace of the one before, would not
            fit.
    """
    # A quarter of the images along pixels: 1024 px are 21 times 224 px.
    fewer = max(base.batch_size // 4, 1)
    points = [
        *(("batch", base.change(batch_size=size)) for size in BATCHES),
        *(("pixels", base.change(batch_size=fewer, image_size=side)) for side in PIXELS),
        *(("model", base.change(variant=name)) for name in VARIANTS),
    ]
    growth = Growth({"batch": [], "pixels": [], "model": []})
    pace: float | None = None
    for axis, case in sorted(points, key=lambda point: _work(point[1])):
        left = runner.deadline.left
        if left <= 0 or (pace is not None and pace * _work(case) > left):
            growth.left_out.append(f"{axis}: {case.title}")
            continue
        start = time.monotonic()
        growth.axes[axis].append(runner.compare(case, choose_rows(case, patterns)))
        pace = (time.monotonic() - start) / _work(case)
    return growth


def _work(case: Case) -> float:
    """FLOP of a step, and a constant for what a comparison takes however small it is."""
    return sum(operation.flop for operation in operations(case)) + 5e10
