"""The policy: a causal language model as a LightningModule."""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.policy.examples import ExampleModule, PreferenceModule, SupervisedModule
    from hybrid_lightning.policy.language import LanguageModule
    from hybrid_lightning.policy.master_weights import MasterWeights
    from hybrid_lightning.policy.modes import Bfloat16Precision
    from hybrid_lightning.policy.module import PolicyModule
    from hybrid_lightning.policy.optim import ConstantSchedule, CosineSchedule, LearningRateSchedule, LinearSchedule
    from hybrid_lightning.policy.quantization import NF4, Int8, Quantization

__all__ = [
    "NF4",
    "Bfloat16Precision",
    "ConstantSchedule",
    "CosineSchedule",
    "ExampleModule",
    "Int8",
    "LanguageModule",
    "LearningRateSchedule",
    "LinearSchedule",
    "MasterWeights",
    "PolicyModule",
    "PreferenceModule",
    "Quantization",
    "SupervisedModule",
]

__getattr__ = public_names(
    __name__,
    {
        "examples": ["ExampleModule", "PreferenceModule", "SupervisedModule"],
        "language": ["LanguageModule"],
        "master_weights": ["MasterWeights"],
        "module": ["PolicyModule"],
        "optim": ["ConstantSchedule", "CosineSchedule", "LearningRateSchedule", "LinearSchedule"],
        "modes": ["Bfloat16Precision"],
        "quantization": ["Int8", "NF4", "Quantization"],
    },
)
