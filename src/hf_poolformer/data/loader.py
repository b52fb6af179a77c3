"""Batches from a stream: rows are decoded in the workers, broken ones counted, and the place is known."""

import contextlib
import dataclasses
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image as PILImage
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ..foundation.errors import UserError, one_line
from ..foundation.machine import cores
from ..foundation.workers import arguments_for
from .columns import ImageDataset, columns_needed, field_of
from .decoding import BrokenImage, decode_image, describe_source
from .labels import Nothing, Unlabelled
from .sampling import Repeats
from .stream import Lane, Order, Piece, Row, Start, among_lanes, deal, fresh_pieces, lane_seed, remaining


if TYPE_CHECKING:  # of typing itself from Python 3.11 on
    from typing_extensions import NotRequired

logger = logging.getLogger(__name__)

# A share of broken images says nothing before this many were seen.
MIN_SEEN = 64
# Of `ImageLoader.state_dict`: with another number, the same numbers in it mean other rows.
_FORMAT = 3
# Of a message: what is for the loader itself.
_NOT_OF_BATCHES = frozenset(["seen", "lane", "state", "damaged", "broken", "ends"])


class Origin(NamedTuple):
    """Where an image of a batch comes from.

    Attributes:
        shard, index: its row, as `stream.Row` has it.
        name: the path by which a person would look for it, if it has one.
        is_file: this is a file's, and not what a row with the bytes calls itself.
        values: what the row holds in `ImageDataset.other_columns`.
        error: why it is in no batch, where it is not.
    """

    shard: int
    index: int
    name: str | None
    is_file: bool
    values: tuple[Any, ...]
    error: str = ""


class Batch(TypedDict):
    """What a loader hands out.

    Attributes:
        pixel_values: float32 (B, C, H, W); of dense tasks a list of (C, H, W).
        labels: of one class per image int64 (B,), its index; of several float32 (B, classes), 1 for each that the
            image has, else 0; of regression float32 (B, targets), in units; of dense tasks a list; of images without
            labels int64 (B,), zeros.
        skipped: describes the broken images that were met since the batch before.
        origins: of the images, in their order; only of a loader with `tell_origins`.
    """

    pixel_values: Any
    labels: Any
    skipped: list[str]
    origins: "NotRequired[list[Origin]]"


class Message(Batch, total=False):
    """What a worker sends: a batch, if it has one, and what became of the rows since the message before.

    Attributes:
        broken: with `tell_origins`, of the images in `skipped`.
        ends: with `tell_origins`, of each shard that was read in, the number behind its last row so far.
        damaged: shards that end early, and what is to be said of each.
        seen: rows, broken ones included.
        lane, state: whose rows these are, and the place behind them (`LaneState`), as JSON, which neither a queue nor
            a thread that pins memory looks into.
        error: in the place of all this: why nothing more can be read.
    """

    broken: list[Origin]
    ends: dict[int, int]
    damaged: dict[str, str]
    seen: int
    lane: int
    state: str
    error: str


