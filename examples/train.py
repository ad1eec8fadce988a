"""Train or fine-tune a SegFormer.

Without --data it learns procedurally drawn scenes: the command that made the embedded model is in
fastseg/demo/assets/scenes-b0/metrics.json. With --data it learns your pictures, from a folder in
one of the layouts of docs/evaluate.md, such as

    DIR/images/*.jpg|png|tif    DIR/masks/<same name>.png (class numbers, 255 = ignore; or, for two
    classes, 0 and 255)    DIR/classes.txt (one name a line, from class 0)

    python examples/train.py --data DIR --init nvidia/mit-b0 --lr 6e-5 --output my-model

A run that was interrupted or killed goes on from its last checkpoint, with the same result, by the
same command and --resume. metrics.jsonl in --run-dir has loss, mIoU, ms a step and peak memory;
metrics.png is their plot. This file and pictures.py beside it are meant to be copied and changed.
Muon needs PyTorch 2.9.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from pictures import IGNORE, PROCESSOR, Crops, DrawnScenes, Folder, Pictures
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import fastseg
from fastseg.demo.scenes import PALETTE

# ------------------------------------------------------------------------------------- metrics


def evaluate(model: nn.Module, pictures: Pictures) -> fastseg.Evaluation:
    """The figures of all held-out pictures, at their own size."""
    was_training = model.training
    found = fastseg.evaluate(
        model.eval(), pictures.held_out(), processor=PROCESSOR, ignore_index=IGNORE
    )
    model.train(was_training)
    return found


# ------------------------------------------------------------------------------ model, optimiser


def build_model(
    args: argparse.Namespace, classes: list[str]
) -> fastseg.SegformerForSemanticSegmentation:
    names = dict(enumerate(classes))
    options = {
        "drop_path_rate": args.drop_path,
        "classifier_dropout_prob": args.dropout,
        "semantic_loss_ignore_index": IGNORE,
    }
    if args.init is not None:
        return fastseg.SegformerForSemanticSegmentation.from_pretrained(
            args.init, num_labels=len(classes), id2label=names, dtype=torch.float32, **options
        )
    config = fastseg.SegformerConfig(num_labels=len(classes), id2label=names, **options)
    model = fastseg.SegformerForSemanticSegmentation(config)
    # Convolutions drawn with 0.02 all but shut the 3x3 depthwise ones; without pretraining, the
    # variance of the paper's code (fan-out) learns several times faster.
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / fan_out))
    nn.init.normal_(model.decode_head.classifier.weight, std=0.01)
    return model


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW: no decay for norms and biases, a higher rate for the head. With --optimizer muon the
    matrices go to Muon instead, which needs far fewer steps where nothing is pretrained."""
    matrices: list[nn.Parameter] = []
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        mixes = parameter.ndim > 1 and ".dwconv." not in name and ".classifier." not in name
        if args.optimizer == "muon" and mixes:
            matrices.append(parameter)
            continue
        scale = args.head_lr_scale if name.startswith("decode_head.") else 1.0
        decay = 0.0 if parameter.ndim == 1 else args.weight_decay
        groups.setdefault((scale, decay), []).append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=args.lr,
    )
    if not matrices:
        return [adamw]
    muon = MatrixMuon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay)
    muon.param_groups[0]["scale"] = args.muon_lr / args.lr
    return [adamw, muon]


class MatrixMuon(torch.optim.Muon):
    """Muon for convolutions as well: a kernel is a matrix (out, in * height * width)."""

    def __init__(self, weights: list[nn.Parameter], **options: Any) -> None:
        self.weights = weights
        super().__init__([nn.Parameter(w.detach().flatten(1)) for w in weights], **options)

    def step(self, closure: Any = None) -> Any:
        # The matrices are views of the weights: what is written into them is in the model.
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then polynomial decay to zero."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 - (step - warmup) / max(1, args.steps - warmup)) ** args.power


# --------------------------------------------------------------------------------- checkpoints


