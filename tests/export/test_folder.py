"""The folder of an export: whose it is while it is made, what a kill leaves, and what is noticed in it afterwards."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from hf_poolformer.commands.explain import main as explain
from hf_poolformer.commands.publish import main as publish
from hf_poolformer.conversion.convert import ConversionError, convert
from hf_poolformer.export import export_model, load
from hf_poolformer.export.folder import Manifest, new_folder
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.exported import no_model
from hf_poolformer.foundation.loading import load_checkpoint


def put(output: Path, text: str, overwrite: bool = False) -> None:
    with new_folder(output, overwrite) as scratch:
        (scratch / "export.json").write_text(text)


def hold(output: Path, working) -> None:
    """Half an export."""
    with new_folder(output, overwrite=True) as scratch:
        (scratch / "half").write_text("half")
        working.set()
        time.sleep(600)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_model(small_model(), folder, format="torch", dynamic_size=False)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copied"))


@pytest.mark.parametrize("before", ["nothing", "empty", "export"])
@pytest.mark.parametrize("link", [False, True], ids=["same name", "through a link"])
def test_the_second_of_two_is_refused(before, link, tmp_path):
    out = tmp_path / "real" / "out"
    out.parent.mkdir()
    if before == "empty":
        out.mkdir()
    if before == "export":
        put(out, "old")
    other = out
    if link:
        (tmp_path / "link").symlink_to(out.parent)
        other = tmp_path / "link" / "out"
    with new_folder(out, overwrite=True) as scratch:
        (scratch / "export.json").write_text("first")
        for overwrite in (False, True):
            with pytest.raises(UserError, match="at work" if overwrite or before != "export" else "--overwrite"):
                put(other, "second", overwrite)
        put(out.with_name("out-2"), "neighbour")
    assert (out / "export.json").read_text() == "first"
    assert names(out.parent) == ["out", "out-2"]
    put(other, "third", overwrite=True)
    assert (out / "export.json").read_text() == "third"


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_many_at_once_one_wins(overwrite, tmp_path):
    out = tmp_path / "deep" / "out"
    start, refused, done = threading.Barrier(8), [], []

    def work(number: int) -> None:
        start.wait()
        try:
            with new_folder(out, overwrite) as scratch:
                (scratch / "export.json").write_text(str(number))
                (scratch / "other").write_text(str(number))
                everybody.wait()
            done.append(number)
        except UserError:
            refused.append(number)
            everybody.wait()

    everybody = threading.Barrier(8)  # nobody is through before all have tried
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and len(refused) == 7
    assert {(out / name).read_text() for name in ("export.json", "other")} == {str(done[0])}
    assert names(out.parent) == ["out"]


def test_what_a_kill_leaves_is_cleared_away(tmp_path, caplog):
    out = tmp_path / "out"
    put(out, "old")
    put(tmp_path / "out-2", "neighbour")
    context = multiprocessing.get_context("fork")
    working = context.Event()
    holder = context.Process(target=hold, args=(out, working))
    holder.start()
    assert working.wait(60)
    with pytest.raises(UserError, match="at work"):
        put(out, "new", overwrite=True)
    holder.kill()
    holder.join()
    assert ".out.export" in names(tmp_path) and (out / "export.json").read_text() == "old"
    put(out, "new", overwrite=True)
    assert (out / "export.json").read_text() == "new" and names(tmp_path) == ["out", "out-2"]
    assert "left when it was killed" in caplog.text


@pytest.mark.parametrize("now", ["nothing", "new export", "something else"])
def test_killed_while_replacing(now, tmp_path, caplog):
    """The export before is back, unless the new one has taken its place; what is somebody else's stays."""
    out, place = tmp_path / "out", tmp_path / ".out.export"
    (place / "old-x" / "out").mkdir(parents=True)
    (place / "old-x" / "out" / "export.json").write_text("old")
    if now == "new export":
        put(tmp_path / "x", "new")
        (tmp_path / "x").rename(out)
    if now == "something else":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        with pytest.raises(UserError, match="something else"):
            put(out, "third", overwrite=True)
        assert (place / "old-x" / "out" / "export.json").exists() and (out / "thesis.txt").exists()
        return
    with pytest.raises(UserError, match="--overwrite"):
        put(out, "third")
    assert (out / "export.json").read_text() == ("old" if now == "nothing" else "new")
    assert names(tmp_path) == ["out"] or now == "new export"
    put(out, "third", overwrite=True)
    assert names(tmp_path) == ["out"] and (out / "export.json").read_text() == "third"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_stays(overwrite, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not an exported model" if overwrite else "--overwrite"):  # noqa: SIM117
        with new_folder(out, overwrite) as scratch:
            (scratch / "export.json").write_text("{}")
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")
    assert names(tmp_path) == ["out"] and names(out) == ["thesis.txt"]


def locked_by_child(out: Path, queue) -> None:
    try:
        put(out, "child")
        queue.put("done")
    except UserError as error:
        queue.put(str(error))


def test_other_processes_are_seen(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with new_folder(tmp_path / "out", overwrite=False) as scratch:
        (scratch / "export.json").write_text("{}")
        child = context.Process(target=locked_by_child, args=(tmp_path / "out", queue))
        child.start()
        assert "at work" in queue.get(timeout=60)
        child.join()


# What is noticed afterwards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("change", ["label", "space", "other", "gone"])
def test_changed_settings(name, change, copied):
    path = copied / name
    text = path.read_text()
    if change == "gone":
        path.unlink()
    else:
        path.write_text({"label": text.replace("6", "7"), "space": text + " ", "other": "{}"}[change])
    with pytest.raises(UserError, match=rf"{name} is (missing|not the one that was exported)") as caught:
        load(copied, trust_remote_code=True)
    assert "export the model again" in str(caught.value)
    path.write_text(text)
    load(copied, trust_remote_code=True)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"shards": 3}, r"'shards', which this version .* does not know and 9\.9 wrote: update hf-poolformer"),
        ({"precision": "int4"}, "precision 'int4'; update"),
        ({"task": "depth-estimation"}, "task 'depth-estimation'; update"),
        ({"format": "papyrus"}, "format 'papyrus'; update"),
        ({"image_size": "64x64"}, "damaged"),
        ({"image_size": [64, 0]}, "damaged"),
        ({"num_channels": None}, "damaged"),
        ({"input": 3}, "damaged"),
        ({"files": {"model.pt2": "0", "../copied/config.json": "0"}}, "damaged"),
        ({"task": ...}, "does not say the task"),
    ],
)
def test_manifests_of_others(facts, message, copied):
    written = json.loads((copied / "export.json").read_text())
    written["versions"] = {"hf-poolformer": "9.9"}
    written = {key: value for key, value in {**written, **facts}.items() if value is not ...}
    (copied / "export.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=message):
        load(copied, trust_remote_code=True)


def test_exports_without_digests_of_their_settings(copied):
    """Those of earlier versions are read as before."""
    manifest = Manifest.read(copied)
    manifest.files = {name: sha256 for name, sha256 in manifest.files.items() if not name.endswith(".json")}
    manifest.write(copied)
    load(copied, trust_remote_code=True)


# In the place of a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["teacher or start", "export", "explain", "publish", "convert"])
def test_where_a_model_is_needed(command, exported, photos, tmp_path, capsys):
    """One line that says that it is an export, and of what."""
    if command == "teacher or start":
        with pytest.raises(UserError) as caught:
            load_checkpoint(str(exported))
        said = str(caught.value)
    elif command == "export":
        with pytest.raises(UserError) as caught:
            export_model(exported, tmp_path / "again")
        said = str(caught.value)
    elif command == "convert":
        with pytest.raises(ConversionError) as caught:
            convert(exported, tmp_path / "converted")
        said = str(caught.value)
    else:
        run, arguments = {
            "explain": (explain, [photos / "00.jpg", "--output", tmp_path / "x.png"]),
            "publish": (publish, ["--repo_id", "me/x"]),
        }[command]
        assert run([str(argument) for argument in (exported, *arguments)]) == 2
        said = capsys.readouterr().err
    assert no_model(exported) in said and "\n" not in said.strip()
    assert json.loads((exported / "export.json").read_text())["source"]["model"] in said
    assert os.listdir(tmp_path) == []
