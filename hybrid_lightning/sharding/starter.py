"""End a rank if the process that started it ends before all ranks have connected.

If the command starts its processes itself, the first process starts the others and watches them, but nothing watches the first
one: if it were killed while the others import libraries and try to connect, they would wait for half an hour without a message.
Once all ranks are connected, each notices from its broken connections that another one has gone (see `lost_contact`). Torchrun
and SLURM watch their processes themselves.
"""

import os
import sys
import threading
import time

_STARTER = "HYBRID_LIGHTNING_STARTER"  # environment variable with the id of the process that starts the other ranks
_EVERY_S = 0.5  # seconds between two looks at the starter


def end_with_starter() -> bool:
    """In a started rank, watch the process that started it until all ranks are connected; in the first rank, note its id.

    Must be called before anything takes time. If the starter ends, the watching thread ends this process with exit code 1 and
    one line of explanation. Returns whether another rank started this process.
    """
    starter = os.environ.get(_STARTER)
    if os.environ.get("LOCAL_RANK", "0") == "0" or starter != str(os.getppid()):
        os.environ[_STARTER] = str(os.getpid())
        return False
    threading.Thread(target=_watch, args=(int(starter),), name="starter", daemon=True).start()
    return True


def _watch(starter: int) -> None:
    while not _joined():
        if os.getppid() != starter:  # when a parent ends, another process becomes the parent
            sys.stderr.write(
                f"rank {os.environ['LOCAL_RANK']} ends: rank 0, which started it, was killed or has failed before all had come "
                "together; its own output says why; start the command again\n"
            )
            sys.stderr.flush()
            os._exit(1)  # not by an exception, which would not reach the waiting main thread
        time.sleep(_EVERY_S)


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")  # which may not be imported yet, or only in part
    return bool(getattr(distributed, "is_initialized", bool)())
