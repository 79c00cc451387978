"""Pictures and widgets for the notebooks: rows of images, kernels and films of a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blindlib.files import whole

if TYPE_CHECKING:
    from ipywidgets import Widget
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def picture(x: Tensor) -> np.ndarray:
    """One image or kernel as an array that matplotlib and Pillow show: (H, W, 3) or (H, W), bytes.

    ``x`` is (C, H, W), or (1, C, H, W). Three channels are an image in [-1, 1]; one channel is a kernel, whose peak
    becomes white, with a gamma of 1.5 that lets its faint parts be seen.
    """
    x = x.detach().cpu().float()
    x = x[0] if x.ndim == 4 else x
    if x.shape[0] == 1:
        grey = (x[0].clamp(min=0) / x.max().clamp(min=1e-12)) ** (1 / 1.5)
        return (255 * grey).round().byte().numpy()
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def show(pictures: Mapping[str, Tensor] | Sequence[Tensor], *, columns: int | None = None, size: float = 2.2) -> Figure:
    """A grid of images and kernels, titled by the mapping's keys; ``size`` is the width of each in inches."""
    import matplotlib.pyplot as plt

    named = pictures if isinstance(pictures, Mapping) else {i: x for i, x in enumerate(pictures)}
    columns = columns or len(named)
    rows = -(-len(named) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.25) * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, x) in zip(axes.flat, named.items(), strict=False):
        draw(axis, x)
        if isinstance(title, str):
            axis.set_title(title, fontsize=9)
    return figure


