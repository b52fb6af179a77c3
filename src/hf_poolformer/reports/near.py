"""Pictures that show the same although their pixels differ: resized, encoded anew, brightened, cropped, mirrored.

Each picture has a descriptor, its lowest frequencies, and pictures whose descriptors point nearly the same way are
candidates. One thumbnail of a candidate is then laid upon the other, stretched and shifted until it fits best, as a
crop needs. What decides is how the details correlate, edges and texture, whatever brightness and contrast are.

No fixed limit does for all datasets: two photographs never look alike by chance, two shirts on white nearly always do.
So a pair counts where its pictures are much nearer to each other than each is to what lies around it.

Measured, when the limits below were chosen, on 226 photographs and drawings (scikit-image, Tux Paint), of each a copy
that was resized, encoded anew (JPEG, quality 60), cropped by up to 4 % or made brighter or darker: see the constants.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image


SIDE = 32  # of a thumbnail
# Standard deviation of a thumbnail, of 255 grey values, below which there is nothing that could be compared.
FLAT = 2.0
# Frequencies of a descriptor in each direction. A crop of 4 % moves the higher ones too far.
_LOW = 8
# Rows and columns of the products in which descriptors are compared, and pairs that are aligned at a time: what fits
# into a cache of some megabytes.
_ROWS, _COLUMNS, _PAIRS = 512, 8192, 256
# What lies around a picture is looked for among so many, evenly spread; the one of this rank counts, since those that
# are nearer may be copies. Where there are fewer than so many in all, nothing can be told of it.
_AROUND, _RANK, _FEW = 4096, 5, 20
# A candidate: cosine of the descriptors, and its distance to 1 at most so many times that of what lies around. That
# holds for 98 % of the copies (of crops of 4 % at two sides: 94 %). Among pictures that look alike, a crop leads away:
# of clothes (Fashion-MNIST) that were moved by one pixel of 28 it holds for 37 %.
_ALIKE, _NEARER = 0.6, 0.7
_MOST = 2  # candidates of a picture; copies of copies are found through each other
# A pair: correlation of the details, and its distance to 1 at most so many times that of what lies around. That finds
# 94 % of the copies of photographs. In Fashion-MNIST it finds 94 % of what was encoded anew, and among its own 70 000
# pictures 501 pairs, of which about two thirds are one thing to the eye; with 0.2 it would be 2.5 times as many.
_DETAIL, _APART = 0.85, 0.15
# So alike that what lies around does not matter: 47 of these pairs.
_CERTAIN = 0.995
# Fitting: steps, limits of stretching (a part of the side) and shift (pixels of a thumbnail), what is cut off after.
_STEPS, _STRETCH, _SHIFT, _EDGE = 3, 0.1, 2.0, 3


def thumbnail_of(picture: Image.Image | np.ndarray) -> np.ndarray:
    """(SIDE, SIDE) uint8, grey: the whole picture, squeezed into a square.

    Args:
        picture: an image, or an array (height, width, channels) of values from 0 to 255.
    """
    exact = isinstance(picture, Image.Image)
    grey = picture.convert("L") if exact else Image.fromarray(picture.mean(2, dtype=np.float32))
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0))
    return small if exact else small.round().clip(0, 255).astype(np.uint8)


class Pairs(NamedTuple):
    """Pairs of pictures, the earlier one `left`.

    Attributes:
        score: correlation of their details, at most 1.
        mirrored: whether one is the mirror image of the other.
    """

    left: np.ndarray
    right: np.ndarray
    score: np.ndarray
    mirrored: np.ndarray


class _Descriptors(NamedTuple):
    """Unit vectors in two parts: what a mirror leaves as it is, and what changes its sign, if it is known."""

    even: np.ndarray
    odd: np.ndarray | None

    def cosines(self, rows: slice | np.ndarray, columns: slice | np.ndarray) -> np.ndarray:
        """(rows, columns), of the pictures as they are or mirrored, whichever is nearer."""
        found = self.even[rows] @ self.even[columns].T
        if self.odd is not None:
            found += np.abs(self.odd[rows] @ self.odd[columns].T)
        return found


def near_pairs(thumbnails: np.ndarray, embeddings: np.ndarray | None = None) -> Pairs:
    """Pairs of pictures that show the same.

    100 000 take about a minute of one core, and time grows with the square of the number; memory is some 300 bytes for
    each, beside the thumbnails, which are read where they lie.

    Args:
        thumbnails: (N, SIDE, SIDE) uint8, none of them `FLAT`, in memory or mapped.
        embeddings: (N, D) features of a model; pictures whose features are alike are candidates, too.
    """
    own = _lowest_frequencies(thumbnails)
    around, left, right = _candidates(own)
    if embeddings is not None:
        values = embeddings - embeddings.mean(0)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
        _, more_left, more_right = _candidates(_Descriptors(values, None))
        both = np.unique(np.stack([np.append(left, more_left), np.append(right, more_right)]), axis=1)
        left, right = both
    mirrored = _mirrored(own, left, right)
    detail = _details(thumbnails, left, right, mirrored)
    kept = detail >= _DETAIL
    left, right, mirrored, detail = left[kept], right[kept], mirrored[kept], detail[kept]
    others = np.zeros(len(thumbnails), np.float32)
    concerned = np.unique(np.append(left, right))
    concerned = concerned[around[concerned] >= 0]
    opposite = around[concerned]
    others[concerned] = _details(thumbnails, concerned, opposite, _mirrored(own, concerned, opposite)).clip(0)
    apart = (1 - detail) <= _APART * (1 - np.maximum(others[left], others[right]))
    kept = apart | (detail >= _CERTAIN)
    return Pairs(left[kept], right[kept], detail[kept], mirrored[kept])


def _lowest_frequencies(thumbnails: np.ndarray) -> _Descriptors:
    # The first basis vectors of the discrete cosine transform.
    basis = np.cos(np.pi * np.outer(np.arange(_LOW), np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)
    basis[0] /= np.sqrt(2)
    found = np.empty((len(thumbnails), _LOW, _LOW), np.float32)
    for start in range(0, len(thumbnails), _COLUMNS):
        some = slice(start, start + _COLUMNS)
        found[some] = basis @ thumbnails[some].astype(np.float32) @ basis.T
    found[:, 0, 0] = 0  # the brightness
    found /= np.maximum(np.linalg.norm(found, axis=(1, 2), keepdims=True), 1e-6)
    # Across, every second basis vector of the cosine transform is its own mirror image, the others are its negative.
    parts = (found[:, :, parity::2].reshape(len(found), -1) for parity in (0, 1))
    return _Descriptors(*map(np.ascontiguousarray, parts))


def _candidates(descriptors: _Descriptors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each picture one that lies around it, or -1; and the left and right pictures of pairs."""
    number = len(descriptors.even)
    some = np.unique(np.linspace(0, number - 1, min(number, _AROUND)).astype(np.int64))
    around = np.full(number, -1)
    limits = np.full(number, _ALIKE, np.float32)
    for start in range(0, number if number > _FEW else 0, _ROWS):
        rows = slice(start, min(start + _ROWS, number))
        found = descriptors.cosines(rows, some)
        found[some == np.arange(rows.start, rows.stop)[:, None]] = -1
        place = np.argpartition(found, -_RANK, axis=1)[:, -_RANK, None]
        around[rows] = some[place[:, 0]]
        limits[rows] = 1 - _NEARER * (1 - np.take_along_axis(found, place, axis=1)[:, 0])
    limits = limits.clip(_ALIKE, 1 - 1e-3)
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for start in range(0, number, _ROWS):
        rows = slice(start, min(start + _ROWS, number))
        left, right, found = (list[np.ndarray]() for _ in range(3))
        for first in range(start, number, _COLUMNS):
            values = descriptors.cosines(rows, slice(first, first + _COLUMNS))
            row, column = np.divmod(np.flatnonzero(values > limits[rows, None]), values.shape[1])
            kept = (start + row < first + column) & (values[row, column] > limits[first + column])
            row, column = row[kept], column[kept]
            left.append(start + row)
            right.append(first + column)
            found.append(values[row, column])
        pairs.append(_nearest(*map(np.concatenate, (left, right, found))))
    return around, *(np.concatenate(side) for side in zip(*pairs, strict=True))


