"""Small models with random weights, of transformers and of fastseg, and how to compare them.

transformers is imported where it is needed alone, as tests of kernels do without it.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from safetensors.torch import load_file

import fastseg

TINY = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "num_attention_heads": [1, 2, 5, 8],
    "decoder_hidden_size": 24,
    "num_labels": 5,
}
# Two stages, one of them without a reduction: quick to trace.
SMALL = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [4, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 24,
    "num_labels": 7,
}
WIDE = {"depths": [1, 1, 1, 1], "hidden_sizes": [64, 128, 320, 512], "num_labels": 19}


def randomize(model: torch.nn.Module) -> None:
    """Draw weights that keep activations of order one, with every bias and statistic in play."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                is_gain = "norm" in name and name.endswith("weight")
                parameter.normal_(mean=float(is_gain), std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def tiny_model(**config: Any) -> Any:
    """fastseg's segmentation model in eval mode with random weights; `config` as in `TINY`."""
    settings = fastseg.SegformerConfig(**{**TINY, **config})
    model = fastseg.SegformerForSemanticSegmentation(settings).eval()
    randomize(model)
    return model


def twins(
    class_name: str = "SegformerForSemanticSegmentation", attention: str = "sdpa", **config: Any
) -> tuple[Any, Any]:
    """transformers' model and fastseg's, both in eval mode, with the same random weights.

    `attention` of transformers': "sdpa", its default, or "eager", which can give the probabilities
    but takes its softmax in float32 whatever the model's dtype.
    """
    import transformers

    hf_config = transformers.SegformerConfig(**config, attn_implementation=attention)
    hf_model = getattr(transformers, class_name)(hf_config).eval()
    randomize(hf_model)
    model = getattr(fastseg, class_name)(fastseg.SegformerConfig(**config)).eval()
    # transformers writes the names on disk itself, which are those of fastseg in memory.
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return hf_model, model


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the error over that of the reference, in float64."""
    reference = reference.double()
    error = (result.double() - reference).square().mean()
    return (error / reference.square().mean()).sqrt().item()
