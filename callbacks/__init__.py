"""Lightning callbacks, imported as `hybrid_lightning.callbacks` (a link to this folder)."""

from hybrid_lightning.callbacks.diagnosis import Diagnosis
from hybrid_lightning.callbacks.evaluation_report import EvaluationReport
from hybrid_lightning.callbacks.graceful_stop import GracefulStop
from hybrid_lightning.callbacks.hybrid_adapter_setup import HybridAdapterSetup
from hybrid_lightning.callbacks.loggers import TrackioLogger
from hybrid_lightning.callbacks.model_checkpoint import ModelCheckpoint
from hybrid_lightning.callbacks.planning import Adaptable
from hybrid_lightning.callbacks.policy_export import PolicyExport
from hybrid_lightning.callbacks.prediction_writer import PredictionWriter
from hybrid_lightning.callbacks.progress import RolloutProgress, StepLines
from hybrid_lightning.callbacks.rollouts import RewardDivergence, RolloutSamples
from hybrid_lightning.callbacks.run_folder import RunFolder
from hybrid_lightning.callbacks.run_report import RunReport
from hybrid_lightning.callbacks.run_summary import RunSummary
from hybrid_lightning.callbacks.step_timer import StepTimer

__all__ = [
    "Adaptable",
    "Diagnosis",
    "EvaluationReport",
    "GracefulStop",
    "HybridAdapterSetup",
    "ModelCheckpoint",
    "PolicyExport",
    "PredictionWriter",
    "RewardDivergence",
    "RolloutProgress",
    "RolloutSamples",
    "RunFolder",
    "RunReport",
    "RunSummary",
    "StepLines",
    "StepTimer",
    "TrackioLogger",
]
