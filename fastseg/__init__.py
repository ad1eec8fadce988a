"""fastseg: SegFormer semantic segmentation, as fast as the hardware allows."""

from .acceleration import accelerate, repack, restore
from .auto import from_pretrained
from .checkpoint import CheckpointError, CheckpointWarning
from .config import SegformerConfig
from .decode_head import SegformerDecodeHead
from .export import ExportError, ExportResult, ExportWarning, export
from .graphed import graphed
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
    "ExportError",
    "ExportResult",
    "ExportWarning",
    "SegformerConfig",
    "SegformerDecodeHead",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
    "SegformerImageProcessor",
    "SegformerModel",
    "accelerate",
    "backend",
    "export",
    "from_preset",
    "from_pretrained",
    "graphed",
    "plain_path",
    "repack",
    "report",
    "restore",
    "segment",
    "warmup",
]
