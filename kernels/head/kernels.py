"""The kernels of `decode_head`: the coarse maps' projections, and everything at full resolution."""

from ..core.optional_triton import tl, triton


@triton.jit(do_not_specialize=["rows_2", "rows_3", "rows_4"])
def decode_head_project_kernel(
    x_2_pointer,  # (rows_2, CHANNELS_2)
    x_3_pointer,  # (rows_3, CHANNELS_3)
    x_4_pointer,  # (rows_4, CHANNELS_4)
    weight_2_pointer,  # (WIDTH, CHANNELS_2)
    weight_3_pointer,  # (WIDTH, CHANNELS_3)
    weight_4_pointer,  # (WIDTH, CHANNELS_4)
    output_2_pointer,  # (rows_2, WIDTH)
    output_3_pointer,  # (rows_3, WIDTH)
    output_4_pointer,  # (rows_4, WIDTH)
    rows_2,
    rows_3,
    rows_4,
    CHANNELS_2: tl.constexpr,
    CHANNELS_3: tl.constexpr,
    CHANNELS_4: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The projections of three maps; the programs with the longest sums come first."""
    block = tl.program_id(0)
    blocks_4 = tl.cdiv(rows_4, BLOCK_M)
    blocks_3 = tl.cdiv(rows_3, BLOCK_M)
    # One loop for all: three, each in its branch, would have shared memory for three.
    is_4 = block < blocks_4
    is_3 = block < blocks_4 + blocks_3
    x_pointer = tl.where(is_4, x_4_pointer, tl.where(is_3, x_3_pointer, x_2_pointer))
    weight_pointer = tl.where(
        is_4, weight_4_pointer, tl.where(is_3, weight_3_pointer, weight_2_pointer)
    )
    output_pointer = tl.where(
        is_4, output_4_pointer, tl.where(is_3, output_3_pointer, output_2_pointer)
    )
    rows = tl.where(is_4, rows_4, tl.where(is_3, rows_3, rows_2))
    channels = tl.where(is_4, CHANNELS_4, tl.where(is_3, CHANNELS_3, CHANNELS_2))
    block -= tl.where(is_4, 0, tl.where(is_3, blocks_4, blocks_4 + blocks_3))

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_mask = row < rows
    column_mask = column < WIDTH
    x_pointers = x_pointer + row.to(tl.int64)[:, None] * channels + k[None, :]
    weight_pointers = weight_pointer + column[None, :] * channels + k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, channels, BLOCK_K):
        x = tl.load(x_pointers + k0, mask=row_mask[:, None], other=0.0)
        if WIDTH % BLOCK_N == 0:
            weight = tl.load(weight_pointers + k0)
        else:
            weight = tl.load(weight_pointers + k0, mask=column_mask[None, :], other=0.0)
        product = tl.dot(x, weight, product, input_precision=PRECISION)
    output_pointers = output_pointer + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(output_pointers, product.to(output_pointer.dtype.element_ty), mask=mask)


@triton.jit
def scaled_source_position(position, size, source_size):
    """Places of an axis' positions on the source axis, in units of 1 / (2 size).

    As `interpolate(align_corners=False)` places them, but in integers, thus exactly. Past the last
    source position both neighbours are that, so the place is kept within the source.
    """
    source = (2 * position + 1) * source_size - size
    return tl.minimum(tl.maximum(source, 0), (source_size - 1) * 2 * size)


@triton.jit
def shares(source, window, size):
    """Share (BLOCK_M, WINDOW) that each pixel has of each source position in a window (WINDOW,)."""
    distance = tl.abs(source[:, None] - (window * (2 * size))[None, :])
    return tl.maximum(1.0 - distance.to(tl.float32) * (1.0 / (2 * size)), 0.0)


@triton.jit
def tile_window(
    y,  # (BLOCK_M,), rows of the tile's pixels
    x,  # (BLOCK_M,), columns
    top,  # of the tile
    left,
    image,
    height,
    width,
    source_height,
    source_width,
    WINDOW_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Window that a tile reads of a coarse map: `WINDOW` tokens, and each pixel's share of each.

    Returns:
        tokens (WINDOW,) int64; shares (BLOCK_M, WINDOW) float32.
    """
    position = tl.arange(0, WINDOW)
    window_y = scaled_source_position(top, height, source_height) // (2 * height)
    window_x = scaled_source_position(left, width, source_width) // (2 * width)
    window_y += position // WINDOW_WIDTH
    window_x += position % WINDOW_WIDTH
    share = shares(scaled_source_position(y, height, source_height), window_y, height)
    share *= shares(scaled_source_position(x, width, source_width), window_x, width)
    # Positions past the source are read at its edge; their share is 0.
    row = image.to(tl.int64) * source_height + tl.minimum(window_y, source_height - 1)
    return row * source_width + tl.minimum(window_x, source_width - 1), share


# `width` stays: where it is a multiple of 16, stores are wide (52 loads and stores, not 122).
@triton.jit(
    do_not_specialize=[
        "height",
        "height_2",
        "width_2",
        "height_3",
        "width_3",
        "height_4",
        "width_4",
    ]
)
def decode_head_kernel(
    x_pointer,  # (batch, height, width, CHANNELS), the finest map
    weight_pointer,  # (WIDTH, CHANNELS)
    projected_2_pointer,  # (batch, height_2, width_2, WIDTH), projections of the coarse maps
    projected_3_pointer,  # (batch, height_3, width_3, WIDTH)
    projected_4_pointer,  # (batch, height_4, width_4, WIDTH)
    bias_pointer,  # (WIDTH,)
    classifier_weight_pointer,  # (classes, WIDTH)
    classifier_bias_pointer,  # (classes,)
    output_pointer,  # (batch, classes, height, width)
    classes,
    height,
    width,
    height_2,
    width_2,
    height_3,
    width_3,
    height_4,
    width_4,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW_2: tl.constexpr,
    WINDOW_3: tl.constexpr,
    WINDOW_4: tl.constexpr,
    WINDOW_WIDTH_2: tl.constexpr,
    WINDOW_WIDTH_3: tl.constexpr,
    WINDOW_WIDTH_4: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLASSES_A: tl.constexpr,
    CLASSES_B: tl.constexpr,  # 0 for none
):
    tiles_x = tl.cdiv(width, TILE_WIDTH)
    tiles = tl.cdiv(height, TILE_HEIGHT) * tiles_x
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    top = (tile // tiles_x) * TILE_HEIGHT
    left = (tile % tiles_x) * TILE_WIDTH
    pixel = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)
    y = top + pixel // TILE_WIDTH
    x = left + pixel % TILE_WIDTH
    pixel_mask = (y < height) & (x < width)
    d = tl.arange(0, BLOCK_D)
    dtype = x_pointer.dtype.element_ty

    token_2, share_2 = tile_window(
        y, x, top, left, image, height, width, height_2, width_2, WINDOW_WIDTH_2, WINDOW_2
    )
    token_3, share_3 = tile_window(
        y, x, top, left, image, height, width, height_3, width_3, WINDOW_WIDTH_3, WINDOW_3
    )
    token_4, share_4 = tile_window(
        y, x, top, left, image, height, width, height_4, width_4, WINDOW_WIDTH_4, WINDOW_4
    )
    share_2, share_3, share_4 = share_2.to(dtype), share_3.to(dtype), share_4.to(dtype)
    pointers_2 = projected_2_pointer + token_2[:, None] * WIDTH + d[None, :]
    pointers_3 = projected_3_pointer + token_3[:, None] * WIDTH + d[None, :]
    pointers_4 = projected_4_pointer + token_4[:, None] * WIDTH + d[None, :]

    channel = tl.arange(0, BLOCK_C)
    channel_mask = channel < CHANNELS
    pixel_offset = y * width + x
    image_pixels = height * width
    token = image.to(tl.int64) * image_pixels + pixel_offset
    finest = tl.load(
        x_pointer + token[:, None] * CHANNELS + channel[None, :],
        mask=pixel_mask[:, None] & channel_mask[None, :],
        other=0.0,
    )
    weight_pointers = weight_pointer + d[None, :] * CHANNELS + channel[:, None]
    # Columns past the last class repeat it, which costs no masks, and are not stored.
    class_a = tl.program_id(1) * (CLASSES_A + CLASSES_B) + tl.arange(0, CLASSES_A)
    row_a = tl.minimum(class_a, classes - 1)
    pointers_a = classifier_weight_pointer + row_a[None, :] * WIDTH + d[:, None]
    logits_a = tl.zeros((TILE_HEIGHT * TILE_WIDTH, CLASSES_A), tl.float32)
    if CLASSES_B > 0:
        class_b = tl.program_id(1) * (CLASSES_A + CLASSES_B) + CLASSES_A + tl.arange(0, CLASSES_B)
        row_b = tl.minimum(class_b, classes - 1)
        pointers_b = classifier_weight_pointer + row_b[None, :] * WIDTH + d[:, None]
        logits_b = tl.zeros((TILE_HEIGHT * TILE_WIDTH, CLASSES_B), tl.float32)

    for d0 in range(0, WIDTH, BLOCK_D):
        weight = tl.load(weight_pointers + d0 * CHANNELS, mask=channel_mask[:, None], other=0.0)
        fused = tl.dot(finest, weight, input_precision=PRECISION)
        fused = tl.dot(share_2, tl.load(pointers_2 + d0), fused, input_precision=PRECISION)
        fused = tl.dot(share_3, tl.load(pointers_3 + d0), fused, input_precision=PRECISION)
        fused = tl.dot(share_4, tl.load(pointers_4 + d0), fused, input_precision=PRECISION)
        fused += tl.load(bias_pointer + d0 + d).to(tl.float32)[None, :]
        # As torch's relu: NaN stays.
        fused = tl.where(fused < 0, 0.0, fused).to(dtype)
        weight_a = tl.load(pointers_a + d0)
        logits_a = tl.dot(fused, weight_a, logits_a, input_precision=PRECISION)
        if CLASSES_B > 0:
            weight_b = tl.load(pointers_b + d0)
            logits_b = tl.dot(fused, weight_b, logits_b, input_precision=PRECISION)

    dtype = output_pointer.dtype.element_ty
    output_pointers = output_pointer + image.to(tl.int64) * classes * image_pixels
    output_pointers = output_pointers + pixel_offset[:, None]
    logits_a += tl.load(classifier_bias_pointer + row_a).to(tl.float32)[None, :]
    plane = class_a.to(tl.int64)[None, :] * image_pixels
    mask = pixel_mask[:, None] & (class_a < classes)[None, :]
    tl.store(output_pointers + plane, logits_a.to(dtype), mask=mask)
    if CLASSES_B > 0:
        logits_b += tl.load(classifier_bias_pointer + row_b).to(tl.float32)[None, :]
        plane = class_b.to(tl.int64)[None, :] * image_pixels
        mask = pixel_mask[:, None] & (class_b < classes)[None, :]
        tl.store(output_pointers + plane, logits_b.to(dtype), mask=mask)