def make_loader(
    dataset: ImageDataset,
    transform: Callable[[PILImage.Image], torch.Tensor],
    *,
    batch_size: int,
    training: bool,
    num_workers: int = 0,
    seed: int = 0,
    shuffle_buffer_size: int = 1000,
    process_index: int = 0,
    num_processes: int = 1,
    max_skipped: float | int = 0.05,
    max_skipped_shards: int = 0,
    drop_last: bool | None = None,
    repeats: Sequence[float] | None = None,
    pin_memory: bool = False,
    batches: "Callable[..., DecodedBatches] | None" = None,
    finish: Callable[[Message], Message] | None = None,
    tell_origins: bool = False,
) -> "ImageLoader":
    """Batches of one process's share of a labelled dataset.

    Yields `Batch`es. When training, the stream is shuffled, anew at each `set_epoch`, and an incomplete last batch is
    dropped unless it is the only one.

    The shares of the processes are disjoint and complete but not always equally long: whoever reduces gradients over
    processes must stop all of them when the first runs out. They are made here, once: do not pass the loader through
    `accelerator.prepare`.

    Args:
        transform: RGB image to a tensor (C, H, W) of fixed size; runs in the workers. When training, torch's, numpy's
            and Python's global generators are seeded for each image from `seed`, epoch and its place in the dataset.
            If it has a method `at_epoch`, that returns the transform of an epoch, of which the first is 0.
        num_workers: of remote data an upper limit: no more are started than this process has shards.
        shuffle_buffer_size: undecoded images held by each worker, on average.
        max_skipped: the run stops when more than this fraction (float; one image always passes) or number (int) of an
            epoch's images is broken. 1.0 never stops it, 0 does at the first. Rows without a label count as broken
            where the dataset does not know how many there are.
        max_skipped_shards: the run stops when more of this process's shards than this end early, because they are
            truncated, say, or gone.
        drop_last: overrides the rule above.
        repeats: when training, how often an image of each class comes in an epoch, on average; see `sampling.py`. Each
            time it is augmented in another way. By default every image comes once.
        batches: what makes examples and batches of rows, where these are not images with labels.
        finish: what the main process does with each message of the workers, on the device say; it may leave out images
            and describe them in `skipped`.
        tell_origins: each batch has `origins`, and the loader `broken` and `ends`. Not with a `finish` that leaves
            out images.

    Raises:
        UserError: from the loader's iteration too: too many broken images, a label outside the range, nothing to read.
    """
    if not dataset.label_columns and not isinstance(dataset.storage, Nothing):
        raise UserError(f"{dataset.name} has no labels")
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"a batch needs at least one image and zero workers, not {batch_size} and {num_workers}")
    stream = dataset.stream.select_columns(columns_needed(dataset))
    order = Order(
        stream,
        shuffle=training,
        buffer_size=max(1, shuffle_buffer_size),
        seed=seed,
        process_index=process_index,
        num_processes=num_processes,
        num_workers=num_workers,
        local=dataset.local,
        repeats=Repeats(dataset, repeats) if repeats is not None and training else None,
    )
    if process_index == 0 and order.num_workers < num_workers:
        logger.info(
            "%s: %d data workers per process instead of %d: it is a stream, and more would read the same parts of it; "
            "--streaming false downloads it first, and all have work",
            dataset.name,
            order.num_workers,
            num_workers,
        )
    images = (batches or DecodedBatches)(dataset, order, transform, batch_size, training)
    images.tells_origins = tell_origins
    return ImageLoader(
        images,
        max_skipped=max_skipped,
        max_skipped_shards=max_skipped_shards,
        drop_last=training if drop_last is None else drop_last,
        finish=finish or _as_is,
        num_workers=order.num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else every epoch draws from the model's
        persistent_workers=order.num_workers > 0,
    )


def too_many_broken(broken: int, seen: int, limit: float | int) -> bool:
    """Whether that many of the images seen are more than a fraction (float) or a number (int) allows.

    One is never too many for a fraction: of a small set it would always be.
    """
    return broken > (limit if isinstance(limit, int) else max(limit * seen, 1))


