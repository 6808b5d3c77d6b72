"""A `sana` that starts at once: a server forks a process for each, with the imports behind it.

torch's imports take longer than what most tests run, and some tests start dozens of processes.

`python forks.py SOCKET` serves until its stdin ends; `python forks.py SOCKET WORDS…` is the
command. Between them go the command's three streams, its words, folder and environment, and back
its process id and its exit code. SIGINT and SIGTERM are passed on; a command that dies takes its
process with it. With SANA_TEST_KILL=N the process is killed at the N-th lasting change it makes,
half of what it was about to write being written; with SANA_TEST_KILL_AFTER=S after so many seconds.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys


def ask(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        order = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)})
        # Signals that come before the process is there have to wait for it.
        passed_on = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
        socket.send_fds(line, [b"\0"], [0, 1, 2])
        line.sendall(order.encode() + b"\n")
        answers = line.makefile()
        child = int(answers.readline())
        for number in passed_on:
            signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        return int(answers.readline())


def serve(path: str) -> None:
    gc.disable()
    import filelock  # noqa: F401
    import httpx2  # noqa: F401
    import PIL.PngImagePlugin  # noqa: F401
    import rich.progress  # noqa: F401
    import torch._dynamo  # noqa: F401 - counting on the meta device imports it
    import uvicorn  # noqa: F401

    import sana_cli.app
    import sana_cli.batch.run
    import sana_cli.batch.this_process
    import sana_cli.pipeline.draw
    import sana_cli.pipeline.text_encoder
    import sana_cli.server.app
    import sana_cli.ui

    sana_cli.app.command()

    # Its constants are read from the environment as it is imported.
    assert "huggingface_hub" not in sys.modules
    gc.freeze()  # or every process would look for garbage among the imports, and copy them
    gc.enable()
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:  # closed: the tests are over, or were killed
            return
        line, _ = server.accept()
        if not os.fork():
            server.close()
            answer(line)
        line.close()


def reap() -> None:
    """Wait for those who have answered: what they took then counts as the tests' own time."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(line: socket.socket) -> None:
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    order = json.loads(line.makefile().readline())
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    child = os.fork()
    if not child:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        line.close()
        become(order, streams)
    for stream in streams:
        os.close(stream)
    line.sendall(f"{child}\n".encode())
    after = order["env"].get("SANA_TEST_KILL_AFTER")
    ready, _, _ = select.select([line, ended], [], [], float(after) if after else None)
    if ended not in ready:  # time is up, or whoever asked is gone
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        line.sendall(f"{code}\n".encode())
    os._exit(0)


def become(order: dict, streams: list[int]) -> None:
    from sana_cli.app import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if place := order["env"].get("SANA_TEST_KILL"):
        die_at(int(place))
    sys.argv = ["sana", *order["words"]]
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = 120  # as of Python
        os._exit(code)


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
