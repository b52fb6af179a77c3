"""The server: right answers, shared batches, and what it says to requests that are wrong, late or too many."""

import http.client
import importlib.util
import io
import json
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from warm import warm_python

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.export import export_model
from hf_poolformer.prediction.inference import Predictor


EXAMPLES = Path(__file__).parents[2] / "examples"
JPEG = {"Content-Type": "image/jpeg"}
QUEUE = 6
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def serve():
    for library in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        pytest.importorskip(library)
    specification = importlib.util.spec_from_file_location("serve_example", EXAMPLES / "serve.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["serve_example"] = module  # where dataclasses look up their annotations
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), num_labels=7)
    classifier = PoolFormerForImageClassification(config)
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=0.5)
    classifier.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    PoolFormerImageProcessor(**size).save_pretrained(folder)
    return folder


class Gate:
    """A predictor that waits at a gate, and fails if told to."""

    def __init__(self, predictor):
        self.predictor, self.processor = predictor, predictor.processor
        self.model, self.columns = predictor.model, predictor.columns
        self.open, self.entered = threading.Event(), threading.Event()
        self.error = None
        self.sizes = []
        self.open.set()

    def rows(self, batch, choices):
        self.entered.set()
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        self.sizes.append(len(batch["names"]))
        return self.predictor.rows(batch, choices)


@pytest.fixture
def start(serve, model):
    """Runs a server in a thread of this process; returns its service, gate and port."""
    import uvicorn

    running = []

    def run(folder=model, **limits):
        gate = Gate(Predictor(str(folder), device="cpu"))
        defaults = {"max_batch": 4, "max_queue": QUEUE, "max_bytes": MEGABYTE, "max_pixels": MEGABYTE, "timeout": 60.0}
        service = serve.Service(gate, "tiny", serve.Limits(**{**defaults, **limits}))
        listener = serve.listening_socket("127.0.0.1", 0)
        listener.listen()
        config = uvicorn.Config(serve.create_app(service), log_level="critical", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, gate, thread))
        return SimpleNamespace(service=service, gate=gate, port=listener.getsockname()[1])

    yield run
    for server, gate, thread in running:
        gate.open.set()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def ask(port, method="POST", path="/predict", body=None, headers=None):
    """Status, headers and text of one answer, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def predict(port, image, path="/predict"):
    status, _, text = ask(port, path=path, body=image, headers=JPEG)
    return status, json.loads(text)


def form(content, field="file", filename="cat.jpg"):
    """Body and headers of a form with one file."""
    name = f'; filename="{filename}"' if filename else ""
    head = f'--frontier\r\nContent-Disposition: form-data; name="{field}"{name}\r\n\r\n'.encode()
    return head + content + b"\r\n--frontier--\r\n", {"Content-Type": "multipart/form-data; boundary=frontier"}


def metric(port, name):
    _, _, text = ask(port, "GET", "/metrics")
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def photograph(seed=0, size=(60, 48), format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG that says it is this large, and has next to nothing in it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def slow_upload(port, image):
    """A connection whose request lacks its last bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/jpeg")
    connection.putheader("Content-Length", str(len(image)))
    connection.endheaders(image[:-10])
    return connection


