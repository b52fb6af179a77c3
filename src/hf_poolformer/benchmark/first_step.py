"""Seconds from the start of a program to the end of its first training step, by ours as one gets it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..foundation.errors import UserError
from ..foundation.strict_json import to_json
from .case import DTYPES, Case
from .rows import make_weights, transformers_model


@dataclass
class FirstSteps:
    """Seconds until the first step is through, by what of the kernels is compiled before."""

    case: Case
    cold: float  # nothing
    warm: float  # everything, by the run before


def measure_first_steps(case: Case) -> FirstSteps:
    """
    Two programs after each other, which share a cache of Triton's that is empty at first.

    Raises:
        UserError: one of them failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-kernels-") as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-m", __name__, to_json(dataclasses.asdict(case))]
        seconds = []
        for _ in ("cold", "warm"):
            start = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise UserError(f"the first step failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
            seconds.append(time.monotonic() - start)
    return FirstSteps(case, *seconds)


def take_step(case: Case) -> None:
    """A model, a batch, forward, backward and step."""
    model = transformers_model("ours", case, make_weights(case.config())).to(case.device, DTYPES[case.dtype]).train()
    images, labels = case.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    F.cross_entropy(model(images).logits.float(), labels).backward()
    optimizer.step()
    print(next(model.parameters()).sum().item())  # waits for the device


if __name__ == "__main__":
    take_step(Case(**json.loads(sys.argv[1])))
