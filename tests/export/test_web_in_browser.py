"""The page of `export --format web` in Chromium, with the real onnxruntime-web, as people use it."""

import base64
import functools
import http.server
import io
import json
import re
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification
from hf_poolformer.data.photographs import photographs
from hf_poolformer.export import export_model, onnxruntime_web
from hf_poolformer.foundation.errors import UserError


pytestmark = pytest.mark.slow

# The first two would be an image that runs a script, and a script, if anything took them for HTML.
NAMES = [
    "<img src=x onerror='window.hacked=1'>",
    "<script>window.hacked=1</script>",
    "cat",
    "dog",
    "été",
    "🐟",
    "<b>g",
]
TURNED = (3, 6, 8)
# Of an image that the browser decodes and composites by itself, a level of 255 in alpha or colour, on small answers.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    try:
        return onnxruntime_web.fetch(tmp_path_factory.mktemp("npm"))
    except UserError as error:
        pytest.skip(f"no onnxruntime-web: {error}")


@pytest.fixture(scope="module")
def model_dir(save_model):
    torch.manual_seed(0)
    names = dict(enumerate(NAMES))
    config = PoolFormerConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 16, 32, 64),
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return save_model(PoolFormerForImageClassification(config))


@pytest.fixture(scope="module")
def folder(model_dir, package, tmp_path_factory):
    out = tmp_path_factory.mktemp("web") / "pets"
    export_model(model_dir, out, format="web", precision="float32", vendor=package)
    return out


@pytest.fixture
def serve():
    """Serves the parent of a folder, as a page's sub-path; gives the URL and a way to stop."""
    servers = []

    def start(folder):
        class Handler(http.server.SimpleHTTPRequestHandler):
            extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

            def log_message(self, *arguments):
                pass

        handler = functools.partial(Handler, directory=str(folder.parent))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/{folder.name}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def page(browser, serve, folder):
    with browser.new_context() as context:
        page = context.new_page()
        opened(page, serve(folder))
        yield page


def opened(page, url):
    page.goto(url)
    wait_for(page, "Ready")
    return page


def wait_for(page, text):
    page.locator("#status").filter(has_text=re.compile(text)).wait_for(timeout=120_000)


def answers(page):
    page.locator("#answers .score").first.wait_for(timeout=120_000)
    wait_for(page, "Ready|camera")
    found = page.locator("#answers li").evaluate_all(
        "rows => rows.map(row => [row.querySelector('.name').textContent, Number(row.dataset.score)])"
    )
    return dict(map(tuple, found))


def forget(page):
    page.locator("#answers").evaluate("list => list.replaceChildren()")


