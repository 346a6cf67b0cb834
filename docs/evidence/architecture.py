#!/usr/bin/env python3
"""Draws architecture.png beside this file: the way of a model, and the packages with what they import."""

from __future__ import annotations

from pathlib import Path

INK, GREY, SHARED, TRAINING, SERVING = "#1c2430", "#7a8594", "#eceff3", "#dcebdc", "#dbe6f6"

# Directories on the way of a model, (x, label, colour); what makes the next one, and the package that it lies in.
DIRECTORIES = [
    (0.85, "Llama-2-7b-hf\n\nHugging Face\ndirectory", SHARED),
    (3.02, "llama2-7b\n\ntorch_dist\ncheckpoint", TRAINING),
    (5.19, "zero_out\n\nneuron faded\nto 0, CR 1", TRAINING),
    (7.36, "retrofit\n\nCR rises\n1 to 4", TRAINING),
    (9.53, "finetune\n\nCR stays 4", TRAINING),
    (12.25, "Llama-2-7B-DMC-4x\n\nHugging Face directory\nwith a dmc block", SHARED),
]
STEPS = [
    ("import", "checkpoint/"),
    ("zero_out", "training/"),
    ("retrofit", "training/"),
    ("finetune", "training/"),
    ("export", "checkpoint/"),
]
USES = [
    ("dmc serve", "OpenAI's API"),
    ("dmc batch", "JSONL, arrays"),
    ("dmc generate", "LLM.generate"),
    ("transformers", "remote code"),
]

# Package -> (x, y, width, what is in it, colour). y grows upwards.
PACKAGES = {
    "evaluation": (0.25, 3.9, 13.1, "quality, compression by head, other methods: may import both sides", "#f6ead6"),
    "training": (0.25, 2.95, 6.2, "the three stages: loop, data, resume, signals, watch", TRAINING),
    "checkpoint": (0.25, 2.0, 6.2, "torch_dist <-> Hugging Face, manifests, checksums", TRAINING),
    "model": (0.25, 1.05, 6.2, "DMC attention as a layer spec, loss for every layout", TRAINING),
    "serving": (7.15, 2.95, 6.2, "HTTP server, batch runner, metrics", SERVING),
    "inference": (7.15, 2.0, 6.2, "engine: scheduler, compressed cache, serving model", SERVING),
    "kernels": (7.15, 1.05, 6.2, "paged cache operations: PyTorch, C++, CUDA", SERVING),
    "ops": (0.25, 0.1, 7.9, "the mathematics in plain PyTorch, and the slow oracle", SHARED),
    "config, schedule": (8.45, 0.1, 4.9, "dataclasses, pure functions; no torch", SHARED),
}
IMPORTS = [
    ("training", "checkpoint"),
    ("checkpoint", "model"),
    ("model", "ops"),
    ("serving", "inference"),
    ("inference", "kernels"),
    ("kernels", "ops"),
    ("ops", "config"),
    ("evaluation", "training"),
    ("evaluation", "serving"),
    ("inference", "checkpoint.mapping"),
    ("inference", "checkpoint.hf"),
]
"""(who, whom): a test holds them against the rules of the house."""


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(13.6, 9.6), dpi=110)
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 13.6), ylim=(-0.35, 9.25))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, colour: str) -> None:
        shape = "round,pad=0,rounding_size=0.09"
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=INK, linewidth=1.1)
        )

    def arrow(start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
        style = dict(
            arrowstyle="-|>", color=INK, linewidth=1.4, linestyle="--" if dashed else "-", shrinkA=0, shrinkB=0
        )
        axes.annotate("", end, start, arrowprops=style)

    def text(x: float, y: float, words: str, size: float = 10.5, **more: object) -> None:
        axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **more})

    text(0.25, 9.0, "The way of a model: one directory per step, each with a manifest", 13, ha="left", weight="bold")
    for x, label, colour in DIRECTORIES:
        name, _, rest = label.partition("\n\n")
        half = 0.98 if x > 12 else 0.66
        box(x - half + 0.06, 7.05, 2 * half, 1.35, colour)
        text(x + 0.06, 8.1, name, 10, weight="bold", family="monospace" if x < 12 else "sans-serif")
        text(x + 0.06, 7.55, rest, 9.5)
    for i, (step, package) in enumerate(STEPS):
        left, right = DIRECTORIES[i][0] + 0.74, DIRECTORIES[i + 1][0] - (0.94 if i == 4 else 0.62)
        arrow((left, 7.72), (right, 7.72))
        text((left + right) / 2, 7.92, step, 9.5, weight="bold")
        text((left + right) / 2, 7.53, package, 8.5, color=GREY, family="monospace")
    for i, (name, what) in enumerate(USES):
        x = 5.6 + 2.23 * i
        box(x - 0.95, 5.65, 1.9, 0.7, SERVING if i < 3 else SHARED)
        text(x, 6.12, name, 10, weight="bold", family="monospace")
        text(x, 5.84, what, 9)
        arrow((12.31, 7.05), (x, 6.37))
    text(0.25, 6.25, "llama2-7b to finetune: any TP x PP x DP, stopped\nand resumed bit for bit.", 10, ha="left")
    text(0.25, 5.72, "The last directory needs no Megatron.", 10, ha="left")

    title = "The packages of megatron.dmc: each imports what its arrow points to, and what is below that"
    text(0.25, 5.1, title, 13, ha="left", weight="bold")
    for name, (x, y, width, what, colour) in PACKAGES.items():
        box(x, y, width, 0.68, colour)
        text(
            x + 0.18,
            y + 0.34,
            name + "/" * (name != "config, schedule"),
            11,
            ha="left",
            weight="bold",
            family="monospace",
        )
        text(x + width - 0.15, y + 0.34, what, 9.5, ha="right")
    for x in (3.35, 10.25):
        for y in (3.9, 2.95, 2.0, 1.05):
            arrow((x, y), (x, y - 0.26))
    arrow((8.15, 0.44), (8.44, 0.44))
    arrow((7.6, 1.05), (7.6, 0.79))
    arrow((7.14, 2.34), (6.46, 2.34), dashed=True)
    text(6.8, 2.62, "mapping\nhf only", 8.5)
    text(0.25, -0.17, "training side: needs megatron-core", 9.5, ha="left", color="#3f7a3f")
    text(
        13.35, -0.17, "serving side: imports no Megatron (the serving image has none)", 9.5, ha="right", color="#345f9c"
    )
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
