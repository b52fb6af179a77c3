"""Serves an image classifier over HTTP, in batches.

    pip install 'hf-poolformer[serve]'
    python examples/serve.py outputs/pets --port 8000
    curl -F file=@cat.jpg 'http://127.0.0.1:8000/predict?top_k=3'
    curl -H 'Content-Type: image/jpeg' --data-binary @cat.jpg http://127.0.0.1:8000/predict

POST /predict takes an image and answers with labels and scores, or of a regression with its numbers: what
`hf-poolformer predict` writes. GET /health/live and /health/ready are for whoever watches over it, /metrics is for
Prometheus, /openapi.json describes it all.

Images that arrive together are computed together. What is sent is not trusted: bytes, pixels, formats and time are
limited, and a bad request gets a 4xx with a reason. When --max_queue requests are being worked on, the next one gets a
503 at once, which keeps memory and the time to an answer bounded. After Ctrl-C or SIGTERM, what was accepted is still
answered. There is neither encryption nor a password: for others than this machine, put a proxy in front.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hf_poolformer.commands import CommandParser, add_model_arguments, command, complain, quieten
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.origin import Origin


try:
    import prometheus_client as prometheus
    import python_multipart  # noqa: F401  starlette imports it when the first form arrives
    import uvicorn
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    sys.exit(complain(f"{error.name} is not installed: pip install 'hf-poolformer[serve]'"))

if TYPE_CHECKING:
    import torch

    from hf_poolformer.prediction.inference import Predictor


logger = logging.getLogger("serve")

# What browsers and cameras produce. Pillow reads dozens more, some by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BUSY = {"Retry-After": "1"}  # seconds
# Of a body that is refused, this many times the limit is read and thrown away, so that the client hears why.
DISCARDED = 10
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}},
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    },
}


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        max_batch: images computed at once.
        max_wait: seconds that a decoded image waits for others to join it.
        max_queue: requests accepted and not answered yet.
        max_bytes: of a request's body.
        max_pixels: of an image, width times height.
        timeout: seconds for the upload, and again for the answer.
    """

    max_batch: int = 16
    max_wait: float = 0.005
    max_queue: int = 64
    max_bytes: int = 10_000_000
    max_pixels: int = 40_000_000
    timeout: float = 30.0


class Metrics:
    """What /metrics shows, beside the memory and the processor time of this process."""

    def __init__(self, service: Service, limits: Limits):
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        times = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        sizes = {limits.max_batch, *(2**power for power in range(limits.max_batch.bit_length()))}
        self.requests = prometheus.Counter("poolformer_requests", "Answers of /predict", ["status"], registry=registry)
        self.seconds = prometheus.Histogram(
            "poolformer_request_seconds", "From request to answer", ["status"], buckets=times, registry=registry
        )
        self.batch_sizes = prometheus.Histogram(
            "poolformer_batch_size", "Images computed at once", buckets=sorted(sizes), registry=registry
        )
        self.batch_seconds = prometheus.Histogram(
            "poolformer_batch_seconds", "Of the model, for one batch", buckets=times, registry=registry
        )
        queue = prometheus.Gauge("poolformer_queue_length", "Requests accepted, not answered yet", registry=registry)
        queue.set_function(lambda: service.accepted)
        limit = prometheus.Gauge("poolformer_queue_limit", "Requests accepted at most", registry=registry)
        limit.set(limits.max_queue)


@dataclass
class Job:
    """A decoded image, (channels, height, width), that waits for its answer."""

    pixels: torch.Tensor
    choice: tuple[int | None, float | None]  # top_k and threshold
    answer: asyncio.Future
    arrived: float


