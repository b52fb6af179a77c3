"""Puts a server of examples/serve.py under load on this machine, and checks what it promises.

    pip install 'hf-poolformer[serve]'
    python examples/load_test.py outputs/pets-int8                      # starts the server, and ends it
    python examples/load_test.py outputs/pets-int8 -- --max_batch 8     # with settings for it
    python examples/load_test.py http://127.0.0.1:8000                  # one that runs already
    python examples/load_test.py                                        # one of a small model, for a first look

First a growing number of clients that each send one request after another, up to what the queue holds: no request may
fail. Then more clients than the queue holds, and requests at fixed times, more per second than the server can answer:
it may refuse with 503, and nothing else; what it accepts is answered in bounded time, its memory stays bounded, and
afterwards it answers as before. The exit status is 0 if all of that is so, and 1 if not. Client and server share this
machine, so the server alone would be a little faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from hf_poolformer.commands import CommandParser, command, complain
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.strict_json import to_json


try:
    import aiohttp
except ModuleNotFoundError as error:
    sys.exit(complain(f"{error.name} is not installed: pip install 'hf-poolformer[serve]'"))

SERVER = Path(__file__).with_name("serve.py")
IMAGES = 16
MAX_OPEN = 2000  # requests of ours on their way; when the server is that late, the next ones wait
MAX_SECONDS = 60  # of one load, where filling the queue takes longer than --seconds
GOODPUT = 1 / 3  # of its capacity must be left to a server that refuses, and shares the machine with who asks
PAUSE = 0.1  # seconds before a client that was refused asks again
SAMPLING = 0.5  # seconds between two looks at the server's memory
# Memory that a server may gain past saturation: buffers of the queue, and the pages that the allocator keeps.
MEMORY_GROWTH = 200e6


@dataclass
class Step:
    """One load, and what came of it.

    Attributes:
        offered: requests sent per second, None where clients wait for their answers.
        requests: how many were answered, or failed, in `seconds`.
        statuses: how often which HTTP status, or which error of the connection, came back.
        throughput: of answers with status 200, per second.
        p50, p95, p99: milliseconds from request to answer, of those with status 200.
        memory: the most bytes that the server had meanwhile, resident; None where it cannot tell.
    """

    load: str
    below_saturation: bool
    clients: int | None = None
    offered: float | None = None
    seconds: float = 0.0
    requests: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    throughput: float = 0.0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    memory: float | None = None


class Client:
    """Sends photographs to a server, each of a set in turn, and notes what comes back."""

    def __init__(self, session: aiohttp.ClientSession, images: Sequence[bytes], max_requests: int):
        self.session, self.images = session, images
        self.left = max_requests
        self.answers: list[tuple[str, float]] = []  # status, seconds

    async def send(self) -> str:
        image = self.images[len(self.answers) % len(self.images)]
        started = time.perf_counter()
        try:
            async with self.session.post("/predict", data=image, headers={"Content-Type": "image/jpeg"}) as response:
                await response.read()
                status = str(response.status)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            status = type(error).__name__
        self.answers.append((status, time.perf_counter() - started))
        return status

    def take(self) -> bool:
        """Whether one more request may be sent."""
        self.left -= 1
        return self.left >= 0

    async def closed_loop(self, clients: int, seconds: float) -> None:
        end = time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end and self.take():
                if await self.send() == "503":
                    await asyncio.sleep(PAUSE)

        await asyncio.gather(*(one() for _ in range(clients)))

    async def open_loop(self, rate: float, seconds: float) -> None:
        started = time.perf_counter()
        on_their_way: set[asyncio.Task] = set()
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, started + index / rate - time.perf_counter()))
            if not self.take():
                break
            if len(on_their_way) >= MAX_OPEN:
                await asyncio.wait(on_their_way, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self.send())
            on_their_way.add(task)
            task.add_done_callback(on_their_way.discard)
        await asyncio.gather(*on_their_way)


async def measure(client: Client, step: Step, seconds: float) -> Step:
    """Fills in what came of a load."""
    seen: list[float] = []
    watcher = asyncio.create_task(watch_memory(client.session, seen))
    started = time.perf_counter()
    if step.offered is None:
        await client.closed_loop(step.clients, seconds)
    else:
        await client.open_loop(step.offered, seconds)
    step.seconds = time.perf_counter() - started
    watcher.cancel()
    step.memory = max(seen, default=None)
    step.requests = len(client.answers)
    step.statuses = dict(sorted(Counter(status for status, _ in client.answers).items()))
    right = [elapsed for status, elapsed in client.answers if status == "200"]
    step.throughput = len(right) / step.seconds
    if right:
        step.p50, step.p95, step.p99 = (1000 * float(np.percentile(right, part)) for part in (50, 95, 99))
    return step


async def watch_memory(session: aiohttp.ClientSession, seen: list[float]) -> None:
    """Adds the server's resident memory to `seen`, until it is cancelled."""
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            memory = (await read_metrics(session)).get("process_resident_memory_bytes")
            seen += [] if memory is None else [memory]
        await asyncio.sleep(SAMPLING)


