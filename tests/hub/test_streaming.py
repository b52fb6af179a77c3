"""Images streamed from a Hub that takes its time: what is asked for, and what happens meanwhile."""

import io
import re
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Commit, Handler, Repo
from PIL import Image


GROUPS, ROWS = 3, 10
BALLAST = 12_000_000  # bytes of a row group, between its images and the next one's

# Says to the Hub when it has its first row, and looks at the next only when the Hub has answered.
READ = """
import sys
from urllib.request import urlopen
from hf_poolformer.data import hub_files
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.stream import Lane, Piece, Shards

hub_files.SHARE = 0  # no room to keep what is read
tell = lambda what: urlopen(f"{sys.argv[1]}/api/datasets/me/photos?{what}").read()
dataset = open_datasets(dataset_name="me/photos", train_val_split=0)["train"]
assert dataset.stream.num_shards == 1 and set(dataset.stream.features) == {"image", "label"}
tell("begin")
rows = iter(Lane(Shards(dataset.stream), [Piece(0)], 0, (0,)))
labels = [next(rows).values["label"]]
tell("first")
labels += [row.values["label"] for row in rows]
print(*labels)
"""


@pytest.fixture
def photos():
    """A Parquet file, and where the images of its second row group lie."""
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    count = GROUPS * ROWS
    table = pa.table(
        {
            "ballast": [generator.bytes(BALLAST // ROWS) for _ in range(count)],
            "image": [{"bytes": buffer.getvalue(), "path": f"{row}.png"} for row in range(count)],
            "label": [f"row {row % 5}" for row in range(count)],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=ROWS)
    group = pq.read_metadata(file).row_group(1)
    chunk = group.column(1)
    assert chunk.path_in_schema == "image.bytes"
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    return file.getvalue(), range(start, start + chunk.total_compressed_size)


def test_the_next_row_group_comes_while_a_row_is_decoded_and_other_columns_stay_there(
    hub, run_with_hub, photos, monkeypatch
):
    data, second = photos
    commit = Commit("1" * 40, "photos", {"data/train-00000-of-00001.parquet": data})
    hub.repos["datasets", "me/photos"] = Repo(branches={"main": [commit]})
    events, asked = [], []
    wanted, taken = threading.Event(), threading.Event()
    answer = Handler.do_GET

    def slow(handler):
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if handler.path.endswith("?begin"):
            events.append("begin")
        elif handler.path.endswith("?first"):
            wanted.wait(10)
            events.append("a row is held")
            taken.set()
        elif span and events:
            start, end = int(span[1]), int(span[2])
            asked.append(end + 1 - start)
            if start < second.stop and end >= second.start:
                events.append("asked for the next row group")
                wanted.set()
                taken.wait(10)  # the latency of this answer: until a row was handed out
                events.append("answered")
        return answer(handler)

    monkeypatch.setattr(Handler, "do_GET", slow)
    done = run_with_hub(READ, hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == " ".join(f"row {row % 5}" for row in range(GROUPS * ROWS))
    assert events[:4] == ["begin", "asked for the next row group", "a row is held", "answered"]
    assert 0 < sum(asked) < 600_000  # of 36 MB; for each row group also 64 KiB beyond it, and of the file's end


COUNT = """
import sys
from pathlib import Path
from hf_poolformer.data import contents
from hf_poolformer.data.datasets import open_datasets

contents.WORTH_KEEPING = 0
for revision in ("1" * 40, "1" * 40, "main", "main"):
    arguments = {"problem_type": "multi_label_classification", "train_val_split": 0, "cache_dir": sys.argv[1]}
    dataset = open_datasets(dataset_name="me/photos", revision=revision, **arguments)["train"]
    print(*dataset.label_names, *dataset.counts, dataset.labelled, Path(dataset.counts_from).name or "read")
"""


def test_labels_that_were_counted_once_are_remembered_until_the_next_commit(hub, run_with_hub, tmp_path):
    def data(lists):
        file, image = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "PNG")
        pq.write_table(pa.table({"image": [image.getvalue()] * len(lists), "tags": lists}), file)
        return {"data/train-00000-of-00001.parquet": file.getvalue()}

    lists = [["a"], ["a", "b"], [], ["b", "c"]] * 5
    commits = [Commit("1" * 40, "photos", data(lists)), Commit("2" * 40, "more", data([*lists, ["c"]]))]
    hub.repos["datasets", "me/photos"] = Repo(branches={"main": commits})
    done = run_with_hub(COUNT, str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in said] == ["a b c 10 10 5 20"] * 2 + ["a b c 10 10 6 21"] * 2
    assert [line.endswith(" read") for line in said] == [True, False, True, False]
