"""Peak memory of a forward, each provider in a process of its own.

The figure is how far the resident memory rises above what it was just before the forward, with
weights and pixels loaded and a small forward behind it. `ru_maxrss` would not do: a child inherits
its parent's peak. So this reads Linux's VmHWM, which begins anew with a program.

`python -m bench.memory` is such a process; `bench.grid` starts it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from . import pairs
from .context import SkippedCase
from .gates import Gate, logits_gate
from .providers import BASELINE

PROVIDERS = (BASELINE, "fastseg eager")
MAX_REPEATS = 3  # the figure hardly varies
_STATUS = Path("/proc/self/status")
_WARM_UP_SIZE = (64, 64)
_TIMEOUT_SECONDS = 600


def measure(
    variant: str, size: tuple[int, int], threads: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float], Gate]:
    """Peak growth in MB (10^6 bytes) of every run and the parity error, by provider, and the gate.

    Raises:
        RedGate: logits of a provider are wrong.
        SkippedCase: this system does not tell the peak of a process, or `size` is too small.
        RuntimeError: a child process failed.
    """
    if not _STATUS.exists():
        raise SkippedCase("the peak of a process is read from Linux's /proc")
    samples: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs.write_checkpoint(folder, variant)
        gate = logits_gate(pairs.reference_logits(folder, pairs.draw_pixels(size)))
        for _ in tqdm(range(min(repeats, MAX_REPEATS)), desc="peak memory", leave=False):
            for provider in PROVIDERS:
                samples[provider].append(_run_child(provider, folder, size, threads))
                logits = load_file(_logits_path(folder))["logits"]
                errors[provider] = gate.check(provider, logits)
    return samples, errors, gate


def _run_child(provider: str, folder: Path, size: tuple[int, int], threads: int) -> float:
    arguments = [provider, str(folder), *map(str, size), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"bench.memory {provider} failed:\n{done.stderr}")
    growth = int(done.stdout)
    if growth == 0:
        raise SkippedCase(f"a forward of {size} takes less memory than loading did")
    return growth / 1e6


def _logits_path(folder: Path) -> Path:
    return folder / "logits.safetensors"


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"no {field} in {_STATUS}"
    return 1024 * int(match.group(1))


def main() -> None:
    """Print the growth in bytes, 0 where it stays below an earlier peak.

    The logits are left in the checkpoint's folder, for the gate.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("height", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    load = pairs.load_transformers if arguments.provider == BASELINE else pairs.load_fastseg
    model = load(arguments.folder)
    pixel_values = pairs.draw_pixels((arguments.height, arguments.width))
    with torch.inference_mode():
        model(pairs.draw_pixels(_WARM_UP_SIZE))
        peak_before, before = _status_bytes("VmHWM"), _status_bytes("VmRSS")
        logits = model(pixel_values).logits
        peak = _status_bytes("VmHWM")
    save_file({"logits": logits.contiguous()}, _logits_path(arguments.folder))
    print(peak - before if peak > peak_before else 0)


if __name__ == "__main__":
    main()