async def read_metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """What /metrics says, without the labelled ones."""
    async with session.get("/metrics") as response:
        text = await response.text()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


async def run(
    url: str, levels: Sequence[int], overloads: Sequence[float], seconds: float, max_requests: int
) -> tuple[list[Step], list[str]]:
    """All steps, and the promises that were not kept."""
    images = photographs(IMAGES)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        steps: list[Step] = []

        async def put(step: Step, seconds: float = seconds) -> None:
            steps.append(await measure(Client(session, images, max_requests), step, seconds))
            show(step)

        before = await predictions(session, images)
        limit = int((await read_metrics(session)).get("poolformer_queue_limit", max(levels)))
        for clients in sorted({level for level in levels if level < limit} | {limit}):
            await put(Step(f"{clients} clients", True, clients))
        capacity = max(step.throughput for step in steps)
        if not capacity:
            return steps, [f"not a single request was answered with 200: {steps[0].statuses}"]
        await put(Step(f"{2 * limit} clients", False, 2 * limit))
        for factor in overloads:
            # Long enough to fill the queue several times.
            filling = 3 * limit / ((factor - 1) * capacity)
            step = Step(f"{factor:g}x capacity", False, offered=factor * capacity)
            await put(step, max(seconds, min(MAX_SECONDS, filling)))
        after = await predictions(session, images)
    return steps, broken_promises(steps, limit, capacity, before, after)


def broken_promises(steps: Sequence[Step], limit: int, capacity: float, before: list, after: list) -> list[str]:
    broken = []
    for step in steps:
        allowed = {"200"} if step.below_saturation else {"200", "503"}
        if not step.requests or set(step.statuses) - allowed:
            broken.append(f"{step.load}: answers other than {' and '.join(sorted(allowed))}: {step.statuses}")
    below = [step for step in steps if step.below_saturation]
    for step in steps[len(below) :]:
        if step.throughput < GOODPUT * capacity:
            broken.append(f"{step.load}: {step.throughput:.1f} answers/s, of {capacity:.1f} before")
            continue
        # The last one accepted waits for a full queue; three times that, since the pace is never even.
        bound = 3 * 1000 * limit / step.throughput
        if step.p99 > bound:
            broken.append(f"{step.load}: p99 is {step.p99:.0f} ms, more than {bound:.0f} ms for a queue of {limit}")
    growth = max(step.memory or 0 for step in steps) - (below[-1].memory or 0)
    if growth > MEMORY_GROWTH:
        broken.append(f"the server grew by {growth / 1e6:.0f} MB past saturation")
    same = all(
        [best["label"] for best in one] == [best["label"] for best in other]
        and np.allclose([best["score"] for best in one], [best["score"] for best in other], rtol=1e-3, atol=1e-5)
        for one, other in zip(before, after, strict=True)
    )
    if not same:
        broken.append("afterwards the server answers differently")
    return broken


