"""Dataset cards: the README.md of a folder of images, Parquet files or tar shards, written from the files alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..foundation.files import size_text
from ..foundation.tasks import CLASSIFICATION
from .metadata import check_license
from .rendering import clean_line, plain_markdown


__all__ = ["dataset_card"]

TEMPLATE = Path(__file__).with_name("dataset_card_template.md")

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SHARD = re.compile(r"(?:(?P<folder>.*)/)?(?P<split>[\w.]+?)[-_](?P<number>\d+)(?:-of-\d+)?\.(?:parquet|tar)")

SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "test": "test"}

# More classes than this make a table nobody reads.
MAX_CLASSES_IN_TABLE = 100

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(folder: str | Path, files: Mapping[str, Any], *, repo_id: str, license: str | None = None) -> str:
    """The card of the dataset in `folder`.

    Args:
        files: the files that are published, by their path in the folder; values are not looked at.
        repo_id: where the dataset will be published.
        license: a licence identifier of the Hub; without one the card says `unknown`.

    Raises:
        CardError: an unknown licence.
    """
    folder = Path(folder)
    license = license or "unknown"
    check_license(license)
    data = DatasetCardData(
        license=license,
        tags=["image", "hf-poolformer"],
        pretty_name=clean_line(repo_id.rpartition("/")[2]),
    )
    shards = group_by_split([name for name in files if name.lower().endswith((".parquet", ".tar"))])
    classes: list[str] = []
    counts: dict[str, int | None] = {}
    if shards:
        unit = "examples"
        data.configs = [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": sorted(names)} for split, names in shards.items()],
            }
        ]
        if all(name.lower().endswith(".parquet") for names in shards.values() for name in names):
            classes, counts = describe_parquet(folder, shards, data)
    else:
        unit = "images"
        shards = group_by_split([name for name in files if Path(name).suffix.lower() in IMAGES])
        counts = {split: len(names) for split, names in shards.items()}
        classes = sorted(
            {parts[-2] for names in shards.values() for name in names if len(parts := Path(name).parts) > 1}
        )
        classes = [] if set(classes) <= set(shards) else classes
    total = None if not counts or None in counts.values() else sum(count or 0 for count in counts.values())
    if classes:
        data.task_categories = [CLASSIFICATION]
    if total is not None:
        data.size_categories = [next((text for limit, text in SIZES if total < limit), "n>10M")]
    splits = [
        {
            "name": split,
            "examples": "?" if counts.get(split) is None else f"{counts[split]:,}",
            "files": len(names),
            "size": size_text(sum((folder / name).stat().st_size for name in names)),
        }
        for split, names in shards.items()
    ]
    what = f"{total:,} images" if total is not None else "Images"
    of = f" of {len(classes)} classes" if classes else ""
    card = DatasetCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        md=plain_markdown,
        title=repo_id.rpartition("/")[2],
        summary=f"{what}{of}, in {'1 split' if len(splits) == 1 else f'{len(splits)} splits'}.",
        unit=unit,
        splits=splits,
        classes=classes if len(classes) <= MAX_CLASSES_IN_TABLE else [],
        repo_id=repo_id,
        snippet=(
            "from datasets import load_dataset\n\n"
            f'dataset = load_dataset("{repo_id}", streaming=True)\n'
            f'print(next(iter(dataset["{next(iter(shards), "train")}"])))'
        ),
    )
    return str(card).rstrip("\n") + "\n"


def group_by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split that the names of shards begin with or that a folder is called after; else `train`."""
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        shard = SHARD.fullmatch(name)
        folders = (SPLITS[part.lower()] for part in Path(name).parts[:-1] if part.lower() in SPLITS)
        splits.setdefault(shard["split"] if shard else next(folders, "train"), []).append(name)
    order = list(dict.fromkeys([*SPLITS.values(), *sorted(splits)]))
    return {split: splits[split] for split in order if split in splits}


def describe_parquet(
    folder: Path, shards: Mapping[str, Sequence[str]], data: DatasetCardData
) -> tuple[list[str], dict[str, int | None]]:
    """Class names, examples per split; features and sizes go into the metadata as `dataset_info`."""
    try:
        import pyarrow.parquet as parquet
        from datasets import ClassLabel, DatasetInfo, Features
        from datasets.info import DatasetInfosDict
        from datasets.splits import SplitDict, SplitInfo
    except ImportError:  # the extra `train`; the card is poorer without
        return [], dict.fromkeys(shards)
    counts: dict[str, int | None] = {}
    splits, features = SplitDict(), None
    for split, names in shards.items():
        opened = [parquet.ParquetFile(folder / name) for name in names]
        counts[split] = sum(file.metadata.num_rows for file in opened)
        features = features or Features.from_arrow_schema(opened[0].schema_arrow)
        size = sum((folder / name).stat().st_size for name in names)
        splits.add(SplitInfo(name=split, num_bytes=size, num_examples=counts[split]))
    total = sum((folder / name).stat().st_size for names in shards.values() for name in names)
    info = DatasetInfo(features=features, splits=splits, download_size=total, dataset_size=total)
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    labels = [feature for feature in (features or {}).values() if isinstance(feature, ClassLabel)]
    return (list(labels[0].names) if labels else []), counts
