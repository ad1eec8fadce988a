"""Peak memory of a forward, each provider in a process of its own.

The figure is how far the resident memory rises above what it was just before the forward, with
weights and pixels loaded and a small forward behind it. `ru_maxrss` would not do: a child inherits
its parent's peak. So this reads Linux's VmHWM, which begins anew with a program.
"""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fastseg

from ..gates import logits_gate
from ..providers import BASELINE, PROVIDERS
from ..setting import Setting, SkippedCase, context, draw_pixels, load_transformers
from .run import Checked, Run, what_of

NAMES = (BASELINE, "fastseg eager")
MAX_REPEATS = 3  # the figure hardly varies
_STATUS = Path("/proc/self/status")
_WARM_UP_SIZE = (64, 64)


def measure(run: Run) -> None:
    """Add the rows of "memory"."""
    if "memory" not in run.options.kinds or run.options.list:
        return
    for setting in run.options.memory_settings:
        what, label = what_of("memory", setting), f"memory, {setting}"
        if run.wants(what, label):
            with run.telling(label, "all"):
                samples, checked = peaks(setting, run.options.threads, run.options.repeats)
                run.add(run.rows(what, samples, checked))


def peaks(
    setting: Setting, threads: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Checked]]:
    """Peak growth in MB (10^6 bytes) of every run, by provider, and how right they are.

    Raises a RedGate for wrong logits, a SkippedCase where the system tells no peak of a process.
    """
    if not _STATUS.exists():
        raise SkippedCase("the peak of a process is read from Linux's /proc")
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    checked: dict[str, Checked] = {}
    spawn = multiprocessing.get_context("spawn")
    with context(setting, torch.device("cpu"), threads) as where:
        with torch.inference_mode():
            reference = where.transformers(torch.float64)(where.pixel_values.double()).logits
        gate = logits_gate(reference)
        rounds = range(min(repeats, MAX_REPEATS))
        for _ in tqdm(rounds, "peak memory", leave=False, disable=None):
            for provider in NAMES:
                with ProcessPoolExecutor(1, spawn) as process:
                    arguments = (provider, where.folder, setting.size, threads)
                    growth, logits = process.submit(_forward, *arguments).result()
                if growth == 0:
                    raise SkippedCase(f"{setting.size} takes less memory than loading did")
                samples[provider].append(growth / 1e6)
                error = gate.check(provider, torch.from_numpy(logits))
                version = PROVIDERS[provider].version()
                checked[provider] = Checked(_forward, version, gate, error)
    return samples, checked


def _forward(
    provider: str, folder: Path, size: tuple[int, int], threads: int
) -> tuple[int, np.ndarray]:
    """The growth in bytes, 0 where it stays below an earlier peak, and the logits."""
    torch.set_num_threads(threads)
    load = load_transformers if provider == BASELINE else fastseg.from_pretrained
    model = load(folder).eval()
    pixel_values = draw_pixels(size)
    with torch.inference_mode():
        model(draw_pixels(_WARM_UP_SIZE))
        peak_before, before = status_bytes("VmHWM"), status_bytes("VmRSS")
        logits = model(pixel_values).logits
        peak = status_bytes("VmHWM")
    return peak - before if peak > peak_before else 0, logits.numpy()


def status_bytes(field: str) -> int:
    """What Linux says of this process, as "VmRSS" or "VmHWM", its peak."""
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(kib)