async def predictions(session: aiohttp.ClientSession, images: Sequence[bytes]) -> list[list[dict]]:
    """The server's answers, one image after another.

    Raises:
        UserError: it does not answer.
    """
    answers = []
    for image in images:
        async with session.post("/predict", data=image, headers={"Content-Type": "image/jpeg"}) as response:
            if response.status != 200:
                raise UserError(f"the server answers a photograph with {response.status}: {await response.text()}")
            answers.append((await response.json())["predictions"])
    return answers


def photographs(number: int) -> list[bytes]:
    """JPEGs of 500 x 375 pixels and 30 to 60 kB, as ImageNet's are: coloured blobs with some noise."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(number):
        blobs = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.BICUBIC
        )
        pixels = np.asarray(blobs) + generator.normal(0, 8, (375, 500, 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        images.append(buffer.getvalue())
    return images


HEADER = f"{'load':>14}  {'answers/s':>9}  {'p50 ms':>7}  {'p95 ms':>7}  {'p99 ms':>7}  {'memory MB':>9}  statuses"


def show(step: Step) -> None:
    parts = ("-" if value is None else f"{value:.1f}" for value in (step.p50, step.p95, step.p99))
    times = "  ".join(f"{part:>7}" for part in parts)
    memory = "-" if step.memory is None else f"{step.memory / 1e6:.0f}"
    statuses = ", ".join(f"{status}: {count}" for status, count in step.statuses.items())
    print(f"{step.load:>14}  {step.throughput:9.1f}  {times}  {memory:>9}  {statuses}", flush=True)


@contextlib.contextmanager
def server(model: str, settings: Sequence[str]) -> Iterator[str]:
    """A server of its own on a free port, as its URL; ended afterwards.

    Raises:
        UserError: it does not start; it has said why.
    """
    program = [sys.executable, str(SERVER), model, "--port", "0", *settings]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if not found:
                raise UserError(f"the server did not start: {line or 'see above'}")
            yield found[0]
            if process.poll() is not None:
                raise UserError(f"the server ended by itself, with status {process.returncode}")
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def small_model() -> Iterator[str]:
    """A folder with a PoolFormer of random weights, 64 pixels."""
    from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        config = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(16, 32, 64, 128), num_labels=10)
        PoolFormerForImageClassification(config).save_pretrained(folder)
        size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
        PoolFormerImageProcessor(**size).save_pretrained(folder)
        yield folder


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("target", metavar="MODEL|URL", nargs="?", help="what to serve, or the server (default: a small model)")
    add("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="at once (default: 1 2 4 8 16 32)")
    add("--overload", type=float, nargs="+", default=[2, 3], help="times its capacity (default: 2 3)")
    add("--seconds", type=float, default=8, help="for each load (default: %(default)s)")
    add("--max_requests", type=int, default=20_000, help="for each load (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the figures into a file")
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status 1 if the server did not keep a promise."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    arguments, settings = parser(prog).parse_args(given[:cut]), given[cut + 1 :]
    if min(*arguments.clients, arguments.seconds, arguments.max_requests) <= 0 or min(arguments.overload) <= 1:
        raise UserError("--clients, --seconds and --max_requests must be above 0, --overload above 1")
    with contextlib.ExitStack() as stack:
        target = arguments.target or stack.enter_context(small_model())
        running = re.match(r"https?://", target)
        if running and settings:
            raise UserError(f"the server at {target} runs already, so it takes no settings: {' '.join(settings)}")
        url = target if running else stack.enter_context(server(target, settings))
        print(HEADER)
        work = run(url, arguments.clients, arguments.overload, arguments.seconds, arguments.max_requests)
        try:
            steps, broken = asyncio.run(work)
        except aiohttp.ClientConnectionError as error:
            raise UserError(f"nobody answers at {url}: {error}") from error
    if arguments.json:
        content = {"steps": [asdict(step) for step in steps], "broken_promises": broken}
        arguments.json.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
        print(f"figures: {arguments.json}")
    for promise in broken:
        print(f"not kept: {promise}")
    if not broken:
        print("kept: no failed request up to a full queue; past it 200 and 503 only, bounded time and memory")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
