"""What a cell writes to its console, kept within bounds while it is written: the beginning and the end."""

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

_BEGINNING = 1 << 20  # bytes: they are in the file at once
_END = 1 << 20  # bytes: they are in the file when the cell has ended
_PIECE = 1 << 16


class Output:
    """The end of a pipe that a cell writes to, and the file that its beginning and its end are kept in.

    The file comes with the first byte. What cannot be written to it, as on a full disk, is lost: no cell fails because
    of what it prints.

    Args:
        descriptor: Of the pipe, which is read without waiting.
        file: Where to; overwritten.
    """

    def __init__(self, descriptor: int, file: Path) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._path = file
        self._file: IO[bytes] | None = None
        self._room, self._left_out = _BEGINNING, 0
        self._end = bytearray()

    def read(self) -> bool:
        """Take some of what is in the pipe; say whether more may follow."""
        try:
            piece = os.read(self.descriptor, _PIECE)
        except BlockingIOError:
            return False
        first, rest = piece[: self._room], piece[self._room :]
        self._room -= len(first)
        self._write(first)
        self._end += rest
        excess = max(0, len(self._end) - _END)
        del self._end[:excess]
        self._left_out += excess
        return bool(piece)

    def close(self) -> None:
        """Take what is left in the pipe, and write the end."""
        for _ in range(_END // _PIECE):  # no more than a pipe holds: what has outlived the cell may write for ever
            if not self.read():
                break
        if self._left_out:
            self._write(f"\n[... {self._left_out:,} bytes are left out here ...]\n".encode())
        self._write(self._end)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _write(self, content: bytes | bytearray) -> None:
        with suppress(OSError):
            if content and self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("wb", buffering=0)
            if content and self._file is not None:
                self._file.write(content)
