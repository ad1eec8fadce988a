"""Kernels of whole forwards compiled for GPUs that are not here.

Nothing runs: what is tested is that every kernel compiles, what it takes, and its offsets.
"""

from __future__ import annotations

import functools
import operator
import re

import pandas as pd
import pytest
import torch

from fastseg.kernels.core import optional_triton

if not optional_triton.HAS_TRITON or optional_triton.interpreting():
    pytest.skip("compiling needs Triton, not its interpreter", allow_module_level=True)

from bench.ahead_of_time import SHARED_LIMIT, Compiled, compile_launch, text_of
from bench.measure import compiles
from bench.work import pretend_gpu, trace
from fastseg.kernels import upsample_argmax, upsample_scores
from tests.kernels.triton.embed.embed_cases import parameters, patch_embed

# Bytes a thread may spill. Elsewhere a spill is a matter of speed that nothing has measured.
SPILL_LIMIT = {"sm_90": 0, "sm_80": 64}
PARTS = 8  # tests that share the launches of a target, so that processes can share them


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """Nothing that an earlier run compiled may hide a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def launches(target: str, dtype: torch.dtype, variants: tuple[str, ...], batches: tuple[int, ...]):
    name = str(dtype).removeprefix("torch.")
    uniques = compiles.unique_launches(target, variants, batches, [name])
    return [unique.launch for unique in uniques]


def widest(target: str, dtype: torch.dtype):
    """Of each kernel of B2 the launch with the largest constexprs."""
    found = {}
    for launch in launches(target, dtype, ("b2",), (1,)):
        constants = [value for value in launch.options.values() if type(value) is int]
        if launch.name not in found or sum(constants) > found[launch.name][0]:
            found[launch.name] = (sum(constants), launch)
    return [launch for _, launch in found.values()]


def rows_of_tile(options) -> int:
    """The rows of the matrix products of a kernel: of tokens, or of pixels."""
    for names in (("BLOCK_M",), ("TILE_HEIGHT", "TILE_WIDTH"), ("BLOCK_Y", "BLOCK_X")):
        if names[0] in options:
            return functools.reduce(lambda size, name: size * options[name], names, 1)
    raise AssertionError(f"no tile in {options}")


def complaints(launches, target: str, half: bool) -> list[str]:
    """What is wrong with launches compiled for `target`."""
    return [
        f"{launch.name} {launch.options}: {complaint}"
        for launch in launches
        for complaint in complaints_of(launch, target, half)
    ]


def complaints_of(launch, target: str, half: bool) -> list[str]:
    compiled = compile_launch(launch, target, count=False)
    found = []
    if compiled.spill_bytes > SPILL_LIMIT.get(target, float("inf")):
        found.append(f"spills {compiled.spill_bytes} bytes")
    if compiled.shared_bytes > SHARED_LIMIT[target]:
        found.append(f"takes {compiled.shared_bytes} bytes of shared memory")
    multiplies = half and "PRECISION" in launch.options
    if multiplies:
        if compiled.tensor_core == "none":
            found.append("uses no matrix instruction")
        large = rows_of_tile(launch.options) >= 64
        if target == "sm_90" and large and compiled.tensor_core != "wgmma":
            found.append(f"uses {compiled.tensor_core}")
    return found


# What one of B0 and one of B2 launch, quickly; all of them where there is time.
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.oldest
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("variants", "batches", "least"),
    [(("b0", "b2"), (1,), 60), SLOW(("b0", "b1", "b2"), (1, 8), 100)],
)
@pytest.mark.slow
def test_all_of_sm_90_in_half(variants, batches, least, part):
    found = launches("sm_90", torch.bfloat16, variants, batches)
    assert len(found) > least
    assert not complaints(found[part::PARTS], "sm_90", half=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("variants", "batches", "least"), [(("b2",), (1,), 25), SLOW(("b0", "b2"), (1, 8), 40)]
)
def test_all_of_sm_90_in_float32(variants, batches, least, part):
    found = launches("sm_90", torch.float32, variants, batches)
    assert len(found) > least
    assert not complaints(found[part::PARTS], "sm_90", half=False)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *((target, torch.float16) for target in SHARED_LIMIT if target != "sm_90"),
        # Where shared memory is scarce.
        *((target, torch.float32) for target in ("sm_80", "sm_120", "gfx942")),
    ],
    ids=str,
)
@pytest.mark.slow
def test_other_targets(target, dtype):
    found = widest(target, dtype)
    assert len(found) > 10
    assert not complaints(found, target, half=dtype != torch.float32)


LOGITS = (150, 128, 128)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_90", torch.bfloat16),
        ("sm_90", torch.float32),
        *(
            pytest.param(target, torch.bfloat16, marks=pytest.mark.slow)
            for target in SHARED_LIMIT
            if target != "sm_90"
        ),
    ],
    ids=str,
)
def test_label_maps(target, dtype):
    """Forms and sizes that no forward asks for."""
    with pretend_gpu(compiles.family_of(target)):
        logits = torch.empty(1, *LOGITS, device="meta", dtype=dtype)
        found = [
            *trace(upsample_argmax, logits, (1024, 1024)).launches,
            *trace(upsample_argmax, logits, (683, 512), torch.uint8).launches,
            *trace(upsample_argmax, logits, (100, 512)).launches,
            *trace(upsample_argmax, logits[:, :19], (128, 128)).launches,
            *trace(upsample_scores, logits, (1024, 1024)).launches,
            *trace(upsample_scores, logits[:, :19], (100, 512)).launches,
        ]
    agree = {**found[0].options, "AGREE": True, "BLOCK": 32, "BLOCK_ROWS": 4, "num_warps": 1}
    found.append(found[0]._replace(options=agree))
    assert len({launch.name for launch in found}) == 3
    assert not complaints(found, target, half=False)


# Offsets


Range = tuple[int, int]


def launch_ranges(launch, text: str) -> dict[str, Range]:
    """The integer parameters of a launch by their names in TTIR, and "x", "y", "z" of the grid."""
    names = re.findall(r"(%\w+): ", re.search(r"tt\.func public @\w+\((.*)", text)[1])
    values = [
        value
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False)
        if not (parameter.is_constexpr or value is None)
        and (parameter.do_not_specialize or type(value) is not int or value != 1)
    ]
    ranges = {
        name: (value, value)
        for name, value in zip(names, values, strict=True)
        if type(value) is int
    }
    return {**ranges, **{"xyz"[axis]: (0, size - 1) for axis, size in enumerate(launch.grid)}}


def combine(operation: str, a: Range, b: Range) -> Range | None:
    """The range of an integer operation; None where it is not followed."""
    if operation == "arith.remsi":
        if a[0] >= 0 and a[1] < b[0]:
            return a
        return (0 if a[0] >= 0 else 1 - b[1], b[1] - 1) if b[0] > 0 else None
    if operation == "arith.divsi" and b[0] <= 0:
        return None
    function = {
        "arith.addi": operator.add,
        "arith.subi": operator.sub,
        "arith.muli": operator.mul,
        "arith.divsi": lambda x, y: abs(x) // y * (1 if x >= 0 else -1),
        "arith.minsi": min,
        "arith.maxsi": max,
    }.get(operation)
    if function is None:
        return None
    corners = [function(x, y) for x in a for y in b]
    return min(corners), max(corners)


def overflows(text: str, known: dict[str, Range]) -> list[str]:
    """Lines of TTIR whose result may pass 32 bits and is of 32 bits.

    Ranges are followed through integer arithmetic; what comes from memory or from an earlier round
    of a loop is not known, nor what is computed from it.
    """
    ranges, found = dict(known), []
    for line in text.splitlines():
        loop = re.match(r"\s*(?:%.* = )?scf\.for (%\w+) = (%\w+) to (%\w+) step", line)
        if loop and loop[2] in ranges and loop[3] in ranges:
            ranges[loop[1]] = (ranges[loop[2]][0], max(ranges[loop[2]][0], ranges[loop[3]][1] - 1))
        match = re.match(r"\s*(%\w+) = ([\w.]+)(.*)", line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        rest = rest.split(" loc(")[0]
        operands = [ranges.get(name) for name in re.findall(r"%\w+", rest)]
        value = None
        if operation == "arith.constant":
            number = re.match(r" (?:dense<)?(-?\d+)>? : .*i\d+", rest)
            value = (int(number[1]),) * 2 if number else None
        elif operation == "tt.make_range":
            end, start = (int(re.search(rf"{name} = (\d+)", rest)[1]) for name in ("end", "start"))
            value = (start, end - 1)
        elif operation == "tt.get_program_id":
            value = ranges.get(rest.split()[0], (0, 0))
        elif operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"):
            value = operands[0]
        elif operation == "arith.select" and None not in operands[1:]:
            value = min(operands[1][0], operands[2][0]), max(operands[1][1], operands[2][1])
        elif len(operands) == 2 and None not in operands:
            value = combine(operation, *operands)
        if value is None:
            continue
        ranges[result] = value
        narrow = re.search(r"\bi32\b|xi32>", rest.rsplit(" : ", 1)[-1]) is not None
        if narrow and operation != "arith.extsi" and not -(2**31) <= value[0] <= value[1] < 2**31:
            found.append(line.strip())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b0", SLOW("b1")])
def test_offsets_pass_32_bits(variant):
    """A batch whose tensors have more than 2^31 elements each, though fewer rows."""
    found = {}
    for launch in launches("sm_90", torch.bfloat16, (variant,), (40_000,)):
        found.setdefault(launch.name, launch)
    assert len(found) > 10
    for launch in found.values():
        text = text_of(launch, "sm_90", "ttir")
        assert not overflows(text, launch_ranges(launch, text)), launch.name


def test_offsets_of_scores_pass_32_bits():
    logits = torch.empty(8, 150, 4096, 4096, device="meta", dtype=torch.bfloat16)
    with pretend_gpu("sm_90"):
        (launch,) = trace(upsample_scores, logits, (16384, 16384)).launches
    text = text_of(launch, "sm_90", "ttir")
    assert not overflows(text, launch_ranges(launch, text))


@pytest.mark.parametrize("wide", ["rows", "columns"])
def test_strides_of_pixels_pass_32_bits(wide):
    """Rows of an image that lie far apart, as in a view of a larger one."""
    far = 2**29
    strides = (1, 64 * far, far, 1) if wide == "rows" else (1, 64 * far, 1, far)
    pixels = torch.empty_strided((1, 3, 64, 64), strides, device="meta", dtype=torch.bfloat16)
    layer = parameters(3, 32, 7, torch.bfloat16, torch.device("meta"))
    with pretend_gpu("sm_90"):
        traced = trace(lambda: patch_embed(pixels, *layer, stride=4, padding=3, eps=1e-6))
    (launch,) = traced.launches
    assert any(type(one) is int and one == far for one in launch.arguments)
    text = text_of(launch, "sm_90", "ttir")
    assert not overflows(text, launch_ranges(launch, text))


def test_overflows_are_found():
    text = """
    %c100 = arith.constant 100 : i32 loc(#loc)
    %block = arith.constant dense<64> : tensor<64xi32> loc(#loc)
    %row = tt.get_program_id x : i32 loc(#loc)
    %splat = tt.splat %row : i32 -> tensor<64xi32> loc(#loc)
    %rows = arith.muli %splat, %block : tensor<64xi32> loc(#loc)
    %widths = tt.splat %width : i32 -> tensor<64xi32> loc(#loc)
    %bad = arith.muli %rows, %widths : tensor<64xi32> loc(#loc)
    %late = arith.extsi %bad : tensor<64xi32> to tensor<64xi64> loc(#loc)
    %wide = arith.extsi %rows : tensor<64xi32> to tensor<64xi64> loc(#loc)
    %wide_widths = arith.extsi %widths : tensor<64xi32> to tensor<64xi64> loc(#loc)
    %good = arith.muli %wide, %wide_widths : tensor<64xi64> loc(#loc)
    %inside = arith.remsi %rows, %block : tensor<64xi32> loc(#loc)
    %fine = arith.muli %inside, %widths : tensor<64xi32> loc(#loc)
    """
    known = {"x": (0, 10**6), "%width": (512, 512)}
    assert [line.split()[0] for line in overflows(text, known)] == ["%bad"]


# The report


@pytest.mark.slow
def test_report(tmp_path, monkeypatch, capsys):
    def pretend(launch, target):
        if launch.name == "layer_norm_kernel":
            raise RuntimeError("out of luck")
        return Compiled(launch.name, target, launch.options, 100, 8, 2048, "wgmma", 500, 3)

    monkeypatch.setattr(compiles, "compile_launch", pretend)
    output = tmp_path / "new" / "compiles.csv"
    given = ["--targets", "sm_90,gfx942", "--variants", "b0,b1", "--output", str(output)]
    assert compiles.main(given) == 1
    said = capsys.readouterr().out
    assert "python -m bench compiles --targets sm_90,gfx942 --variants b0,b1" in said
    kernels = pd.read_csv(output)
    assert list(dict.fromkeys(kernels["target"])) == ["sm_90", "gfx942"]
    failed = kernels["kernel"].str.contains("layer_norm_kernel")
    assert set(kernels["error"][failed]) == {"RuntimeError"}
    assert kernels["error"][~failed].isna().all()
    figures = [100, 8, 2048, "wgmma", 500, 3]
    columns = ["registers", "spill_bytes", "shared_bytes", "tensor_core", "instructions"]
    for line in kernels[~failed][[*columns, "ctas_per_sm"]].itertuples(index=False):
        assert list(line) == figures
    assert "b0 x 1, b0 x 8, b1 x 1, b1 x 8" in set(kernels["launched_by"])
    on_sm_90 = next(line for line in said.splitlines() if line.startswith("| sm_90 "))
    here = kernels["target"] == "sm_90"
    cells = [int(cell) for cell in on_sm_90.strip("| ").split("|")[1:]]
    assert cells == [here.sum(), (here & failed).sum(), (here & ~failed).sum(), 8, 100, 2]
