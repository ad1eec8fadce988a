"""fastseg: SegFormer semantic segmentation, as fast as the hardware allows."""

from fastseg._version import __version__ as __version__
from fastseg.acceleration import accelerate, restore
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from fastseg.cuda_graphs.default import graphs
from fastseg.cuda_graphs.runner import graphed
from fastseg.evaluation.evaluate import evaluate
from fastseg.evaluation.result import Evaluation
from fastseg.exporting.export import ExportError, ExportResult, ExportWarning, export
from fastseg.folding.conditions import plain_path
from fastseg.folding.swap import refold
from fastseg.folding.warmup import warmup
from fastseg.images.processor import SegformerImageProcessor
from fastseg.inference.prompted import keep_prompt
from fastseg.inference.result import Result
from fastseg.inference.segment import segment
from fastseg.inference.segmenter import Segmenter
from fastseg.kernels import backend
from fastseg.models.auto import PRESETS, from_preset, from_pretrained
from fastseg.models.segformer.config import SegformerConfig
from fastseg.models.segformer.decode_head import SegformerDecodeHead
from fastseg.models.segformer.modeling import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)
from fastseg.models.seggpt.config import SegGptConfig
from fastseg.models.seggpt.draft import (
    SegGPTConfig,
    SegGPTForInstanceSegmentation,
    SegGPTForSemanticSegmentation,
    SegGPTImageProcessor,
    SegGPTModel,
)
from fastseg.models.seggpt.modeling import SegGptForImageSegmentation, SegGptModel
from fastseg.models.seggpt.processor import SegGptImageProcessor
from fastseg.reporting import report

__all__ = [
    "PRESETS",
    "CheckpointError",
    "CheckpointWarning",
    "Evaluation",
    "ExportError",
    "ExportResult",
    "ExportWarning",
    "Result",
    "SegGPTConfig",
    "SegGPTForInstanceSegmentation",
    "SegGPTForSemanticSegmentation",
    "SegGPTImageProcessor",
    "SegGPTModel",
    "SegGptConfig",
    "SegGptForImageSegmentation",
    "SegGptImageProcessor",
    "SegGptModel",
    "SegformerConfig",
    "SegformerDecodeHead",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
    "SegformerImageProcessor",
    "SegformerModel",
    "Segmenter",
    "accelerate",
    "backend",
    "evaluate",
    "export",
    "from_preset",
    "from_pretrained",
    "graphed",
    "graphs",
    "keep_prompt",
    "plain_path",
    "refold",
    "report",
    "restore",
    "segment",
    "warmup",
]

# Pickles and documents name public classes by where users import them, which no move changes. For
# inspect.getsource they are then in this file, and not found.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
del _name
