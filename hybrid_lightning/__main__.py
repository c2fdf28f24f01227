"""`python -m hybrid_lightning`."""

import logging
import os

# How often a thread looks for work before it sleeps. OpenMP's default of 300,000 times takes the time that working threads need
# where something else runs on the same cores: a step of the embedded policy beside another took 0.6 to 10 s, with this 0.44, and
# asleep at once 0.33. But a thread that always sleeps costs more on idle cores: 13.1 s instead of 8.9 for a step of SmolLM2-135M.
# Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Advice about 4-bit kernels, given to everybody who has the package installed, when peft imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from hybrid_lightning.sharding.starter import end_with_starter  # noqa: E402

if __name__ == "__main__":
    end_with_starter()

from hybrid_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
