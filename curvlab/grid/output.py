"""Console output of a run, of which the beginning and the end are kept."""

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

_BEGINNING = 1 << 20  # bytes, written to the file at once
_END = 1 << 20  # bytes, written to the file when the run has ended
_PIECE = 1 << 16


class Output:
    """The reading end of a pipe that a run writes to, and the file that keeps the beginning and the end.

    The file is created with the first byte. Output that cannot be written, as on a full disk, is dropped: a run does
    not fail because of its output.

    Args:
        descriptor: Reading end of the pipe; it is set to non-blocking.
        file: File for the output; overwritten.
    """

    def __init__(self, descriptor: int, file: Path) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._path = file
        self._file: IO[bytes] | None = None
        self._room, self._left_out = _BEGINNING, 0
        self._end = bytearray()

    def read(self) -> bool:
        """Read a piece from the pipe, and return whether more may follow."""
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
        """Read the rest of the pipe, and write the end to the file."""
        for _ in range(_END // _PIECE):  # at most what a pipe holds: a process that outlives the run may write forever
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
