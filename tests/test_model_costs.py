"""The table of costs: counts by hand and against a real step, the study, the command."""

import json
import math

import common
import model_costs
import pytest
import torch
from typer.testing import CliRunner

from regkit import cli, losses, models
from regkit.attention import Attention
from regkit.blocks import CONV, DispHead
from regkit.models import cost
from regkit.models.base import RegistrationModel
from regkit.record import Rows

HELD = common.RESULTS / "model_costs.json"


@pytest.fixture(scope="module", autouse=True)
def first_count():
    """It imports those parts of PyTorch that know shapes without numbers, which takes seconds."""
    cost.count("vxm", 2, (16, 16))


class Small(RegistrationModel):
    """A convolution, full attention, a head."""

    def __init__(self, ndim):
        super().__init__(ndim)
        self.conv = CONV[ndim](2, 8, kernel_size=3, padding=1)
        self.attention = Attention(8, 2)
        self.head = DispHead(ndim, 8)

    def estimate(self, moving, fixed):
        x = self.conv(torch.cat([moving, fixed], dim=1))
        return {"disp": self.head(self.attention(x.movedim(1, -1)).movedim(-1, 1))}


@pytest.mark.parametrize("shape", [(6, 10), (4, 5, 6)])
def test_multiply_adds_are_counted_by_hand(shape):
    n, d = math.prod(shape), len(shape)
    convs = 3**d * n * (2 * 8 + 8 * d)
    attention = n * (3 * 8 * 8 + 8 * 8) + 2 * n * n * 8  # linear layers; q k and weights v
    found = cost._counted(Small(d).train(), shape, False)
    assert found.multiply_adds == convs + attention
    assert found.parameters == models.parameter_count(Small(d))


def really_kept(model, shape, bf16=False):
    """Bytes that a step with real numbers holds for its way back, beside the weights."""
    held = {}

    def keep(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    images = torch.rand(2, 1, 1, *shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            result = model.train()(*images)
        losses.mse(result.moved, images[1]) + losses.diffusion(result.disp)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(s.nbytes() for at, s in held.items() if at not in weights)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vxm", {}),
        ("vxm", {"save_memory": True}),
        ("rigid_resnet34", {"width": 8}),
        ("h_sganet", {"channels": (8, 8, 16), "save_memory": True}),
        ("transmorph", {"size": "tiny", "layers": (1, 1, 1, 1)}),
        ("unfolding", {"channels": (8, 16), "layers": 1, "mlp": 8, "stages": 1}),
    ],
)
def test_what_is_counted_without_numbers_is_what_a_real_step_keeps(name, options, bf16):
    shape = (32, 44)
    found = cost.count(name, 2, shape, bf16=bf16, **options)
    torch.manual_seed(0)
    model = models.create(name, 2, **options)
    assert found.parameters == models.parameter_count(model)
    expected = really_kept(model, shape, bf16)
    # mean and variance of a norm are bfloat16 where there are no numbers, float32 on a CPU
    assert found.kept == (pytest.approx(expected, rel=5e-3) if bf16 else expected)


def test_a_step_that_fits_no_memory_is_counted_all_the_same():
    """Twice the size, eight times the multiply-adds; 2048^3 voxels would take a terabyte."""
    small, large = (cost.count("vxm", 3, (n,) * 3) for n in (1024, 2048))
    assert large.multiply_adds == 8 * small.multiply_adds
    assert large.kept > 1e12 and small.parameters == large.parameters


def test_a_model_that_is_laid_out_takes_no_memory():
    model = cost.laid_out("utsrmorph", 3, size="large")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_seconds_are_those_of_one_pair(monkeypatch):
    seen = []
    forward = RegistrationModel.forward
    monkeypatch.setattr(
        RegistrationModel, "forward", lambda m, *x: seen.append(x[0].shape[2:]) or forward(m, *x)
    )
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    assert cost.seconds("vxm", 2, (40, 48), channels_last=True, bf16=True) == 2.5
    assert seen == [(32, 32), (40, 48)]