def assert_same(predictions, expected):
    assert [best["label"] for best in predictions] == [best["label"] for best in expected]
    # Other batches, hence other last digits.
    scores = [best["score"] for best in expected]
    assert [best["score"] for best in predictions] == pytest.approx(scores, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error_of_that_image(start, value, caplog):
    server = start(max_queue=64)

    def spoil(module, arguments, keywords, outputs):
        outputs.logits[keywords["pixel_values"].mean((1, 2, 3)) > 1.5] = value
        return outputs

    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(buffer, "JPEG")
    server.gate.predictor.model.register_forward_hook(spoil, with_kwargs=True)
    good = predict(server.port, photograph())
    server.gate.open.clear()
    with ThreadPoolExecutor(3) as pool:
        images = (photograph(), buffer.getvalue(), photograph())
        answers = [pool.submit(predict, server.port, image) for image in images]
        wait_until(lambda: server.service.accepted == 3)
        server.gate.open.set()
        (first, bad, last) = (answer.result() for answer in answers)
    assert good[0] == first[0] == last[0] == 200
    assert_same(first[1]["predictions"], good[1]["predictions"])
    assert bad[0] == 500 and "no finite scores" in bad[1]["detail"]
    assert "Traceback" not in caplog.text


def test_answers_are_those_of_the_pipeline(start, model):
    port = start().port
    classify = pipeline("image-classification", model=str(model), device="cpu")
    for seed, kind in enumerate(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]):
        image = photograph(seed, format=kind)
        expected = classify(Image.open(io.BytesIO(image)), top_k=7)
        status, answer = predict(port, image)
        assert status == 200
        assert_same(answer["predictions"], expected[:5])
        body, headers = form(image)
        status, _, text = ask(port, path="/predict?top_k=100", body=body, headers=headers)
        assert status == 200
        assert_same(json.loads(text)["predictions"], expected)
    assert len(predict(port, photograph(), "/predict?top_k=1")[1]["predictions"]) == 1


def variant(model, folder, problem_type, **more):
    """The same weights, said to have been trained for something else."""
    changed = PoolFormerForImageClassification.from_pretrained(model)
    changed.config.problem_type = problem_type
    for name, value in more.items():
        setattr(changed.config, name, value)
    changed.save_pretrained(folder)
    PoolFormerImageProcessor.from_pretrained(model).save_pretrained(folder)
    return folder


def test_several_labels(start, model, tmp_path):
    """Those that reach their thresholds, or what the request asks for; also where requests share a batch."""
    images = [photograph(seed) for seed in range(6)]
    folder = variant(model, tmp_path / "plain", "multi_label_classification")
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    scores = [classify(Image.open(io.BytesIO(image)), top_k=7) for image in images]
    # Of each label the middle of its scores but one: half of the images have it; that one is never given.
    names = [entry["label"] for entry in sorted(scores[0], key=lambda entry: entry["label"])]
    columns = [[entry["score"] for found in scores for entry in found if entry["label"] == name] for name in names]
    thresholds = [float(np.mean(np.sort(column)[2:4])) for column in columns[:-1]] + [1.0]
    folder = variant(model, tmp_path / "model", "multi_label_classification", label_thresholds=thresholds)
    server = start(folder, max_wait=1.0)
    least = dict(zip(names, thresholds, strict=True))
    asked = {
        "": lambda found: [entry for entry in found if entry["score"] >= least[entry["label"]]],
        "?threshold=0.45": lambda found: [entry for entry in found if entry["score"] >= 0.45],
        "?threshold=0.45&top_k=1": lambda found: [entry for entry in found if entry["score"] >= 0.45][:1],
        "?top_k=3": lambda found: found[:3],
        "?threshold=1": lambda found: [],
    }
    with ThreadPoolExecutor(5) as pool:
        answers = [
            pool.submit(predict, server.port, image, f"/predict{query}")
            for image, query in zip(images, asked, strict=False)
        ]
    assert max(server.gate.sizes) > 1, "a batch of several wishes"
    for found, answer, pick in zip(scores, answers, asked.values(), strict=False):
        status, said = answer.result()
        assert status == 200
        assert_same(said["predictions"], pick(found))
    status, said = predict(server.port, images[0], "/predict?threshold=1.5")
    assert status == 422 and said["detail"].startswith("threshold: ")


def test_numbers(start, model, tmp_path):
    folder = variant(model, tmp_path / "model", "regression", id2label={i: f"length {i}, cm" for i in range(7)})
    port = start(folder).port
    measure = pipeline("image-classification", model=str(folder), device="cpu")
    status, answer = predict(port, photograph())
    assert status == 200
    expected = measure(Image.open(io.BytesIO(photograph())))
    assert [entry["label"] for entry in answer["predictions"]] == [f"length {i}, cm" for i in range(7)]
    values = [entry["value"] for entry in answer["predictions"]]
    assert values == pytest.approx([entry["score"] for entry in expected], rel=1e-4)
    assert min(values) < 0, "no probabilities"
    for query, message in (("top_k=1", "gives numbers"), ("threshold=0.5", "several labels")):
        status, answer = predict(port, photograph(), f"/predict?{query}")
        assert status == 422 and message in answer["detail"]


