"""`python -m hybrid_lightning`."""

import atexit
import logging
import os
import signal
import sys
from contextlib import suppress

from hybrid_lightning.process import prepare_process
from hybrid_lightning.sharding.starter import end_with_starter
from hybrid_lightning.stopping import RunStopped, StopSignals


def run() -> None:
    """Run the command line; signals count from here on, before anything takes time, until the process is gone."""
    signals = StopSignals(started_by_rank=end_with_starter())
    signals.take_over()
    status = 1  # after an exception that nobody foresaw
    stop: RunStopped | None = None

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        number = signals.requested
        if number and (stop is None or not stop.explained):
            os.write(2, f"stopped by {signal.Signals(number).name}: {signals.last_words()}\n".encode())
        # Where a rank ends with a code, Lightning kills the one that started it, which is still saving.
        together = signals.started_by_rank and stop is not None and stop.together
        os._exit(0 if together else 128 + number if number else status)

    # Called last. Python would then take all modules apart, which takes a second or two, and hear no signal meanwhile.
    atexit.register(end)
    try:
        prepare_process()  # before torch is loaded
        # Advice about 4-bit kernels, given to everybody who has the package installed, when peft imports it.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from hybrid_lightning.cli import main

        main(signals=signals)
        status = 0
    except RunStopped as stopped:
        stop = stopped
        raise
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        signals.defer()  # until the end: what is left must not be torn apart, but a signal still counts


if __name__ == "__main__":
    run()
