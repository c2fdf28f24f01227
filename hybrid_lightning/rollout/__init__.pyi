from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling as DynamicSampling
from hybrid_lightning.rollout.loader import RolloutLoader as RolloutLoader
from hybrid_lightning.rollout.loader import RolloutSchedule as RolloutSchedule
from hybrid_lightning.rollout.rollout_engine import RolloutEngine as RolloutEngine
from hybrid_lightning.rollout.sampler import Sampler as Sampler
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler as VLLMSampler
from hybrid_lightning.rollout.vllm.servers import VLLMServerSampler as VLLMServerSampler