def save_atomically(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fixed_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a resumed run must share with the run that it goes on with."""
    free = {"resume", "run_dir", "output", "workers", "threads", "stop_at", "save_every", "device"}
    return {k: str(v) for k, v in sorted(vars(args).items()) if k not in free}


def save_run(path: Path, step: int, model: nn.Module, optimizers: list[Any], args: Any) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "arguments": fixed_arguments(args),
    }
    save_atomically(state, path)


def load_run(
    path: Path, model: nn.Module, optimizers: list[Any], args: Any
) -> tuple[int, torch.Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    ours = fixed_arguments(args)
    differ = [k for k in ours if state["arguments"].get(k) != ours[k]]
    if differ:
        raise ValueError(f"--resume: the run in {path} had other values of {', '.join(differ)}")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"], state["rng"]


def log(run_dir: Path, **values: Any) -> None:
    """Add a line to metrics.jsonl."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for one that a kill has cut off."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def forget_after(run_dir: Path, step: int) -> None:
    """Drop lines of steps that are made again, and that of the end."""
    kept = [line for line in logged(run_dir) if line["step"] <= step and "loss" in line]
    temporary = run_dir / ".metrics.jsonl.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, run_dir / "metrics.jsonl")


def plot(run_dir: Path) -> None:
    """Draw loss and mIoU over the steps into metrics.png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(xlabel="step", ylabel="loss of the step")
    right = left.twinx()
    right.set(ylabel="mIoU of held-out pictures", ylim=(0, 1))
    for axes, name, color in ((left, "loss", "#6c8ebf"), (right, "mean_iou", "#d55e00")):
        points = [(line["step"], line[name]) for line in logged(run_dir) if name in line]
        axes.plot(*zip(*points, strict=True), color=color, marker="." if axes is right else None)
        axes.yaxis.label.set_color(color)
    figure.savefig(run_dir / "metrics.png", dpi=120)


def peak_memory_mb(device: torch.device) -> float:
    """Of a GPU's memory what tensors took at most; on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def export(
    model: fastseg.SegformerForSemanticSegmentation,
    args: argparse.Namespace,
    metrics: dict[str, Any],
) -> None:
    """Half-precision weights, image processor and metrics.json, as one checkpoint directory."""
    model.to(torch.float16).save_pretrained(args.output)
    fastseg.SegformerImageProcessor().save_pretrained(args.output)
    temporary = args.output / ".metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(temporary, args.output / "metrics.json")