class ImageLoader(DataLoader):
    """What `make_loader` returns: a DataLoader that counts broken images, reports errors without a traceback, and
    knows its place.

    Attributes:
        finish: as of `make_loader`.
        seen: images met by this process in the current epoch, broken ones included.
        skipped: how many of them were broken.
        damaged: shards of this process that ended early in the current epoch: where and why.
        broken: with `tell_origins`, of the images of this process that are in no batch of the epoch.
        ends: with `tell_origins`, of each shard that this process read in, the number behind its last row. The
            greatest of all processes is the number of rows in the shard.
    """

    def __init__(
        self,
        images: "DecodedBatches",
        *,
        max_skipped: float | int,
        max_skipped_shards: int,
        drop_last: bool,
        finish: Callable[[Message], Message],
        num_workers: int,
        **arguments: Any,
    ):
        # Workers put batches together themselves: batch_size None, and nothing left to collate here.
        super().__init__(images, batch_size=None, collate_fn=_as_is, **arguments_for(num_workers), **arguments)
        self._images = images
        self._max_skipped = max_skipped
        self._max_skipped_shards = max_skipped_shards
        self._drop_incomplete = drop_last
        self.finish = finish
        self._place = _Place()
        self._resumed = _Place()  # where `order.start` is
        self.seen = 0
        self.skipped = 0
        self._damaged: dict[str, str] = {}
        self._examples: list[str] = []
        self.broken: list[Origin] = []
        self.ends: dict[int, int] = {}

    @property
    def dealing(self) -> str:
        """Who reads what, in words."""
        return str(self._images.order)

    @property
    def num_shards(self) -> int:
        """Of the dataset, as `Origin.shard` counts them."""
        return self._images.order.num_shards

    @property
    def damaged(self) -> list[str]:
        return list(self._damaged.values())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle order and the augmentations of the next iteration."""
        self._images.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the batch that was handed out last, of this process: small, and nothing but plain values.

        What workers have read ahead is not part of it. Costs no reading; see `stream.py`.
        """
        order, epoch, place = self._images.order, self._images.epoch, self._place
        start = order.start_of(epoch)
        return {
            "format": _FORMAT,
            "epoch": epoch,
            "batch_size": self._images.batch_size,
            "num_shards": order.shards(start.divided).num_shards,
            "divided": start.divided,
            "layout": order.layout,
            "pieces": None if start.pieces is None else [[tuple(piece) for piece in lane] for lane in start.pieces],
            "lanes": [place.lanes.get(number) for number in range(order.layout["lanes"])],
            "turn": place.turn,
            "tail": place.tail,
            "batches": place.batches,
            "seen": place.seen,
            "skipped": place.skipped,
            "examples": list(place.examples),
        }

    def load_state_dict(self, states: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str | None:
        """Goes on where the states were taken, when the epoch they belong to is iterated over; chooses this epoch.

        With as many processes, workers and images per batch as then, what follows is the same, bit by bit. With
        others, what had not been handed out in this epoch is dealt anew: nothing is lost and nothing comes twice that
        was not to come twice.

        Args:
            states: of all processes of the run that is continued, by rank; or the state of the only one.

        Returns:
            None if what follows is the same as it would have been, otherwise a statement for the person who resumes.
        """
        states = [states] if isinstance(states, Mapping) else list(states)
        order, own = self._images.order, None
        epoch, divided = states[0]["epoch"], states[0]["divided"]
        self._iterator = None  # workers that run already would not hear of it
        self.set_epoch(epoch)
        if states[0].get("format") != _FORMAT:
            return (
                f"the checkpoint was written by a version that deals {self._images.name} to its workers in another "
                f"way: epoch {epoch + 1} starts from its beginning"
            )
        num_shards = order.shards(divided).num_shards
        if states[0]["num_shards"] != num_shards:
            return (
                f"{self._images.name} has {num_shards} shards and had {states[0]['num_shards']} when the checkpoint "
                f"was written: epoch {epoch + 1} starts from its beginning"
            )
        if len(states) == order.num_processes:
            own = states[order.process_index]
        if own and own["layout"] == order.layout and own["batch_size"] == self._images.batch_size:
            lanes = [json.loads(lane) if lane else None for lane in own["lanes"]]
            order.start = Start(epoch, divided, own["turn"], lanes, _pieces(own))
            kept = {number: lane for number, lane in enumerate(own["lanes"]) if lane}
            names = ("turn", "tail", "batches", "seen", "skipped")
            self._resumed = _Place(lanes=kept, examples=list(own["examples"]), **{name: own[name] for name in names})
            self._place = self._resumed.copy()
            return None
        begun, untouched, unfinished = _left_over(order, states)
        mine = [
            among_lanes(deal(pieces, order.num_processes)[order.process_index], order.layout)
            for pieces in (begun, untouched)
        ]
        lanes = [first + then for first, then in zip(*mine, strict=True)]
        order.start = Start(epoch, divided, pieces=lanes)
        self._resumed = _Place(batches=max(state["batches"] for state in states))
        self._place = self._resumed.copy()
        then, now = states[0]["layout"], order.layout
        return (
            f"the checkpoint is of {then['num_processes']} processes with {then['lanes']} data workers each, this run "
            f"has {now['num_processes']} with {now['lanes']}: the images left of epoch {epoch + 1} are dealt anew, "
            "each once, in another order than the uninterrupted run's"
            + (f"; up to {unfinished} images of its end are left out" if unfinished else "")
        )

    def __iter__(self) -> Iterator[Batch]:
        order, epoch = self._images.order, self._images.epoch
        resumes = order.start is not None and order.start.epoch == epoch
        place = self._place = self._resumed.copy() if resumes else _Place()
        self.seen, self.skipped, self._examples = place.seen, place.skipped, list(place.examples)
        self.broken, self.ends = [], {}
        states = [json.loads(lane) for lane in place.lanes.values()]
        self._damaged = {shard: text for state in states for shard, text in state.get("damaged", {}).items()}
        held: Message | None = None  # one batch behind, so that late broken images still find one to go with
        incomplete: list[Message] = []  # each worker ends with one; together they may fill batches
        for message in super().__iter__():
            # As the worker made it: what is found to be broken later makes a batch smaller, and nothing else.
            whole = len(message.get("labels", ())) == self._images.batch_size
            message = self.finish(message)
            self._account(message)
            if not whole or "labels" not in message:
                incomplete.append(message)
                continue
            if held is not None:
                yield self._hand_out(held, held)
            held = message
        incomplete.sort(key=lambda message: message["lane"])  # whichever lane came first
        late = [description for message in incomplete for description in message["skipped"]]
        tail = list(self._complete(incomplete, only=held is None and not place.batches))
        if held is None and not tail:
            if not place.batches:
                self._explain_nothing()
            return
        if not tail:
            held["skipped"] = held["skipped"] + late
            yield self._hand_out(held, held, *incomplete)
            return
        if held is not None:
            yield self._hand_out(held, held)
        for number in range(place.tail, len(tail)):
            last = number + 1 == len(tail)
            place.tail = 0 if last else number + 1
            yield self._hand_out({**tail[number], "skipped": [] if number else late}, *(incomplete if last else ()))

    def _hand_out(self, batch: Message, *messages: Message) -> Batch:
        """A batch for the caller; with it, what these messages say about the place becomes true."""
        place = self._place
        place.batches += 1
        for message in messages:
            place.lanes[message["lane"]] = message["state"]
            place.turn = (message["lane"] + 1) % self._images.order.layout["lanes"]
            place.seen += message["seen"]
            place.skipped += len(message["skipped"])
            place.examples += message["skipped"][: 5 - len(place.examples)]
        return {name: value for name, value in batch.items() if name not in _NOT_OF_BATCHES}

    def _complete(self, incomplete: list[Message], only: bool) -> Iterator[Batch]:
        incomplete = [message for message in incomplete if "labels" in message]
        if not incomplete:
            return
        size = self._images.batch_size
        pixel_values = _joined([message["pixel_values"] for message in incomplete])
        labels = _joined([message["labels"] for message in incomplete])
        whole = {"pixel_values": pixel_values, "labels": labels}
        if self._images.tells_origins:
            whole["origins"] = _joined([message["origins"] for message in incomplete])
        for start in range(0, len(labels), size):
            if len(labels) - start < size and self._drop_incomplete and not (only and start == 0):
                return
            yield {name: values[start : start + size] for name, values in whole.items()}

    def _account(self, message: Message) -> None:
        if "error" in message:
            raise UserError(message["error"])
        self.seen += message["seen"]
        for shard, damage in message["damaged"].items():
            if shard not in self._damaged:  # several workers may read it
                self._damaged[shard] = damage
                logger.warning("%s: %s", self._images.name, damage)
        if len(self.damaged) > self._max_skipped_shards:
            raise UserError(
                f"{self._images.name} is damaged: {'; '.join(self.damaged[:5])}. Mend it, or go on without what is "
                f"lost: --max_skipped_shards {len(self.damaged)}"
            )
        self.skipped += len(message["skipped"])
        self._examples += message["skipped"][: 5 - len(self._examples)]
        self.broken += message.get("broken", ())
        for shard, end in message.get("ends", {}).items():
            self.ends[shard] = max(end, self.ends.get(shard, 0))
        if isinstance(self._max_skipped, int) or self.seen >= MIN_SEEN:
            self.judge(self.seen, self.skipped, "first ")

    def judge(self, seen: int, skipped: int, which: str = "") -> None:
        """Whether too many images are broken. To be called at the end of an epoch, with the numbers of all processes.

        Raises:
            UserError: they are.
        """
        limit = self._max_skipped
        if too_many_broken(skipped, seen, limit):
            raise UserError(
                f"{skipped} of the {which}{seen} images of {self._images.name} are broken, more than --max_skipped "
                f"allows ({limit if isinstance(limit, int) else format(limit, '.1%')}): {'; '.join(self._examples)}"
            )

    def _explain_nothing(self) -> None:
        if self.skipped:
            raise UserError(
                f"none of the {self.seen} images of {self._images.name} can be read: {'; '.join(self._examples)}"
            )
        # A process may be left without a share; the only process is not.
        if self._images.order.num_processes == 1:
            raise UserError(f"{self._images.name} is empty")


class DecodedBatches(torch.utils.data.IterableDataset):
    """Runs in the workers: takes rows from the worker's lane and yields `Message`s.

    Args:
        order: None where nothing is iterated over.

    Attributes:
        made: by lane, how many messages there were, of all epochs, whether or not anybody has taken them yet.
        tells_origins: `tell_origins` of `make_loader`.
    """

    tells_origins = False

    def __init__(
        self,
        dataset: ImageDataset,
        order: Order | None,
        transform: Callable[[PILImage.Image], torch.Tensor],
        batch_size: int,
        training: bool,
    ):
        self.name = dataset.name
        self.batch_size = batch_size
        self.order = order
        self._dataset = dataset
        self._transform = transform
        self._training = training
        # Shared memory: workers that outlive an epoch see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        lanes = order.layout["lanes"] if order is not None else 0
        self.made = torch.zeros(lanes, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Message]:
        generators = _Generators(kept=get_worker_info() is None)
        with contextlib.closing(self._messages(generators)) as messages:
            try:
                for message in messages:
                    generators.give_back()
                    yield message
            finally:
                generators.give_back()

    def _messages(self, generators: "_Generators") -> Iterator[Message]:
        worker, epoch = get_worker_info(), self.epoch
        number, lane = self.order.lane(epoch, worker.id if worker is not None else 0)
        if hasattr(self._transform, "at_epoch"):  # workers outlive an epoch
            self._transform = self._transform.at_epoch(epoch)
        self._reported = set(lane.damaged)
        examples: list[tuple[Any, Any]] = []
        skipped: list[str] = []
        seen = 0
        told = _Told()
        rows = iter(lane)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                # Whatever the storage raises: said in one line by the loader, not as a worker's traceback.
                yield {"error": f"reading {self.name} failed after {lane.read} images: {one_line(error)}"}
                return
            if row is None:
                break
            seen += 1
            if self.tells_origins:
                told.ends[row.shard] = max(row.index + 1, told.ends.get(row.shard, 0))
            try:
                image, label = self._read(row.values)
                if self._training:
                    place = (self.order.seed, epoch, row.shard, row.index)
                    generators.seed((*place, row.copy) if row.copy else place)
                examples.append(self._example(image, label))
                if self.tells_origins:
                    told.origins.append(self._origin(row))
            except Unlabelled as reason:
                if self._dataset.labelled is None:
                    skipped.append(f"{self._describe(row)}: {reason}")
                    if self.tells_origins:
                        told.broken.append(self._origin(row, str(reason)))
                else:  # they were counted, and judged, before
                    seen -= 1
                continue
            except BrokenImage as reason:
                if row.copy:  # it is one broken image, however often it comes
                    seen -= 1
                else:
                    skipped.append(f"{self._describe(row)}: {reason}")
                    if self.tells_origins:
                        told.broken.append(self._origin(row, str(reason)))
                continue
            except UserError as error:
                yield {"error": f"{self._describe(row)} of {self.name}: {error}"}
                return
            if len(examples) == self.batch_size:
                yield self._message(examples, skipped, seen, told, number, lane)
                examples, skipped, seen, told = [], [], 0, _Told()
        if seen or lane.damaged or told.ends:
            yield self._message(examples, skipped, seen, told, number, lane)

    def _message(
        self, examples: list[tuple[Any, Any]], skipped: list[str], seen: int, told: "_Told", number: int, lane: Lane
    ) -> Message:
        batch = self._batch(*map(list, zip(*examples, strict=True))) if examples else {}
        self.made[number] += 1
        damaged = {shard: text for shard, text in lane.damaged.items() if shard not in self._reported}
        self._reported.update(lane.damaged)
        about = {"skipped": skipped, "damaged": damaged, "seen": seen, "lane": number}
        if self.tells_origins:
            about |= vars(told)
        return {**batch, **about, "state": json.dumps(lane.state())}

    # What a subclass may replace, to read something else than labels: these three.

    def _read(self, row: Mapping[str, Any]) -> tuple[PILImage.Image, Any]:
        """Image and label of a row. BrokenImage leaves the row out and counts it, UserError ends the run."""
        label = self._dataset.label(row)
        return decode_image(row[self._dataset.image_column], token=self._dataset.token), label

    def _example(self, image: PILImage.Image, label: Any) -> tuple[Any, Any]:
        """What goes into a batch; the global generators are seeded for this image. Errors as of `_read`."""
        return self._transform(image), label

    def _batch(self, pixels: list[Any], labels: list[Any]) -> dict[str, Any]:
        """`pixel_values` and `labels`, each a tensor or a list, one element per image."""
        # default_collate stacks straight into shared memory when it runs in a worker.
        return {"pixel_values": default_collate(pixels), "labels": torch.from_numpy(np.stack(labels))}

    def _describe(self, row: Row) -> str:
        path = describe_source(row.values[self._dataset.image_column])
        return path or f"image {row.index} of shard {row.shard}"

    def _origin(self, row: Row, error: str = "") -> Origin:
        source = row.values[self._dataset.image_column]
        stored = isinstance(source, bytes) or (isinstance(source, Mapping) and source.get("bytes") is not None)
        values = tuple(field_of(row.values, column) for column in self._dataset.other_columns)
        return Origin(row.shard, row.index, describe_source(source), not stored, values, error)


@dataclasses.dataclass
class _Told:
    """What a message says with `tell_origins`, by the names of `Message`."""

    origins: list[Origin] = dataclasses.field(default_factory=list)
    broken: list[Origin] = dataclasses.field(default_factory=list)
    ends: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Place:
    """How far a process has got in an epoch, by what it has handed out.

    Attributes:
        lanes: number of a lane -> its state, as JSON; those without one have not handed out anything.
        turn: the lane whose batch comes next.
        tail: batches handed out of those that are put together from what the lanes leave over at the end.
        batches: all that were handed out.
    """

    lanes: dict[int, str] = dataclasses.field(default_factory=dict)
    turn: int = 0
    tail: int = 0
    batches: int = 0
    seen: int = 0
    skipped: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def copy(self) -> "_Place":
        return dataclasses.replace(self, lanes=dict(self.lanes), examples=list(self.examples))


def _left_over(order: Order, states: Sequence[Mapping[str, Any]]) -> tuple[list[Piece], list[Piece], int]:
    """Of all processes: pieces that were begun, pieces that were not, and at most how many images are given up."""
    begun: list[Piece] = []
    untouched: list[Piece] = []
    given_up = 0
    for rank, state in enumerate(states):
        layout = state["layout"]
        if state["tail"]:
            # Some of what its lanes had left over is used already; which, only a reading would tell.
            given_up += layout["lanes"] * state["batch_size"]
            continue
        dealt = _pieces(state) or fresh_pieces(state["num_shards"], order.shuffle, state["epoch"], layout, rank)
        for number, (pieces, lane) in enumerate(zip(dealt, state["lanes"], strict=True)):
            seed = lane_seed(layout["seed"], state["epoch"], rank, number)
            parts = remaining(pieces, json.loads(lane) if lane else None, layout["window"], seed, layout["most"])
            begun += parts[0]
            untouched += parts[1]
    return begun, untouched, given_up


def _pieces(state: Mapping[str, Any]) -> list[list[Piece]] | None:
    """By lane, from plain values; None where they are dealt out as usual."""
    if state["pieces"] is None:
        return None
    return [
        [
            Piece(shard, tuple(map(tuple, strides)), start, tuple(extra), group, first, tuple(copies))
            for shard, strides, start, extra, group, first, copies in lane
        ]
        for lane in state["pieces"]
    ]


class _Generators:
    """The global generators of the CPU: torch's, numpy's and Python's.

    Args:
        kept: whether they are somebody else's, too, the main process's, who gets them back as they were.
    """

    def __init__(self, kept: bool):
        self._kept, self._states = kept, None

    def seed(self, seed: tuple[int, ...]) -> None:
        """For one image."""
        if self._kept and self._states is None:
            self._states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
        first, second = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        torch.default_generator.manual_seed(int(first >> np.uint64(1)))  # torch.manual_seed reseeds the GPU, too
        np.random.seed(int(second) & 0xFFFFFFFF)
        random.seed(int(second))

    def give_back(self) -> None:
        if self._states is not None:
            torch.set_rng_state(self._states[0])
            np.random.set_state(self._states[1])
            random.setstate(self._states[2])
            self._states = None


def _as_is(message: Any) -> Any:
    return message


def _joined(parts: list[Any]) -> Any:
    """Tensors or lists, one behind the other."""
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [item for part in parts for item in part]


def data_workers(wanted: int | None, accelerator: Accelerator) -> int:
    """Data workers of one process: as wanted, else its part of the machine's cores, which the CPU shares with us."""
    if wanted is not None:
        return wanted
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 1 if accelerator.device.type == "cpu" else min(max(cores() // local - 1, 1), 16)


def skip_limit(value: float) -> float | int:
    """`--max_skipped` as the loader takes it: a fraction stays one, anything else is a number of images."""
    return value if 0 < value < 1 else int(value)