def film(history: Mapping[str, Tensor], names: Sequence[str] = ("image", "kernel"), *, item: int = 0) -> Figure:
    """The frames of a run side by side, one row for each latent; titles give the time t. A tilt is drawn as arrows.

    Parameters
    ----------
    history : mapping
        As of :class:`~blindlib.sampler.Result`: ``t`` (n,), and (n, B, [M,] C, H, W) of each latent.
    names : sequence of str
        The latents to show.
    item : int
        Of the batch.
    """
    import matplotlib.pyplot as plt

    times = history["t"].tolist()
    figure, axes = plt.subplots(
        len(names), len(times), figsize=(1.5 * len(times), 1.65 * len(names)), layout="constrained", squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        for axis, t, x in zip(row, times, history[name][:, item], strict=True):
            draw(axis, x)
            if name == names[0]:
                axis.set_title(f"t = {t}", fontsize=8)
    return figure


def draw(axis: Axes, x: Tensor) -> None:
    """One image, kernel or tilt (C, H, W), or the first of several (M, C, H, W), without an axis about it."""
    x = x[0] if x.ndim == 4 else x
    if len(x) == 2:
        arrows(axis, x)
    else:
        axis.imshow(picture(x), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.axis("off")


def arrows(axis: Axes, tilt: Tensor, *, every: int | None = None) -> None:
    """A tilt field (2, H, W) in pixels as arrows at every ``every``-th pixel, three times their length, over its size.

    The shade is the tilt's length, from none to 3 pixels.
    """
    tilt = tilt.detach().cpu().float()
    h, w = tilt.shape[-2:]
    every = every or max(1, round(max(h, w) / 14))
    rows, columns = torch.arange(every // 2, h, every), torch.arange(every // 2, w, every)
    x, y = tilt[:, rows][:, :, columns]
    axis.imshow(tilt.norm(dim=0), cmap="Blues", vmin=0, vmax=3, alpha=0.6, interpolation="nearest")
    axis.quiver(columns, rows, x, y, angles="xy", scale_units="xy", scale=1 / 3, width=0.008, headwidth=4)


def png(x: Tensor, width: int = 256) -> bytes:
    """One image or kernel as the bytes of a PNG file, enlarged to ``width`` pixels without smoothing."""
    import io

    from PIL import Image

    image = Image.fromarray(picture(x))
    image = image.resize((width, round(width * image.height / image.width)), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def scrubber(history: Mapping[str, Tensor], names: Sequence[str] = ("image", "kernel"), *, item: int = 0) -> Widget:
    """A slider that runs through the frames of a finished run; needs ipywidgets.

    Parameters
    ----------
    history : mapping
        As of :func:`film`, with ``residual`` (n, B) too.
    names : sequence of str
        The latents to show, images or kernels.
    item : int
        Of the batch.
    """
    import ipywidgets as w

    frames = [[png(history[name][i, item], 220) for name in names] for i in range(len(history["t"]))]
    views = [w.Image(format="png", layout=w.Layout(width="220px")) for _ in names]
    label = w.Label()
    slider = w.IntSlider(description="frame", min=0, max=len(frames) - 1, value=len(frames) - 1)
    play = w.Play(min=0, max=len(frames) - 1, interval=150)
    w.jslink((play, "value"), (slider, "value"))

    def update(change: dict) -> None:
        i = change["new"]
        for view, data in zip(views, frames[i], strict=True):
            view.value = data
        label.value = f"t = {int(history['t'][i])}, residual {float(history['residual'][i, item]):.3f}"

    slider.observe(update, "value")
    update({"new": slider.value})
    return w.VBox([w.HBox([play, slider, label]), w.HBox(views)])


def chooser(results: Mapping[tuple, Mapping[str, Tensor]], labels: Sequence[str]) -> Widget:
    """A panel to pick one of many precomputed results by its keys; needs ipywidgets.

    Parameters
    ----------
    results : mapping of a tuple of choices to named pictures
        Such as ``{("astronaut", 0.02): {"blurred": y, "sharp": x}, ...}``; every combination is present.
    labels : sequence of str
        What each position of the tuples is.
    """
    import ipywidgets as w

    options = [list(dict.fromkeys(key[i] for key in results)) for i in range(len(labels))]
    pickers = [
        w.SelectionSlider(description=label, options=choices) if len(choices) > 1 and not isinstance(choices[0], str)
        else w.Dropdown(description=label, options=choices)
        for label, choices in zip(labels, options, strict=True)
    ]  # fmt: skip
    shown = w.HBox()

    def update(_: object = None) -> None:
        pictures = results[tuple(p.value for p in pickers)]
        shown.children = [
            w.VBox([w.Label(name), w.Image(value=png(x, 200), format="png", layout=w.Layout(width="200px"))])
            for name, x in pictures.items()
        ]

    for picker in pickers:
        picker.observe(update, "value")
    update()
    return w.VBox([w.HBox(pickers), shown])


def figures_folder() -> Path:
    """Where a notebook writes its pictures: the repository's ``figures``, from its root or from ``notebooks``."""
    for folder in (Path("figures"), Path("../figures")):
        if folder.is_dir():
            return folder
    folder = Path("figures")
    folder.mkdir()
    return folder


def save_figure(figure: Figure, name: str) -> Path:
    """Write a figure into :func:`figures_folder` at a size for the web, whole or not at all; returns its path."""
    target = figures_folder() / name
    with whole(target) as part:
        figure.savefig(part, dpi=110, format=target.suffix[1:])
    return target


def record(notebook: str, **figures: object) -> Path:
    """Write a notebook's figures of merit to ``<figures_folder>/<notebook>.json``, with the machine they come from."""
    about = {"machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}"}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    target = figures_folder() / f"{notebook}.json"
    with whole(target) as part:
        part.write_text(json.dumps({**about, **figures}, indent=1, default=float) + "\n")
    return target


def maps(named: Mapping[str, Tensor], *, size: float = 2.6) -> Figure:
    """Errors or spreads, (H, W) or (1, ..., 1, H, W), side by side in one scale of colours, titled by the keys.

    The scale ends where a hundredth of the values of the largest lies beyond.
    """
    import matplotlib.pyplot as plt

    values = {}
    for title, x in named.items():
        if x.shape[:-2].numel() != 1:
            raise ValueError(f"{title}: expected one map, (H, W) or (1, ..., 1, H, W), got {tuple(x.shape)}")
        values[title] = x.detach().cpu().reshape(x.shape[-2:]).numpy()
    figure, axes = plt.subplots(
        1, len(values), figsize=(size * len(values) + 0.8, size + 0.25), layout="constrained", squeeze=False
    )
    top = max(float(np.quantile(x, 0.99)) for x in values.values())
    for axis, (title, x) in zip(axes.flat, values.items(), strict=True):
        drawn = axis.imshow(x, vmin=0, vmax=top, cmap="magma", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure


def spread(samples: Tensor) -> Tensor:
    """Standard deviation over posterior samples (n, C, H, W) as one picture (1, H, W): where they disagree."""
    return torch.std(samples.detach().cpu(), dim=0).mean(0, keepdim=True)