def _nearest(left: np.ndarray, right: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each left picture the nearest few right ones."""
    order = np.lexsort((-found, left))
    left, right = left[order], right[order]
    rank = np.arange(len(left)) - np.searchsorted(left, left)
    return left[rank < _MOST], right[rank < _MOST]


def _mirrored(descriptors: _Descriptors, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each pair, whether it is nearer when one is mirrored."""
    return np.einsum("ij,ij->i", descriptors.odd[left], descriptors.odd[right]) < 0


def _details(thumbnails: np.ndarray, left: np.ndarray, right: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Of each pair, how the details correlate where the pictures fit best."""
    found = np.empty(len(left), np.float32)
    for start in range(0, len(left), _PAIRS):
        some = slice(start, start + _PAIRS)
        ours, theirs = (thumbnails[side[some]].astype(np.float32) for side in (left, right))
        ours[mirrored[some]] = ours[mirrored[some], :, ::-1]
        fitted = _fitted(ours, theirs)
        inner = slice(_EDGE, -_EDGE)
        ours, theirs = (
            (picture - _blurred(_blurred(picture)))[:, inner, inner].reshape(len(picture), -1)
            for picture in (fitted, theirs)
        )
        ours, theirs = (values - values.mean(1, keepdims=True) for values in (ours, theirs))
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        found[some] = np.einsum("ij,ij->i", ours, theirs) / np.maximum(norms, 1e-6)
    return found


# Coordinates of a thumbnail's pixels, from its middle.
_PLACES = (np.arange(SIDE) - (SIDE - 1) / 2).astype(np.float32)


def _fitted(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Our pictures, stretched and shifted, in both directions, so that they lie upon theirs.

    Steps of Gauss and Newton (Lucas and Kanade): theirs ~ gain * ours(warped) + offset, linear in gain, offset and
    small changes of the warp.
    """
    warp = np.zeros((len(ours), 4), np.float32)  # stretch and shift down, stretch and shift across
    bounds = np.array([_STRETCH, _SHIFT, _STRETCH, _SHIFT], np.float32)
    smooth, inner = _blurred(ours), slice(1, -1)
    wanted = _blurred(theirs)[:, inner, inner].reshape(len(theirs), -1, 1)
    places = _PLACES[inner]
    for _ in range(_STEPS):
        now = _warped(smooth, warp)
        down = (now[:, 2:, inner] - now[:, :-2, inner]) / 2
        across = (now[:, inner, 2:] - now[:, inner, :-2]) / 2
        now = now[:, inner, inner]
        slopes = np.stack([down * places[:, None], down, across * places, across, now, np.ones_like(now)], axis=1)
        slopes = slopes.reshape(len(ours), 6, -1)
        normal = slopes @ slopes.transpose(0, 2, 1)
        # A little towards no change at all, where a picture is the same all along a direction.
        normal += 1e-5 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(6, dtype=np.float32)
        change = np.linalg.solve(normal, slopes @ wanted)[:, :, 0]
        warp = np.clip(warp + change[:, :4] / np.maximum(np.abs(change[:, 4:5]), 0.2), -bounds, bounds)
    return _warped(ours, warp)


def _warped(pictures: np.ndarray, warp: np.ndarray) -> np.ndarray:
    return _resampling(warp[:, :2]) @ pictures @ _resampling(warp[:, 2:]).transpose(0, 2, 1)


def _resampling(warp: np.ndarray) -> np.ndarray:
    """(N, SIDE, SIDE): matrices that interpolate between pixels at the places that a warp wants."""
    wanted = np.clip(_PLACES * (1 + warp[:, :1]) + warp[:, 1:], -_PLACES[-1], _PLACES[-1])
    return np.maximum(0, 1 - np.abs(wanted[:, :, None] - _PLACES))


def _blurred(pictures: np.ndarray) -> np.ndarray:
    """Each pixel a mean of itself and its neighbours."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16
