"""The one network of this package: the UNet of Dhariwal & Nichol (arXiv 2105.05233).

The published image, kernel and tilt priors are all of this family, so the layer names below are the keys of
their state dicts. The priors that ship with blindlib are small members of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindlib.checks import check_counts


class UNet(nn.Module):
    """Time-conditioned convolutional UNet, ``(x_t, t) -> prediction``.

    Parameters
    ----------
    in_channels : int
        Channels of the input: 3 for an image, 1 for a kernel, 2 for a tilt field.
    out_channels : int, optional
        Channels of the output; ``2 * in_channels`` for a net that also predicts its variance. Default: ``in_channels``.
    base_channels : int
        Width at full resolution.
    multipliers : sequence of int
        Width of each level as a multiple of ``base_channels``; each further level halves the resolution.
    blocks : int
        Residual blocks a level on the way down (one more on the way up).
    attention : sequence of int
        Self-attention stands at the levels downsampled by these factors, and then in the middle too.
        Empty: none at all, so that cost grows only linearly with the number of pixels.
    head_channels : int
        Channels of one attention head.
    groups : int
        Groups of each group normalisation; 32 in the published nets.
    dropout : float
        Dropout probability inside the residual blocks.

    Raises
    ------
    ValueError
        If a count is not positive, or the widths cannot be divided into the groups or heads.

    Examples
    --------
    >>> net = UNet(3, base_channels=32, multipliers=(1, 2, 2))
    >>> net(torch.zeros(1, 3, 16, 16), torch.tensor([10])).shape
    torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        base_channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        head_channels: int = 64,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, base_channels=base_channels, blocks=blocks)
        check_counts(head_channels=head_channels, groups=groups)
        check_counts(out_channels=out_channels, optional=True)
        if len(multipliers) == 0:
            raise ValueError("multipliers: expected one for each level, at least one, got none")
        check_counts(**{f"multipliers[{i}]": multiplier for i, multiplier in enumerate(multipliers)})
        out_channels = in_channels if out_channels is None else out_channels
        self.config = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            base_channels=base_channels,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention=tuple(attention),
            head_channels=head_channels,
            groups=groups,
            dropout=dropout,
        )
        widths = [base_channels * m for m in multipliers]
        for width in widths:
            if width % groups:
                raise ValueError(f"groups: a width of {width} channels cannot be divided into {groups} groups")
        self.in_channels = in_channels
        self.base_channels = base_channels
        self.stride = 2 ** (len(widths) - 1)

        emb = 4 * base_channels
        self.time_embed = nn.Sequential(nn.Linear(base_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def res(cin: int, cout: int, resample: str = "") -> _ResBlock:
            return _ResBlock(cin, cout, emb, groups, dropout, resample)

        def stage(cin: int, cout: int, factor: int) -> list[nn.Module]:
            layers: list[nn.Module] = [res(cin, cout)]
            if factor in attention:
                layers.append(_Attention(cout, head_channels, groups))
            return layers

        width = widths[0]
        skips = [width]
        self.input_blocks = nn.ModuleList([_Stage(nn.Conv2d(in_channels, width, 3, padding=1))])
        for level, cout in enumerate(widths):
            for _ in range(blocks):
                self.input_blocks.append(_Stage(*stage(width, cout, 2**level)))
                width = cout
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(_Stage(res(width, width, "down")))
                skips.append(width)

        middle: list[nn.Module] = [res(width, width), res(width, width)]
        if attention:
            middle.insert(1, _Attention(width, head_channels, groups))
        self.middle_block = _Stage(*middle)

        self.output_blocks = nn.ModuleList()
        for level, cout in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                layers = stage(width + skips.pop(), cout, 2**level)
                width = cout
                if level > 0 and i == blocks:
                    layers.append(res(width, width, "up"))
                self.output_blocks.append(_Stage(*layers))

        self.out = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)
        nn.init.zeros_(self.out[2].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict from ``x`` of shape (B, in_channels, H, W) and ``t`` of shape (B,) or (1,), the timesteps.

        Raises
        ------
        TypeError, ValueError
            If ``x`` has another rank or channel count, or another type than the weights; if its sides are not multiples
            of ``self.stride``; if there is not one time, or one for each item.
        """
        # No values are looked at here: a GPU would have to be waited for, at every step.
        if not isinstance(x, Tensor) or x.dtype != self.out[2].weight.dtype:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a tensor of {self.out[2].weight.dtype}, as the weights are, got {kind}")
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self.stride or x.shape[3] % self.stride or 0 in x.shape:
            raise ValueError(
                f"x: expected height and width to be multiples of {self.stride}, got {tuple(x.shape[2:])}; "
                "crop or pad it first"
            )
        if not isinstance(t, Tensor) or t.shape not in ((1,), x.shape[:1]):
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"t: expected a tensor of shape (1,) or ({len(x)},), got {got}")
        emb = F.silu(self.time_embed(_sinusoid(t, self.base_channels)))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Tensor], *, head_channels: int = 64, groups: int = 32, dropout: float = 0.0
    ) -> UNet:
        """Build the net whose layout the keys and shapes of ``state`` show, and load it.

        What shapes cannot show (channels of a head, groups, dropout) is given; the defaults are the published nets'.

        Raises
        ------
        ValueError
            If the keys are not those of this family, or a tensor is missing or has another shape.
        """
        try:
            config = _read_layout(state)
            net = cls(**config, head_channels=head_channels, groups=groups, dropout=dropout)
            net.load_state_dict(state, strict=True)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"state: not the state dict of this UNet family ({error})") from None
        return net


@torch.no_grad()
def moving_average(mean: list[Tensor], new: list[Tensor], updates: Tensor | int) -> None:
    """Exponential moving average of the weights, over all steps at first and over the last 2000 or so later on."""
    torch._foreach_lerp_(mean, new, 1 - min(0.9995, (1 + int(updates)) / (10 + int(updates))))


class _Stage(nn.Sequential):
    """Layers in a row, of which only residual blocks take the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, _ResBlock) else layer(x)
        return x


class _ResBlock(nn.Module):
    """Two convolutions with a skip; time enters as scale and shift of the second normalisation."""

    def __init__(self, cin: int, cout: int, emb: int, groups: int, dropout: float, resample: str) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        # The SiLU of the embedding is the same for every block, so the UNet applies it once; index 1 keeps the key.
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(emb, 2 * cout))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, cout), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(cout, cout, 3, padding=1)
        )
        nn.init.zeros_(self.out_layers[3].weight)
        nn.init.zeros_(self.out_layers[3].bias)
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)
        self.resample = resample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
        h = conv(h)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        norm, act, dropout, conv = self.out_layers
        h = torch.addcmul(shift, norm(h), 1 + scale)
        return self.skip_connection(x) + conv(dropout(act(h)))


