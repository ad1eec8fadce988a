"""The gradient kernel of `upsample_cross_entropy`.

A position's gradient is the sum over the pixels that touch it. Lanes have cells side by side, and
go down their rows. In a cell the pixels of a class are added up with their shares of the four
corners. The lower two sums stay with the lane until the next row of cells has given its upper two;
the right two go to the lane of the next cell. So each power is computed once, and each position is
written once, by one lane, in one order: no atomics, the same bits every time. The first lane's cell
is that of the last position of the block to the left, computed twice.
"""

from ..blocks.primitives import LOG2_E
from ..core.optional_triton import tl, triton
from .kernels import SIZES, cell_weight, first_pixel, power_of_2


@triton.jit(do_not_specialize=[*SIZES, "column_blocks", "row_chunks"])
def upsample_cross_entropy_gradient_kernel(
    logits_pointer,  # (batch, CLASSES, height, width)
    kept_pointer,  # (batch, out_height, out_width) float32
    kept_labels_pointer,  # (batch, out_height, out_width) int16
    weight_pointer,  # (CLASSES,) float32 or None
    gradient_pointer,  # (batch, CLASSES, height, width) float32, contiguous
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
    label_share,  # 1 - label smoothing
    class_share,  # label smoothing / CLASSES
    column_blocks,  # of BLOCK - 1 positions
    row_chunks,
    CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,  # of a cell's pixels that are taken at once
    COLUMNS: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    COLUMN_PARTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,  # cells side by side
    GROUP: tl.constexpr,  # classes of a program
    CHUNK: tl.constexpr,  # rows of positions of a program
):
    place = tl.program_id(0)
    column_block = place % column_blocks
    chunk = place // column_blocks % row_chunks
    image = (place // (column_blocks * row_chunks)).to(tl.int64)
    first_class = tl.program_id(1) * GROUP
    lane = tl.arange(0, BLOCK)
    # The first lane has the cell before the first position of this program.
    cell_x = column_block * (BLOCK - 1) + lane - 1
    left = tl.minimum(tl.maximum(cell_x, 0), width - 1)
    right = tl.minimum(left + 1, width - 1)
    # Before the first position and after the last one both neighbours are the same position.
    is_before = cell_x < 0
    is_last = cell_x == width - 1
    in_image = cell_x < width
    stores = (lane > 0) & in_image
    lane_before = tl.maximum(lane - 1, 0)
    stride_class = tl.cast(stride_class, tl.int64)
    stride_row = tl.cast(stride_row, tl.int64)
    stride_column = tl.cast(stride_column, tl.int64)
    image_pointer = logits_pointer + image * stride_batch
    left_offset = left * stride_column
    right_offset = right * stride_column
    columns_start = first_pixel(cell_x, step_x, offset_x, divisor_x)
    columns_end = tl.minimum(first_pixel(cell_x + 1, step_x, offset_x, divisor_x), out_width)

    # Corners of the upper row of positions, and what the row of cells above said of it.
    top = chunk * CHUNK
    bottom = tl.minimum(top + CHUNK, height)
    row_now = tl.maximum(top - 1, 0)
    zero = tl.zeros((BLOCK,), tl.float32)
    lefts = ()
    rights = ()
    carried = ()
    of_label = ()  # what is taken off where a class is the label
    of_class = ()  # and at each pixel
    for g in tl.static_range(GROUP):
        k = tl.minimum(first_class + g, CLASSES - 1)
        class_pointer = image_pointer + k * stride_class + row_now * stride_row
        lefts += (tl.load(class_pointer + left_offset).to(tl.float32) * LOG2_E,)
        rights += (tl.load(class_pointer + right_offset).to(tl.float32) * LOG2_E,)
        carried += (zero,)
        class_weight = 1.0
        if weight_pointer is not None:
            class_weight = tl.load(weight_pointer + k)
        of_label += (class_weight * label_share,)
        of_class += (class_weight * class_share,)

    for step in tl.range(0, bottom - top + 1, num_stages=1):
        cell_y = top - 1 + step
        upper = tl.maximum(cell_y, 0)
        next_row = tl.minimum(cell_y + 1, height - 1)
        new_lefts = ()
        new_rights = ()
        sums = ()  # of each class: of the corners upper left, upper right, lower left, lower right
        for g in tl.static_range(GROUP):
            k = tl.minimum(first_class + g, CLASSES - 1)
            class_pointer = image_pointer + k * stride_class + next_row * stride_row
            new_left = tl.load(class_pointer + left_offset).to(tl.float32)
            new_right = tl.load(class_pointer + right_offset).to(tl.float32)
            new_lefts += (new_left * LOG2_E,)
            new_rights += (new_right * LOG2_E,)
            sums += (zero, zero, zero, zero)
        rows_start = first_pixel(cell_y, step_y, offset_y, divisor_y)
        rows_end = tl.minimum(first_pixel(cell_y + 1, step_y, offset_y, divisor_y), out_height)
        for part in tl.range(0, ROW_PARTS * COLUMN_PARTS, loop_unroll_factor=1):
            first_row = rows_start + part // COLUMN_PARTS * ROWS
            first_column = columns_start + part % COLUMN_PARTS * COLUMNS
            across = ()
            for column in tl.static_range(COLUMNS):
                x = first_column + column
                across += (cell_weight(x, left, step_x, offset_x, divisor_x),)
            for row in tl.static_range(ROWS):
                y = first_row + row
                down = cell_weight(y, upper, step_y, offset_y, divisor_y)
                row_there = in_image & (lane * 0 + y < rows_end)
                pixel = (image * out_height + y) * out_width + first_column
                kept = ()
                labels = ()
                for column in tl.static_range(COLUMNS):
                    there = row_there & (first_column + column < columns_end)
                    at_pixel = tl.load(kept_pointer + pixel + column, there, float("inf"))
                    label = tl.load(kept_labels_pointer + pixel + column, there, -1)
                    kept += (at_pixel,)
                    labels += (label.to(tl.int32),)
                updated = ()
                for g in tl.static_range(GROUP):
                    start = lefts[g] + (new_lefts[g] - lefts[g]) * down
                    difference = rights[g] + (new_rights[g] - rights[g]) * down - start
                    both = zero
                    to_right = zero
                    for column in tl.static_range(COLUMNS):
                        exponent = start + difference * across[column] - kept[column]
                        value = power_of_2(exponent, APPROXIMATE)
                        is_label = labels[column] == first_class + g
                        value = tl.where(is_label, value - of_label[g], value)
                        if SMOOTH:
                            value = tl.where(labels[column] >= 0, value - of_class[g], value)
                        both += value
                        to_right += value * across[column]
                    to_left = both - to_right
                    updated += (
                        sums[4 * g] + to_left * (1 - down),
                        sums[4 * g + 1] + to_right * (1 - down),
                        sums[4 * g + 2] + to_left * down,
                        sums[4 * g + 3] + to_right * down,
                    )
                sums = updated
        new_carried = ()
        for g in tl.static_range(GROUP):
            upper_left = sums[4 * g] + tl.where(is_last, sums[4 * g + 1], 0.0)
            upper_right = sums[4 * g + 1] + tl.where(is_before, sums[4 * g], 0.0)
            lower_left = sums[4 * g + 2] + tl.where(is_last, sums[4 * g + 3], 0.0)
            lower_right = sums[4 * g + 3] + tl.where(is_before, sums[4 * g + 2], 0.0)
            above = upper_left + tl.gather(upper_right, lane_before, 0)
            below = lower_left + tl.gather(lower_right, lane_before, 0)
            if cell_y < 0:
                below += above
            if cell_y == height - 1:
                above += below
            k = first_class + g
            row_of_map = (image * CLASSES + k) * height + upper
            tl.store(
                gradient_pointer + row_of_map * width + cell_x,
                carried[g] + above,
                mask=stores & (lane * 0 + cell_y >= top) & (lane * 0 + k < CLASSES),
            )
            new_carried += (below,)
        carried = new_carried
        lefts = new_lefts
        rights = new_rights
