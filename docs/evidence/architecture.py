#!/usr/bin/env python3
"""Draws architecture.png beside this file: the way of a model, and the packages with their imports."""

from __future__ import annotations

from pathlib import Path

INK, GREY = "#1c2430", "#7a8594"
SHARED, TRAINING, SERVING, BOTH = "#eceff3", "#dcebdc", "#dbe6f6", "#f6ead6"

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
    "cli": (0.25, 5.8, 13.1, "dmc train, convert, data, plan, eval, compare, generate, serve, batch, bench", BOTH),
    "evaluation": (0.25, 4.85, 13.1, "quality, compression by head, other methods: may import both sides", BOTH),
    "training": (0.25, 2.95, 6.2, "the three stages: loop, data, saving, signals", TRAINING),
    "model": (0.25, 2.0, 3.95, "DMC attention, layer spec, loss", TRAINING),
    "serving": (7.15, 3.9, 4.35, "HTTP server, batch runner, metrics", SERVING),
    "vllm": (11.7, 3.9, 1.65, "plugin", SERVING),
    "inference": (7.15, 2.95, 6.2, "engine: scheduler, compressed cache, serving model", SERVING),
    "kernels": (9.15, 2.0, 4.2, "paged cache: PyTorch, C++, CUDA", SERVING),
    "checkpoint": (4.5, 2.0, 4.35, "formats, mapping, conversion", SHARED),
    "ops": (0.25, 1.05, 13.1, "the mathematics in plain PyTorch, and the slow oracle", SHARED),
    "config, environment, flags, planning, schedule": (0.25, 0.1, 13.1, "dataclasses, pure functions: for all", SHARED),
}
IMPORTS = [
    ("cli", "evaluation"),
    ("evaluation", "training"),
    ("evaluation", "serving"),
    ("training", "model"),
    ("training", "checkpoint"),
    ("serving", "inference"),
    ("vllm", "inference"),
    ("inference", "kernels"),
    ("inference", "checkpoint"),
    ("model", "ops"),
    ("kernels", "ops"),
    ("ops", "config"),
]
"""Arrows, (who, whom): a test holds them against the rules of the house."""
ARROWS = [
    (3.35, 5.8, 5.53),
    (10.25, 5.8, 5.53),
    (3.35, 4.85, 3.63),
    (10.25, 4.85, 4.58),
    (10.25, 3.9, 3.63),
    (12.5, 3.9, 3.63),
    (2.2, 2.95, 2.68),
    (5.5, 2.95, 2.68),
    (8.0, 2.95, 2.68),
    (11.25, 2.95, 2.68),
    (2.2, 2.0, 1.73),
    (11.25, 2.0, 1.73),
    (6.8, 1.05, 0.78),
]
"""Lines of the arrows: (x, from y, to y)."""


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(13.6, 11.4), dpi=110)
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 13.6), ylim=(-0.35, 11.15))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, colour: str) -> None:
        shape = "round,pad=0,rounding_size=0.09"
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=INK, linewidth=1.1)
        )

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = dict(arrowstyle="-|>", color=INK, linewidth=1.4, shrinkA=0, shrinkB=0)
        axes.annotate("", end, start, arrowprops=style)

    def text(x: float, y: float, words: str, size: float = 10.5, **more: object) -> None:
        axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **more})

    text(0.25, 10.9, "The way of a model: one directory per step, each with a manifest", 13, ha="left", weight="bold")
    for x, label, colour in DIRECTORIES:
        name, _, rest = label.partition("\n\n")
        half = 0.98 if x > 12 else 0.66
        box(x - half + 0.06, 8.95, 2 * half, 1.35, colour)
        text(x + 0.06, 10.0, name, 10, weight="bold", family="monospace" if x < 12 else "sans-serif")
        text(x + 0.06, 9.45, rest, 9.5)
    for i, (step, package) in enumerate(STEPS):
        left, right = DIRECTORIES[i][0] + 0.74, DIRECTORIES[i + 1][0] - (0.94 if i == 4 else 0.62)
        arrow((left, 9.62), (right, 9.62))
        text((left + right) / 2, 9.82, step, 9.5, weight="bold")
        text((left + right) / 2, 9.43, package, 8.5, color=GREY, family="monospace")
    for i, (name, what) in enumerate(USES):
        x = 5.6 + 2.23 * i
        box(x - 0.95, 7.55, 1.9, 0.7, SERVING if i < 3 else SHARED)
        text(x, 8.02, name, 10, weight="bold", family="monospace")
        text(x, 7.74, what, 9)
        arrow((12.31, 8.95), (x, 8.27))
    text(0.25, 8.15, "llama2-7b to finetune: any TP x PP x DP, stopped\nand resumed bit for bit.", 10, ha="left")
    text(0.25, 7.62, "The last directory needs no Megatron.", 10, ha="left")

    title = "The packages of megatron.dmc: each imports those that its arrows lead to"
    text(0.25, 6.85, title, 13, ha="left", weight="bold")
    for name, (x, y, width, what, colour) in PACKAGES.items():
        box(x, y, width, 0.68, colour)
        label = name if "," in name else name + "/"
        text(x + 0.18, y + 0.34, label, 11, ha="left", weight="bold", family="monospace")
        text(x + width - 0.15, y + 0.34, what, 9.5, ha="right")
    for x, start, end in ARROWS:
        arrow((x, start), (x, end))
    text(0.25, -0.17, "training side: needs megatron-core", 9.5, ha="left", color="#3f7a3f")
    text(
        13.35, -0.17, "serving side: imports no Megatron (the serving image has none)", 9.5, ha="right", color="#345f9c"
    )
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
