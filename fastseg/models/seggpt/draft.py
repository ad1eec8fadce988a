"""Names of an early draft of transformers' documentation, for programs that were written by it.

docs/seggpt.md has the table. What they name is what transformers released under other names.
"""

from __future__ import annotations

from .config import SegGptConfig
from .modeling import SegGptForImageSegmentation, SegGptModel
from .processor import SegGptImageProcessor

SegGPTConfig = SegGptConfig
SegGPTImageProcessor = SegGptImageProcessor
SegGPTModel = SegGptModel
SegGPTForInstanceSegmentation = SegGptForImageSegmentation


class SegGPTForSemanticSegmentation(SegGptForImageSegmentation):
    """SegGptForImageSegmentation whose `embedding_type` is "semantic" where none is given."""

    default_embedding_type = "semantic"
