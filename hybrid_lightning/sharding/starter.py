"""A rank that waits for the others to come does not outlive the one that started it.

Where the command starts its processes itself, the first one starts the others and watches them, and nobody watches it: were it
killed while they import and look for it, they would wait for half an hour, without a word. Once all have come together, each
notices by its broken connections that another is gone (see `lost_contact`). Torchrun and SLURM watch by themselves.
"""

import os
import sys
import threading
import time

_STARTER = "HYBRID_LIGHTNING_STARTER"  # in the environment: the process that starts other ranks
_EVERY_S = 0.5


def end_with_starter() -> bool:
    """Watch the process that started this one until the ranks have come together, or be the one that is watched.

    Called before anything takes time. Ends this process with 1 and one line if the other is gone.

    Returns:
        Whether another rank started this process.
    """
    starter = os.environ.get(_STARTER)
    if os.environ.get("LOCAL_RANK", "0") == "0" or starter != str(os.getppid()):
        os.environ[_STARTER] = str(os.getpid())
        return False
    threading.Thread(target=_watch, args=(int(starter),), name="starter", daemon=True).start()
    return True


def _watch(starter: int) -> None:
    while not _joined():
        if os.getppid() != starter:  # another takes its place as parent
            sys.stderr.write(
                f"rank {os.environ['LOCAL_RANK']} ends: rank 0, which started it, was killed or has failed before all had come "
                "together; its own output says why; start the command again\n"
            )
            sys.stderr.flush()
            os._exit(1)  # the main thread may be waiting where no exception reaches it
        time.sleep(_EVERY_S)


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported for this, and perhaps only in part so far
    return bool(getattr(distributed, "is_initialized", bool)())
