"""Weights in 8 and 12 bits: how far they are from what was saved, and files that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regkit import models
from regkit.models import quantised

# largest distance between a weight and its number in the file, for a channel whose largest is 1
STEP = {8: 1 / 127, 12: 1 / 2047}
BITS = pytest.mark.parametrize("bits", [8, 12])


class File(dict):
    """Tensors as an open file of safetensors gives them."""

    get_tensor = dict.__getitem__


def through(weights: dict, bits: int) -> dict:
    stored = quantised.pack(weights, bits)
    kinds = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}
    found = quantised.parameters({k: (kinds[v.dtype], tuple(v.shape)) for k, v in stored.items()})
    assert {k: shape for k, (_, shape) in found.items()} == {
        k: tuple(v.shape) for k, v in weights.items()
    }
    names = frozenset(stored)
    return {k: quantised.read(File(stored), k, kind, names) for k, (kind, _) in found.items()}


@BITS
def test_each_weight_is_within_half_a_step_of_its_channel(bits):
    """Channels of very different size do not spoil each other; an odd count of numbers is kept."""
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    weight /= weight.abs().amax((1, 2, 3), keepdim=True)
    sizes = torch.tensor([1e-4, 1.0, 3e5, 0.0, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    read = through({"weight": sizes * weight}, bits)["weight"]
    assert read.dtype == torch.float32 and weight.numel() % 2
    apart = (read.double() - sizes * weight).abs()
    assert (apart <= (0.5 * STEP[bits] * 1.001) * sizes).all()
    assert apart[4].max() > 0.4 * STEP[bits] * 2.0  # and no finer than that
    assert (read[3] == 0).all()


@BITS
def test_whole_numbers_of_steps_are_kept_exactly(bits):
    """All of them, negative and positive, in any place."""
    largest = quantised.LARGEST[bits]
    n = torch.arange(-largest, largest + 1).float()
    n = torch.stack([n, n.flip(0)])
    assert torch.equal(through({"weight": n}, bits)["weight"], n)
    torch.testing.assert_close(through({"weight": n / 64}, bits)["weight"], n / 64, atol=0, rtol=0)


@BITS
def test_what_has_one_axis_is_in_half_precision(bits):
    weights = {"bias": torch.randn(7), "number": torch.tensor(1.5), "none": torch.zeros(0, 3)}
    read = through(weights, bits)
    for key, value in weights.items():
        assert torch.equal(read[key], value.half().float())


@BITS
def test_a_smaller_file_and_nearly_the_same_answer(bits, tmp_path):
    model = models.create("rigid_resnet34", ndim=2, width=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    models.save(model, tmp_path / "whole.safetensors")
    models.save(model, tmp_path / "small.safetensors", bits=bits, seed=7)
    whole, small = ((tmp_path / f"{x}.safetensors").stat().st_size for x in ("whole", "small"))
    assert small < (bits + 1.5) / 32 * whole
    about = models.about(tmp_path / "small.safetensors")
    assert {k: shape for k, (_, shape) in about.tensors.items()} == {
        k: tuple(p.shape) for k, p in model.named_parameters()
    }
    loaded = models.load(tmp_path / "small.safetensors")
    assert loaded.info == {"seed": 7}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        largest = float(parameter.detach().abs().max())
        torch.testing.assert_close(
            loaded.get_parameter(name),
            parameter,
            atol=0.51 * STEP[bits] * largest,
            rtol=1e-3,
        )
    # what was read stays when the file is overwritten, and is saved again as it is
    models.save(loaded, tmp_path / "small.safetensors", bits=bits)
    again = models.load(tmp_path / "small.safetensors")
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 16}, {"bits": 12, "half": True}])
def test_other_bits_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="bits is .*, expected 8, 12 or None"):
        models.save(models.create("vxm", ndim=2), tmp_path / "w.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


NAME, BIAS = "stem.0.weight", "stem.1.bias"
DAMAGE = {
    "no scale": lambda t: t.pop(f"{NAME}.scale"),
    "one scale too few": lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"][1:].clone()}),
    "scales of another type": lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"].double()}),
    "a byte too few": lambda t: t.update({f"{NAME}.low": t[f"{NAME}.low"][1:].clone()}),
    "a byte too many": lambda t: t.update({f"{NAME}.low": torch.cat([t[f"{NAME}.low"]] * 2)}),
    "low bits of another type": lambda t: t.update({f"{NAME}.low": t[f"{NAME}.low"].short()}),
    "a scale of nothing": lambda t: t.update({"x.scale": torch.zeros(2)}),
    "low bits of nothing": lambda t: t.update({"x.low": torch.zeros(2, dtype=torch.uint8)}),
    "whole numbers without a scale": lambda t: t.update({"x": torch.zeros(2, dtype=torch.int8)}),
    "numbers of another type": lambda t: t.update({NAME: t[NAME].short()}),
    "a bias of whole numbers": lambda t: t.update({BIAS: t[BIAS].int()}),
    "another shape": lambda t: t.update({NAME: t[NAME][:, :, :2].clone()}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_whose_parts_do_not_fit_is_refused(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    models.save(models.create("rigid_resnet34", ndim=2, width=4), path, bits=12)
    tensors = load_file(path)
    DAMAGE[kind](tensors)
    header = {"name": "rigid_resnet34", "ndim": 2, "options": {"width": 4}, "info": {}}
    save_file(tensors, path, metadata={"regkit": json.dumps(header)})
    with pytest.raises(ValueError, match=r"^path_or_name is 'w\.safetensors'"):
        models.load(path)
