"""What a stream fetches from the Hub: only what it needs, once for all processes, epochs and runs of a machine."""

import errno
import io
import json
import re
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Commit, Repo, describe
from PIL import Image
from warm import warm_python

from hf_poolformer.data import hub_files
from hf_poolformer.data.hub_files import HubFiles


COUNT = 120
BLOCK = 50_000

# Trains as far as data is concerned: prints the images of each batch.
READ = """
import json, multiprocessing, os, signal, sys
from torchvision.transforms.v2.functional import pil_to_tensor
from hf_poolformer.data import hub_files
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.loader import make_loader

how = json.loads(sys.argv[1])
hub_files.BLOCK, hub_files.SHARE = how["block"], how["share"]
if how["method"]:
    multiprocessing.set_start_method(how["method"])
dataset = open_datasets(dataset_name="me/photos", train_val_split=0)["train"]
loader = make_loader(
    dataset,
    pil_to_tensor,
    batch_size=4,
    training=True,
    num_workers=how["workers"],
    shuffle_buffer_size=10,
    drop_last=False,
    process_index=how["rank"],
    num_processes=how["ranks"],
)
if how["state"]:
    assert loader.load_state_dict(json.loads(how["state"])) is None
for epoch in range(how["begin"], 2):
    loader.set_epoch(epoch)
    for number, batch in enumerate(loader):
        print(json.dumps([epoch, batch["pixel_values"][:, 0, 0, 0].tolist()]), flush=True)
        if number == how["stop"]:
            print(json.dumps(loader.state_dict()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""


HOW = {"rank": 0, "ranks": 1, "workers": 0, "method": None, "share": 0.1, "block": BLOCK}
HOW |= {"state": None, "begin": 0, "stop": None}


def encoded(number):
    """An image that tells its number, and is 4 kB large."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue() + np.random.default_rng(number).bytes(4000)


def parquet(group, ballast=0):
    columns = {
        "ballast": [np.random.default_rng(number).bytes(ballast) for number in range(COUNT)],
        "image": [encoded(number) for number in range(COUNT)],
        "label": [f"class {number % 3}" for number in range(COUNT)],
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return {"data/train-00000-of-00001.parquet": file.getvalue()}


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(COUNT):
            for suffix, data in (("png", encoded(number)), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {"train-00000.tar": file.getvalue()}


@pytest.fixture
def publish(hub):
    def put(files):
        hub.repos["datasets", "me/photos"] = Repo(branches={"main": [Commit("1" * 40, "photos", files)]})
        return sum(map(len, files.values()))

    return put


@pytest.fixture
def read(hub_environment):
    """Starts READ in `ranks` processes at once; what each of them prints."""

    def start(ranks=1, code=0, **changes):
        processes = []
        for rank in range(ranks):
            how = HOW | {"rank": rank, "ranks": ranks} | changes
            command = [warm_python(), "-c", READ, json.dumps(how)]
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=hub_environment, **pipes))
        printed = []
        for process in processes:
            out, start.errors = process.communicate(timeout=300)
            assert process.returncode == code, start.errors
            printed.append([json.loads(line) for line in out.splitlines()])
        return printed

    return start


def each_once(printed):
    for epoch in range(2):
        seen = Counter(number for batches in printed for at, batch in batches if at == epoch for number in batch)
        assert seen == Counter(range(COUNT))


@pytest.mark.parametrize(
    ("files", "ranks", "workers", "needed"),
    [
        pytest.param(lambda: parquet(COUNT), 2, 0, 1.0, id="one row group, two processes"),
        pytest.param(lambda: parquet(10), 1, 3, 1.0, id="row groups, three workers"),
        pytest.param(lambda: parquet(60, ballast=16_000), 2, 2, 0.5, id="a column nobody needs"),
        pytest.param(tar, 2, 0, 1.0, id="tar"),
    ],
)
def test_processes_epochs_and_runs_fetch_the_same_bytes_once(hub, publish, read, files, ranks, workers, needed):
    size = publish(files())
    printed = read(ranks, workers=workers)
    each_once(printed)
    assert 0 < hub.sent.total() <= needed * size
    assert "kept in" in read.errors or ranks > 1  # the others need not say it
    hub.sent.clear()
    assert read(ranks, workers=workers) == printed
    assert hub.sent.total() == 0 and "kept in" not in read.errors
    # Where there is no room, everything is the same but for what is fetched.
    assert read(ranks, workers=workers, share=0) == printed
    assert hub.sent.total() > 2 * needed * size * 0.3


@pytest.mark.parametrize("files", [lambda: parquet(60), tar], ids=["parquet", "tar"])
def test_workers_that_are_started_anew(hub, publish, read, files):
    """As on macOS and Windows."""
    size = publish(files())
    each_once(read(workers=1, method="spawn", block=1 << 22))
    assert 0 < hub.sent.total() <= size


def test_who_is_killed_is_continued_without_fetching_again(hub, publish, read, tmp_path):
    size = publish(parquet(COUNT))
    (whole,) = read(share=0)
    hub.sent.clear()
    (before,) = read(stop=7, code=-9)
    state = json.dumps(before.pop())
    assert before == whole[:8]
    folder = tmp_path / "hf-home/hf-poolformer/streamed"
    blocks = sorted(file for file in folder.glob("??/*") if file.suffix != ".partial")
    assert blocks
    # As after a loss of power, or of a disk's good will.
    blocks[0].write_bytes(blocks[0].read_bytes()[:100])
    (folder / "ab").mkdir(exist_ok=True)
    (folder / "ab" / "abcd-0.partial").write_bytes(b"half a block")
    (after,) = read(state=state)
    assert before + after == whole
    assert hub.sent.total() <= size + 3 * BLOCK  # the damaged block, and what was under way


