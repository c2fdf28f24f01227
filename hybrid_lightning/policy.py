"""Public names of what trains a policy, as configs and checkpoints hold them: the rooms `model/` and `training/`."""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.model.quantization import NF4, Quantization
    from hybrid_lightning.training.examples import ExampleModule, PreferenceModule, SupervisedModule
    from hybrid_lightning.training.language import LanguageModule
    from hybrid_lightning.training.module import PolicyModule
    from hybrid_lightning.training.optim import ConstantSchedule, CosineSchedule, LearningRateSchedule, LinearSchedule

__all__ = [
    "NF4",
    "ConstantSchedule",
    "CosineSchedule",
    "ExampleModule",
    "LanguageModule",
    "LearningRateSchedule",
    "LinearSchedule",
    "PolicyModule",
    "PreferenceModule",
    "Quantization",
    "SupervisedModule",
]

__getattr__ = public_names(
    __name__,
    {
        ".training.examples": ["ExampleModule", "PreferenceModule", "SupervisedModule"],
        ".training.language": ["LanguageModule"],
        ".training.module": ["PolicyModule"],
        ".training.optim": ["ConstantSchedule", "CosineSchedule", "LearningRateSchedule", "LinearSchedule"],
        ".model.quantization": ["NF4", "Quantization"],
    },
)
