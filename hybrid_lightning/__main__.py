"""`python -m hybrid_lightning`."""

import logging
import os

# Threads that wait for work sleep instead of spinning. Where something else runs on the same cores, spinning threads take the
# time that the working ones need: with a small model on two busy cores a run took nine times as long. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Advice about 4-bit kernels, given to everybody who has the package installed, when peft imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from hybrid_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