def test_requests_that_come_together_are_computed_together(start):
    server = start(max_queue=64)
    alone = [predict(server.port, photograph(seed))[1]["predictions"] for seed in range(13)]
    assert server.gate.sizes == [1] * 13, "nobody else is on the way, so nobody is waited for"
    server.gate.sizes.clear()
    server.gate.open.clear()
    with ThreadPoolExecutor(13) as pool:
        answers = [pool.submit(predict, server.port, photograph(seed)) for seed in range(13)]
        wait_until(lambda: server.service.accepted == 13 and server.service.jobs.qsize() >= 9)
        server.gate.open.set()
        together = [answer.result()[1]["predictions"] for answer in answers]
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)
    assert sum(server.gate.sizes) == 13 and max(server.gate.sizes) == 4 and len(server.gate.sizes) <= 5
    assert metric(server.port, "poolformer_batch_size_sum") == 26
    assert metric(server.port, 'poolformer_batch_size_bucket{le="2.0"}') < metric(
        server.port, "poolformer_batch_size_count"
    )


def test_a_batch_waits_for_those_on_their_way_but_not_for_long(start):
    server = start(max_wait=0.5)
    connection = slow_upload(server.port, photograph(1))
    wait_until(lambda: server.service.accepted == 1)
    started = time.monotonic()
    assert predict(server.port, photograph(0))[0] == 200, "the other one never arrives"
    assert time.monotonic() - started >= 0.5
    connection.send(photograph(1)[-10:])
    assert connection.getresponse().status == 200
    connection.close()


def test_images_of_several_sizes_share_a_batch(serve, model):
    predictor = Predictor(str(model), device="cpu")
    service = serve.Service(predictor, "tiny", serve.Limits())
    jobs = [serve.Job(torch.rand(3, 32 + 8 * (index % 2), 32), (index + 1, None), None, 0.0) for index in range(5)]
    rows = service.compute(jobs)
    for job, row in zip(jobs, rows, strict=True):
        (alone,) = service.compute([job])
        assert row["labels"] == alone["labels"] and len(row["labels"]) == job.choice[0]
        assert row["scores"] == pytest.approx(alone["scores"], rel=1e-4, abs=1e-6)


