"""End a rank if the process that started it has ended.

If the command starts its processes itself, the first process starts the others and watches them, but nothing watches the first
one. If it is killed, gloo's connections break and each rank prints which checkpoint to resume from (`lost_contact` in
`callbacks/graceful_stop.py`). NCCL between the GPUs of a machine notices nothing, and neither does a rank that still waits for
the others to connect: both would wait for half an hour without a message. Torchrun and SLURM watch their processes themselves.
"""

import os
import threading
import time

from hybrid_lightning.shared.stopping import StopSignals

_STARTER = "HYBRID_LIGHTNING_STARTER"  # environment variable with the id of the process that starts the other ranks
_EVERY_S = 0.5  # seconds between two checks of the starter
_GRACE_S = 10.0  # seconds for a rank to end by itself: with gloo's error, or with all work done, like the starter


def end_with_starter(signals: StopSignals) -> bool:
    """In a started rank, watch the process that started it for the whole run; in the first rank, note its id.

    Call it before anything that takes time. If the starter ends and this process does not, the watching thread ends it with exit
    code 1 and one line, which has the `last_words` of the signals. Returns whether another rank started this process.
    """
    starter = os.environ.get(_STARTER)
    if os.environ.get("LOCAL_RANK", "0") == "0" or starter != str(os.getppid()):
        os.environ[_STARTER] = str(os.getpid())
        return False
    threading.Thread(target=_watch, args=(int(starter), signals), name="starter", daemon=True).start()
    return True


def _watch(starter: int, signals: StopSignals) -> None:
    while os.getppid() == starter:  # when a parent ends, another process becomes the parent
        time.sleep(_EVERY_S)
    time.sleep(_GRACE_S)
    try:
        cause = "rank 0, which started it, has ended; see the output of rank 0 for the reason"
        os.write(2, f"rank {os.environ['LOCAL_RANK']} ends: {cause}; {signals.last_words()}\n".encode())
    finally:
        os._exit(1)  # not by an exception, which would not reach the waiting main thread