def test_a_compiled_model_is_timed_after_it_was_compiled_for_the_shape(monkeypatch):
    """What torch.compile is given is called, and first with a pair of the same shape."""
    seen = []
    monkeypatch.setattr(
        cost.torch, "compile", lambda model: lambda *x: seen.append(x[0].shape[2:]) or model(*x)
    )
    assert cost.seconds("vxm", 2, (40, 48), compiled=True) > 0
    assert seen == [(40, 48), (40, 48)]


@pytest.mark.parametrize("function", [cost.count, cost.seconds])
def test_a_shape_of_another_dimension_is_a_sentence(function):
    with pytest.raises(ValueError, match=r"shape is \(32, 32\), expected 3 positive numbers.*\.$"):
        function("vxm", 3, (32, 32))
    with pytest.raises(ValueError, match="shape is .*0"):
        function("vxm", 2, (32, 0))


def test_costs_in_2d_and_models_without_save_memory():
    row = cost.measured("vxm", (32, 32), save_memory=True)
    assert row.kept == cost.count("vxm", 2, (32, 32), save_memory=True).kept
    assert row.kept < cost.measured("vxm", (32, 32)).kept and row.seconds > 0
    assert cost.saves_memory("unfolding") and not cost.saves_memory("rigid_resnet34")
    with pytest.raises(ValueError, match="save_memory.* is no option"):
        cost.measured("rigid_resnet34", (32, 32), save_memory=True)


# --- the study -----------------------------------------------------------------------------------


def test_the_study_counts_each_setting():
    row = model_costs.counts("vxm", {}, (32, 40))
    plain = cost.count("vxm", 2, (32, 40))
    assert (row["parameters"], row["multiply_adds"], row["kept"]) == plain
    saving = cost.count("vxm", 2, (32, 40), bf16=True, save_memory=True)
    assert row["kept_saving_bf16"] == saving.kept < row["kept_saving"] < row["kept"]
    assert model_costs.counts("vtn", {"channels": 4}, (32, 32))["kept_saving"] is None


