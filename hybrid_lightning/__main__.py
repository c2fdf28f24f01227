"""`python -m hybrid_lightning`."""

import logging

from hybrid_lightning.process import prepare_process

prepare_process()  # before torch is loaded
# Advice about 4-bit kernels, given to everybody who has the package installed, when peft imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from hybrid_lightning.sharding.starter import end_with_starter  # noqa: E402

if __name__ == "__main__":
    end_with_starter()

from hybrid_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
