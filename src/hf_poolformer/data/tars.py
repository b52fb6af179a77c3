"""Samples of WebDataset tars, which can be entered in the middle where somebody has looked through them before."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset


@dataclass
class TarConfig(datasets.BuilderConfig):
    """
    Attributes:
        starts: path -> the bytes at which reading may begin, ascending, the first of them 0.
    """

    starts: Mapping[str, list[int]] = field(default_factory=dict)


class TarRanges(WebDataset):
    """The builder of `datasets`; `reshard` divides its tars into ranges of bytes."""

    BUILDER_CONFIG_CLASS = TarConfig

    def _generate_more_gen_kwargs(self, tar_paths: list[str], tar_iterators: list[Any]) -> Iterator[dict[str, Any]]:
        for path, members in zip(tar_paths, tar_iterators, strict=True):
            if isinstance(members, _Range):
                ranges = [members]
            else:
                starts = self.config.starts.get(path, [0])
                ranges = [_Range(path, *ends) for ends in zip(starts, [*starts[1:], None], strict=True)]
            yield {"tar_paths": [path] * len(ranges), "tar_iterators": ranges}


@dataclass
class _Range:
    """The files of a tar whose headers lie from one byte to another, as `iter_archive` of `datasets` gives them."""

    path: str
    start: int
    stop: int | None

    def __iter__(self) -> Iterator[tuple[str, IO[bytes]]]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # else it keeps all of them
                    if self.stop is not None and member.offset >= self.stop:
                        return
                    if member.isreg() and not member.name.rpartition("/")[2].startswith((".", "__")):
                        yield member.name, tar.extractfile(member)
