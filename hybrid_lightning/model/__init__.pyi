from hybrid_lightning.model.quantization import NF4 as NF4
from hybrid_lightning.model.quantization import Quantization as Quantization
