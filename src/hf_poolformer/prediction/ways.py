"""`--device_preprocessing auto` of `predict`: a short measurement on the first images, by the rules of training."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..foundation.errors import UserError, one_line
from ..foundation.machine import cores
from .pixels import Preprocessing


if TYPE_CHECKING:
    from .inference import Predictor

logger = logging.getLogger(__name__)

# Fewer images are done before a measurement has paid for itself.
WORTH_MEASURING = 1000


def choose_way(
    predictor: Predictor, items: Iterable[tuple[str, Any]], total: int | None, batch_size: int, workers: int
) -> tuple[str, str]:
    """What `auto` means for a model, its device and these images. A measurement that fails is a warning, and "no".

    Args:
        predictor: whose `preprocessing` is "no".
        items: names and undecoded images, of which a batch or so is read.
        total: how many there are; None where nobody knows.
        workers: processes that decode, 0 for none.

    Returns:
        "no" or "decode", and what is to be said of it; nothing on a CPU, where there is no choice.
    """
    from ..training.device_choice import choose, describe
    from ..training.device_pipeline import Preprocessing as Way

    if predictor.device.type == "cpu":
        return "no", ""
    if total is not None and total < WORTH_MEASURING:
        return "no", f"device_preprocessing auto: no ({total} images are too few to measure)"
    try:
        decoding = Preprocessing(predictor.processor, predictor.device, "decode")
    except UserError as error:
        return "no", f"device_preprocessing auto: no ({error})"
    ways = {Way("no"): predictor.preprocessing, Way("decode", decoding.decoder): decoding}
    workers = min(workers, cores())
    try:
        rates = measured_rates(predictor, ways, items, batch_size)
        expected = {way: rate.expected(workers) for way, rate in rates.items()}
    except Exception as error:  # of drivers and images; what is wrong with the run as well will be said by that
        logger.warning("--device_preprocessing auto: measuring failed (%s), so it is no.", one_line(error))
        return "no", ""
    chosen = choose(expected)
    return chosen.mode, describe("auto", chosen, expected, workers, "")


def measured_rates(
    predictor: Predictor, ways: dict[Any, Preprocessing], items: Iterable[tuple[str, Any]], batch_size: int
) -> dict[Any, Any]:
    """`Rates` of each way on the first images, of which the device's part includes the model."""
    from ..training.device_choice import MEASURED_IMAGES, Rates

    first = list(itertools.islice(items, MEASURED_IMAGES))
    batch = list(itertools.islice(itertools.cycle(first), batch_size))
    threads, before, rates = torch.get_num_threads(), predictor.preprocessing, {}
    try:
        for way, preprocessing in ways.items():
            predictor.preprocessing = preprocessing
            torch.set_num_threads(1)  # as a worker
            seconds = fastest(time.thread_time, lambda load=preprocessing.load: load(first))
            loaded = preprocessing.load(batch)
            torch.set_num_threads(threads)
            # Rows are answers on the CPU: nothing of it is under way any more.
            answered = fastest(time.perf_counter, lambda loaded=loaded: predictor.rows(dict(loaded)))
            rates[way] = Rates(len(first) / seconds, len(batch) / answered)
            preprocessing.decoded = preprocessing.held_back = 0
    finally:
        torch.set_num_threads(threads)
        predictor.preprocessing = before
    return rates


def fastest(clock: Callable[[], float], work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some rounds, of which the first only warms up."""
    from ..training.device_choice import ROUNDS

    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        seconds.append(clock() - start)
    return max(min(seconds[1:]), 1e-9)
