"""Raw latencies of a run of any length: every one kept, in order, in little memory.

Ten minutes of a network that takes 17 µs are 35 million latencies. They are packed in pieces while the run
goes on, between its blocks, and wait in a file that has no name. In JSON a short run is a list of numbers and
a long one

    {"coding": "indexed-planes-zlib-base64", "num_samples": n, "pieces": ["...", ...]}

Each piece is base64 of zlib of byte planes of unsigned 64-bit numbers, first the lowest bytes of all of them,
then the next ones, up to the 8th. The numbers are k, then the k different latencies of the piece in ns in
ascending order, each less the one before it, then for each latency in turn its index among them. A clock
that ticks in 10 ns leaves few of them, so that a latency takes about 1.2 bytes, the entropy of its noise.
"""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
import zlib
from array import array
from typing import IO, Any, Dict, Iterable, Iterator, List, Optional, Union

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

CODING = "indexed-planes-zlib-base64"
MAX_PLAIN = 50_000
"""Latencies that JSON holds as a list; of more they are packed."""

PIECE_SAMPLES = 65_536
ITEM_BYTES = 8


class SampleStore:
    """Latencies of one session, block by block; what is beyond a piece is in a file.

    Attributes:
        block_lengths: latencies in each block.
        num_samples: in all of them.
        total_ns: their sum.

    Example:
        >>> store = SampleStore()
        >>> store.append([30, 10]), store.append([20])
        (False, False)
        >>> [block.tolist() for block in store.blocks()], store.to_json(), store.total_ns
        ([[30, 10], [20]], [30, 10, 20], 60)
    """

    def __init__(self) -> None:
        self.block_lengths: List[int] = []
        self.num_samples = 0
        self.total_ns = 0
        self._pending = array("q")
        self._piece_bytes: List[int] = []
        self._file: Optional[IO[bytes]] = None

    def append(self, block: Iterable[int]) -> bool:
        """Keep a block of latencies in ns, and tell whether a piece was packed, which empties the caches.

        Raises:
            OSError: if the file cannot be written.
        """
        earlier = len(self._pending)
        self._pending.extend(block)
        length = len(self._pending) - earlier
        self.block_lengths.append(length)
        self.num_samples += length
        self.total_ns += sum(self._pending[earlier:])
        if len(self._pending) < PIECE_SAMPLES:
            return False
        if self._file is None:
            folder = os.curdir if os.access(os.curdir, os.W_OK) else None
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the store lives
        piece = pack(np.frombuffer(self._pending, np.int64))
        self._file.seek(0, os.SEEK_END)
        self._file.write(piece)
        self._piece_bytes.append(len(piece))
        self._pending = array("q")
        return True

    def chunks(self) -> Iterator[Int64Array]:
        """Yield all latencies in order, a piece at a time."""
        for piece in self._pieces():
            yield unpack_piece(piece)
        if self._pending:
            yield np.array(self._pending, np.int64)

    def blocks(self) -> Iterator[Int64Array]:
        """Yield the latencies of each block."""
        lengths = iter(self.block_lengths)
        rest = np.empty(0, np.int64)
        length = next(lengths, None)
        for chunk in self.chunks():
            rest = np.concatenate([rest, chunk])
            while length is not None and length <= len(rest):
                yield rest[:length]
                rest = rest[length:]
                length = next(lengths, None)

    def between(self, start: int, stop: int) -> Iterator[Int64Array]:
        """Yield the latencies from index `start` to before `stop`, a piece at a time."""
        first = 0
        for chunk in self.chunks():
            part = chunk[max(start - first, 0) : max(stop - first, 0)]
            first += len(chunk)
            if len(part):
                yield part

    def to_json(self) -> Union[List[int], Dict[str, Any]]:
        """Return a list, or of a long run packed pieces that are read when they are written."""
        if self.num_samples <= MAX_PLAIN:
            return [sample for chunk in self.chunks() for sample in chunk.tolist()]
        return {"coding": CODING, "num_samples": self.num_samples, "pieces": Pieces(self)}

    def texts(self) -> Iterator[str]:
        """Yield the packed pieces in base64."""
        for piece in self._pieces():
            yield base64.b64encode(piece).decode("ascii")
        if self._pending:
            yield base64.b64encode(pack(np.frombuffer(self._pending, np.int64))).decode("ascii")

    def _pieces(self) -> Iterator[bytes]:
        position = 0
        for size in self._piece_bytes:
            if self._file is not None:
                self._file.seek(position)
                yield self._file.read(size)
            position += size


