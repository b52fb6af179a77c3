"""The order of a stream: who reads what, how rows are shuffled, and how a place in the middle is found again.

The shards of a dataset are dealt to processes and their workers. What one worker reads is a `Lane`: a list of pieces,
each a shard or a part of one, read one after the other. A lane is shuffled without a random choice that depends on
what happened before: row `n` gets the key `n + window * u(n)`, `u(n)` being uniform in [0, 1) and a function of the
seed, the epoch and `n` alone, and rows leave in the order of their keys. A row thus moves by up to `window` places,
about half of `window` rows are held at a time, and a place in the stream is a handful of numbers: how far the lane has
read, and the key that left last. Whoever continues there reads the last `window` rows once more, still encoded, keeps
those with greater keys, and is where the other was. No buffer is ever written down.

Where rows are repeated or left out (see `sampling.py`), row `n` has as many keys as the times that it comes: the one
above, and the same with `u(n)` moved on around the interval by the golden ratio, again and again. Each of them is
uniform like the first, and however many there are, they lie far from each other, so that the copies of an image come
in different batches.

A lane's rows are read by a thread of its own, a little ahead of whoever decodes them; its place counts only those that
were taken.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypedDict, TypeVar

import numpy as np
from datasets import Features, IterableDataset

from ..foundation.errors import one_line
from ..foundation.faults import Patience, is_transient
from . import hub_files  # noqa: F401 - a data worker that is started anew must know its addresses
from .sampling import Repeats


if TYPE_CHECKING:  # of typing itself from Python 3.11 on
    from typing_extensions import NotRequired


_FEW = 4  # with fewer shards than so many for each worker, those that do not go round weigh
NO_ROW = 1 << 62  # a row that no shard reaches
_KEYS = 4096  # keys are drawn in blocks
_GOLDEN = (5**0.5 - 1) / 2  # of the steps around an interval, the one that leaves no two places close to each other
TABLE_ROWS = 16  # rows of an Arrow table: few enough that tables of large images stay small
# Read ahead of the decoding, for each worker: at most so many rows, and bytes of images.
_ROWS_AHEAD, _BYTES_AHEAD = 64, 1 << 24

T = TypeVar("T")


class Piece(NamedTuple):
    """Rows of one shard: those from `start` on that pass the strides, and `extra`.

    Attributes:
        strides: pairs (part, parts): of the rows, every `parts`-th from `part` on; of what remains, the next pair.
        extra: rows before `start`, ascending.
        group, first: where reading begins: the group that holds the first of these rows, and its first row.
        copies: of each extra row, which of its copies belong to the piece, as the bits of a number; empty: all.
    """

    shard: int
    strides: tuple[tuple[int, int], ...] = ()
    start: int = 0
    extra: tuple[int, ...] = ()
    group: int = 0
    first: int = 0
    copies: tuple[int, ...] = ()

    @classmethod
    def of_rows(cls, shard: int, rows: Sequence[int]) -> Piece:
        """These rows only, ascending."""
        return cls(shard, start=NO_ROW, extra=tuple(rows))

    def part(self, part: int, parts: int) -> Piece:
        """One of `parts` disjoint parts of this piece."""
        mine = slice(part, None, parts)
        return self._replace(strides=(*self.strides, (part, parts)), extra=self.extra[mine], copies=self.copies[mine])

    def holds(self, row: int) -> bool:
        if row < self.start:
            place = bisect.bisect_left(self.extra, row)
            return place < len(self.extra) and self.extra[place] == row
        for part, parts in self.strides:
            row, remainder = divmod(row, parts)
            if remainder != part:
                return False
        return True

    def copies_of(self, row: int) -> int:
        """Which copies of a row that the piece holds belong to it, as bits; -1, which has all bits, are all."""
        if row >= self.start or not self.copies:
            return -1
        return self.copies[bisect.bisect_left(self.extra, row)]

    @property
    def end(self) -> int:
        """No row from here on belongs to the piece."""
        return NO_ROW if self.start < NO_ROW else (self.extra[-1] + 1 if self.extra else 0)


class Row(NamedTuple):
    shard: int
    index: int  # in the shard
    values: dict[str, Any]
    copy: int = 0  # of a row that comes several times


class Stored(NamedTuple):
    """A row where it is stored: its group, the first row of this group that was read, its own number, its values."""

    group: int
    first: int
    index: int
    values: dict[str, Any]


class LaneState(TypedDict):
    """A place in a lane, in plain values.

    Attributes:
        marks: of the groups that may hold rows still to leave: rows read before it, piece, group, its first row.
        read: rows read, in all.
        next: the row of the shard that is read next.
        last: the key that left last.
        damaged: as of `Lane`; not there if nothing is.
    """

    marks: list[list[int]]
    read: int
    next: int
    last: float
    damaged: NotRequired[dict[str, str]]


class DamagedShard(Exception):
    """A shard cannot be read from here on, now or later: truncated, gone, not what its name says.

    Attributes:
        rows: that come before.
    """

    def __init__(self, reason: str, rows: int):
        super().__init__(reason)
        self.rows = rows


class Shards:
    """Access by shard to a stream of rows.

    Args:
        divided: take the groups of the shards for shards; for Parquet these are the row groups.
    """

    def __init__(self, stream: IterableDataset, divided: bool = False):
        self._stream = stream.reshard() if divided else stream
        self.num_shards: int = self._stream.num_shards
        self._blocks: dict[int, IterableDataset] = {}

    def rows(self, piece: Piece, group: int = 0, first: int = 0) -> Iterator[Stored]:
        """The rows of a piece, from the beginning of a group on.

        A group is what can be read without what lies before it: a row group of a Parquet file, elsewhere the shard.
        What breaks off for a passing reason is opened again where it broke.

        Args:
            first: the number of the group's first row.

        Raises:
            DamagedShard: it breaks off for another reason.
        """
        patience = Patience()
        groups, index = None, first
        while first < piece.end:
            try:
                if groups is None:
                    groups = self._only(piece.shard).reshard()
                while group < groups.num_shards:
                    done = index - first
                    for block in _blocks(groups, group):
                        # Of a block that was opened again, what was handed out before is left out.
                        for place in range(min(done, len(block)), len(block)):
                            if index >= piece.end:
                                return
                            if piece.holds(index):
                                yield Stored(group, first, index, block[place])
                            index += 1
                        if len(block) > done:  # it got further than before
                            patience.renew()
                        done = max(done - len(block), 0)
                    group, first = group + 1, index
                return
            except Exception as error:
                if not is_transient(error):
                    raise DamagedShard(one_line(error).rstrip("."), index) from error
                if not patience.wait(f"reading shard {piece.shard} failed: {one_line(error)}"):
                    raise

    def _only(self, shard: int) -> IterableDataset:
        """One shard; by way of a block of them, since taking one out of thousands looks at all of them."""
        size = max(math.isqrt(self.num_shards), 1)
        blocks = -(-self.num_shards // size)
        sizes = [self.num_shards // blocks + (block < self.num_shards % blocks) for block in range(blocks)]
        starts = [0, *itertools.accumulate(sizes)]
        block = next(index for index in range(blocks) if shard < starts[index + 1])
        if block not in self._blocks:
            self._blocks[block] = self._stream.shard(blocks, block)
        return self._blocks[block].shard(sizes[block], shard - starts[block])


class _Table(Sequence):
    """Rows of an Arrow table, each made a dictionary when it is asked for."""

    def __init__(self, table: Any, features: Features | None):
        self._table, self._features = table, features

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self._table.slice(index, 1).to_pylist()
        return self._features.decode_example(row) if self._features else row


def _blocks(groups: IterableDataset, group: int) -> Iterator[Sequence[dict[str, Any]]]:
    """The rows of one group, some at a time."""
    one = groups.shard(groups.num_shards, group) if groups.num_shards > 1 else groups
    # `iter`, because iterating over the stream itself divides it among the workers of a DataLoader.
    if one._ex_iterable.iter_arrow:
        # Rows that another worker keeps never become Python's.
        for table in one.with_format("arrow").iter(batch_size=TABLE_ROWS):
            yield _Table(table, one.features)
    else:
        for batch in one.iter(batch_size=1):
            yield [{column: values[0] for column, values in batch.items()}]


class Ahead(Generic[T]):
    """The same items, taken in advance by a thread, up to a number of them and of their bytes.

    What `items` raises is raised where the next item would have come. The thread ends with the items, with `close`,
    when nobody holds this any more, and at the end of the process.

    Args:
        size: bytes of an item.
    """

    def __init__(
        self,
        items: Iterator[T],
        size: Callable[[T], int],
        max_items: int = _ROWS_AHEAD,
        max_bytes: int = _BYTES_AHEAD,
    ):
        self._shelf = _Shelf(max_items, max_bytes)
        self.close = weakref.finalize(self, self._shelf.end)
        threading.Thread(target=_fill, args=(items, size, self._shelf), name="reading ahead", daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._shelf.take()
        if error is not None:
            self.close()
            raise error
        return item


class _Shelf:
    """What lies between the thread that reads and the one that decodes."""

    def __init__(self, max_items: int, max_bytes: int):
        self._max_items, self._max_bytes = max_items, max_bytes
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._room = threading.Condition()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._ended = False

    def put(self, item: Any, size: int) -> bool:
        """Waits until there is room; False where nobody takes anything any more."""
        with self._room:
            # A single item may be as large as it likes.
            while self._sizes and not self._ended:
                if len(self._sizes) < self._max_items and self._bytes + size <= self._max_bytes:
                    break
                self._room.wait()
            if self._ended:
                return False
            self._sizes.append(size)
            self._bytes += size
        self._items.put((item, None))
        return True

    def fail(self, error: BaseException) -> None:
        self._items.put((None, error))

    def take(self) -> tuple[Any, BaseException | None]:
        item, error = self._items.get()
        if error is None:
            with self._room:
                self._bytes -= self._sizes.popleft()
                self._room.notify()
        else:
            self._items.put((None, error))  # for whoever asks again
        return item, error

    def end(self) -> None:
        with self._room:
            self._ended = True
            self._room.notify()


def _fill(items: Iterator[T], size: Callable[[T], int], shelf: _Shelf) -> None:
    try:
        for item in items:
            if not shelf.put(item, size(item)):
                return
    except BaseException as error:
        shelf.fail(error)
    else:
        shelf.fail(StopIteration())
    finally:
        items.close()


class Lane:
    """What one worker reads in one epoch, shuffled.

    Args:
        window: rows move by up to so many places; 0 leaves the stored order.
        seed: of the shuffling: of run, epoch, process and worker.
        state: a former `state()`, to go on from there.
        copies: how often a row comes; by default once.

    Attributes:
        read: rows read, in all.
        damaged: number of a shard that could not be read to its end -> where and why. It ends there.
    """

    def __init__(
        self,
        shards: Shards,
        pieces: Sequence[Piece],
        window: int,
        seed: Sequence[int],
        state: LaneState | None = None,
        copies: Callable[[Row], int] | None = None,
    ):
        self._shards = shards
        self._pieces = pieces
        self._window = window
        self._keys = Keys(window, seed)
        self._copies = copies
        self._begin = tuple(state["marks"][0]) if state and state["marks"] else None
        self._last = state["last"] if state else -1.0
        self.read = 0
        self.damaged: dict[str, str] = dict(state.get("damaged", {})) if state else {}
        self._next = 0
        self._marks: deque[tuple[int, int, int, int]] = deque()

    def __iter__(self) -> Iterator[Row]:
        held: list[tuple[float, int, int, Row]] = []
        for number, piece, row in self._stored():
            copies, mine = 1 if self._copies is None else self._copies(row), piece.copies_of(row.index)
            for copy, key in enumerate(self._keys.of(number, copies)):
                if key > self._last and mine >> copy & 1:  # otherwise it has left before
                    heapq.heappush(held, (key, number, copy, row._replace(copy=copy) if copy else row))
            while held and held[0][0] < number + 1:  # no later key is smaller
                yield self._leave(held)
        while held:
            yield self._leave(held)

    def state(self) -> LaneState:
        """The place behind the row that came last, in numbers; a few dozen bytes per group within the window."""
        while len(self._marks) > 1 and self._marks[1][0] <= self._last - self._window:
            self._marks.popleft()
        marks = [list(mark) for mark in self._marks]
        state = LaneState(marks=marks, read=self.read, next=self._next, last=self._last)
        if self.damaged:
            state["damaged"] = dict(self.damaged)
        return state

    def _leave(self, held: list[tuple[float, int, int, Row]]) -> Row:
        self._last, *_, row = heapq.heappop(held)
        return row

    def _stored(self) -> Iterator[tuple[int, Piece, Row]]:
        """Numbered rows in stored order. Marks note at which number, in which piece, each group begins."""
        self.read, *begin = self._begin or (0, 0, None, None)
        current = None
        ahead = Ahead(_read(self._shards, self._pieces, *begin), _size)
        try:
            for number, found in ahead:
                piece = self._pieces[number]
                if isinstance(found, DamagedShard):
                    text = f"shard {piece.shard} ends after {found.rows} rows: {found}"
                    self.damaged.setdefault(str(piece.shard), text)
                    continue
                if (number, found.group) != current:
                    current = (number, found.group)
                    self._marks.append((self.read, number, found.group, found.first))
                self._next = found.index + 1
                self.read += 1
                yield self.read - 1, piece, Row(piece.shard, found.index, found.values)
        finally:
            ahead.close()


def _read(
    shards: Shards, pieces: Sequence[Piece], begin: int, group: int | None, first: int | None
) -> Iterator[tuple[int, Stored | DamagedShard]]:
    """Rows of pieces, with the number of the piece; of a damaged shard, what comes before the damage, and that."""
    for number in range(begin, len(pieces)):
        piece = pieces[number]
        if number > begin or group is None:
            group, first = piece.group, piece.first
        try:
            for row in shards.rows(piece, group, first):
                yield number, row
        except DamagedShard as error:
            yield number, error


def _size(item: tuple[int, Stored | DamagedShard]) -> int:
    """Bytes of a row, but for what is small."""
    _, row = item
    values = row.values.values() if isinstance(row, Stored) else ()
    parts = (part for value in values for part in (value.values() if isinstance(value, dict) else (value,)))
    return sum(len(part) for part in parts if isinstance(part, (bytes, str)))


class Keys:
    """By which rows are ordered: the first of row `n` is `n + window * u(n)`."""

    def __init__(self, window: int, seed: Sequence[int]):
        self._window, self._seed = window, seed
        self._number, self._block = -1, np.zeros(0)

    def of(self, number: int, copies: int = 1) -> list[float]:
        """The keys of a row, one for each time that it comes."""
        if not self._window:
            return [float(number)] * copies
        if number // _KEYS != self._number:
            self._number = number // _KEYS
            self._block = np.random.default_rng([*self._seed, self._number]).random(_KEYS)
        first = float(self._block[number % _KEYS])
        return [number + self._window * ((first + copy * _GOLDEN) % 1.0) for copy in range(copies)]


def deal(pieces: Sequence[Piece], hands: int) -> list[list[Piece]]:
    """Disjoint shares, whole pieces as far as they go round; the rest is divided row by row.

    Each share has as many pieces as every other. Of the rest, a piece is divided among as few hands as that allows, so
    that little is read several times: 4 pieces for 16 hands are read by 4 each.
    """
    whole = len(pieces) // hands * hands
    shares = [list(pieces[hand:whole:hands]) for hand in range(hands)]
    rest = pieces[whole:]
    groups = math.gcd(len(rest), hands)
    for number, piece in enumerate(rest):
        for part in range(hands // groups):
            shares[number % groups + part * groups].append(piece.part(part, hands // groups))
    return shares


def remaining(
    pieces: Sequence[Piece], state: LaneState | None, window: int, seed: Sequence[int], most: int = 1
) -> tuple[list[Piece], list[Piece]]:
    """What a lane left in `state` has not handed out: pieces that it has begun, and pieces it has not touched.

    Found without reading anything: keys are a function of the number of a row, and the marks tell which row has it.

    Args:
        most: copies that a row can have.
    """
    if state is None or not state["marks"]:
        return [], list(pieces)
    keys = Keys(window, seed)
    begun: dict[int, Piece] = {}
    marks = [*state["marks"], [state["read"], None, None, None]]
    for (count, number, group, first), (until, *_) in itertools.pairwise(marks):
        piece = pieces[number]
        rows = (row for row in itertools.count(first) if piece.holds(row))
        pending = {}
        for key, row in zip(range(count, until), rows, strict=False):
            later = sum(1 << copy for copy, place in enumerate(keys.of(key, most)) if place > state["last"])
            if later & piece.copies_of(row):
                pending[row] = later & piece.copies_of(row)
        if number not in begun:
            begun[number] = Piece(piece.shard, start=NO_ROW, group=group, first=first)
        if pending and not begun[number].extra:
            begun[number] = begun[number]._replace(group=group, first=first)
        begun[number] = _with_extra(begun[number], pending, most)
    _, number, group, first = state["marks"][-1]
    piece, last = pieces[number], begun[number]
    if not last.extra:
        last = last._replace(group=group, first=first)
    # Extra rows of a piece that was such a remainder itself may not have been reached.
    beyond = {row: piece.copies_of(row) for row in piece.extra if row >= state["next"]}
    start = max(piece.start, state["next"])
    begun[number] = _with_extra(last._replace(strides=piece.strides, start=start), beyond, most)
    return [piece for piece in begun.values() if piece.end], list(pieces[number + 1 :])


def _with_extra(piece: Piece, rows: dict[int, int], most: int) -> Piece:
    """With more extra rows, and which copies of them; where there is but one, that says itself."""
    copies = piece.copies + tuple(rows.values()) if most > 1 else ()
    return piece._replace(extra=piece.extra + tuple(rows), copies=copies)


class Order:
    """Who reads what in each epoch, as a process sees it; the same for all that are given the same numbers.

    Args:
        stream: undecoded rows.
        shuffle: the shards anew in each epoch, and the rows of each lane within a window of `2 * buffer_size`, so that
            it holds about `buffer_size` of them.
        num_workers: how many lanes there are; one where there are none.
        local: a row that two lanes read costs little. Of remote data it would be downloaded twice: there no piece is
            divided among the lanes of a process, and these are at most as many as its pieces.
        divided: see `Shards`. By default where whole shards would not go round evenly and are few.
        repeats: how often rows come; once each if there is none. Only for a stream that is shuffled.

    Attributes:
        start: the place to go on from, in the epoch it belongs to; what `ImageLoader.load_state_dict` found out.
    """

    def __init__(
        self,
        stream: IterableDataset,
        *,
        shuffle: bool,
        buffer_size: int,
        seed: int,
        process_index: int,
        num_processes: int,
        num_workers: int,
        local: bool = True,
        divided: bool | None = None,
        repeats: Repeats | None = None,
    ):
        self.stream = stream
        self.repeats = repeats
        self.shuffle, self.seed, self.window = shuffle, seed, 2 * buffer_size if shuffle else 0
        self.process_index, self.num_processes = process_index, num_processes
        hands = max(num_workers, 1) * num_processes
        if divided is None:
            few = stream.num_shards < (_FEW * hands if local else hands)
            divided = few and stream.num_shards % hands > 0
        self.divided = divided
        self.start: Start | None = None
        self._shards: dict[bool, Shards] = {}
        self.num_shards = self.shards(divided).num_shards
        self.local = local
        share = len(deal([Piece(shard) for shard in range(self.num_shards)], num_processes)[process_index])
        self.num_workers = num_workers if local else min(num_workers, share)

    @property
    def layout(self) -> dict[str, int]:
        """What must be equal for a place to mean the same."""
        return {
            "seed": self.seed,
            "window": self.window,
            "num_processes": self.num_processes,
            "lanes": max(self.num_workers, 1),
            "local": self.local,
            "most": self.repeats.most if self.repeats else 1,
        }

    def __str__(self) -> str:
        """How the data is dealt, in words."""
        pieces = fresh_pieces(self.num_shards, False, 0, self.layout, self.process_index)[0]
        undivided = self.stream.num_shards
        what = f"{undivided} shard{'s' * (undivided != 1)}"
        if self.divided and self.num_shards != undivided:
            what += f" in {self.num_shards} parts"
        hands = f"{max(self.num_workers, 1)} data worker{'s' * (self.num_workers > 1)}"
        if self.num_processes > 1:
            hands += f" of each of {self.num_processes} processes"
        whole = sum(not piece.strides for piece in pieces)
        shared = len(pieces) - whole
        parts = [f"{whole} whole"] if whole else []
        if shared:
            every = math.prod(parts for _, parts in pieces[-1].strides)
            parts.append(f"1 row in {every} of {shared}{' more' if whole else ''}")
        return f"{what} for {hands}, which read{'s' * (self.num_workers < 2)} {' and '.join(parts)}"

    def shards(self, divided: bool) -> Shards:
        if divided not in self._shards:
            self._shards[divided] = Shards(self.stream, divided)
        return self._shards[divided]

    def lane(self, epoch: int, worker: int) -> tuple[int, Lane]:
        """The number of a worker's lane, and what it reads."""
        start, lanes = self.start_of(epoch), self.layout["lanes"]
        number = (worker + start.turn) % lanes
        pieces = self.pieces(epoch)[number]
        seed = lane_seed(self.seed, epoch, self.process_index, number)
        state = start.states[number] if start.states else None
        copies = self.repeats.draws(self.seed, epoch) if self.repeats else None
        return number, Lane(self.shards(start.divided), pieces, self.window, seed, state, copies)

    def pieces(self, epoch: int) -> list[list[Piece]]:
        """By lane of this process."""
        start = self.start_of(epoch)
        if start.pieces is not None:
            return start.pieces
        num_shards = self.shards(start.divided).num_shards
        return fresh_pieces(num_shards, self.shuffle, epoch, self.layout, self.process_index)

    def start_of(self, epoch: int) -> Start:
        return self.start if self.start and self.start.epoch == epoch else Start(epoch, self.divided)


