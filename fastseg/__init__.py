"""fastseg: SegFormer semantic segmentation, as fast as the hardware allows."""

from .auto import from_pretrained
from .checkpoint import CheckpointError, CheckpointWarning
from .config import SegformerConfig
from .decode_head import SegformerDecodeHead
from .image_processing import SegformerImageProcessor
from .kernels import backend
from .modeling import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)
from .packing import plain_path
from .presets import PRESETS, from_preset
from .reporting import report
from .segmentation import segment
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CheckpointError",
    "CheckpointWarning",
    "SegformerConfig",
    "SegformerDecodeHead",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
    "SegformerImageProcessor",
    "SegformerModel",
    "backend",
    "from_preset",
    "from_pretrained",
    "plain_path",
    "report",
    "segment",
    "warmup",
]
