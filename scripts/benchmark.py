"""Time PoolFormer against transformers' built-in one: interleaved, medians, after a correctness gate.

python scripts/benchmark.py                                  # S12, batch 16: forward and training step
python scripts/benchmark.py --mode infer --batch_size 1 --compile
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.models.poolformer.configuration_poolformer import PoolFormerConfig as BuiltInConfig
from transformers.models.poolformer.modeling_poolformer import PoolFormerForImageClassification as BuiltIn

from hf_poolformer import VARIANTS, MetaFormerConfig, PoolFormerForImageClassification


# Relative error of the logits that every row must stay within before it is timed.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = [name for name, variant in VARIANTS.items() if variant.model_type == "poolformer"]
    parser.add_argument("--mode", nargs="+", choices=STEPS, default=list(STEPS), help="what to time (default: both)")
    parser.add_argument("--variant", choices=variants, default="poolformer_s12", metavar="NAME", help="default: S12")
    parser.add_argument("--batch_size", type=int, default=16, help="default: 16")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="default: float32")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds; each visits every row (default: 11)")
    parser.add_argument("--compile", action="store_true", help="also time every row under torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, device, versions and commit here")
    return parser.parse_args()


def make_models(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Rows of the table: the same weights in both implementations, both memory layouts, eager or compiled."""
    config = MetaFormerConfig.from_variant(args.variant)
    torch.manual_seed(0)
    ours = PoolFormerForImageClassification(config)
    peer = BuiltIn(BuiltInConfig.from_dict(config.to_dict()))
    peer.load_state_dict(ours.state_dict())
    models = {"ours": ours, "built-in": peer}
    for name, model in list(models.items()):
        model.to(args.device, getattr(torch, args.dtype))
        models[f"{name}, channels_last"] = copy.deepcopy(model).to(memory_format=torch.channels_last)
    if args.compile:
        models |= {f"{name}, compile": torch.compile(model) for name, model in list(models.items())}
    return models


def infer(model: torch.nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor):
    with torch.no_grad():
        model(pixel_values)


def train(model: torch.nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor):
    """Forward and backward; the optimiser is the same for everybody."""
    model.zero_grad()
    model(pixel_values, labels=labels).loss.backward()


STEPS = {"infer": infer, "train": train}


def check(models: dict[str, torch.nn.Module], pixel_values: torch.Tensor, tolerance: float):
    """Exits unless every model computes what the built-in eager one does."""
    with torch.no_grad():
        wanted = models["built-in"](pixel_values).logits
        for name, model in models.items():
            error = ((model(pixel_values).logits - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= tolerance:
                sys.exit(f"error: {name} is off by {error:.1e} (relative); nothing was timed")


def time_rounds(models, step, batch, rounds: int, device: str, label: str) -> dict[str, list[float]]:
    """Seconds per step and row. Rows take turns, in alternating order, so that a noisy minute hits all alike."""
    seconds = {name: [] for name in models}
    for index in tqdm(range(-2, rounds), desc=label):
        for name in list(models) if index % 2 else reversed(models):
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(models[name], *batch)
            if device != "cpu":
                torch.cuda.synchronize()
            if index >= 0:  # the first two rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def environment(args: argparse.Namespace) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": cpu if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def main():
    args = parse_arguments()
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    models = make_models(args)
    pixel_values = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype))
    batch = pixel_values, torch.randint(0, 1000, shape[:1], device=args.device)
    check({name: model.eval() for name, model in models.items()}, pixel_values, TOLERANCES[args.dtype])

    rows = []
    for mode in args.mode:
        for model in models.values():
            model.train(mode == "train")
        seconds = time_rounds(models, STEPS[mode], batch, args.rounds, args.device, mode)
        fastest_peer = min(statistics.median(times) for name, times in seconds.items() if name.startswith("built-in"))
        for name, times in seconds.items():
            median = statistics.median(times)
            rows.append(
                {
                    "mode": mode,
                    "model": name,
                    "images_per_second": args.batch_size / median,
                    "spread": (max(times) - min(times)) / median,
                    "times_built_in_eager": statistics.median(seconds["built-in"]) / median,
                    "times_fastest_peer": fastest_peer / median,
                }
            )

    about = environment(args)
    print(
        f"\n{args.variant}, {args.dtype}, batch {args.batch_size}, {args.image_size} px; " + ", ".join(about.values())
    )
    print("\n| mode | model | images/s | spread | x built-in eager | x fastest peer |\n|---|---|---:|---:|---:|---:|")
    for row in rows:
        mode, name, rate, spread, eager, fastest = row.values()
        print(f"| {mode} | {name} | {rate:.1f} | {spread:.0%} | {eager:.2f} | {fastest:.2f} |")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings, "environment": about, "rows": rows}, indent=2) + "\n")
        print(f"\nFigures: {args.json}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
