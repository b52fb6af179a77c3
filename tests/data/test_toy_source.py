"""A kind of file that the package does not know: one class and one line in the table of layouts."""

import io
import zipfile

import numpy as np
import pytest
from datasets import Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from hf_poolformer.data import layouts
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.loader import make_loader
from hf_poolformer.data.sources import Source, Split


COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250)}


def rows_of(archives):
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield {"image": {"bytes": archive.read(name), "path": name}, "label": name.split("_")[0]}


class AlbumSource(Source):
    """Archives of images that are named after their classes."""

    def __init__(self, name, archives):
        self.name, self.splits, self._archives = name, ["train"], archives

    def open(self, split):
        features = Features({"image": Image(decode=False), "label": Value("string")})
        stream = IterableDataset.from_generator(rows_of, features, gen_kwargs={"archives": self._archives})
        return Split(stream, None)


def open_albums(location):
    albums = location.with_suffix({".album"})
    return AlbumSource(location.name, [str(album) for album in albums]) if albums else None


@pytest.fixture
def albums(tmp_path, monkeypatch):
    """A folder of three albums with 20 pictures each."""
    for number in range(3):
        with zipfile.ZipFile(tmp_path / f"{number}.album", "w") as archive:
            for index in range(20):
                name = list(COLOURS)[index % 2]
                buffer = io.BytesIO()
                picture = np.full((9, 12, 3), COLOURS[name], np.uint8)
                picture[0, 0] = number, index, 0  # no two are alike
                PILImage.fromarray(picture).save(buffer, "PNG")
                archive.writestr(f"{name}_{index}.png", buffer.getvalue())
    monkeypatch.setattr(layouts, "LAYOUTS", [open_albums, *layouts.LAYOUTS])
    return tmp_path


def test_a_toy_source_is_split_read_and_resumed(albums):
    opened = open_datasets(dataset_name=albums, train_val_split=0.3)
    assert [part.label_names for part in opened.values()] == [["blue", "red"]] * 2
    assert opened["train"].local and "held-out" in opened["validation"].name

    def colour(image):
        import torch

        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    def batches(part, **how):
        return make_loader(opened[part], colour, batch_size=4, **{"training": False, "num_workers": 0, **how})

    seen = {}
    for part in opened:
        for batch in batches(part):
            for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
                assert (pixels[2].max() > 200) == (label == 0)
                seen.setdefault(part, set()).add(tuple(pixels[:, 0, 0].tolist()))
    assert len(seen["train"]) + len(seen["validation"]) == 60 and not seen["train"] & seen["validation"]

    whole = [batch["pixel_values"] for batch in batches("train", training=True, num_workers=1)]
    loader = batches("train", training=True, num_workers=1)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    again = batches("train", training=True, num_workers=1)
    assert again.load_state_dict(loader.state_dict()) is None
    rest = [batch["pixel_values"] for batch in again]
    assert all((a == b).all() for a, b in zip(whole[3:], rest, strict=True))
