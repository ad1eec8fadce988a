"""Depthwise 3x3 convolution with its activation, alone and with the linear map that follows it.

Per hidden element these few FMAs cost far more in loads, conversions and the activation than in
arithmetic, so a row of a tile is a strip of `STRIP` pixels side by side: the `STRIP + 2` columns
that it sees in a row of the grid are loaded and converted once for all its pixels. With strips of
4 a hidden element takes some 48 instructions of a lane instead of 73.

The loop over the three rows of taps stays a loop: unrolled, the compiler hoists the loads of all
taps and spills.
"""

from ..blocks.activations import activate
from ..core.optional_triton import tl, triton


@triton.jit
def tile_pixels(height, width, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, STRIP: tl.constexpr):
    """The strips of this program's tile, `BLOCK_Y` rows of `BLOCK_X` strips.

    Tiles of all images lie along axis 0 of the launch grid, the only long one.

    Returns:
        y, x (strips,): place of a strip's first pixel, possibly outside of the image;
        pixel (strips,) int64: its index among the pixels of all images.
    """
    columns = tl.cdiv(width, BLOCK_X * STRIP)
    rows = tl.cdiv(height, BLOCK_Y)
    tile = tl.program_id(0)
    strip = tl.arange(0, BLOCK_Y * BLOCK_X)
    y = tile // columns % rows * BLOCK_Y + strip // BLOCK_X
    x = (tile % columns * BLOCK_X + strip % BLOCK_X) * STRIP
    image = (tile // (columns * rows)).to(tl.int64)
    return y, x, (image * height + y) * width + x


@triton.jit
def load_pairs(pointers, mask, WIDTH: tl.constexpr):
    """The `WIDTH` bfloat16 numbers from each pointer on, as float32; 0 where `mask` is not.

    bfloat16 is the upper half of float32. Two that share a register cost an instruction each this
    way; converted as bfloat16 the upper one costs two.

    Args:
        pointers, mask: (rows, 1), the pointers aligned to 4 bytes.
    """
    pointers = pointers.to(tl.pointer_type(tl.int32), bitcast=True)
    pairs = tl.load(pointers + tl.arange(0, WIDTH // 2)[None, :], mask=mask, other=0)
    lower = (pairs << 16).to(tl.float32, bitcast=True)
    upper = (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.interleave(lower, upper)


@triton.jit
def depthwise_strips(
    hidden_pointer,  # (pixels, HIDDEN)
    weight_pointer,  # (HIDDEN, 1, 3, 3) of any strides
    bias_pointer,  # (HIDDEN,)
    first_channel,
    y,
    x,
    pixel,
    height,
    width,
    channel_stride,
    row_stride,
    column_stride,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Activated convolution of strips: a tuple of `STRIP` tiles (strips, BLOCK_E), float32.

    Outside of the image the hidden tensor is 0, which is not what fc1 makes of zeros.
    """
    PAIRS: tl.constexpr = hidden_pointer.dtype.element_ty == tl.bfloat16
    channel = first_channel + tl.arange(0, BLOCK_E)
    bias = tl.load(bias_pointer + channel).to(tl.float32)[None, :]
    sums = ()
    for _first in tl.static_range(STRIP):
        sums += (tl.zeros((y.shape[0], BLOCK_E), tl.float32) + bias,)
    for tap_row in tl.range(0, 3, num_stages=1):
        taps = weight_pointer + channel * channel_stride + tap_row * row_stride
        left = tl.load(taps).to(tl.float32)[None, :]
        middle = tl.load(taps + column_stride).to(tl.float32)[None, :]
        right = tl.load(taps + 2 * column_stride).to(tl.float32)[None, :]
        row = y + tap_row - 1
        in_rows = (row >= 0) & (row < height)
        source = pixel + (tap_row - 1) * width - 1
        pointers = hidden_pointer + source[:, None] * HIDDEN + first_channel
        for column in tl.static_range(STRIP + 2):
            source_x = x + column - 1
            mask = (in_rows & (source_x >= 0) & (source_x < width))[:, None]
            if PAIRS:
                hidden = load_pairs(pointers + column * HIDDEN, mask, BLOCK_E)
            else:
                pixels = pointers + column * HIDDEN + tl.arange(0, BLOCK_E)[None, :]
                hidden = tl.load(pixels, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for place in tl.static_range(STRIP):
                if place == column:
                    updated += (sums[place] + hidden * left,)
                elif place == column - 1:
                    updated += (sums[place] + hidden * middle,)
                elif place == column - 2:
                    updated += (sums[place] + hidden * right,)
                else:
                    updated += (sums[place],)
            sums = updated
    activated = ()
    for last in tl.static_range(STRIP):
        activated += (activate(sums[last], ACTIVATION),)
    return activated


@triton.jit(do_not_specialize=["height", "width"])
def depthwise_kernel(
    hidden_pointer,  # (pixels, HIDDEN)
    weight_pointer,  # (HIDDEN, 1, 3, 3) of any strides
    bias_pointer,  # (HIDDEN,)
    output_pointer,  # (pixels, HIDDEN)
    height,
    width,
    channel_stride,
    row_stride,
    column_stride,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    y, x, pixel = tile_pixels(height, width, BLOCK_Y, BLOCK_X, STRIP)
    first_channel = tl.program_id(1) * BLOCK_E
    activated = depthwise_strips(
        hidden_pointer,
        weight_pointer,
        bias_pointer,
        first_channel,
        y,
        x,
        pixel,
        height,
        width,
        channel_stride,
        row_stride,
        column_stride,
        HIDDEN,
        ACTIVATION,
        STRIP,
        BLOCK_E,
    )
    channel = first_channel + tl.arange(0, BLOCK_E)
    pointers = output_pointer + pixel[:, None] * HIDDEN + channel[None, :]
    for place in tl.static_range(STRIP):
        mask = (y < height) & (x + place < width)
        value = activated[place].to(output_pointer.dtype.element_ty)
        tl.store(pointers + place * HIDDEN, value, mask=mask[:, None])


@triton.jit
def finish_rows(
    products,  # a tuple of CHUNKS tiles (rows, BLOCK_N), float32
    row,  # (rows,) int64
    row_mask,
    column,  # (BLOCK_N,), of the first tile
    bias_pointer,  # (CHANNELS,)
    residual_pointer,  # (all rows, CHANNELS)
    norm_weight_pointer,  # (CHANNELS,) or None for no LayerNorm
    norm_bias_pointer,  # (CHANNELS,) or None
    output_pointer,  # (all rows, CHANNELS)
    norm_eps,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add bias and residual to rows, normalise them where they are to be, and store them."""
    offset = row[:, None] * CHANNELS
    total = tl.zeros(row.shape, tl.float32)
    values = ()
    for chunk in tl.static_range(CHUNKS):
        channel = column + chunk * BLOCK_N
        mask = row_mask[:, None] & (channel < CHANNELS)[None, :]
        bias = tl.load(bias_pointer + channel, mask=channel < CHANNELS, other=0.0)
        residual = tl.load(residual_pointer + offset + channel[None, :], mask=mask, other=0.0)
        value = products[chunk] + bias.to(tl.float32)[None, :] + residual.to(tl.float32)
        values += (value,)
        total += tl.sum(value, 1)
    if norm_weight_pointer is not None:
        # Columns beyond CHANNELS hold zeros so far, which the sums may take in.
        mean = total / CHANNELS
        square_sum = tl.zeros(row.shape, tl.float32)
        for measured in tl.static_range(CHUNKS):
            in_row = column + measured * BLOCK_N < CHANNELS
            deviation = tl.where(in_row[None, :], values[measured] - mean[:, None], 0.0)
            square_sum += tl.sum(deviation * deviation, 1)
        rstd = tl.rsqrt(square_sum / CHANNELS + norm_eps)
    for stored in tl.static_range(CHUNKS):
        channel = column + stored * BLOCK_N
        in_row = channel < CHANNELS
        value = values[stored]
        if norm_weight_pointer is not None:
            gain = tl.load(norm_weight_pointer + channel, mask=in_row, other=0.0)
            value = (value - mean[:, None]) * rstd[:, None] * gain.to(tl.float32)[None, :]
            if norm_bias_pointer is not None:
                shift = tl.load(norm_bias_pointer + channel, mask=in_row, other=0.0)
                value += shift.to(tl.float32)[None, :]
        mask = row_mask[:, None] & in_row[None, :]
        value = value.to(output_pointer.dtype.element_ty)
        tl.store(output_pointer + offset + channel[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def tail_kernel(
    hidden_pointer,  # (pixels, HIDDEN)
    weight_pointer,  # (HIDDEN, 1, 3, 3) of any strides
    bias_pointer,  # (HIDDEN,)
    fc2_weight_pointer,  # (CHANNELS, HIDDEN)
    fc2_bias_pointer,  # (CHANNELS,)
    residual_pointer,  # (pixels, CHANNELS)
    norm_weight_pointer,  # (CHANNELS,), or None for no LayerNorm of the result
    norm_bias_pointer,  # (CHANNELS,) or None
    output_pointer,  # (pixels, CHANNELS)
    height,
    width,
    channel_stride,
    row_stride,
    column_stride,
    norm_eps,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Convolution, activation and fc2 of a tile, for `CHUNKS` times `BLOCK_N` output columns.

    The activated tensor never leaves the registers: each chunk of `BLOCK_E` hidden channels goes
    to the tensor cores as it is made. Widths that are no power of two are several chunks.
    """
    y, x, pixel = tile_pixels(height, width, BLOCK_Y, BLOCK_X, STRIP)
    column = tl.program_id(1) * (BLOCK_N * CHUNKS) + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_E)
    fc2_pointers = fc2_weight_pointer + column[None, :] * HIDDEN + k[:, None]
    products = ()
    for _first in tl.static_range(STRIP * CHUNKS):
        products += (tl.zeros((BLOCK_Y * BLOCK_X, BLOCK_N), tl.float32),)
    for first_channel in tl.range(0, HIDDEN, BLOCK_E, num_stages=1):
        activated = depthwise_strips(
            hidden_pointer,
            weight_pointer,
            bias_pointer,
            first_channel,
            y,
            x,
            pixel,
            height,
            width,
            channel_stride,
            row_stride,
            column_stride,
            HIDDEN,
            ACTIVATION,
            STRIP,
            BLOCK_E,
        )
        updated = ()
        for chunk in tl.static_range(CHUNKS):
            pointers = fc2_pointers + first_channel + chunk * BLOCK_N * HIDDEN
            if CHANNELS % (BLOCK_N * CHUNKS) == 0:
                fc2 = tl.load(pointers)
            else:
                in_row = column + chunk * BLOCK_N < CHANNELS
                fc2 = tl.load(pointers, mask=in_row[None, :], other=0.0)
            for place in tl.static_range(STRIP):
                product = tl.dot(
                    activated[place].to(fc2.dtype),
                    fc2,
                    products[chunk * STRIP + place],
                    input_precision=PRECISION,
                )
                updated += (product,)
        products = updated
    for finished in tl.static_range(STRIP):
        row_products = ()
        for part in tl.static_range(CHUNKS):
            row_products += (products[part * STRIP + finished],)
        finish_rows(
            row_products,
            pixel + finished,
            (y < height) & (x + finished < width),
            column,
            fc2_bias_pointer,
            residual_pointer,
            norm_weight_pointer,
            norm_bias_pointer,
            output_pointer,
            norm_eps,
            CHANNELS,
            BLOCK_N,
            CHUNKS,
        )