# ----------------------------------------------------------------------------------------- run


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    pictures: Pictures = (
        Folder(args.data, args.seed)
        if args.data
        else DrawnScenes(args.picture_sizes, args.eval_size, args.eval_count)
    )
    model = build_model(args, pictures.classes).to(device).train()
    if not args.data:
        model.config.palette = [list(color) for color in PALETTE]  # what `fastseg predict` paints
    optimizers = build_optimizers(model, args)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = args.run_dir / "checkpoint.pt"
    start, rng_state = 0, torch.get_rng_state()
    if args.resume and checkpoint.exists():
        start, rng_state = load_run(checkpoint, model, optimizers, args)
    forget_after(args.run_dir, start)
    per_batch = args.batch_size // args.crops_per_picture
    loader = DataLoader(
        Crops(pictures, args.crop, args.crops_per_picture, args.seed),
        batch_size=per_batch,
        # Item numbers, not a shuffle: a resumed run takes up the stream where it was cut.
        sampler=range(start * per_batch, args.steps * per_batch),
        num_workers=args.workers,
        generator=torch.Generator(),
    )
    torch.set_rng_state(rng_state)  # dropout goes on as well
    seconds: list[float] = []  # of the last steps
    milliseconds = math.nan  # where all steps were made before
    progress = tqdm(loader, initial=start, total=args.steps, disable=None, desc="train")
    for step, (pixels, labels) in enumerate(progress, start):
        began = time.perf_counter()
        rate = learning_rate(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
        pixels = pixels.flatten(0, 1).to(device)
        labels = labels.flatten(0, 1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(pixels).logits
        # Of logits at a quarter of the size. Crops in which no pixel counts give 0, and not NaN.
        loss = fastseg.kernels.upsample_cross_entropy(
            logits, labels, ignore_index=IGNORE, empty="zero"
        )
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()

        done, value = step + 1, loss.item()
        seconds = [*seconds[-19:], time.perf_counter() - began]
        milliseconds = round(1000 * sum(seconds) / len(seconds), 1)
        progress.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.1e}", ms=f"{milliseconds:.0f}")
        line: dict[str, Any] = {"step": done, "loss": round(value, 4)}
        if done % args.eval_every == 0 and done < args.steps:
            line["mean_iou"] = round(evaluate(model, pictures).mean_iou, 4)
            tqdm.write(f"step {done}: mIoU {line['mean_iou']:.4f}")
        if done % 20 == 0 or done in (1, args.steps) or "mean_iou" in line:
            memory = round(peak_memory_mb(device))
            log(args.run_dir, **line, ms_per_step=milliseconds, peak_memory_mb=memory)
        if done % args.save_every == 0 or done in (args.steps, args.stop_at):
            save_run(checkpoint, done, model, optimizers, args)
        if done == args.stop_at:
            return

    # What is measured is what is shipped: the weights rounded to half precision.
    model.to(torch.float16).to(torch.float32)
    found = evaluate(model, pictures)
    log(args.run_dir, step=args.steps, mean_iou=round(found.mean_iou, 4))
    plot(args.run_dir)
    made_by = [word for word in sys.argv[1:] if word != "--resume"]
    metrics = {
        "mean_iou": round(found.mean_iou, 4),
        "iou": {n: round(float(v), 4) for n, v in zip(pictures.classes, found.iou, strict=True)},
        **pictures.describe(),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "crop": args.crop,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": shlex.join(["python", "examples/train.py", *made_by]),
        "versions": {
            "fastseg": fastseg.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
    }
    export(model, args, metrics)
    print(f"{milliseconds:.0f} ms a step, {peak_memory_mb(device):.0f} MB at most")
    print(f"mIoU {metrics['mean_iou']:.4f}, written to {args.output}; plot: {args.run_dir}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of pictures and masks; default: drawn scenes")
    add("--init", help="checkpoint directory or hub id to fine-tune; default: from scratch")
    add("--output", type=Path, default=Path("output/model"), help="where the model is written")
    add("--run-dir", type=Path, default=Path("runs/train"), help="checkpoint, metrics, plot")
    add("--resume", action="store_true", help="go on with the run in --run-dir")
    add("--steps", type=int, default=4000)
    add("--batch-size", type=int, default=8, help="crops a step")
    add("--crops-per-picture", type=int, default=2)
    add("--crop", type=int, default=256, help="side of a crop, pixels")
    add(
        "--picture-sizes", type=int, nargs="+", default=[512], help="sides of drawn scenes, in turn"
    )
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--lr", type=float, default=6e-5, help="of AdamW")
    add("--muon-lr", type=float, default=0.02)
    add("--head-lr-scale", type=float, default=10.0)
    add("--weight-decay", type=float, default=0.01)
    add("--warmup", type=float, default=0.05, help="share of the steps")
    add("--power", type=float, default=1.0, help="of the polynomial decay")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--drop-path", type=float, default=0.1)
    add("--dropout", type=float, default=0.1)
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=0, help="PyTorch CPU threads; 0 for its default")
    add("--workers", type=int, default=2, help="processes that prepare pictures")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=500)
    add("--eval-size", type=int, default=512, help="side of a held-out scene, pixels")
    add("--eval-count", type=int, default=100, help="held-out scenes")
    add("--save-every", type=int, default=200)
    add("--stop-at", type=int, default=0, help="stop after this step, to be resumed later")
    args = parser.parse_args(argv)
    if args.batch_size % args.crops_per_picture:
        parser.error("--batch-size must be a multiple of --crops-per-picture")
    return args


if __name__ == "__main__":
    train(parse())
