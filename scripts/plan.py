"""What a training run on many GPUs needs, computed from figures of one GPU and one core; and its stream, simulated.

    python scripts/plan.py               ImageNet-21K on 64 GPUs, as docs/scale.md has it
    python scripts/plan.py --gpus 256 --gpu_rate 9000
    python scripts/plan.py --simulate    the order of the stream at that scale, without images: minutes

The plan is arithmetic. The simulation writes Parquet shards of row numbers and reads them as training does, through
`hf_poolformer.data.stream`: how long a worker takes to start and to find a place in the middle, in how much memory,
how evenly the images are dealt, and how well they are mixed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--images", type=int, default=13_153_500, help="images of an epoch")
    data.add_argument("--classes", type=int, default=19_167, help="classes, for the mixing of the simulation")
    data.add_argument("--image_bytes", type=int, default=100_000, help="bytes of an encoded image, on average")
    data.add_argument("--epochs", type=int, default=90, help="epochs")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--gpus", type=int, default=64, help="GPUs in all")
    machine.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of one machine")
    machine.add_argument("--cores_per_gpu", type=int, default=16, help="cores that can decode for one GPU")
    machine.add_argument("--workers", type=int, default=8, help="data workers of one GPU, in the simulation")
    rates = parser.add_argument_group("measured figures")
    rates.add_argument("--gpu_rate", type=float, default=4931, help="images/s that one GPU trains, data apart")
    rates.add_argument("--core_rate", type=float, default=190, help="images/s that one core decodes and augments")
    rates.add_argument("--parameters", type=float, default=11.9e6, help="of the model")
    rates.add_argument("--storage_rate", type=float, default=1e9, help="bytes/s to which a checkpoint is written")
    rates.add_argument("--start_seconds", type=float, default=120, help="from a restart to the next step")
    rates.add_argument("--gpu_hours_per_failure", type=float, default=50_000, help="GPU hours between two failures")
    stream = parser.add_argument_group("stream")
    stream.add_argument("--batch_size", type=int, default=64, help="images of one GPU in one step")
    stream.add_argument("--buffer_size", type=int, default=1000, help="--shuffle_buffer_size of training")
    stream.add_argument(
        "--shards_per_worker", type=int, default=4, help="whole shards that a worker reads in an epoch"
    )
    stream.add_argument("--row_group", type=int, default=500, help="images of a row group of Parquet")
    stream.add_argument("--minutes_between_checkpoints", type=float, default=15, help="of training")
    parser.add_argument("--simulate", action="store_true", help="simulate the stream, too")
    parser.add_argument("--folder", type=Path, help="keep the simulation's shards here")
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            parser.error(f"--{name} must be above zero, not {value}")
    if arguments.gpus % arguments.gpus_per_node:
        parser.error(f"--gpus {arguments.gpus} are not whole machines of {arguments.gpus_per_node}")
    print(table(plan(arguments)))
    if arguments.simulate:
        with tempfile.TemporaryDirectory() as temporary:
            print("\n" + table(simulate(arguments, arguments.folder or Path(temporary))))
    return 0


def table(rows: list[tuple[str, str]]) -> str:
    """Rows (what, how much) in Markdown."""
    return "\n".join(["| | |", "|---|---:|", *(f"| {what} | {value} |" for what, value in rows)])


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def plan(given: argparse.Namespace) -> list[tuple[str, str]]:
    """What the run needs, as rows (what, how much)."""
    lanes = given.gpus * given.workers
    shards = lanes * given.shards_per_worker
    images_per_shard = math.ceil(given.images / shards)
    decoded = given.cores_per_gpu * given.core_rate
    rate = min(given.gpu_rate, decoded)
    epoch = given.images / (rate * given.gpus)
    steps = given.images // (given.batch_size * given.gpus)
    # Weights, their moving average, and Adam's two moments, float32 each.
    checkpoint = 4 * 4 * given.parameters
    written = checkpoint / given.storage_rate
    days = given.epochs * epoch / 86_400
    failures = given.gpus * 24 / given.gpu_hours_per_failure
    lost = 60 * given.minutes_between_checkpoints / 2 + given.start_seconds
    total = days * (1 + failures * lost / 86_400)
    return [
        ("shards, each worker's share whole", f"{shards:,}"),
        ("images of a shard", f"{images_per_shard:,}"),
        ("size of a shard", f"{images_per_shard * given.image_bytes / 1e6:,.0f} MB"),
        ("row groups of a shard", f"{math.ceil(images_per_shard / given.row_group):,}"),
        ("all shards", f"{given.images * given.image_bytes / 1e12:,.2f} TB"),
        ("one GPU could train", f"{given.gpu_rate:,.0f} images/s"),
        (f"its {given.cores_per_gpu} cores can decode", f"{decoded:,.0f} images/s"),
        ("cores that would keep it busy", f"{math.ceil(given.gpu_rate / given.core_rate)}"),
        ("what it trains", f"{rate:,.0f} images/s, the {'GPU' if rate == given.gpu_rate else 'cores'} being slower"),
        ("bytes to one machine", f"{rate * given.gpus_per_node * given.image_bytes / 1e6:,.0f} MB/s"),
        ("bytes to all", f"{rate * given.gpus * given.image_bytes / 1e9:,.1f} GB/s"),
        ("steps of an epoch", f"{steps:,} of {given.batch_size * given.gpus:,} images"),
        ("one epoch", f"{epoch / 60:,.1f} minutes"),
        (f"{given.epochs} epochs", f"{days:,.2f} days"),
        ("a checkpoint", f"{checkpoint / 1e6:,.0f} MB, written in {written:,.1f} s, in the background"),
        ("checkpoints of a day", f"{24 * 60 / given.minutes_between_checkpoints:,.0f}"),
        ("failures of a day", f"{failures:,.3f}"),
        ("what one costs", f"{lost / 60:,.1f} minutes: half the time between two checkpoints, and a start"),
        ("images held by a worker to shuffle", f"{given.buffer_size * given.image_bytes / 1e6:,.0f} MB"),
        ("wall time with failures", f"{total:,.2f} days"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The simulation


def simulate(given: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    """What was measured of the stream, as rows (what, how much)."""
    from hf_poolformer.data.stream import fresh_pieces

    shards = given.gpus * given.workers * given.shards_per_worker
    sizes = write_shards(given, folder, shards)
    layout = {"seed": 0, "window": 2 * given.buffer_size, "num_processes": given.gpus, "lanes": given.workers}
    layout["local"] = True
    shares = [
        sum(sizes[piece.shard] for piece in lane)  # whole shards: each worker has as many
        for rank in range(given.gpus)
        for lane in fresh_pieces(shards, True, 0, layout, rank)
    ]
    # Each worker in a process of its own, forked from one that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "hf_poolformer.data.stream"])
    with context.Pool(1, maxtasksperchild=1) as pool:

        def read(rank: int, rows: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
            return pool.apply(read_as_worker, (given, folder, rank, rows, state))

        # In one step each process hands out a batch of one worker.
        starts = [read(rank, given.batch_size) for rank in range(given.gpus)]
        ranks = range(0, given.gpus, max(given.gpus // 8, 1))
        middles = [read(rank, 1, read(rank, min(shares) // 2)["state"]) for rank in ranks]
    batch = [number for start in starts for number in start["numbers"]]
    found = len({number * given.classes // given.images for number in batch})
    wanted = given.classes * (1 - (1 - 1 / given.classes) ** len(batch))
    return [
        ("images dealt to all workers", f"{sum(shares):,} of {given.images:,}"),
        ("the smallest and the largest share", f"{min(shares):,} and {max(shares):,}"),
        ("a worker's start, to its first row", seconds(starts)),
        ("to go on in the middle, to its first row", seconds(middles)),
        (
            "memory of a worker beyond its imports",
            f"at most {max(each['memory'] for each in starts + middles):,.0f} MB",
        ),
        ("classes in a batch of all GPUs, shards sorted by class", f"{found:,}"),
        ("the same of images drawn at random", f"{wanted:,.0f}"),
    ]


def seconds(measured: list[dict[str, Any]]) -> str:
    values = [each["seconds"] for each in measured]
    return f"{statistics.median(values):.2f} s, at most {max(values):.2f} s"


def write_shards(given: argparse.Namespace, folder: Path, shards: int) -> list[int]:
    """Parquet files of row numbers in ascending order, as a dataset sorted by class would have them; their sizes."""
    import pyarrow
    import pyarrow.parquet

    bounds = [given.images * shard // shards for shard in range(shards + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for shard, (first, end) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"train-{shard:05d}-of-{shards:05d}.parquet"
        if not path.exists():
            rows = pyarrow.table({"number": pyarrow.array(range(first, end), pyarrow.int64())})
            pyarrow.parquet.write_table(rows, path, row_group_size=given.row_group)
    return [end - first for first, end in itertools.pairwise(bounds)]


def read_as_worker(
    given: argparse.Namespace, folder: Path, rank: int, rows: int, state: dict[str, Any] | None
) -> dict[str, Any]:
    """The first worker of a process reads some rows, from the beginning of an epoch or from a state.

    Returns:
        seconds to its first row, the memory in MB that it took beyond what importing did, the numbers of its rows, and
        the place behind them.
    """
    from datasets import load_dataset

    from hf_poolformer.data.stream import Order, Start

    files = sorted(str(path) for path in folder.glob("train-*.parquet"))
    before, start = peak(), time.perf_counter()
    stream = load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)
    order = Order(
        stream,
        shuffle=True,
        buffer_size=given.buffer_size,
        seed=0,
        process_index=rank,
        num_processes=given.gpus,
        num_workers=given.workers,
        divided=False,
    )
    if state is not None:
        order.start = Start(0, False, states=[state, *[None] * (given.workers - 1)])
    _, lane = order.lane(0, 0)
    numbers: list[int] = []
    for row in itertools.islice(lane, rows):
        numbers.append(row.values["number"])
        if len(numbers) == 1:
            first = time.perf_counter() - start
    return {"seconds": first, "memory": peak() - before, "numbers": numbers, "state": lane.state()}


def peak() -> float:
    """The largest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "linux" else 1024) / 1e3


if __name__ == "__main__":
    sys.exit(main())
