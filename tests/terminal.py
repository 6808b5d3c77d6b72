"""A command at a terminal of its own, and what a person would see there."""

import os
import re
import struct
import subprocess
import threading

import pytest

fcntl = pytest.importorskip("fcntl", reason="needs POSIX terminals")
termios = pytest.importorskip("termios")

# The codes that Rich sends: colours and cursor shown or hidden, up, and erase the line.
CODE = re.compile(rb"\033\[([?\d;]*)([A-Za-z])|(\r?\n)|(\r)|([^\033\r\n]+)")


def at_terminal(
    command: list[str],
    width: int = 80,
    height: int = 24,
    results: bool = True,
    typed: bytes = b"",
    **options,
) -> tuple[int, bytes, bytes]:
    """Exit code, what came to the terminal, and what came to stdout if `results` is not set.

    stderr is the terminal, and stdout too unless it is a pipe. `typed` is typed ahead.
    """
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    os.write(leader, typed)
    stdout = follower if results else subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=follower, stdout=stdout, stderr=follower, close_fds=True, **options
    )
    os.close(follower)
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # Linux, once nobody holds the other end
                return
            if not part:
                return
            seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    piped, _ = process.communicate(timeout=120)
    reader.join()
    os.close(leader)
    return process.returncode, bytes(seen), piped or b""


def screen(seen: bytes) -> list[str]:
    """The lines that are left. ValueError for a code that this does not know."""
    lines, row, column, at = [""], 0, 0, 0
    for match in CODE.finditer(seen):
        if match.start() != at:
            raise ValueError(seen[at : match.start() + 1])
        at = match.end()
        count, name, newline, back, text = match.groups()
        if newline:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif back:
            column = 0
        elif text:
            word = text.decode()
            lines[row] = lines[row][:column].ljust(column) + word + lines[row][column + len(word) :]
            column += len(word)
        elif name == b"A":
            row = max(row - int(count), 0)
        elif (name, count) == (b"K", b"2"):
            lines[row] = ""
        elif name not in b"mhl":
            raise ValueError(match[0])
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")
