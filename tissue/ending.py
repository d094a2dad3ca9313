"""How a script takes it that its user leaves: Ctrl-C, and output that nobody reads any more.

Imports next to nothing, because scripts call `end_at_once` before all that they import themselves.
"""

import io
import os
import signal
import sys
import threading


def stopped() -> None:
    """Say that the script was stopped, in one line, wherever it is: in a signal handler too."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode(errors="replace"))


def end_at_once() -> None:
    """Let Ctrl-C end a script in one line, exit code 130, where there is nothing yet to close.

    Where SIGINT is ignored, as in the background of a shell script, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number, frame):
    stopped()
    os._exit(128 + number)


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt as Python does, now that there is something to close."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What a terminal obeys instead of showing it: control characters, and what turns the direction.
OBEYED = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
SHOWN = {code: chr(code).encode("unicode_escape").decode() for code in OBEYED - set(b"\t\n\r")}


class _Shown(io.TextIOWrapper):
    """A stream of text on which names of files give a terminal no orders."""

    def write(self, text):
        super().write(text.translate(SHOWN))
        return len(text)


class _Lasting(io.FileIO):
    """A stream whose text goes nowhere once its reader is gone, as that of `| head -1` is soon."""

    def write(self, text):
        try:
            return super().write(text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(text)


def keep_output_open() -> None:
    """Let nothing that is printed end a script: neither a reader that has gone, nor output that is
    closed, nor letters of a name that a terminal cannot show; those that it would obey are shown.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
            raw = _Lasting(stream.fileno(), "w", closefd=False)
            is_unbuffered = isinstance(stream.buffer, io.FileIO)  # PYTHONUNBUFFERED
            lasting = _Shown(
                raw if is_unbuffered else io.BufferedWriter(raw), stream.encoding,
                "backslashreplace", None, stream.line_buffering, stream.write_through,
            )  # fmt: skip
            setattr(sys, name, lasting)
        else:
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _of_thread


def _of_thread(args):
    """An error of a thread; one of the disk is told where its thread is waited for."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
