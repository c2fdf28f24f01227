from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy as FSDP2Strategy
