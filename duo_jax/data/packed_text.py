"""Text that is packed with zstd, unpacked as it is read, at a bounded cost."""

import io
import pathlib
from typing import Any

from duo_jax.errors import InputError

_STEP = 512  # packed bytes taken at a time; the format unpacks 4 bytes to 128 KB at most
_MOST_EXPANSION = 1000  # text packs 3- to 10-fold; a line that repeats, 100-fold
_FREE = 1 << 26  # bytes that any file may unpack to, such as one word over and over


class ZstdReader(io.RawIOBase):
    """The bytes of all frames of a file.

    zstandard's own reader hides a cut-off end, and unpacks whatever it is given at once.

    Raises:
      InputError: when read: the file is no zstd file, is cut short, or expands as no text does.
    """

    def __init__(self, path: pathlib.Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()  # making one takes longer than its work
        self._path = path
        self._packed = path.open("rb")
        self._frame: Any = None
        self._rest = b""  # packed
        self._ready = memoryview(b"")  # unpacked
        self._num_packed = self._num_unpacked = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._unpack():
                return 0
        size = min(len(out), len(self._ready))
        out[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _unpack(self) -> bool:
        """Unpack a little more; return whether there was anything."""
        if not self._rest:
            self._rest = self._packed.read(_STEP)
            self._num_packed += len(self._rest)
        if not self._rest:
            if self._frame is not None and not self._frame.eof:
                raise InputError(f"{self._path} is cut short: its last zstd frame has no end")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        try:
            unpacked = self._frame.decompress(self._rest)
        except self._error as error:
            raise InputError(f"{self._path} is not a zstd file: {error}") from None
        self._rest = self._frame.unused_data
        self._ready = memoryview(unpacked)
        self._num_unpacked += len(unpacked)
        if self._num_unpacked > _FREE + _MOST_EXPANSION * self._num_packed:
            raise InputError(
                f"{self._path} unpacks to more than {_MOST_EXPANSION:,} times its size: no text"
            )
        return True
