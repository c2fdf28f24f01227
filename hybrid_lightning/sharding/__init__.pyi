from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy as FSDP1Strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy as FSDP2Strategy
