"""How a command ends: a user's mistake gives a line or two, a fault of the program a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

TRACEBACK = "ORPO_TRACEBACK"

# A ValueError of these packages speaks to the user. One from anywhere else is a fault, and needs its traceback.
_SPEAKING = {"orpo", "orpo_kernels", "transformers", "datasets", "peft", "accelerate", "huggingface_hub"}


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are one line, without its usage, which may be pages long."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2."""
        self.exit(2, f"{self.prog}: {message}; options: {self.prog} --help\n")


def run_command(name: str, main: Callable[[], Any]) -> None:
    """Calls `main`, and ends the process with ``name: what is wrong`` and code 1 where the user can mend it.

    The user can mend missing files, packages and memory, and values that this package or one around it refuses. Any
    other error keeps its traceback, and with the environment variable ``ORPO_TRACEBACK`` every error does. Ctrl-C ends
    the process with one line and code 130. Where nobody reads the output any more (``| head``), it ends silently.

    Raises:
        SystemExit: with the message and the notes of the error, and its `exit_code` where it has one.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            # The stream was closed before Python began: progress bars and the like would fail on None.
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        # Printing a character that an ASCII terminal lacks would end the run.
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")
    # peft reads the attribute by its older name whenever it wraps a model; the user cannot mend that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        main()
    except KeyboardInterrupt as error:
        if os.environ.get(TRACEBACK):
            raise
        said = f"\n{name}: interrupted{error}"
        print("\n".join([said, *getattr(error, "__notes__", ())]), file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(128 + signal.SIGPIPE) from None
        if os.environ.get(TRACEBACK) or not _is_the_users(error):
            raise
        text = "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
        print(f"{name}: {text}", file=sys.stderr)
        if not _speaks_for_itself(error):
            hint = f"({type(error).__name__}; with {TRACEBACK}=1 in the environment: where it was raised)"
            print(hint, file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    finally:
        _nobody_reads()


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of an accelerator or of the machine, did not suffice."""
    # torch, which takes seconds to load, has a class for the memory of accelerators only.
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _nobody_reads() -> bool:
    """Whether the reader of stdout or stderr has ended; what is still to be printed is then dropped."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            gone = True
            # Python flushes the stream once more as it exits, and would print an error.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
    return gone


def _is_the_users(error: Exception) -> bool:
    if isinstance(error, OSError | ImportError) or out_of_memory(error):
        return True
    if _is_ours(error):
        return isinstance(error, ValueError | RuntimeError | FloatingPointError)
    return isinstance(error, ValueError) and _raised_in(error).partition(".")[0] in _SPEAKING


def _speaks_for_itself(error: Exception) -> bool:
    """Whether `error` is this package's refusal of what it was given, to which a traceback would add nothing."""
    return (_is_ours(error) and isinstance(error, ValueError | ImportError)) or hasattr(error, "exit_code")


def _is_ours(error: Exception) -> bool:
    # Under `python -m orpo.train` the module is called __main__.
    return _raised_in(error).partition(".")[0] in ("orpo", "orpo_kernels", "__main__")


def _raised_in(error: Exception) -> str:
    """The name of the module whose code raised `error`."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else place.tb_frame.f_globals.get("__name__", "")
