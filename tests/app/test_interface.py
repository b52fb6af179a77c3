"""The page's endpoints over loopback HTTP, as `gradio_client` and as ruder clients use them."""

import json
import urllib.request

import pytest
from PIL import Image
from transformers import pipeline


pytest.importorskip("gradio", minversion="6.20", reason="needs gradio: pip install 'hf-poolformer[app]'")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError


@pytest.fixture(scope="module")
def client(serve, saved_models, pictures):
    models = [
        saved_models / name for name in ("classifier", "labels", "numbers", "segmenter", "detector", "instances")
    ]
    page = serve(*models, max_pixels=10**6)
    return Client(page.local_url, verbose=False, download_files=True)


def test_classes_a_picture_and_a_note(client, pictures, saved_models):
    scores, picture, _, _, note = client.predict(
        handle_file(pictures / "photo.png"), "classifier", api_name="/predict"
    )
    confidences = scores["confidences"] if "confidences" in scores else scores["value"]["confidences"]
    assert len(confidences) == 5
    best = confidences[0]["label"]
    assert best in json.loads((saved_models / "classifier" / "config.json").read_text())["id2label"].values()
    assert Image.open(picture).size == (600, 360)
    assert best in note
    explained, note = client.predict(
        handle_file(pictures / "photo.png"), "classifier", confidences[2]["label"], api_name="/explain"
    )
    assert Image.open(explained).tobytes() != Image.open(picture).tobytes()
    assert confidences[2]["label"] in note


def test_the_labels_that_apply(client, pictures):
    upload = handle_file(pictures / "photo.png")
    scores, picture, _, _, note = client.predict(upload, "labels", api_name="/predict")
    confidences = scores["confidences"] if "confidences" in scores else scores["value"]["confidences"]
    assert {entry["label"] for entry in confidences} == {"intact", "broken <b>"}
    explained, note = client.predict(upload, "labels", "wet", api_name="/explain")
    assert "wet" in note and Image.open(explained).tobytes() != Image.open(picture).tobytes()


def test_numbers_by_their_names(client, pictures, saved_models):
    upload = handle_file(pictures / "photo.png")
    _, picture, _, table, note = client.predict(upload, "numbers", api_name="/predict")
    table = table.get("value", table)
    assert table["headers"] == ["target", "value"]
    expected = pipeline("image-classification", str(saved_models / "numbers"))(str(pictures / "photo.png"))
    assert [name for name, _ in table["data"]] == [entry["label"] for entry in expected]
    assert [float(value) for _, value in table["data"]] == pytest.approx(
        [entry["score"] for entry in expected], rel=2e-3
    )
    assert "makes this number larger" in note and Image.open(picture).size == (600, 360)
    assert "cracked" in client.predict(upload, "numbers", "cracked", api_name="/explain")[1]


@pytest.mark.parametrize("model", ["segmenter", "detector", "instances"])
def test_dense_models(client, pictures, model):
    _, picture, _, table, note = client.predict(handle_file(pictures / "photo.png"), model, api_name="/predict")
    assert Image.open(picture).width > 200
    table = table.get("value", table)
    assert table["headers"][0] == "class"
    assert note


def test_the_endpoints_have_names(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(named) == ["/explain", "/predict"]


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("broken.png", "classifier", "This file cannot be used: not an image in a format that Pillow knows."),
        ("cut.jpg", "classifier", "truncated"),
        ("bomb.png", "segmenter", "8000x8000 pixels, more than the limit of 1000000"),
        ("photo.png", "me/secret", "This page has no model &#x27;me/secret&#x27;"),
        ("photo.png", "<img src=x onerror=alert(1)>", "&lt;img src=x"),
        (None, "classifier", "There is no image"),
    ],
)
def test_mistakes_are_messages(client, pictures, name, model, message):
    upload = None if name is None else handle_file(pictures / name)
    with pytest.raises(AppError) as caught:
        client.predict(upload, model, api_name="/predict")
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "<img" not in str(caught.value)


def test_a_wrong_class_is_a_message(client, pictures):
    with pytest.raises(AppError, match="no class"):
        client.predict(handle_file(pictures / "photo.png"), "classifier", "horse", api_name="/explain")


def test_files_of_the_server_are_out_of_reach(client, saved_models, pictures):
    """A client that names a path in the place of an upload gets an error, and so does one that asks for a file."""
    url = client.src.rstrip("/")
    for path in (pictures / "photo.png", saved_models / "classifier" / "config.json"):
        body = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}, "classifier"]}
        request = urllib.request.Request(
            f"{url}/gradio_api/call/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            event = json.loads(answer.read())["event_id"]
        with urllib.request.urlopen(f"{url}/gradio_api/call/predict/{event}") as answer:
            said = answer.read().decode()
        assert "event: error" in said
        assert "event: complete" not in said
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/gradio_api/file={path}")
        assert caught.value.code == 403


def test_a_report_is_shown_when_asked_for_and_in_a_sandbox(client, serve, saved_models, report):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{client.src.rstrip('/')}/report")
    page = serve(saved_models / "classifier", report=report)
    with urllib.request.urlopen(f"{page.local_url}report") as answer:
        assert answer.read() == (report / "report.html").read_bytes()
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'") and "allow-same-origin" not in policy


def test_the_page_tells_nothing_of_this_machine(client, saved_models):
    with urllib.request.urlopen(client.src) as answer:
        page = answer.read().decode()
    with urllib.request.urlopen(f"{client.src.rstrip('/')}/config") as answer:
        page += answer.read().decode()
    assert str(saved_models) not in page
    assert "fonts.googleapis" not in page
    assert json.loads(page[page.rindex('{"version"') :])["analytics_enabled"] is False
