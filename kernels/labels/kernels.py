"""The kernels of label maps and scores: lanes that own cells, and lanes that own pixels.

What a label map costs is neither bytes nor FLOPs but instructions, a handful for every pixel and
class. Hence cells:

- four loads serve all pixels of a cell, two vertical blends all pixels of a row of it;
- the highest value and the class of each pixel stay in registers of the lane, as tuples of
  one-dimensional tensors: a second dimension Triton would move between lanes, class after class;
- what is left for a pixel and a class is a multiply-add, a maximum, a comparison and a selection;
- the next classes are on their way while the present ones are compared: at batch 1 a
  multiprocessor has too few warps to hide the way to memory otherwise.
"""

from ..core.optional_triton import tl, triton

# What follows from the sizes of an image.
SIZES = [
    "stride_batch",
    "stride_class",
    "stride_row",
    "height",
    "width",
    "out_height",
    "out_width",
    "blocks",
]


@triton.jit
def load_corners(class_pointer, offsets):
    """The logits of one class at the four corners of each cell.

    Args:
        offsets: four (BLOCK,) int64.
    """
    return (
        tl.load(class_pointer + offsets[0]),
        tl.load(class_pointer + offsets[1]),
        tl.load(class_pointer + offsets[2]),
        tl.load(class_pointer + offsets[3]),
    )


@triton.jit
def load_classes(class_pointer, stride_class, offsets, COUNT: tl.constexpr):
    """`load_corners` of `COUNT` classes from `class_pointer` on."""
    logits = ()
    for _ in tl.static_range(COUNT):
        logits += (load_corners(class_pointer, offsets),)
        class_pointer += stride_class
    return logits