class Service:
    """The model behind the server: decoding in a few threads, the model in one, and the queue between them.

    Everything but `decode` and `compute` runs in the event loop, which never waits for either.
    """

    def __init__(self, predictor: Predictor, name: str, limits: Limits):
        self.predictor, self.name, self.limits = predictor, name, limits
        self.accepted = 0
        self.metrics = Metrics(self, limits)
        self.batch_started: float | None = None
        self.jobs: asyncio.Queue[Job] = asyncio.Queue()  # as long as `accepted` at most
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        self.model = ThreadPoolExecutor(1, "model")

    def warm_up(self) -> None:
        """Computes batches of the sizes to come, so that no visitor waits for a compilation."""
        from hf_poolformer.data.transforms import blank_image

        pixels = self.preprocess(blank_image(self.predictor.processor, 256))
        for size in (1, 2, 3, *range(4, self.limits.max_batch + 1, 2)):
            if size <= self.limits.max_batch:
                self.compute([Job(pixels, (None, None), None, 0.0)] * size)

    def preprocess(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        from hf_poolformer.data.transforms import prepare

        return prepare(self.predictor.processor, image)

    def decode(self, data: bytes) -> torch.Tensor:
        """Encoded bytes to what the model takes, as `hf-poolformer predict` does it.

        Raises:
            HTTPException: not an image, a broken one, or one of too many pixels; told by its header.
        """
        from hf_poolformer.data.decoding import BrokenImage, decode_image
        from hf_poolformer.data.transforms import channels_of
        from hf_poolformer.foundation.errors import one_line
        from hf_poolformer.image_pixels import open_encoded

        try:
            image = open_encoded(io.BytesIO(data), formats=FORMATS)  # reads the header only
            if math.prod(image.size) > self.limits.max_pixels:
                raise Image.DecompressionBombError
        except Image.UnidentifiedImageError:
            raise HTTPException(415, f"this is not an image in one of the formats {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:
            raise HTTPException(413, f"the image has more than {self.limits.max_pixels} pixels") from None
        except Exception as error:  # parsers of foreign bytes raise anything at all
            raise HTTPException(400, f"the image cannot be read: {one_line(error)}") from None
        try:
            with image:
                return self.preprocess(decode_image(image, num_channels=channels_of(self.predictor.processor)))
        except (BrokenImage, ValueError) as error:
            raise HTTPException(400, f"the image cannot be used: {one_line(error)}") from None

    async def predict(self, data: bytes, top_k: int | None, threshold: float | None) -> list[dict[str, Any]]:
        """Encoded bytes to classes and scores, in the form of transformers' pipeline, or to names and values.

        Raises:
            HTTPException: the model gives no such choice; or of the image, see `decode`.
            UserError: the model gives no finite answer.
        """
        from hf_poolformer.foundation.scores import check_choice

        try:
            check_choice(self.predictor.model.config, top_k, threshold)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self.decoders, self.decode, data)
        answer = loop.create_future()
        self.jobs.put_nowait(Job(pixels, (top_k, threshold), answer, loop.time()))
        row = await answer
        if row["error"] is not None:
            raise UserError(row["error"])
        if "labels" not in row:
            return [{"label": name, "value": row[name]} for name in self.predictor.columns]
        return [{"label": label, "score": score} for label, score in zip(row["labels"], row["scores"], strict=True)]

    async def run(self) -> None:
        """Computes batch after batch until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [job for job in await self.next_batch() if not job.answer.done()]  # done: given up
            if not batch:
                continue
            self.batch_started = loop.time()
            try:
                rows = await loop.run_in_executor(self.model, self.compute, batch)
            except UserError as error:
                logger.error("%s", error)
                rows = [error] * len(batch)
            except Exception as error:
                logger.exception("a batch of %d images failed", len(batch))
                rows = [error] * len(batch)
            self.metrics.batch_sizes.observe(len(batch))
            self.metrics.batch_seconds.observe(loop.time() - self.batch_started)
            self.batch_started = None
            for job, row in zip(batch, rows, strict=True):
                if not job.answer.done():
                    job.answer.set_exception(row) if isinstance(row, Exception) else job.answer.set_result(row)

    async def next_batch(self) -> list[Job]:
        """Waits for company only if there is some: requests accepted already that are not decoded yet."""
        batch = [await self.jobs.get()]
        deadline = batch[0].arrived + self.limits.max_wait
        while len(batch) < min(self.limits.max_batch, self.accepted):
            left = deadline - asyncio.get_running_loop().time()
            try:
                batch.append(
                    await asyncio.wait_for(self.jobs.get(), left) if left > 0 else self.jobs.get_nowait(),
                )
            except (asyncio.TimeoutError, asyncio.QueueEmpty):
                break
        return batch

    def compute(self, batch: list[Job]) -> list[dict[str, Any]]:
        """One row per image. Images of different sizes, which some processors leave, are computed size by size."""
        import torch

        groups: dict[tuple[int, ...], list[int]] = {}
        for index, job in enumerate(batch):
            groups.setdefault(tuple(job.pixels.shape), []).append(index)
        stacked = [(indices, torch.stack([batch[i].pixels for i in indices])) for indices in groups.values()]
        nameless = [None] * len(batch)
        choices = [job.choice for job in batch]
        return self.predictor.rows({"names": nameless, "errors": nameless, "groups": stacked}, choices)

    def stuck(self) -> bool:
        """Whether the model has been at one batch for longer than anybody waits for it."""
        started = self.batch_started
        return started is not None and asyncio.get_running_loop().time() - started > self.limits.timeout


class Drained:
    """ASGI middleware: reads on, up to a limit, before it refuses a request whose body is still on its way.

    A client that is cut off while it sends sees a broken connection, and not the reason.
    """

    def __init__(self, app: Any, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received, ended = 0, False
        # Who asks before sending has sent nothing yet, and hears the answer first.
        asks = any(name == b"expect" for name, _ in scope["headers"])

        async def counted() -> dict:
            nonlocal received, ended
            message = await receive()
            received += len(message.get("body", b""))
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def rest() -> None:
            while not ended and received < self.limits.max_bytes * DISCARDED:
                await counted()

        async def answer(message: dict) -> None:
            refused = message["type"] == "http.response.start" and message["status"] >= 400
            if refused and message["status"] != 408 and not ended and not (asks and not received):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(rest(), self.limits.timeout)
            await send(message)

        await self.app(scope, counted, answer)


class Measured:
    """ASGI middleware: counts and times the answers of /predict, whoever gives them."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self.app(scope, receive, send)
        started = time.perf_counter()

        async def watch(message: dict) -> None:
            if message["type"] == "http.response.start":
                status = str(message["status"])
                self.metrics.requests.labels(status).inc()
                self.metrics.seconds.labels(status).observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, watch)


