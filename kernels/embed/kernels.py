"""The kernels of `patch_embed`: a convolution as a matrix product over patches, then LayerNorm.

One row of the product is one patch, gathered as it is multiplied, and one row of the result is a
token. Of pixels one step takes what lies under one row of the convolution's kernel; of a stage's
tokens, some channels under one tap.
"""

from ..core.optional_triton import tl, triton


@triton.jit
def patch_corners(token, height, width, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """Image, top and left of the patches of tokens; top and left may lie in the padding."""
    row = token // width
    top = (row % height) * STRIDE - PADDING
    left = (token % width) * STRIDE - PADDING
    return (row // height).to(tl.int64), top, left


@triton.jit
def normalize_row(
    values, column, norm_weight_pointer, norm_bias_pointer, eps, CHANNELS: tl.constexpr
):
    """LayerNorm of whole rows (BLOCK_M, BLOCK_N) that are 0 from column CHANNELS on."""
    in_row = column < CHANNELS
    mean = tl.sum(values, 1) / CHANNELS
    centred = tl.where(in_row[None, :], values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
    weight = tl.load(norm_weight_pointer + column, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_pointer + column, mask=in_row, other=0.0).to(tl.float32)
    return centred * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit(
    do_not_specialize=[
        "tokens",
        "height",
        "width",
        "in_height",
        "in_width",
        "image_stride",
        "channel_stride",
        "row_stride",
    ]
)
def patch_embed_pixels_kernel(
    pixels_pointer,  # (batch, IN_CHANNELS, in_height, in_width), of any strides
    scale_pointer,  # (IN_CHANNELS,) float32 or None
    offset_pointer,  # (IN_CHANNELS,) float32 or None
    weight_pointer,  # (CHANNELS, KERNEL, KERNEL, IN_CHANNELS)
    bias_pointer,  # (CHANNELS,)
    norm_weight_pointer,  # (CHANNELS,)
    norm_bias_pointer,  # (CHANNELS,)
    output_pointer,  # (tokens, CHANNELS)
    tokens,
    height,
    width,
    in_height,
    in_width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    eps,
    IN_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    KERNEL_ROW: tl.constexpr = KERNEL * IN_CHANNELS
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)  # (column of the convolution's kernel, channel)
    kernel_x = k // IN_CHANNELS
    channel = k % IN_CHANNELS
    token_mask = token < tokens
    column_mask = column < CHANNELS
    image, top, left = patch_corners(token, height, width, STRIDE, PADDING)
    x = left[:, None] + kernel_x[None, :]
    x_mask = (x >= 0) & (x < in_width) & (k < KERNEL_ROW)[None, :] & token_mask[:, None]
    corner = image * image_stride + top.to(tl.int64) * row_stride
    corner += left.to(tl.int64) * column_stride
    inside = channel.to(tl.int64) * channel_stride + kernel_x.to(tl.int64) * column_stride
    pixels_pointers = pixels_pointer + corner[:, None] + inside[None, :]
    row_step = tl.cast(row_stride, tl.int64)
    weight_pointers = weight_pointer + column[None, :] * (KERNEL * KERNEL_ROW) + k[:, None]
    weight_mask = (k < KERNEL_ROW)[:, None] & column_mask[None, :]
    if scale_pointer is not None:
        scale = tl.load(scale_pointer + channel)
    if offset_pointer is not None:
        offset = tl.load(offset_pointer + channel)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for kernel_y in range(KERNEL):
        y = top + kernel_y
        mask = x_mask & ((y >= 0) & (y < in_height))[:, None]
        pixels = tl.load(pixels_pointers + kernel_y * row_step, mask=mask, other=0)
        if scale_pointer is not None:
            pixels = pixels.to(tl.float32) * scale[None, :]
        if offset_pointer is not None:
            # The padding comes after the normalisation: it stays 0.
            pixels = tl.where(mask, pixels.to(tl.float32) + offset[None, :], 0.0)
        weight = tl.load(weight_pointers + kernel_y * KERNEL_ROW, mask=weight_mask, other=0.0)
        product = tl.dot(pixels.to(weight.dtype), weight, product, input_precision=PRECISION)

    bias = tl.load(bias_pointer + column, mask=column_mask, other=0.0)
    product += bias.to(tl.float32)[None, :]
    product = normalize_row(product, column, norm_weight_pointer, norm_bias_pointer, eps, CHANNELS)
    output_pointers = output_pointer + token.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    mask = token_mask[:, None] & column_mask[None, :]
    tl.store(output_pointers, product.to(output_pointer.dtype.element_ty), mask=mask)


@triton.jit
def patch_pointers(
    x_pointer,
    token,
    tokens,
    height,
    width,
    in_height,
    in_width,
    IN_CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pointers to the first channels at the corner of each patch; and tops and lefts."""
    image, top, left = patch_corners(token, height, width, STRIDE, PADDING)
    # Tokens past the last have their patch below the image, where nothing is read.
    top = tl.where(token < tokens, top, in_height)
    corner = (image * in_height + top) * in_width + left
    return x_pointer + corner[:, None] * IN_CHANNELS + tl.arange(0, BLOCK_K)[None, :], top, left


@triton.jit
def load_patches(
    pointers,  # as patch_pointers gives them
    top,
    left,
    step,  # of the steps through (row of the convolution's kernel, its column, channels)
    in_height,
    in_width,
    IN_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`BLOCK_K` channels under one tap of each patch, 0 in the padding."""
    CHUNKS: tl.constexpr = IN_CHANNELS // BLOCK_K
    tap = step // CHUNKS
    kernel_y = tap // KERNEL
    kernel_x = tap % KERNEL
    y = top + kernel_y
    x = left + kernel_x
    mask = (y >= 0) & (y < in_height) & (x >= 0) & (x < in_width)
    shift = (kernel_y * in_width + kernel_x) * IN_CHANNELS + (step % CHUNKS) * BLOCK_K
    return tl.load(pointers + shift, mask=mask[:, None], other=0.0)


@triton.jit(do_not_specialize=["tokens", "height", "width", "in_height", "in_width"])
def patch_embed_whole_row_kernel(
    x_pointer,  # (batch, in_height, in_width, IN_CHANNELS)
    weight_pointer,  # (CHANNELS, KERNEL, KERNEL, IN_CHANNELS)
    bias_pointer,  # (CHANNELS,)
    norm_weight_pointer,  # (CHANNELS,)
    norm_bias_pointer,  # (CHANNELS,)
    output_pointer,  # (tokens, CHANNELS)
    tokens,
    height,
    width,
    in_height,
    in_width,
    eps,
    IN_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A row of 160 or 320 channels is no power of two: it is a tuple of blocks.
    BLOCKS: tl.constexpr = CHANNELS // BLOCK_N
    WEIGHT_ROW: tl.constexpr = KERNEL * KERNEL * IN_CHANNELS
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    pointers, top, left = patch_pointers(
        x_pointer,
        token,
        tokens,
        height,
        width,
        in_height,
        in_width,
        IN_CHANNELS,
        STRIDE,
        PADDING,
        BLOCK_K,
    )
    weight_pointers = weight_pointer + column[None, :] * WEIGHT_ROW + k[:, None]

    products = ()
    for _ in tl.static_range(BLOCKS):
        products = products + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)  # noqa: RUF005
    for step in range(WEIGHT_ROW // BLOCK_K):
        x = load_patches(
            pointers, top, left, step, in_height, in_width, IN_CHANNELS, KERNEL, BLOCK_K
        )
        sums = ()
        for block in tl.static_range(BLOCKS):
            weight = tl.load(weight_pointers + block * BLOCK_N * WEIGHT_ROW + step * BLOCK_K)
            product = tl.dot(x, weight, products[block], input_precision=PRECISION)
            sums = sums + (product,)  # noqa: RUF005
        products = sums

    biased = ()
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for block in tl.static_range(BLOCKS):
        bias = tl.load(bias_pointer + block * BLOCK_N + column).to(tl.float32)
        biased = biased + (products[block] + bias[None, :],)  # noqa: RUF005
        mean += tl.sum(biased[block], 1) / CHANNELS
    variance = tl.zeros((BLOCK_M,), tl.float32)
    for block in tl.static_range(BLOCKS):
        centred = biased[block] - mean[:, None]
        variance += tl.sum(centred * centred, 1) / CHANNELS
    rstd = tl.rsqrt(variance + eps)
    output_pointers = output_pointer + token.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    for block in tl.static_range(BLOCKS):
        norm_weight = tl.load(norm_weight_pointer + block * BLOCK_N + column).to(tl.float32)
        norm_bias = tl.load(norm_bias_pointer + block * BLOCK_N + column).to(tl.float32)
        result = (biased[block] - mean[:, None]) * rstd[:, None]
        result = result * norm_weight[None, :] + norm_bias[None, :]
        result = result.to(output_pointer.dtype.element_ty)
        tl.store(output_pointers + block * BLOCK_N, result, mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens", "height", "width", "in_height", "in_width"])
def patch_embed_split_kernel(
    x_pointer,  # (batch, in_height, in_width, IN_CHANNELS)
    weight_pointer,  # (CHANNELS, KERNEL, KERNEL, IN_CHANNELS)
    parts_pointer,  # (SPLIT, tokens, CHANNELS) float32
    tokens,
    height,
    width,
    in_height,
    in_width,
    IN_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WEIGHT_ROW: tl.constexpr = KERNEL * KERNEL * IN_CHANNELS
    STEPS: tl.constexpr = WEIGHT_ROW // BLOCK_K
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    pointers, top, left = patch_pointers(
        x_pointer,
        token,
        tokens,
        height,
        width,
        in_height,
        in_width,
        IN_CHANNELS,
        STRIDE,
        PADDING,
        BLOCK_K,
    )
    weight_pointers = weight_pointer + column[None, :] * WEIGHT_ROW + k[:, None]

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT):
        x = load_patches(
            pointers, top, left, step, in_height, in_width, IN_CHANNELS, KERNEL, BLOCK_K
        )
        weight = tl.load(weight_pointers + step * BLOCK_K)
        product = tl.dot(x, weight, product, input_precision=PRECISION)
    row = part.to(tl.int64) * tokens + token
    parts_pointers = parts_pointer + row[:, None] * CHANNELS + column[None, :]
    tl.store(parts_pointers, product, mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def patch_embed_reduce_kernel(
    parts_pointer,  # (SPLIT, tokens, CHANNELS) float32
    bias_pointer,  # (CHANNELS,)
    norm_weight_pointer,  # (CHANNELS,)
    norm_bias_pointer,  # (CHANNELS,)
    output_pointer,  # (tokens, CHANNELS)
    tokens,
    eps,
    CHANNELS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    column_mask = column < CHANNELS
    mask = (token < tokens)[:, None] & column_mask[None, :]
    bias = tl.load(bias_pointer + column, mask=column_mask, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias.to(tl.float32)[None, :]
    for part in tl.static_range(SPLIT):
        row = (token + part * tokens).to(tl.int64)
        offset = row[:, None] * CHANNELS + column[None, :]
        total += tl.load(parts_pointer + offset, mask=mask, other=0.0)
    total = normalize_row(total, column, norm_weight_pointer, norm_bias_pointer, eps, CHANNELS)
    output_pointers = output_pointer + token.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    tl.store(output_pointers, total.to(output_pointer.dtype.element_ty), mask=mask)
