"""A server that forks a process for each `sana`, with the imports behind it: torch's take longer
than a small batch, and a test of kills or of scripts starts dozens.

`python forks.py SOCKET` serves; `python forks.py SOCKET WORDS…` is the command. Between them go
the command's three streams, its words, folder and environment, and back its exit code. With
SANA_TEST_KILL=N the process is killed at the N-th lasting change it makes, half of what it was
about to write being written; with SANA_TEST_KILL_AFTER=S after so many seconds.
"""

import json
import os
import signal
import socket
import sys


def ask(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        order = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)})
        socket.send_fds(line, [b"\0"], [0, 1, 2])
        line.sendall(order.encode() + b"\n")
        return int(line.makefile().readline())


def serve(path: str) -> None:
    import filelock  # noqa: F401
    import PIL.PngImagePlugin  # noqa: F401
    import torch  # noqa: F401

    import sana_cli.app
    import sana_cli.batch.run
    import sana_cli.batch.runner
    import sana_cli.pipeline.text_encoder  # noqa: F401

    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        line, _ = server.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            answer(line)
        line.close()


def answer(line: socket.socket) -> None:
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    order = json.loads(line.makefile().readline())
    child = os.fork()
    if not child:
        become(order, streams)
    for stream in streams:
        os.close(stream)
    if after := order["env"].get("SANA_TEST_KILL_AFTER"):
        import time

        time.sleep(float(after))
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line.sendall(f"{code}\n".encode())
    os._exit(0)


def become(order: dict, streams: list[int]) -> None:
    from sana_cli.app import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if place := order["env"].get("SANA_TEST_KILL"):
        die_at(int(place))
    sys.argv = ["sana", *order["words"]]
    try:
        main()
    except SystemExit as stop:
        os._exit(stop.code or 0)


def die_at(place: int) -> None:
    import tempfile

    left = [place]
    write = os.write

    def dying(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if real is write:
                    write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os.write, os.fsync, os.link = dying(os.write), dying(os.fsync), dying(os.link)
    tempfile.mkstemp = dying(tempfile.mkstemp)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
