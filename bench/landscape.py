"""A loss surface of a whole encoder: what it looks like and what it takes in memory.

`python -m bench.landscape` evaluates 51 x 51 points of MiniLM's (22.7 million weights) contrastive
loss on 8 pairs of sentences, and writes bench/results/landscape: surface.json, surface.png and
landscape.md. Interrupted, it goes on where it stopped. The peak is measured before, on a grid of
3 x 3 points, whose directions and points are made in the same way. Exits with 1 if a weight's bits
changed, or if the peak is more than the largest layer above that of a plain evaluation.
"""

import argparse
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F

from bench.run import conditions
from flatkern import landscape
from flatkern._memory import peak_bytes

RESULTS = Path(__file__).parent / "results" / "landscape"
PAIRS = (
    ("The film was a delight from start to finish.", "I enjoyed every minute of the movie."),
    ("He forgot to lock the door.", "The door was left unlocked by him."),
    ("Prices rose sharply last month.", "Last month saw a steep increase in prices."),
    ("The train arrives at noon.", "At twelve o'clock the train gets in."),
    ("She teaches mathematics at a small college.", "A small college employs her to teach maths."),
    ("Heavy rain flooded the valley.", "The valley was under water after the downpour."),
    ("The battery lasts about ten hours.", "You get roughly ten hours out of one charge."),
    ("They postponed the meeting until Friday.", "The meeting was moved to Friday."),
)
TEMPERATURE = 0.2


def model_and_loss():
    """MiniLM, and the cross-entropy of finding each sentence's pair among eight."""
    from flatkern.demo import model as demo

    model, tokenizer = demo.load_pretrained()
    texts = [first for first, _ in PAIRS] + [second for _, second in PAIRS]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None].float()

    def loss():
        hidden = model(**tokens).last_hidden_state
        means = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        first, second = means.chunk(2)
        return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(PAIRS)))

    return model, loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.landscape")
    parser.add_argument("--points", type=int, default=51)
    parser.add_argument("--radius", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, loss = model_and_loss()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        loss()
        plain_peak = peak_bytes(loss, "cpu")
    small = {"points": 3, "radius": options.radius}
    peak = peak_bytes(lambda: landscape.surface_2d(model, loss, **small), "cpu")
    layer = max(p.nbytes for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    plane = landscape.Plane(model)
    surface = landscape.surface_2d(
        model, loss, points=options.points, radius=options.radius, plane=plane,
        save=options.out / "surface.json", progress=True,
    )  # fmt: skip
    title = "MiniLM, contrastive loss"
    landscape.plot_surface(surface, options.out / "surface.png", title=title)
    landscape.plot_surface(surface, options.out / "surface_3d.png", kind="3d", title=title)
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    mib, where = 2**20, conditions()
    rows = [
        ("points", surface.loss.numel()),
        ("weights, MiB", f"{weights / mib:.1f}"),
        ("largest weight (word embeddings), MiB", f"{layer / mib:.1f}"),
        ("peak of a plain evaluation above the weights, MiB", f"{plain_peak / mib:.1f}"),
        ("peak of a surface above the weights, MiB", f"{peak / mib:.1f}"),
        ("difference, in largest weights", f"{(peak - plain_peak) / layer:.2f}"),
        ("weights written in place", len(surface.in_place)),
        ("weights whose bits changed", len(changed)),
        ("loss at the centre", f"{surface.plain:.6f}"),
        ("points without a finite loss", int((~surface.loss.isfinite()).sum())),
    ]
    text = [
        f"# Loss surface of MiniLM, {options.points} x {options.points} points\n",
        f"`python -m bench.landscape --points {options.points} --radius {options.radius:g}`\n",
        tabulate(rows, headers=("", ""), tablefmt="github", disable_numparse=True),
        "\n![contour](surface.png)\n\n![surface](surface_3d.png)\n",
        f"On {where['date']}: {where['cpu']}, {where['threads']} threads, torch {where['torch']}.",
        "The peak is of 3 x 3 points, whose directions and points are made in the same way.",
    ]
    (options.out / "landscape.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    return int(bool(changed) or peak - plain_peak > layer)


if __name__ == "__main__":
    sys.exit(main())