@triton.jit
def to_float32(logit):
    """Cast to float32, and to at least a quarter of its lowest number. NaN stays.

    A class that is masked by -inf would turn to NaN where it is blended.
    """
    LOWEST: tl.constexpr = -8.5070586e37  # not a global: see primitives.py
    return tl.maximum(logit.to(tl.float32), LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def classes_to_float32(logits, COUNT: tl.constexpr):
    """`to_float32` of what `load_classes` gave."""
    converted = ()
    for index in tl.static_range(COUNT):
        a, b, c, d = logits[index]
        corners = (to_float32(a), to_float32(b), to_float32(c), to_float32(d))
        converted += (corners,)
    return converted


@triton.jit
def keep_highest(highest, label, value, k):
    """Take class `k` into an argmax in which the first of equal values wins, and the first NaN.

    The maximum takes NaN on; whether it is a new one its bits tell, as NaN equals nothing.
    """
    new = tl.maximum(highest, value, propagate_nan=tl.PropagateNan.ALL)
    is_new = new.to(tl.int32, bitcast=True) != highest.to(tl.int32, bitcast=True)
    return new, tl.where(is_new, k, label)


@triton.jit
def first_pixel(position, size, out_size):
    """The first pixel of the resized axis that lies at or after a position of the source axis.

    In integers, so that no pixel is left between two cells: the first i with
    (i + 1/2) * size / out_size - 1/2 >= position.
    """
    return tl.maximum((out_size * (2 * position + 1) + size - 1) // (2 * size), 0)


@triton.jit
def source_position(pixel, scale):
    """Place of a pixel of the resized axis on the source axis, as `interpolate` computes it."""
    return tl.maximum((pixel.to(tl.float32) + 0.5) * scale - 0.5, 0.0)


@triton.jit
def corners_of_pixel(y, x, scale_y, scale_x, height, width, stride_row, stride_column):
    """Offsets of the four positions around pixels of the resized map, and their weights."""
    source_y = source_position(y, scale_y)
    source_x = source_position(x, scale_x)
    upper = tl.minimum(source_y.to(tl.int32), height - 1)
    left = tl.minimum(source_x.to(tl.int32), width - 1)
    lower = tl.minimum(upper + 1, height - 1)
    right = tl.minimum(left + 1, width - 1)
    offsets = (
        upper * stride_row + left * stride_column,
        upper * stride_row + right * stride_column,
        lower * stride_row + left * stride_column,
        lower * stride_row + right * stride_column,
    )
    down = source_y - upper
    across = source_x - left
    weights = (
        (1 - down) * (1 - across),
        (1 - down) * across,
        down * (1 - across),
        down * across,
    )
    return offsets, weights


@triton.jit
def blend_corners(class_pointer, offsets, weights):
    """The logits of one class at each pixel, in float32."""
    corners = load_corners(class_pointer, offsets)
    value = to_float32(corners[0]) * weights[0]
    for corner in tl.static_range(1, 4):
        value += to_float32(corners[corner]) * weights[corner]
    return value


@triton.jit
def cell_weight(pixel, scale, start):
    """Share of the way from the start of a pixel's cell to its end, between 0 and 1.

    Rounding may put it on the other side of an edge, but must not extrapolate: past -inf lies +inf.
    """
    return tl.minimum(tl.maximum(source_position(pixel, scale) - start, 0.0), 1.0)


@triton.jit(do_not_specialize=SIZES)
def upsample_argmax_kernel(
    logits_pointer,  # (batch, CLASSES, height, width)
    output_pointer,  # (batch, out_height, out_width), contiguous
    stride_batch,
    stride_class,
    stride_row,
    stride_column,
    height,
    width,
    out_height,  # at least height
    out_width,  # at least width
    scale_y,  # height / out_height
    scale_x,
    blocks,  # in one image
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,  # of a cell's pixels, one lane's share
    COLUMNS: tl.constexpr,
    AGREE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # cells that lanes go down before they go right
    PREFETCH: tl.constexpr,  # classes, at most all
):
    stride_class = tl.cast(stride_class, tl.int64)
    stride_row = tl.cast(stride_row, tl.int64)
    stride_column = tl.cast(stride_column, tl.int64)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    image_pointer = logits_pointer + image * stride_batch

    # Cell -1 lies before position 0: there are height + 1 rows of width + 1 cells.
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    band = BLOCK_ROWS * (width + 1)
    cell_y = cell // band * BLOCK_ROWS + cell % BLOCK_ROWS - 1
    cell_x = cell % band // BLOCK_ROWS - 1
    mask = cell_y < height
    # Lanes past the image load its last row, as masks would cost an instruction a load.
    upper = tl.minimum(tl.maximum(cell_y, 0), height - 1)
    lower = tl.minimum(upper + 1, height - 1)
    left = tl.maximum(cell_x, 0)
    right = tl.minimum(left + 1, width - 1)
    offsets = (
        upper * stride_row + left * stride_column,
        upper * stride_row + right * stride_column,
        lower * stride_row + left * stride_column,
        lower * stride_row + right * stride_column,
    )

    label = tl.zeros((BLOCK,), tl.int32)
    classes = CLASSES
    if AGREE:
        minus_infinity = tl.full((BLOCK,), float("-inf"), tl.float32)
        corner_highest = (minus_infinity, minus_infinity, minus_infinity, minus_infinity)
        corner_labels = (label, label, label, label)
        for k in tl.range(0, CLASSES, loop_unroll_factor=PREFETCH):
            corners = load_corners(image_pointer + k * stride_class, offsets)
            new_highest = ()
            new_labels = ()
            for corner in tl.static_range(4):
                value = to_float32(corners[corner])
                value, best = keep_highest(corner_highest[corner], corner_labels[corner], value, k)
                new_highest += (value,)
                new_labels += (best,)
            corner_highest = new_highest
            corner_labels = new_labels
        label = corner_labels[0]
        differs = (label != corner_labels[1]) | (label != corner_labels[2])
        differs = differs | (label != corner_labels[3])
        classes = CLASSES * tl.max((differs & mask).to(tl.int32), 0)

    first_row = first_pixel(cell_y, height, out_height) + tl.program_id(1) * ROWS
    first_column = first_pixel(cell_x, width, out_width) + tl.program_id(2) * COLUMNS
    down = ()
    across = ()
    highest = ()
    labels = ()
    for row in tl.static_range(ROWS):
        down += (cell_weight(first_row + row, scale_y, upper),)
        for column in tl.static_range(COLUMNS):
            if row == 0:
                across += (cell_weight(first_column + column, scale_x, left),)
            highest += (tl.full((BLOCK,), float("-inf"), tl.float32),)
            labels += (label,)

    # The last group of classes ends with the last class: those that come twice change nothing.
    LAST: tl.constexpr = CLASSES - PREFETCH
    loaded = load_classes(image_pointer, stride_class, offsets, PREFETCH)
    logits = classes_to_float32(loaded, PREFETCH)
    for k0 in range(0, classes, PREFETCH):
        first_class = tl.minimum(k0, LAST)
        next_pointer = image_pointer + tl.minimum(k0 + PREFETCH, LAST) * stride_class
        loaded = load_classes(next_pointer, stride_class, offsets, PREFETCH)
        for ahead in tl.static_range(PREFETCH):
            upper_left = logits[ahead][0]
            upper_right = logits[ahead][1]
            left_difference = logits[ahead][2] - upper_left
            right_difference = logits[ahead][3] - upper_right
            new_highest = ()
            new_labels = ()
            for row in tl.static_range(ROWS):
                start = upper_left + left_difference * down[row]
                difference = upper_right + right_difference * down[row] - start
                for column in tl.static_range(COLUMNS):
                    value, best = keep_highest(
                        highest[row * COLUMNS + column],
                        labels[row * COLUMNS + column],
                        start + difference * across[column],
                        first_class + ahead,
                    )
                    new_highest += (value,)
                    new_labels += (best,)
            highest = new_highest
            labels = new_labels
        # Not before: converting waits for the loads.
        logits = classes_to_float32(loaded, PREFETCH)

    rows_end = tl.minimum(first_pixel(cell_y + 1, height, out_height), out_height)
    columns_end = tl.minimum(first_pixel(cell_x + 1, width, out_width), out_width)
    for row in tl.static_range(ROWS):
        row_pointer = output_pointer + (image * out_height + first_row + row) * out_width
        row_mask = mask & (first_row + row < rows_end)
        for column in tl.static_range(COLUMNS):
            tl.store(
                row_pointer + first_column + column,
                labels[row * COLUMNS + column].to(output_pointer.dtype.element_ty),
                mask=row_mask & (first_column + column < columns_end),
            )


@triton.jit(do_not_specialize=SIZES)
def upsample_argmax_gather_kernel(
    logits_pointer,  # (batch, CLASSES, height, width)
    output_pointer,  # (batch, out_height, out_width), contiguous
    stride_batch,
    stride_class,
    stride_row,
    stride_column,
    height,
    width,
    out_height,
    out_width,
    scale_y,  # height / out_height
    scale_x,
    blocks,  # in one image
    CLASSES: tl.constexpr,
    RESIZE: tl.constexpr,  # False: of the size of the logits
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    stride_class = tl.cast(stride_class, tl.int64)
    stride_row = tl.cast(stride_row, tl.int64)
    stride_column = tl.cast(stride_column, tl.int64)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    image_pointer = logits_pointer + image * stride_batch
    pixel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < tl.cast(out_height, tl.int64) * out_width
    y = tl.minimum((pixel // out_width).to(tl.int32), out_height - 1)
    x = (pixel % out_width).to(tl.int32)
    if RESIZE:
        offsets, weights = corners_of_pixel(
            y, x, scale_y, scale_x, height, width, stride_row, stride_column
        )
    else:
        offset = y * stride_row + x * stride_column

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    label = tl.zeros((BLOCK,), tl.int32)
    for k in tl.range(0, CLASSES, loop_unroll_factor=UNROLL):
        class_pointer = image_pointer + k * stride_class
        if RESIZE:
            value = blend_corners(class_pointer, offsets, weights)
        else:
            # Blended values are never -0.0, which bits tell from a tie with 0.0.
            value = to_float32(tl.load(class_pointer + offset)) + 0.0
        highest, label = keep_highest(highest, label, value, k)
    output_pointers = output_pointer + image * out_height * out_width + pixel
    tl.store(output_pointers, label.to(output_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def upsample_scores_kernel(
    logits_pointer,  # (batch, CLASSES, height, width)
    output_pointer,  # (batch, out_height, out_width), contiguous
    stride_batch,
    stride_class,
    stride_row,
    stride_column,
    height,
    width,
    out_height,
    out_width,
    scale_y,  # height / out_height
    scale_x,
    blocks,  # in one image
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    stride_class = tl.cast(stride_class, tl.int64)
    stride_row = tl.cast(stride_row, tl.int64)
    stride_column = tl.cast(stride_column, tl.int64)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    image_pointer = logits_pointer + image * stride_batch
    pixel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < tl.cast(out_height, tl.int64) * out_width
    y = tl.minimum((pixel // out_width).to(tl.int32), out_height - 1)
    x = (pixel % out_width).to(tl.int32)
    offsets, weights = corners_of_pixel(
        y, x, scale_y, scale_x, height, width, stride_row, stride_column
    )
    # The sum of the exponentials of all classes so far, as a multiple of the highest one's.
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, CLASSES, loop_unroll_factor=UNROLL):
        value = blend_corners(image_pointer + k * stride_class, offsets, weights)
        lower = tl.exp(-tl.abs(value - highest))
        total = tl.where(value > highest, total * lower + 1.0, total + lower)
        highest = tl.maximum(highest, value)
    output_pointers = output_pointer + image * out_height * out_width + pixel
    tl.store(output_pointers, 1.0 / total, mask=mask)