def test_the_study_goes_on_where_it_stopped(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(model_costs, "MODELS", [("vxm", {}), ("transmorph", {"size": "tiny"})])
    monkeypatch.setattr(
        model_costs, "counts", lambda name, options: asked.append(name) or {"parameters": 1}
    )
    monkeypatch.setattr(model_costs, "seconds", lambda name, options: {"seconds": 2.0})
    monkeypatch.setattr(model_costs, "compiled", lambda name, options: {"seconds": 1.0})
    out = tmp_path / "costs.json"
    model_costs.main(part="counts", model=["vxm"], out=out)
    for _ in range(2):
        model_costs.main(part="counts seconds compiled", model=None, out=out)
    assert asked == ["vxm", "transmorph"]
    held = json.loads(out.read_text())
    assert held["shape"] == [160, 192, 160]
    for part in ("counts", "seconds"):
        rows = Rows(out, ("label",), within=part).rows
        assert [row["label"] for row in rows] == ["vxm", "transmorph, tiny"]
    assert [row["label"] for row in Rows(out, ("label",), within="compiled").rows] == ["vxm"]
    with pytest.raises(
        ValueError, match="part holds 'memory', expected some of counts, seconds, compiled"
    ):
        model_costs.main(part="memory", model=None, out=out)


def test_our_order_of_work_took_no_longer_than_the_published_one():
    """Forward at 160x192x160 and a step at an eighth of it, both in one run."""
    rows = json.loads((common.RESULTS / "transmorph_speed.json").read_text())["rows"]
    took = {(row["part"], row["layout"]): row for row in rows}
    assert took["forward", "regkit"]["shape"] == [160, 192, 160]
    for part in ("forward", "step"):
        ours, official = took[part, "regkit"], took[part, "official"]
        assert ours["seconds"] <= official["seconds"] and ours["shape"] == official["shape"]
    assert took["step", "regkit"]["peak_megabytes"] < took["step", "official"]["peak_megabytes"]


def test_the_page_says_what_compiling_brings():
    rows = json.loads(HELD.read_text(encoding="utf-8"))["compiled"]["rows"]
    assert {row["label"] for row in rows} == set(model_costs.COMPILED)
    takes = {
        row["label"]: [
            round(row[f"seconds_compiled{way}"], 1) / round(row[f"seconds{way}"], 1)
            for way in ("", "_bf16")
        ]
        for row in rows
    }
    assert max(plain for plain, _ in takes.values()) < 0.95
    assert min(takes, key=lambda label: takes[label][0]) == "h_sganet"
    assert [label for label, (_, bf16) in takes.items() if bf16 > 1] == ["transmorph"]


@pytest.mark.slow
def test_the_stored_table_is_that_of_the_code():
    held = json.loads(HELD.read_text())
    rows = {row["label"]: row for row in held["counts"]["rows"]}
    assert list(rows) == [model_costs.label(*one) for one in model_costs.MODELS]
    for name in ("vxm", "transmorph", "utsrmorph"):
        found = cost.count(name, 3, held["shape"])
        row = rows[name]
        assert (row["parameters"], row["multiply_adds"], row["kept"]) == found


# --- the command ---------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, ["models", *arguments])


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A stored table of two models; of one nobody has measured the seconds."""
    kept = {"kept": 2_000_000_000, "kept_saving": None, "kept_bf16": 1_500_000_000}
    row = {"parameters": 1_234, "multiply_adds": 5_600_000_000, **kept, "kept_saving_bf16": None}
    counts = [{"label": label, **row} for label in ("vtn", "transmorph, tiny")]
    seconds = [{"label": "vtn", "seconds": 7.5, "seconds_bf16": 3.25}]
    file = tmp_path / "model_costs.json"
    file.write_text(json.dumps({"counts": {"rows": counts}, "seconds": {"rows": seconds}}))
    monkeypatch.setattr(cost.stored, "__kwdefaults__", {**cost.stored.__kwdefaults__, "file": file})
    return file


def test_the_command_reads_the_stored_table(table):
    lines = run("--cost").stdout.splitlines()
    assert lines[0].split()[:2] == ["model", "parameters"]
    assert lines[1].split() == ["vtn", "1,234", "5.6", "2.00", "7.50"]
    assert lines[2].split() == ["transmorph,", "tiny", "1,234", "5.6", "2.00", "-"]
    assert run("--cost", "--bf16").stdout.splitlines()[1].split()[-2:] == ["1.50", "3.25"]
    assert run("--cost", "--save-memory").stdout.splitlines()[1].split()[-2:] == ["-", "7.50"]
    assert len(run("--cost", "--model", "transmorph").stdout.splitlines()) == 2


def test_the_command_counts_and_measures_here():
    result = run("--cost", "--measure", "--size", "32x40", "--model", "vxm")
    parameters, adds, kept, seconds = result.stdout.splitlines()[1].split()[1:]
    expected = cost.count("vxm", 2, (32, 40))
    assert parameters == f"{expected.parameters:,}"
    assert adds == f"{expected.multiply_adds / 1e9:.1f}" and kept == f"{expected.kept / 1e9:.2f}"
    assert float(seconds) >= 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--cost", "--measure", "--size", "large"), "size is 'large', expected voxels such as"),
        (("--cost", "--measure", "--size", "32x0"), "size is '32x0', expected voxels"),
        (("--cost", "--model", "transmorf"), "did you mean 'transmorph'"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, sentence):
    result = run(*arguments)
    assert result.exit_code == 2 and sentence in result.stderr
    assert result.stderr.startswith("regkit: ") and result.stderr.count("\n") == 1


def test_without_a_clone_the_command_says_how_to_measure(table):
    table.unlink()
    result = run("--cost")
    assert result.exit_code == 2 and "--measure counts and measures here" in result.stderr
