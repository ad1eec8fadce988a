"""The forward kernel of `upsample_cross_entropy`: lanes own cells, squares between four positions.

A lane has a cell and its pixels, or its share of them. For each class: four loads, then
for each pixel a multiply-add, a power of 2 and an addition. There is no running maximum: each
corner's logits are less the highest logit of that corner, and shares are convex, so nothing exceeds
0. A cell whose sums underflow is done again, with the maximum of each pixel. The logit of the label
is gathered at the end. What is kept of a pixel for the gradient is one number,

    t = log2(sum_k exp u_k) - log2(a),     a what the pixel counts; +inf where it is ignored,

so that a p_k = exp2(u_k log2(e) - t) takes neither a product nor a mask; and its label, -1 where it
is ignored.
"""

from ..blocks.primitives import LOG2_E
from ..core.optional_triton import tl, triton

LN_2 = tl.constexpr(0.6931471805599453)

# What follows from the sizes of an image.
SIZES = [
    *("stride_batch", "stride_class", "stride_row", "height", "width", "out_height", "out_width"),
    *("step_y", "offset_y", "divisor_y", "step_x", "offset_x", "divisor_x"),
]


@triton.jit
def first_pixel(position, step, offset, divisor):
    """The first pixel that lies at or after a position; an `Axis` has the three numbers."""
    return tl.maximum((position * step - offset + divisor - 1) // divisor, 0)


@triton.jit
def cell_weight(pixel, start, step, offset, divisor):
    """A pixel's share of the end of its cell, from 0 to 1; exact but for the division."""
    beyond = (pixel * divisor + offset - start * step).to(tl.float32) / step
    return tl.minimum(tl.maximum(beyond, 0.0), 1.0)


@triton.jit
def power_of_2(x, APPROXIMATE: tl.constexpr):
    """2^x, results below 2^-126 as 0 where it is one instruction, as on NVIDIA's GPUs."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def blend(pointer, offsets, down, across):
    """The value at one pixel of each cell, of a map at `pointer`."""
    upper_left = tl.load(pointer + offsets[0]).to(tl.float32)
    upper_right = tl.load(pointer + offsets[1]).to(tl.float32)
    lower_left = tl.load(pointer + offsets[2]).to(tl.float32)
    lower_right = tl.load(pointer + offsets[3]).to(tl.float32)
    start = upper_left + (lower_left - upper_left) * down
    end = upper_right + (lower_right - upper_right) * down
    return start + (end - start) * across


@triton.jit
def sums_around_highest(
    image_pointer,
    stride_class,
    offsets,
    down,
    across,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Highest logit of each pixel of a cell, times log2(e), and the sum of powers around it."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # not a global: see primitives.py
    highest = ()
    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        highest += (tl.full((BLOCK,), float("-inf"), tl.float32),)
        sums += (tl.zeros((BLOCK,), tl.float32),)
    for turn in tl.static_range(2):
        class_pointer = image_pointer
        for _ in tl.range(0, CLASSES, loop_unroll_factor=1):
            a = tl.load(class_pointer + offsets[0]).to(tl.float32) * LOG2_E
            b = tl.load(class_pointer + offsets[1]).to(tl.float32) * LOG2_E
            c = tl.load(class_pointer + offsets[2]).to(tl.float32) * LOG2_E
            d = tl.load(class_pointer + offsets[3]).to(tl.float32) * LOG2_E
            updated = ()
            for row in tl.static_range(ROWS):
                start = a + (c - a) * down[row]
                difference = b + (d - b) * down[row] - start
                for column in tl.static_range(COLUMNS):
                    value = start + difference * across[column]
                    if turn == 0:
                        updated += (tl.maximum(highest[row * COLUMNS + column], value),)
                    else:
                        value -= highest[row * COLUMNS + column]
                        updated += (sums[row * COLUMNS + column] + tl.exp2(value),)
            if turn == 0:
                highest = updated
            else:
                sums = updated
            class_pointer += stride_class
    return highest, sums


@triton.jit(do_not_specialize=[*SIZES, "blocks"])
def upsample_cross_entropy_kernel(
    logits_pointer,  # (batch, CLASSES, height, width)
    highest_pointer,  # (batch, height, width) float32: the highest logit of each position
    spread_pointer,  # (batch, height, width) float32: sum_k w_k logit_k, for label smoothing
    labels_pointer,  # (batch, out_height, out_width) of integers
    weight_pointer,  # (CLASSES,) float32 or None
    kept_pointer,  # (batch, out_height, out_width) float32: t
    kept_labels_pointer,  # (batch, out_height, out_width) int16
    partials_pointer,  # (2, programs) float32: sums of losses and of weights
    wrong_pointer,  # (programs,) int64: the first pixel with a wrong label
    stride_batch,
    stride_class,
    stride_row,
    stride_column,
    height,
    width,
    out_height,
    out_width,
    step_y,
    offset_y,
    divisor_y,
    step_x,
    offset_x,
    divisor_x,
    ignore_index,
    label_share,  # 1 - label smoothing
    class_share,  # label smoothing / CLASSES
    all_weights_pointer,  # () float32: the sum of the weights of all classes
    blocks,  # of cells in one image
    CLASSES: tl.constexpr,
    KEEP: tl.constexpr,  # for a gradient
    ROWS: tl.constexpr,  # of a cell's pixels, one lane's share
    COLUMNS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    stride_class = tl.cast(stride_class, tl.int64)
    stride_row = tl.cast(stride_row, tl.int64)
    stride_column = tl.cast(stride_column, tl.int64)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    image_pointer = logits_pointer + image * stride_batch
    # Cell -1 lies before position 0: there are height + 1 rows of width + 1 cells.
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    cell_y = cell // (width + 1) - 1
    cell_x = cell % (width + 1) - 1
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
    map_start = image * height * width
    map_offsets = (
        upper * width + left,
        upper * width + right,
        lower * width + left,
        lower * width + right,
    )
    highest_0 = tl.load(highest_pointer + map_start + map_offsets[0]) * LOG2_E
    highest_1 = tl.load(highest_pointer + map_start + map_offsets[1]) * LOG2_E
    highest_2 = tl.load(highest_pointer + map_start + map_offsets[2]) * LOG2_E
    highest_3 = tl.load(highest_pointer + map_start + map_offsets[3]) * LOG2_E

    first_row = first_pixel(cell_y, step_y, offset_y, divisor_y) + tl.program_id(1) * ROWS
    first_column = first_pixel(cell_x, step_x, offset_x, divisor_x) + tl.program_id(2) * COLUMNS
    down = ()
    across = ()
    sums = ()
    shifts = ()
    for row in tl.static_range(ROWS):
        down += (cell_weight(first_row + row, upper, step_y, offset_y, divisor_y),)
        start = highest_0 + (highest_2 - highest_0) * down[row]
        end = highest_1 + (highest_3 - highest_1) * down[row]
        for column in tl.static_range(COLUMNS):
            if row == 0:
                across += (cell_weight(first_column + column, left, step_x, offset_x, divisor_x),)
            sums += (tl.zeros((BLOCK,), tl.float32),)
            shifts += (start + (end - start) * across[column],)

    class_pointer = image_pointer
    for _ in tl.range(0, CLASSES, loop_unroll_factor=PREFETCH):
        a = tl.load(class_pointer + offsets[0]).to(tl.float32) * LOG2_E - highest_0
        b = tl.load(class_pointer + offsets[1]).to(tl.float32) * LOG2_E - highest_1
        c = tl.load(class_pointer + offsets[2]).to(tl.float32) * LOG2_E - highest_2
        d = tl.load(class_pointer + offsets[3]).to(tl.float32) * LOG2_E - highest_3
        updated = ()
        for row in tl.static_range(ROWS):
            start = a + (c - a) * down[row]
            difference = b + (d - b) * down[row] - start
            for column in tl.static_range(COLUMNS):
                power = power_of_2(start + difference * across[column], APPROXIMATE)
                updated += (sums[row * COLUMNS + column] + power,)
        sums = updated
        class_pointer += stride_class

    least = tl.full((BLOCK,), 1.0, tl.float32)
    for place in tl.static_range(ROWS * COLUMNS):
        least = tl.minimum(least, sums[place])
    if tl.min(tl.where(mask, least, 1.0), 0) < 1e-25:
        shifts, sums = sums_around_highest(
            image_pointer, stride_class, offsets, down, across, CLASSES, ROWS, COLUMNS, BLOCK
        )

    all_weights = 0.0
    if spread_pointer is not None:
        all_weights = tl.load(all_weights_pointer)
    rows_end = tl.minimum(first_pixel(cell_y + 1, step_y, offset_y, divisor_y), out_height)
    columns_end = tl.minimum(first_pixel(cell_x + 1, step_x, offset_x, divisor_x), out_width)
    loss = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.full((BLOCK,), 9223372036854775807, tl.int64)
    for row in tl.static_range(ROWS):
        for column in tl.static_range(COLUMNS):
            y = first_row + row
            x = first_column + column
            # Places beyond the cell's pixels count nowhere.
            there = mask & (y < rows_end) & (x < columns_end)
            pixel = (image * out_height + y) * out_width + x
            label = tl.load(labels_pointer + pixel, mask=there, other=0).to(tl.int64)
            counts = there & (label != ignore_index)
            is_wrong = counts & ((label < 0) | (label >= CLASSES))
            wrong = tl.where(is_wrong, tl.minimum(wrong, pixel), wrong)
            counts = counts & (is_wrong == 0)
            label = tl.where(counts, label, 0)
            at_label = blend(
                image_pointer + label * stride_class, offsets, down[row], across[column]
            )
            log_sum = tl.log2(sums[row * COLUMNS + column]) + shifts[row * COLUMNS + column]
            factor = tl.where(counts, 1.0, 0.0)
            if weight_pointer is not None:
                factor = tl.where(counts, tl.load(weight_pointer + label), 0.0)
            count += factor
            if spread_pointer is not None:
                spread = blend(spread_pointer + map_start, map_offsets, down[row], across[column])
                factor *= label_share
                on_sum = factor + tl.where(counts, all_weights * class_share, 0.0)
                value = on_sum * (log_sum * LN_2) - factor * at_label
                value -= spread * class_share
            else:
                on_sum = factor
                value = factor * (log_sum * LN_2 - at_label)
            # Where nobody can be told of a wrong label, in a graph, the loss is NaN.
            loss += tl.where(counts, value, tl.where(is_wrong, float("nan"), 0.0))
            if KEEP:
                # Of a class with weight 0 too there is nothing.
                kept = log_sum - tl.log2(tl.where(on_sum > 0, on_sum, 1.0))
                kept = tl.where(on_sum > 0, kept, float("inf"))
                tl.store(kept_pointer + pixel, kept, mask=there)
                kept_label = tl.where(counts, label, -1).to(tl.int16)
                tl.store(kept_labels_pointer + pixel, kept_label, mask=there)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    program = program * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_pointer + program, tl.sum(loss, 0))
    tl.store(partials_pointer + programs + program, tl.sum(count, 0))
    tl.store(wrong_pointer + program, tl.min(wrong, 0))