def test_streams_without_room_fetch_the_needed_columns_alone(hub, publish, read):
    size = publish(parquet(10, ballast=100_000))
    each_once(read(workers=3, share=0))
    # The labels, and images in two epochs; each time that it is opened, 64 KiB from the end of the file.
    assert 0 < hub.sent.total() < size


def test_the_token_opens_a_gated_dataset_and_stays_out_of_what_is_kept(
    hub, publish, run_with_hub, hub_token, tmp_path, files_with
):
    publish(parquet(60))
    hub.repos["datasets", "me/photos"].gated = True
    how = HOW | {"workers": 2}
    refused = run_with_hub(READ, json.dumps(how))
    assert refused.returncode == 1 and "no access to dataset 'me/photos'" in refused.stderr
    done = run_with_hub(READ, json.dumps(how), token=hub_token)
    assert done.returncode == 0, done.stderr
    each_once([[json.loads(line) for line in done.stdout.splitlines()]])
    assert list((tmp_path / "hf-home/hf-poolformer/streamed").glob("??/*")) and not files_with(tmp_path, hub_token)


def test_a_folder_of_images(hub, publish, read):
    """Each image is a file, read by one worker, as it is stored."""
    files = {f"train/{'abc'[number % 3]}/{number:04d}.png": encoded(number) for number in range(COUNT)}
    size = publish(files)
    each_once(read(workers=2))
    # In two epochs; and the first one, to see what it is.
    assert hub.sent.total() <= 2 * size + 5 * len(encoded(0))
    assert f"each of its {COUNT} images is asked for by itself, in every epoch; --streaming false" in read.errors


NAME = "a.parquet"
DATA = np.random.default_rng(0).bytes(220_000)


@pytest.fixture
def opened(online, publish, tmp_path, monkeypatch):
    """Opens the file on the Hub, in this process, anew each time."""
    publish({NAME: DATA})
    monkeypatch.setattr(hub_files, "BLOCK", BLOCK)
    monkeypatch.setattr(hub_files._Blocks, "keeps", True)

    def start():
        files = HubFiles(endpoint=online.url, folder=str(tmp_path / "kept"), skip_instance_cache=True)
        return files.open(f"datasets/me/photos@{'1' * 40}/{NAME}")

    return start


def test_any_part_of_a_file(online, opened):
    generator = np.random.default_rng(1)
    for _ in range(3):
        with opened() as file:
            for _ in range(50):
                start, length = generator.integers(0, len(DATA)), generator.integers(0, 2 * BLOCK)
                file.seek(start)
                assert file.read(length) == DATA[start : start + length]
            file.seek(0)
            assert file.read() == DATA and file.read() == b""
    assert online.sent[NAME] == len(DATA)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(online, opened, status):
    online.fail("GET", NAME, status, times=2, headers={"Retry-After": "0"})
    assert opened().read() == DATA


def test_a_file_that_is_gone_is_no_passing_trouble(online, opened):
    from hf_poolformer.foundation.faults import is_transient

    with opened() as file:
        file.read(10)
        online.fail("GET", NAME, 404)
        with pytest.raises(Exception, match="404") as failed:
            file.read()
    assert not is_transient(failed.value)


@pytest.mark.parametrize("sent", [b"", DATA[:100], DATA], ids=["nothing", "a part", "the whole file"])
def test_an_answer_of_another_length_is_not_kept(online, opened, sent):
    online.fail("GET", NAME, 200, times=1, body=sent.decode("latin-1"))
    online.faults[-1].body = sent
    with opened() as file:
        with pytest.raises(ConnectionError, match=f"of {BLOCK} bytes from 0 on, the server has sent {len(sent)}"):
            file.read(10)
        assert file.read() == DATA  # the next attempt


def test_a_disk_that_fills_up(online, opened, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for _ in range(2):
        with opened() as file:
            assert file.read() == DATA
    assert caplog.text.count("is not kept any more") == 1
    assert not [file for file in (tmp_path / "kept").glob("??/*")]
    assert online.sent[NAME] == 2 * len(DATA)


def test_content_is_told_from_content_not_by_the_commit(online, opened, publish, tmp_path):
    """A commit that changes something else costs nothing; another file by the same name is another file."""
    assert opened().read() == DATA
    online.sent.clear()
    commits = online.repos["datasets", "me/photos"].branches["main"]
    other = DATA[::-1]
    commits += [
        Commit("2" * 40, "a card", {NAME: DATA, "README.md": b"hello"}),
        Commit("3" * 40, "more", {NAME: other}),
    ]
    files = HubFiles(endpoint=online.url, folder=str(tmp_path / "kept"), skip_instance_cache=True)
    assert files.open(f"datasets/me/photos@{'2' * 40}/{NAME}").read() == DATA and not online.sent
    assert files.open(f"datasets/me/photos@{'3' * 40}/{NAME}").read() == other
    assert describe(NAME, DATA)["lfs"]["oid"] != describe(NAME, other)["lfs"]["oid"]


@pytest.mark.parametrize("told", ["../../../etc/cron.d/x", "/tmp/x", "", "A" * 64, "..", "0" * 40 + "/../x"])
def test_what_a_server_says_of_the_content_is_no_path(told):
    """Neither upwards nor elsewhere, and two that differ stay two."""
    names = {hub_files._content({"lfs": {"sha256": told}, "blob_id": told}), hub_files._content({"blob_id": "0" * 40})}
    assert len(names) == 2 and all(re.fullmatch("[0-9a-f]{40,64}", name) for name in names)