class Pieces:
    """The pieces of a store in a result, read when it is written."""

    def __init__(self, store: SampleStore) -> None:
        self._store = store

    def listed(self) -> List[str]:
        """Return what the JSON encoder takes for a list while it writes bit by bit."""
        return _Stream(self._store)


class _Stream(List[str]):
    """A list whose items are made one by one and are never all there."""

    def __init__(self, store: SampleStore) -> None:
        super().__init__([""])  # an empty list would be written without asking for its items
        self._store = store

    def __iter__(self) -> Iterator[str]:
        return self._store.texts()


def pack(samples: Int64Array) -> bytes:
    """Return the packed form of latencies in ns, none negative.

    Example:
        >>> unpack_piece(pack(np.array([17_123, 16_998, 5_000_000_000]))).tolist()
        [17123, 16998, 5000000000]
    """
    values, indices = np.unique(samples, return_inverse=True)
    numbers = np.concatenate([[len(values)], np.diff(values, prepend=0), indices.reshape(-1)])
    items = numbers.astype("<u8").view(np.uint8).reshape(-1, ITEM_BYTES)  # (1 + k + n, 8)
    # without the search for repetitions, of which noise has none but short and useless ones
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(np.ascontiguousarray(items.T).tobytes()) + packer.flush()


def unpack_piece(piece: bytes) -> Int64Array:
    """Return the latencies of one packed piece.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        planes = np.frombuffer(zlib.decompress(piece), np.uint8)
        items = np.ascontiguousarray(planes.reshape(ITEM_BYTES, -1).T)  # (1 + k + n, 8)
        numbers = items.view("<u8").reshape(-1).astype(np.int64)
        end = 1 + int(numbers[0])
        samples: Int64Array = np.cumsum(numbers[1:end])[numbers[end:]]
    except (zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"packed samples are damaged: {error}") from error
    return samples


def pack_json(samples: Int64Array) -> Union[List[int], Dict[str, Any]]:
    """Return latencies in ns as JSON holds them: a list, or packed above MAX_PLAIN."""
    if len(samples) <= MAX_PLAIN:
        return [int(sample) for sample in samples]
    starts = range(0, len(samples), PIECE_SAMPLES)
    pieces = [pack(samples[start : start + PIECE_SAMPLES]) for start in starts]
    texts = [base64.b64encode(piece).decode("ascii") for piece in pieces]
    return {"coding": CODING, "num_samples": len(samples), "pieces": texts}


def unpack_json(value: Any) -> Int64Array:
    """Return latencies in ns of what JSON holds, a list or packed.

    Raises:
        ValueError: if it is neither, or damaged.

    Example:
        >>> unpack_json([3, 1]).tolist(), int(unpack_json(pack_json(np.arange(60_000)))[-1])
        ([3, 1], 59999)
    """
    if isinstance(value, list):
        if not all(type(sample) is int for sample in value):
            raise ValueError("samples are expected to be whole numbers of ns")
        return np.array(value, np.int64)
    if not isinstance(value, dict) or value.get("coding") != CODING:
        raise ValueError(f"samples are expected to be a list, or packed with the coding {CODING}")
    try:
        pieces = [base64.b64decode(text, validate=True) for text in value["pieces"]]
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"packed samples are damaged: {error}") from error
    samples = np.concatenate([np.empty(0, np.int64), *map(unpack_piece, pieces)])
    if len(samples) != value.get("num_samples"):
        raise ValueError(f"packed samples hold {len(samples)}, expected {value.get('num_samples')}")
    return samples