def test_bad_requests_get_a_reason_and_the_server_goes_on(start):
    server = start()
    good = photograph()
    noise = np.random.default_rng(0).integers(0, 256, 2 * MEGABYTE, dtype=np.uint8).tobytes()
    two_files = (form(good)[0].removesuffix(b"--frontier--\r\n") + form(good)[0], form(good)[1])
    bad = {
        "a text": (*form(b"hello"), 415, "not an image"),
        "a text as body": (b"hello", JPEG, 415, "not an image"),
        "PDF": (b"%PDF-1.7 ...", JPEG, 415, "not an image"),
        "PostScript, for which Pillow starts a program": (b"%!PS-Adobe-3.0 EPSF-3.0", JPEG, 415, "not an image"),
        "truncated": (good[: len(good) // 2], JPEG, 400, "truncated"),
        "only a beginning": (good[:4], JPEG, 415, "not an image"),
        "nothing": (b"", JPEG, 400, "empty"),
        "an empty file": (*form(b""), 400, "empty"),
        "too many bytes": (good + noise, JPEG, 413, "1000000 bytes"),
        "too many bytes in a form": (*form(good + noise), 413, "1000000 bytes"),
        "too many bytes, chunked": ((noise[:65536] for _ in range(30)), JPEG, 413, "1000000 bytes"),
        "a bomb": (png_of_size(50_000, 50_000), JPEG, 413, "1000000 pixels"),
        "more than allowed": (png_of_size(1001, 1000), JPEG, 413, "1000000 pixels"),
        "a line": (photograph(size=(2000, 2)), JPEG, 400, "aspect ratio"),
        "no pixels": (png_of_size(0, 5), JPEG, 415, "not an image"),
        "another field": (*form(good, field="picture"), 400, "`file`"),
        "a field without a file": (*form(good, filename=None), 400, ""),
        "two files": (*two_files, 400, "Too many files"),
        "no boundary": (good, {"Content-Type": "multipart/form-data"}, 400, "boundary"),
        "no form": (good, form(good)[1], 400, ""),
        "JSON": (b"{}", {"Content-Type": "application/json"}, 415, "image/jpeg"),
        "what curl sends by itself": (good, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "image/jpeg"),
    }
    for name, (body, headers, expected, reason) in bad.items():
        status, _, text = ask(server.port, body=body, headers=headers)
        assert status == expected, (name, text)
        detail = json.loads(text)["detail"]
        assert reason in detail and "\n" not in detail and "Traceback" not in detail, name
    for top_k in ("0", "-1", "x", "1.5", "", "9" * 5000):
        status, answer = predict(server.port, good, f"/predict?top_k={top_k}")
        assert status == 422 and answer["detail"].startswith("top_k: "), top_k
    assert ask(server.port, "GET")[0] == 405 and ask(server.port, "DELETE")[0] == 405
    assert ask(server.port, "POST", "/nowhere")[0] == 404
    status, answer = predict(server.port, good)
    assert status == 200 and len(answer["predictions"]) == 5
    assert ask(server.port, "GET", "/health/ready")[0] == 200
    assert metric(server.port, "poolformer_queue_length") == 0
    assert 'status="5' not in ask(server.port, "GET", "/metrics")[2]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_are_refused_whatever_is_wrong_with_them(serve, model):
    service = serve.Service(Predictor(str(model), device="cpu"), "tiny", serve.Limits(max_pixels=MEGABYTE))
    generator = np.random.default_rng(0)
    refused = 0
    for kind in serve.FORMATS:
        image = np.frombuffer(photograph(format=kind), np.uint8)
        for _ in range(40):
            damaged = image.copy()
            damaged[generator.integers(0, len(image), 8)] = generator.integers(0, 256, 8)
            try:
                assert service.decode(damaged.tobytes()).shape == (3, 32, 32)
            except serve.HTTPException as error:
                assert error.status_code in (400, 413, 415) and error.detail
                refused += 1
    assert refused > 40


def test_past_a_full_queue_requests_are_refused_at_once(start):
    server = start()
    uploads = [slow_upload(server.port, photograph(seed)) for seed in range(QUEUE)]
    wait_until(lambda: metric(server.port, "poolformer_queue_length") == QUEUE)
    for _ in range(3):
        status, headers, text = ask(server.port, body=photograph(), headers=JPEG)
        assert status == 503 and int(headers["Retry-After"]) > 0
        assert "try again" in json.loads(text)["detail"]
    assert ask(server.port, "GET", "/health/ready")[0] == 200
    for seed, upload in enumerate(uploads):
        upload.send(photograph(seed)[-10:])
        assert upload.getresponse().status == 200
        upload.close()
    assert predict(server.port, photograph())[0] == 200
    assert metric(server.port, 'poolformer_requests_total{status="503"}') == 3


def test_nobody_waits_longer_than_the_timeout(start):
    server = start(timeout=0.5)
    upload = slow_upload(server.port, photograph())
    response = upload.getresponse()
    assert response.status == 408 and "upload" in json.loads(response.read())["detail"]
    upload.close()
    server.gate.entered.clear()
    server.gate.open.clear()
    status, answer = predict(server.port, photograph())
    assert status == 503 and "no answer within 0.5 s" in answer["detail"]
    assert ask(server.port, "GET", "/health/live")[0] == 200
    wait_until(lambda: ask(server.port, "GET", "/health/ready")[0] == 503)
    status, answer = predict(server.port, photograph())
    assert status == 503 and "waiting already" in answer["detail"], "nobody is put behind a batch that does not end"
    server.gate.open.set()
    wait_until(lambda: ask(server.port, "GET", "/health")[0] == 200)
    assert predict(server.port, photograph())[0] == 200


def test_who_goes_away_leaves_nothing_behind(start):
    server = start()
    for _ in range(2 * QUEUE):
        slow_upload(server.port, photograph()).close()
    wait_until(lambda: metric(server.port, "poolformer_queue_length") == 0)
    assert predict(server.port, photograph())[0] == 200


def test_a_model_that_fails_is_told_of_and_the_next_request_is_answered(start, caplog):
    server = start()
    server.gate.error = RuntimeError("secret place /home/me")
    status, answer = predict(server.port, photograph())
    assert status == 500 and "secret" not in json.dumps(answer)
    assert "secret" in caplog.text
    server.gate.error = None
    assert predict(server.port, photograph())[0] == 200


def test_it_says_what_it_takes(start):
    description = json.loads(ask(start().port, "GET", "/openapi.json")[2])
    assert set(description["paths"]) == {"/predict", "/health", "/health/live", "/health/ready", "/metrics"}
    assert "multipart/form-data" in description["paths"]["/predict"]["post"]["requestBody"]["content"]


def test_mistakes_are_one_line(serve, model, tmp_path, capsys):
    with serve.listening_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, reason in (
            ([str(tmp_path), "--port", "0"], "config.json"),
            ([str(model), "--port", port], "cannot listen on 127.0.0.1"),
            ([str(model), "--port", "99999"], "--port 99999 is no port"),
            ([str(model), "--host", "999.1.1.1", "--port", "0"], "cannot listen on 999.1.1.1"),
            ([str(model), "--port", "0", "--max_batch", "0"], "--max_batch must be above 0"),
            ([str(model), "--port", "0", "--timeout", "nan"], "--timeout must be above 0"),
            ([str(model), "--max_bach", "2"], "--max_batch"),
        ):
            assert serve.main(arguments) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and reason in error


@pytest.mark.parametrize(("program", "library"), [("serve", "uvicorn"), ("load_test", "aiohttp")])
def test_a_missing_library_is_one_line(program, library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{program}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {library} is not installed: pip install 'hf-poolformer[serve]'\n"


@pytest.fixture
def process():
    """Starts the program; returns the process and its port."""
    started = []

    def run(*arguments):
        program = [warm_python(), str(EXAMPLES / "serve.py"), *map(str, arguments), "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found, process.communicate()
        return process, int(found[1])

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_what_was_accepted_is_answered_before_it_ends(process, model, number, status):
    pytest.importorskip("uvicorn")
    running, port = process(model)
    assert predict(port, photograph())[0] == 200
    upload = slow_upload(port, photograph())
    wait_until(lambda: metric(port, "poolformer_queue_length") == 1)
    running.send_signal(number)

    def refused():
        try:
            ask(port, "GET", "/health")
        except OSError:
            return True
        return False

    wait_until(refused)
    assert running.poll() is None
    upload.send(photograph()[-10:])
    response = upload.getresponse()
    assert response.status == 200 and len(json.loads(response.read())["predictions"]) == 5
    upload.close()
    _, complaints = running.communicate(timeout=60)
    assert running.returncode == status
    assert complaints == ""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_exported_model_is_served(process, model, tmp_path, format):
    pytest.importorskip("aiohttp")
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    export_model(model, tmp_path / "exported", format=format)
    _, port = process(tmp_path / "exported")
    classify = pipeline("image-classification", model=str(model), device="cpu")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: predict(port, photograph(seed)), range(64)))
    for seed, (status, answer) in enumerate(answers):
        assert status == 200
        assert_same(answer["predictions"], classify(Image.open(io.BytesIO(photograph(seed))), top_k=5))
    assert metric(port, "poolformer_batch_size_count") < 64


@pytest.mark.slow
def test_under_load_and_past_it(model, tmp_path):
    pytest.importorskip("aiohttp")
    figures = tmp_path / "figures.json"
    program = [warm_python(), str(EXAMPLES / "load_test.py"), str(model), "--seconds", "2", "--json", str(figures)]
    done = subprocess.run([*program, "--", "--max_queue", "16"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(figures.read_text())["steps"]
    assert [step["load"] for step in steps][-3:] == ["32 clients", "2x capacity", "3x capacity"]
    for step in steps:
        assert set(step["statuses"]) == ({"200"} if step["below_saturation"] else {"200", "503"})
        assert 0 < step["p50"] <= step["p95"] <= step["p99"]
