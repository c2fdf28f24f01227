"""`python -m hybrid_lightning`: prepares the process and its signals, runs the command line (`cli/`), sets the exit code."""

import atexit
import gc
import os
import signal
import sys
import threading
from contextlib import suppress

from hybrid_lightning.process import prepare_process
from hybrid_lightning.sharding.starter import end_with_starter
from hybrid_lightning.shared.stopping import RunStopped, StopSignals

_CLEAN_UP_S = 600.0  # time for a process to end, in which loggers may send pending data


def _find_own_code() -> None:
    """Let imports look in the working folder first, as with `python -m`; for a console script they look in the script's."""
    here = os.getcwd()
    if not sys.flags.safe_path and sys.path[0] != here:
        sys.path.insert(0, here)


def run() -> None:
    """Run the command line. Signals are handled from the start, before anything slow, until the process has ended."""
    _find_own_code()
    signals = StopSignals()
    signals.started_by_rank = end_with_starter(signals)
    signals.take_over()
    status = 1  # exit code after an unexpected exception
    stop: RunStopped | None = None

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        number = signals.requested
        if number and (stop is None or not stop.explained):
            os.write(2, f"stopped by {signal.Signals(number).name}: {signals.last_words()}\n".encode())
        # If a rank ends with an exit code, Lightning kills the rank that started it, which may still be saving.
        together = signals.started_by_rank and stop is not None and stop.together
        os._exit(0 if together else 128 + number if number else status)

    def given_up() -> None:  # Python waits forever for threads of `concurrent.futures`, such as an environment's
        os.write(2, f"forced to end: threads or exit handlers still ran {_CLEAN_UP_S:g} s after the command was done\n".encode())
        end()

    # Called last; ends the process immediately, since Python's own clean-up takes a second or two and handles no signals.
    atexit.register(end)
    gc.disable()  # until a command runs: earlier objects stay alive, and trying to collect them took 2 of 11 seconds
    try:
        prepare_process()  # before torch is loaded
        from hybrid_lightning.cli.main import main

        main(signals=signals)
        status = 0
    except RunStopped as stopped:
        stop = stopped
        raise
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        watch = threading.Timer(_CLEAN_UP_S, given_up)
        watch.daemon = True
        watch.start()
        signals.defer()  # until the end: a signal must not interrupt the clean-up, but still determines the exit code


if __name__ == "__main__":
    run()