class Start(NamedTuple):
    """Where an epoch begins: at its beginning, unless told otherwise.

    Attributes:
        turn: the lane whose batch comes first.
        states: by lane.
        pieces: by lane, where they are not dealt out as usual.
    """

    epoch: int
    divided: bool
    turn: int = 0
    states: list[LaneState | None] | None = None
    pieces: list[list[Piece]] | None = None


def lane_seed(seed: int, epoch: int, process_index: int, number: int) -> tuple[int, ...]:
    return seed, epoch, process_index, number


def fresh_pieces(
    num_shards: int, shuffle: bool, epoch: int, layout: Mapping[str, int], process_index: int
) -> list[list[Piece]]:
    """What the lanes of a process read in an epoch that nothing has interrupted."""
    shards = np.arange(num_shards)
    if shuffle:
        shards = np.random.default_rng([layout["seed"], epoch]).permutation(num_shards)
    share = deal([Piece(int(shard)) for shard in shards], layout["num_processes"])[process_index]
    return among_lanes(share, layout)


def among_lanes(pieces: Sequence[Piece], layout: Mapping[str, int]) -> list[list[Piece]]:
    """By lane, what one process reads."""
    lanes = layout["lanes"]
    return deal(pieces, lanes) if layout["local"] else [list(pieces[number::lanes]) for number in range(lanes)]
