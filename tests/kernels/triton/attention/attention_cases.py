"""What tests of spatial-reduction attention share: weights, and the choice of forms and blocks."""

from __future__ import annotations

from fastseg import kernels
from fastseg.kernels.attention import op
from tests.kernels.triton.kernel_cases import randn


def sr_attention(x, height, width, **arguments):
    """The op, on weights made of `arguments`."""
    return kernels.sr_attention(x, height, width, kernels.SrAttentionWeights(**arguments))


def weights(channels, heads, sr_ratio, dtype, device, sums=True):
    """Arguments of `SrAttentionWeights` that give scores of deviation 1 or so."""

    def random(*shape, scale):
        return randn(*shape, dtype=dtype, device=device, scale=scale)

    scale, head_scale = channels**-0.5, (channels // heads) ** -0.5
    folded = {
        "num_heads": heads,
        "sr_ratio": sr_ratio,
        "eps": 1e-6,
        "output_bias": random(channels, scale=0.3),
        "key_value_weight": random(2 * channels, channels, scale=scale),
    }
    if heads == 1:
        folded["key_value_weight"][:channels] *= head_scale
        folded["key_offset_weight"] = random(channels, scale=scale)
    else:
        folded["query_weight"] = random(channels, channels, scale=scale * head_scale)
        folded["query_bias"] = random(channels, scale=head_scale)
        folded["output_weight"] = random(channels, channels, scale=scale)
    if sr_ratio > 1:
        taps = sr_ratio * sr_ratio
        folded["sr_weight"] = random(channels, taps * channels, scale=(taps * channels) ** -0.5)
        folded["sr_bias"] = random(channels, scale=0.3)
        folded["sr_eps"] = 1e-5
    if sums:
        # As float64 sums of the rounded weights, in float32: check_parity widens them again.
        if heads > 1:
            folded["query_weight_sum"] = folded["query_weight"].double().sum(1).float()
        folded["key_value_weight_sum"] = folded["key_value_weight"].double().sum(1).float()
        if sr_ratio > 1:
            taps = folded["sr_weight"].double().unflatten(1, (taps, -1))
            folded["sr_weight_sum"] = taps.sum(2).t().float().contiguous()
    return folded


def force(monkeypatch, key_value=None, attention=None):
    """Have `choose` give these forms where they are not None."""
    chosen = op.choose

    def choose(*arguments):
        forms = chosen(*arguments)
        return op.Forms(key_value or forms.key_value, attention or forms.attention)

    monkeypatch.setattr(op, "choose", choose)


def configure(monkeypatch, module, **blocks):
    """Overwrite parts of the configurations that `module` looks up."""
    look_up = module.look_up

    def patched(*arguments, **keywords):
        config = look_up(*arguments, **keywords)
        return {**config, **{name: blocks[name] for name in blocks if name in config}}

    monkeypatch.setattr(module, "look_up", patched)