class _Attention(nn.Module):
    """Multi-head self-attention over all pixels, with a skip."""

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"head_channels: {channels} channels cannot be divided into heads of {head_channels}")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, h * w))
        # Each head holds its own query, key and value next to one another.
        q, k, v = qkv.reshape(b, self.heads, 3, c // self.heads, h * w).transpose(-1, -2).unbind(2)
        a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h * w)
        return x + self.proj_out(a).reshape(b, c, h, w)


def _sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps (B,) as (B, dim): cosines, then sines, of frequencies from 1 down to 1e-4."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _read_layout(state: dict[str, Tensor]) -> dict:
    """Read channel counts, levels, blocks and attention of the net off its state dict."""
    base, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    n = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))
    widths, attention, runs, run = [], set(), [], 0
    for i in range(1, n):
        if f"output_blocks.{n - 1 - i}.0.in_layers.2.weight" not in state:
            raise KeyError(f"output_blocks.{n - 1 - i}")
        width = state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0]
        widths.append(width)
    # On the way up, the last block of each level but the finest also upsamples: that block tells the level's length.
    for i in range(n):
        last = max(j for j in range(3) if any(k.startswith(f"output_blocks.{i}.{j}.") for k in state))
        run += 1
        if f"output_blocks.{i}.{last}.in_layers.2.weight" in state and last > 0:
            runs.append(run)
            run = 0
    runs.append(run)
    if len(set(runs)) != 1:
        raise KeyError("levels of unequal length, or down- and upsampling without residual blocks")
    blocks = runs[0] - 1
    for i in range(1, n):
        if f"input_blocks.{i}.1.qkv.weight" in state:
            attention.add(2 ** ((i - 1) // (blocks + 1)))
    return dict(
        in_channels=in_channels,
        out_channels=state["out.2.weight"].shape[0],
        base_channels=base,
        multipliers=[widths[level * (blocks + 1)] // base for level in range(len(runs))],
        blocks=blocks,
        attention=sorted(attention),
    )
