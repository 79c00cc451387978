"""Whatever comes in, what goes out is finite, or an error that names an argument: shapes, types and ranges by lot."""

from functools import partial

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindlib import (
    DPS,
    Blur,
    DiffPIR,
    GaussianPrior,
    LinearLight,
    PiGDM,
    UniformPrior,
    mnc,
    motion_kernels,
    psnr,
    sample,
)
from blindlib.operators import BOUNDARIES

often = settings(max_examples=200)

FLOATS = [torch.float32, torch.float64]
OTHERS = [torch.float16, torch.bfloat16, torch.complex64, torch.uint8, torch.int64, torch.bool]
shapes = st.one_of(
    st.tuples(st.integers(1, 2), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.integers(0, 5), max_size=6).map(tuple),
)
numbers = st.one_of(st.integers(-1, 9), st.floats(-2, 9), st.sampled_from([None, "2", True, (3, 3), np.int64(3)]))


def tensor(shape, dtype=torch.float32, low=-1.0, high=1.0, seed=0):
    return (low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


tensors = st.one_of(
    st.builds(tensor, shapes),
    st.builds(tensor, shapes, st.sampled_from([*FLOATS, *OTHERS]), high=st.just(255.0)),
    shapes.map(lambda shape: tensor(shape).numpy()),
    st.sampled_from([None, 1.0, [[1.0]]]),
)


@st.composite
def arguments(draw, sound, **others):
    """Those that are ``sound``, but for up to two, drawn from ``others``: of more, one error would hide the rest."""
    chosen = draw(st.lists(st.sampled_from(sorted(others)), max_size=2, unique=True))
    return draw(sound) | {name: draw(others[name]) for name in chosen}


def finite_or_named(call, names, given):
    """The result of ``call``, or none if it was refused."""
    try:
        result = call(**given)
    except (TypeError, ValueError) as error:
        name = str(error).split(":")[0].split(",")[0].split("[")[0]
        assert name in names, f"{type(error).__name__} names no argument: {error}"
        return None
    assert torch.isfinite(result).all()
    return result


@st.composite
def pictures(draw):
    """An image and a kernel that fit."""
    dtype, side = draw(st.sampled_from(FLOATS)), draw(st.integers(5, 9))
    image = tensor((draw(st.integers(1, 2)), draw(st.sampled_from([1, 3])), side, 8), dtype)
    return {"image": image, "kernel": tensor((1, 1, draw(st.integers(1, 5)), 3), dtype, low=0.0)}


@often
@given(boundary=st.sampled_from(BOUNDARIES), given=arguments(pictures(), image=tensors, kernel=tensors))
def test_blur(boundary, given):
    out = finite_or_named(Blur(boundary), given, given)
    assert out is None or out.shape[:2] == given["image"].shape[:2]


@often
@given(
    operator=st.sampled_from([*map(Blur, BOUNDARIES), LinearLight(Blur())]),
    sound=pictures(),
    changed=arguments(st.just({}), y=tensors, image=tensors, kernel=tensors),
)
def test_solve(operator, sound, changed):
    y = finite_or_named(operator, sound, sound)
    if y is None:
        return
    given = {"y": y, **sound, **changed, "weight": 0.1}
    out = finite_or_named(operator.solve, given, given)
    assert out is None or out.shape == given["image"].shape


@often
@given(
    arguments(
        st.sampled_from(FLOATS).map(lambda dtype: dict(x=tensor((2, 3, 9, 8), dtype), ref=tensor((2, 3, 9, 8), dtype))),
        x=tensors,
        ref=tensors,
        max_shift=numbers,
        subpixel=numbers,
    )
)
def test_psnr(given):
    out = finite_or_named(psnr, {*given}, given)
    assert out is None or out.shape == given["x"].shape[:1]


@often
@given(
    arguments(
        st.sampled_from(FLOATS).map(lambda dtype: dict(kernel=tensor((2, 1, 9, 8), dtype), ref=tensor((1, 1, 4, 5)))),
        kernel=tensors,
        ref=tensors,
        subpixel=numbers,
    )
)
def test_mnc(given):
    out = finite_or_named(mnc, {*given}, given)
    assert out is None or out.shape == given["kernel"].shape[:1]


@often
@given(
    arguments(
        st.fixed_dictionaries({"n": st.integers(1, 3), "size": st.integers(3, 20), "seed": st.integers(0, 2**70)}),
        n=numbers,
        size=numbers,
        seed=numbers,
        extent=st.tuples(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5)),
    )
)
def test_motion_kernels(given):
    out = finite_or_named(motion_kernels, {*given}, given)
    assert out is None or out.shape == (given["n"], 1, given["size"], given["size"])


SPECTRUM = 0.1 * torch.ones(3, 8, 5)
EXACT, KERNEL = GaussianPrior(0.0, spectrum=SPECTRUM, latent="image"), UniformPrior("kernel", 3)
PRIORS = [EXACT, GaussianPrior(0.0, spectrum=SPECTRUM[:1]), UniformPrior("image"), KERNEL, UniformPrior("kernel")]
BOX = torch.full((1, 1, 3, 3), 1 / 9)


@often
@given(
    arguments(
        st.fixed_dictionaries(
            {
                "y": st.builds(tensor, st.tuples(st.integers(1, 2), st.just(3), st.just(8), st.just(8))),
                "operator": st.just(partial(Blur(), kernel=BOX)),
                "priors": st.just({"image": EXACT}),
                "steps": st.integers(1, 2),
                "guidance": st.sampled_from([None, DPS(), DPS.released(), DiffPIR(0.1), PiGDM(0.1)]),
                "start": st.sampled_from([None, {"image": torch.zeros(1, 3, 8, 8)}]),
            }
        ).map(lambda sound: sound | {"start_time": None if sound["start"] is None else 50}),
        y=tensors,
        operator=st.one_of(
            st.builds(lambda b, k: partial(Blur(b), kernel=k), st.sampled_from(BOUNDARIES), tensors),
            st.sampled_from([Blur(), Blur, None, partial(Blur(), kernel=BOX * torch.nan)]),
        ),
        priors=st.one_of(
            st.dictionaries(st.sampled_from(["image", "kernel", "tilt"]), st.sampled_from([*PRIORS, "image", None])),
            st.sampled_from([{"image": EXACT, "kernel": KERNEL}, EXACT, None, [EXACT], "image"]),
        ),
        steps=st.one_of(numbers, st.lists(st.one_of(st.integers(-1, 1001), numbers), max_size=3)),
        seed=st.one_of(numbers, st.integers(-(2**70), 2**70), st.lists(numbers, max_size=2)),
        samples=numbers,
        history=numbers,
        start=st.one_of(tensors, st.dictionaries(st.sampled_from(["image", "kernel"]), tensors)),
        start_time=numbers,
        guidance=st.sampled_from([DPS, "dps", 3]),
    )
)
def test_sample(given):
    def drawn(**given):
        return torch.cat([value.flatten() for value in sample(**given).latents.values()])

    # "kernel" and "image" are those of the operator, whose error it is when they do not fit; "first" is the start_time.
    names = {*given, "first", "kernel", "image"}
    try:
        finite_or_named(drawn, names, given)
    except ArithmeticError as error:  # bytes make a kernel that amplifies
        assert str(error).startswith("sample: diverged at step ")
