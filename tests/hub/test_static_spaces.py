"""`publish --space static`: a page that was exported, on the loopback Hub."""

import hashlib
import json

import pytest
from huggingface_hub import RepoCard

from hf_poolformer.commands.publish import main
from hf_poolformer.hub import PublishError, publish


CARD = """---
tags: [web]
base_model: me/solar-cells
---

# Solar cells, exported
"""
FILES = {
    "index.html": b"<!doctype html>",
    "page.js": b"",
    "runtime.js": b"",
    "web.json": b"{}",
    "model.onnx": b"\x08\x0a graph",
    "vendor/ort.mjs": b"export {};",
    "README.md": CARD.encode(),
    ".DS_Store": b"x",
}


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "page"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


def write_manifest(folder, format="web"):
    files = {"model.onnx": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()}
    source = {"model": "me/solar-cells"}
    (folder / "export.json").write_text(json.dumps({"format": format, "files": files, "source": source}))


@pytest.fixture
def send(online, page):
    return lambda **options: publish(page, "me/cells-page", endpoint=online.url, space="static", **options)


def test_the_page_becomes_a_space(hub, send, page):
    published = send()
    assert published.url == f"{hub.url}/spaces/me/cells-page"
    assert any("every SHA-256 the same" in note for note in published.notes), "verified by downloading"
    files = hub.files("me/cells-page", kind="spaces")
    assert sorted(files) == sorted(set(FILES) - {".DS_Store"} | {"export.json"})
    for name in files.keys() - {"README.md"}:
        assert files[name] == (page / name).read_bytes()
    assert len(hub.repos["spaces", "me/cells-page"].branches["main"]) == 2, "made, and one commit"
    assert "me/cells-page" not in [name for kind, name in hub.repos if kind == "models"]
    card = RepoCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["sdk"], data["app_file"], data["title"]) == ("static", "index.html", "Cells page")
    assert data["models"] == ["me/solar-cells"]
    assert data["custom_headers"]["cross-origin-embedder-policy"] == "require-corp", "for threads"
    assert "# Solar cells, exported" in card.text, "the export's own words"
    assert (page / "README.md").read_text() == CARD, "the folder is only read"


def test_of_an_earlier_page_nothing_stale_stays(hub, send, page):
    send(verify=False)
    (page / "vendor" / "ort.mjs").rename(page / "vendor" / "newer.mjs")
    send(verify=False)
    files = hub.files("me/cells-page", kind="spaces")
    assert "vendor/newer.mjs" in files and "vendor/ort.mjs" not in files


def test_what_is_no_page_is_refused(hub, send, page, model_dir, online):
    def refusal(**options):
        with pytest.raises(PublishError) as caught:
            send(**options)
        return str(caught.value)

    assert "--gated" in refusal(gated="auto")
    assert "--repo_type" in refusal(repo_type="dataset")
    assert "page.js is missing or excluded" in refusal(exclude=["page.js"])
    (page / "model.onnx").write_bytes(b"another")
    assert "model.onnx is missing, or changed" in refusal()
    write_manifest(page, "onnx")
    assert "is no page" in refusal()
    with pytest.raises(PublishError, match="is no page"):
        publish(model_dir, "me/cells-page", endpoint=online.url, space="static")
    assert hub.requests == []


def test_what_would_be_sent(page, capsys):
    assert main([str(page), "--repo_id", "me/cells-page", "--space", "static", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "-> space me/cells-page: 8 files" in said and ".DS_Store (hidden)" in said