def create_app(service: Service) -> FastAPI:
    limits = service.limits

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batches = asyncio.create_task(service.run())
        yield
        batches.cancel()
        # Threads cannot be interrupted, but nobody waits for what they do any more.
        service.decoders.shutdown(wait=False, cancel_futures=True)
        service.model.shutdown(wait=False, cancel_futures=True)

    # FastAPI's pages of documentation load scripts from elsewhere; /openapi.json does not.
    app = FastAPI(title="hf-poolformer", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Drained, limits=limits)
    app.add_middleware(Measured, metrics=service.metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        reasons = [f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors()]
        return JSONResponse({"detail": "; ".join(reasons)}, 422)

    @app.post("/predict", openapi_extra={"requestBody": BODY})
    async def predict(
        request: Request,
        top_k: int | None = Query(None, ge=1, description="the best so many classes"),
        threshold: float | None = Query(None, ge=0, le=1, description="probability from which an image has a label"),
    ) -> Response:
        if service.accepted >= limits.max_queue or service.stuck():
            raise HTTPException(503, f"{service.accepted} requests are waiting already; try again later", BUSY)
        service.accepted += 1
        try:
            late = HTTPException(408, f"the upload took longer than {limits.timeout:g} s")
            data = await within(limits.timeout, read_upload(request, limits.max_bytes), late)
            late = HTTPException(503, f"there was no answer within {limits.timeout:g} s; try again later", BUSY)
            predictions = await within(limits.timeout, service.predict(data, top_k, threshold), late)
        except (HTTPException, ClientDisconnect):
            raise
        except UserError as error:
            raise HTTPException(500, str(error)) from None
        except Exception as error:
            logger.error("%s: %s", type(error).__name__, error)
            raise HTTPException(500, "the server failed at this image, and says more about it in its log") from error
        finally:
            service.accepted -= 1
        return JSONResponse({"predictions": predictions})

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the metrics; nobody reads it

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        if service.stuck():
            raise HTTPException(503, f"the model has been at one batch for more than {limits.timeout:g} s")
        return {"status": "ready", "model": service.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus.generate_latest(service.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


async def within(seconds: float, work: Awaitable, late: HTTPException) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise late from None


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """The image of a request: its body, or the file in the field `file` of a form.

    Raises:
        HTTPException: there is none, or the body is too large; of more than `max_bytes`, nothing is kept.
    """
    too_large = HTTPException(413, f"the request has more than {max_bytes} bytes")
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise too_large
    received = 0

    async def receive() -> dict:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise too_large
        return dict(message)

    counted = Request(request.scope, receive)
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with counted.form(max_files=1, max_fields=10) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise HTTPException(400, "the form has no file in its field `file`")
            data = await upload.read()
    elif kind.startswith("image/") or kind == "application/octet-stream":
        data = await counted.body()
    else:
        raise HTTPException(
            415, f"send the image as a form's field `file` or as a body with Content-Type: image/jpeg, not {kind}"
        )
    if not data:
        raise HTTPException(400, "the image is empty (0 bytes)")
    return data


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of an image classifier, or a folder that export wrote")
    add("--host", default="127.0.0.1", help="address; 0.0.0.0 for the whole network (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one, and says which (default: %(default)s)")
    add("--max_batch", metavar="N", type=int, default=16, help="images computed at once (default: %(default)s)")
    add(
        "--max_wait",
        metavar="MS",
        type=float,
        default=5,
        help="milliseconds an image waits for others (default: %(default)s)",
    )
    add(
        "--max_queue",
        metavar="N",
        type=int,
        default=64,
        help="requests being worked on; more get a 503 (default: %(default)s)",
    )
    add("--max_megabytes", metavar="MB", type=float, default=10, help="of a request (default: %(default)s)")
    add("--max_megapixels", metavar="MP", type=float, default=40, help="of an image (default: %(default)s)")
    add(
        "--timeout",
        metavar="S",
        type=float,
        default=30,
        help="seconds for an upload, and for an answer (default: %(default)s)",
    )
    add_model_arguments(parser)
    return parser


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound, and not listening yet: whoever connects before the model is loaded is refused.

    Raises:
        UserError: no such address, or somebody else listens there.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; --host and --port choose another"
        ) from None
    return listener


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is interrupted."""
    options = vars(parser(prog).parse_args(argv))
    name, host, port = options.pop("model"), options.pop("host"), options.pop("port")
    if not 0 <= port < 65536:
        raise UserError(f"--port {port} is no port: 0 to 65535")
    flags = ("max_batch", "max_wait", "max_queue", "max_megabytes", "max_megapixels", "timeout")
    given = {flag: options.pop(flag) for flag in flags}
    for flag, value in given.items():
        if not (0 < value < math.inf or (flag == "max_wait" and value == 0)):
            raise UserError(f"--{flag} must be above 0, not {value}")
    limits = Limits(
        max_batch=given["max_batch"],
        max_wait=given["max_wait"] / 1000,
        max_queue=given["max_queue"],
        max_bytes=int(given["max_megabytes"] * 1e6),
        max_pixels=int(given["max_megapixels"] * 1e6),
        timeout=given["timeout"],
    )
    warnings.filterwarnings("ignore", module="PIL")  # says to the log what the sender is told
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a bad form is the sender's affair
    prometheus.disable_created_metrics()
    with listening_socket(host, port) as listener:
        from hf_poolformer.prediction.inference import Predictor

        quieten()
        shown = Path(name).resolve().name if Path(name).is_dir() else name
        origin = Origin(*(options.pop(part) for part in ("revision", "token", "cache_dir", "trust_remote_code")))
        service = Service(Predictor(name, origin=origin, **options), shown, limits)
        service.warm_up()
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            # Longer than clients keep an idle connection: who closes first must not be the server.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=math.ceil(2 * limits.timeout),
        )
        listener.listen(config.backlog)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"{shown}: http://{address} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
