"""Export trained policies as folders that plain PEFT and transformers load.

A plan, the trained weights and the base model form a `TrainedPolicy`; `write_policy` writes it in an `ExportForm`.
"""

from hybrid_lightning.export.adapter_folder import AdapterFolder, LoraFolder
from hybrid_lightning.export.merged_model import MergedModel
from hybrid_lightning.export.sources import policy_of_checkpoint, policy_of_module
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy
from hybrid_lightning.export.write import write_policy

__all__ = [
    "AdapterFolder",
    "ExportForm",
    "LoraFolder",
    "MergedModel",
    "TrainedPolicy",
    "policy_of_checkpoint",
    "policy_of_module",
    "write_policy",
]
