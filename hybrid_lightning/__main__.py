"""`python -m hybrid_lightning`."""

import logging
import os

# Threads that wait for work sleep instead of spinning. Where something else runs on the same cores, spinning threads take the
# time that the working ones need: on two busy cores ten steps of a small model took more than 90 s instead of 20 s
# (results/embedded_default.md). Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Advice about 4-bit kernels, given to everybody who has the package installed, when peft imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from hybrid_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