def transfer(page, content, kind):
    """Drops or pastes a file, as a browser tells a page of it."""
    page.evaluate(
        """([content, kind]) => {
            const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "photo.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            const event = kind === "drop"
                ? new DragEvent("drop", { ...options, dataTransfer: data })
                : new ClipboardEvent("paste", { ...options, clipboardData: data });
            document.querySelector("#drop").dispatchEvent(event);
        }""",
        [base64.b64encode(content).decode(), kind],
    )


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sixteen_bits(pixels):
    """PNG of uint16 (height, width, 3), which Pillow does not write."""
    height, width = pixels.shape[:2]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pictures():
    """Names and encoded images of many modes, formats and sizes."""
    photos = photographs()
    first = photos[0]
    found = {
        "photo.jpg": encoded(first, "JPEG", quality=92),
        "photo.webp": encoded(photos[1], "WEBP", quality=90),
        "photo.bmp": encoded(first.resize((333, 222)), "BMP"),
        "grey.jpg": encoded(first.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(first.convert("CMYK"), "JPEG"),
        "palette.png": encoded(first.convert("P", palette=Image.Palette.ADAPTIVE)),
        "photo.gif": encoded(first.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        "one bit.png": encoded(first.convert("1")),
        "grey 16.png": encoded(Image.fromarray(np.asarray(first.convert("L")).astype(np.uint16) * 257)),
        "rgb 16.png": sixteen_bits(np.asarray(first.resize((150, 100))).astype(np.uint16) * 257),
        "strip.png": encoded(first.resize((1, 500))),
        "line.png": encoded(first.resize((500, 1))),
        "dot.png": encoded(first.resize((1, 1))),
        "tiny.png": encoded(first.resize((7, 5))),
        "large.jpg": encoded(first.resize((4500, 3001)), "JPEG"),
    }
    for mode in ("RGBA", "LA"):
        faded = photos[-1].resize((355, 251)).convert(mode)
        faded.putalpha(Image.linear_gradient("L").resize(faded.size))
        found[f"{mode}.png"] = encoded(faded)
    for orientation in TURNED:
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"turned {orientation}.jpg"] = encoded(photos[-2].resize((411, 233)), "JPEG", exif=exif)
    return found


def test_pictures_have_the_models_answers(page, model_dir, tmp_path):
    model = PoolFormerForImageClassification.from_pretrained(model_dir).eval()
    processor = AutoImageProcessor.from_pretrained(model_dir)
    seen = []
    for name, content in pictures().items():
        (tmp_path / name).write_bytes(content)
        forget(page)
        page.set_input_files("#file", tmp_path / name)
        got = answers(page)
        with torch.inference_mode():
            right = model(**processor(str(tmp_path / name), return_tensors="pt")).logits.softmax(1)[0]
        best = right.argsort(descending=True)[:5]
        assert list(got.values()) == pytest.approx(right[best].tolist(), abs=CLOSE), name
        for index in best.tolist():
            assert got.get(NAMES[index], right[best[-1]].item()) == pytest.approx(right[index].item(), abs=CLOSE), name
        seen.append(right)
    assert torch.stack(seen).std(0).max() > 10 * CLOSE, "else every picture would do"


def test_dropped_pasted_and_in_a_page_of_ones_own(page):
    content = encoded(photographs()[0].resize((300, 200)))
    found = []
    for kind in ("drop", "paste"):
        forget(page)
        transfer(page, content, kind)
        found.append(answers(page))
    own = page.evaluate(
        """async (content) => {
            const { load } = await import("./classify.js");
            const classify = await load({ device: "wasm", threads: 1 });
            const image = new Image();
            image.src = `data:image/png;base64,${content}`;
            await image.decode();
            const [one, two] = await Promise.all([classify(image), classify(image)]);
            return [classify.where, one, two];
        }""",
        base64.b64encode(content).decode(),
    )
    assert own[0] == "WebAssembly, one thread"
    assert own[1] == own[2]
    for other in (found[1], {answer["label"]: answer["score"] for answer in own[1][:5]}):
        assert other == pytest.approx(found[0], abs=1e-6)
    forget(page)
    transfer(page, b"not an image", "drop")
    wait_for(page, "cannot read that as an image")


def test_the_webcam(page):
    page.click("#webcam")
    first = answers(page)
    assert len(first) == 5 and sum(first.values()) <= 1.001
    assert "ms for this image" in page.inner_text("#time")
    page.click("#webcam")
    wait_for(page, "Ready")
    assert page.locator("#live").is_hidden() and page.locator("#shown").is_visible(), "the last picture stays"


def test_names_are_text(page):
    transfer(page, encoded(photographs()[0]), "drop")
    names = answers(page).keys()
    assert names <= set(NAMES)
    assert any("<" in name for name in names)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#answers img, #answers script, #answers b").count() == 0


def test_isolated_with_one_reload_and_no_more(browser, serve, folder):
    with browser.new_context() as context:
        page = context.new_page()
        visits = []
        page.on("framenavigated", lambda frame: visits.append(frame.url))
        opened(page, serve(folder))
        assert len(visits) == 2
        assert page.evaluate("crossOriginIsolated")
        if page.evaluate("navigator.hardwareConcurrency") > 1:
            assert "threads" in page.inner_text("#about")
        page.reload()
        wait_for(page, "Ready")
        assert len(visits) == 3
    with browser.new_context(service_workers="block") as context:
        page = context.new_page()
        visits = []
        page.on("framenavigated", lambda frame: visits.append(frame.url))
        opened(page, serve(folder))
        assert len(visits) == 1
        assert "one thread" in page.inner_text("#about")


def test_without_a_network_once_loaded(browser, serve, folder):
    with browser.new_context() as context:
        page = opened(context.new_page(), serve(folder))
        page.locator("#offline").filter(has_text="works without a network").wait_for()
        context.set_offline(True)
        page.reload()
        wait_for(page, "Ready")
        transfer(page, encoded(photographs()[0]), "drop")
        assert len(answers(page)) == 5


def test_a_new_export_takes_the_old_ones_place(browser, serve, folder, tmp_path):
    place = tmp_path / "pets"
    shutil.copytree(folder, place)
    url = serve(place)
    with browser.new_context() as context:
        page = opened(context.new_page(), url)
        page.locator("#offline").filter(has_text="works without a network").wait_for()
        settings = json.loads((place / "web.json").read_text())
        settings["model"] = "another"
        (place / "web.json").write_text(json.dumps(settings))
        worker = (place / "sw.js").read_text()
        (place / "sw.js").write_text(re.sub('"version": "[^"]*"', '"version": "new"', worker, count=1))
        page.reload()
        for _ in range(3):  # now, or when the new worker has taken over
            wait_for(page, "Ready")
            if page.inner_text("#title") == "another":
                break
            page.wait_for_timeout(2000)
            page.reload()
        assert page.inner_text("#title") == "another"
        assert len(page.evaluate("caches.keys()")) == 1, "of the old one nothing is kept"


@pytest.mark.parametrize("name", ["model.onnx", "vendor/ort-wasm-simd-threaded.wasm"])
def test_what_is_missing_or_changed_is_said(name, browser, serve, folder, tmp_path):
    place = tmp_path / "pets"
    shutil.copytree(folder, place)
    url = serve(place)
    content = bytearray((place / name).read_bytes())
    content[len(content) // 2] ^= 1
    (place / name).write_bytes(content)
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{url}?device=wasm")
        wait_for(
            page, f"could not be fetched from {url}{name}: there is no network, or the file is missing or changed"
        )
    (place / name).unlink()
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{url}?device=wasm")
        wait_for(
            page, f"{url}{name}: there is no network, or the file is missing or changed. .*upload the whole folder"
        )
    (place / "web.json").unlink()
    with browser.new_context(service_workers="block") as context:
        page = context.new_page()
        page.goto(f"{url}?device=wasm")
        wait_for(page, "web.json gives 404. Upload the whole folder again")


def test_no_way_to_the_runtime_is_said(model_dir, browser, serve, tmp_path):
    export_model(model_dir, tmp_path / "page", format="web")
    url = serve(tmp_path / "page")
    with browser.new_context() as context:
        context.route("https://cdn.jsdelivr.net/**", lambda route: route.abort())
        page = context.new_page()
        page.goto(f"{url}?device=wasm")
        wait_for(page, "onnxruntime-web .* could not be fetched from https://cdn.jsdelivr.net/.*--vendor")
        assert page.locator("#file").is_disabled()


def test_the_runtime_from_elsewhere(model_dir, package, browser, serve, tmp_path):
    """Without --vendor, with a stand-in for the other host: it is used, checked, and kept for later."""
    export_model(model_dir, tmp_path / "page", format="web")
    url = serve(tmp_path / "page")
    files = onnxruntime_web.gather(package, ("wasm",))
    types = {"mjs": "text/javascript", "wasm": "application/wasm"}

    def answer(route):
        name = route.request.url.rpartition("/")[2]
        headers = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
        route.fulfill(body=files[name], content_type=types[name.rpartition(".")[2]], headers=headers)

    with browser.new_context() as context:
        context.route("https://cdn.jsdelivr.net/**", answer)
        page = opened(context.new_page(), f"{url}?device=wasm")
        transfer(page, encoded(photographs()[0]), "drop")
        assert len(answers(page)) == 5
        files["ort-wasm-simd-threaded.mjs"] += b"\n"
    with browser.new_context() as context:
        context.route("https://cdn.jsdelivr.net/**", answer)
        page = context.new_page()
        page.goto(f"{url}?device=wasm")
        wait_for(page, "ort-wasm-simd-threaded.mjs: there is no network, or the file is missing or changed")


def test_fits_a_phone_in_the_dark(browser, serve, folder):
    url = serve(folder)
    backgrounds = []
    for scheme in ("light", "dark"):
        with browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme) as context:
            page = opened(context.new_page(), url)
            transfer(page, encoded(photographs()[0]), "drop")
            answers(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing to scroll sideways"
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(18, 22, 28)"]
