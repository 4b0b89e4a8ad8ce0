"""LDDMM: the shortest flow of diffeomorphisms that lays one image over the other, by shooting.

A velocity v_t (mm per unit time) carries the moving image from t = 0 to t = 1. Its momentum is
m_t = L v_t with L = (1 - width^2 Laplacian)^power, and the length of its path is measured by
<m, v> = the integral of m . v. Among all flows with the same end the shortest keeps its momentum,
carried along with the points (the equation EPDiff): with psi_t, where a point at t has come from,

    m_t = det(D psi_t) (D psi_t)^T m_0(psi_t),    v_t = L^-1 m_t,    psi_t' = -(D psi_t) v_t.

So the whole flow follows from m_0 (Miller, Trouve and Younes 2006), and what is searched for is

    1/2 <m_0, L^-1 m_0> + 1/sigma^2 dissimilarity(moving(psi_1), fixed),

<m, v> as mean over the image, in mm^2. `psi_1` is the displacement, and its inverse is the same
flow run the other way; neither folds as long as time and space are divided finely enough.

Sources: Beg et al., IJCV 2005 (energy and operator; their alpha is width^2, their gamma 1, another
one is another sigma); Vialard et al., IJCV 2012, and Singh et al., ISBI 2013 (shooting, the latter
with a vector as momentum, as here); Zhang and Fletcher, IJCV 2019 (a smooth velocity needs few
numbers). Our choices: the velocity lives on a torus of its own, with voxels of half the kernel's
width, whatever the images' are; the variable is y = L^(-1/2) m_0, in which the first term is
1/2 |y|^2, so that L-BFGS, which begins with the unit matrix, begins with the right one; gradients
by autograd through the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regkit.classical.deformation import Deformation
from regkit.classical.linear import Progress
from regkit.classical.pairs import block, check_pair
from regkit.classical.refine import with_gradients
from regkit.losses import lncc, mse, mutual_information, ncc
from regkit.messages import unknown
from regkit.spatial import compose, identity_grid, warp

SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lncc": lncc, "mse": mse, "ncc": ncc, "mutual_information": mutual_information,
}  # fmt: skip
# of a sweep on two validation pairs of brain slices, at width 14; of the last two: guesses
SIGMA = {"lncc": 0.015, "mse": 0.005, "ncc": 0.01, "mutual_information": 0.01}
MARGIN = 1.5  # of the torus about the image, in widths of the kernel
LARGE = 2**20  # numbers of a field from which on memory is more precious than time
ROUND = 10  # steps of L-BFGS after which it is asked what they have gained
GAIN = 1e-3  # of the objective: a round that gains less ends a level
OUTSIDE = 1e3  # times the objective of no motion: what a flow counts that cannot be followed


class Diverged(ArithmeticError):
    """A velocity that crosses the whole torus: its steps follow no flow."""


class Lattice(NamedTuple):
    """Voxels of another size in the place of an image: voxel j lies at `first + size * j`.

    shape: of the lattice. size, first: along each axis, in voxels of the image.
    """

    shape: tuple[int, ...]
    size: tuple[float, ...]
    first: tuple[float, ...]


class Between:
    """Brings displacements from one lattice to another, linearly; constant beyond the border."""

    def __init__(self, source: Lattice, target: Lattice, like: Tensor) -> None:
        """like: a tensor of the device and the dtype."""
        d = len(source.shape)

        def column(values: Iterator[float]) -> Tensor:
            return like.new_tensor(list(values)).reshape(1, d, *[1] * d)

        ratio = [t / s for t, s in zip(target.size, source.size, strict=True)]
        start = ((t - s) / n for t, s, n in zip(target.first, source.first, source.size))
        grid = identity_grid(target.shape, like.device, like.dtype)[None]
        self.where = grid * column(r - 1 for r in ratio) + column(start)
        self.scale = column(1 / r for r in ratio)

    def __call__(self, disp: Tensor) -> Tensor:
        """(1, d, *source) in voxels of the source: (1, d, *target) in those of the target."""
        return warp(disp, self.where, padding="border") * self.scale


class Flow:
    """Geodesics on a torus of voxels: kernel, and shooting.

    Fields are in voxels of the torus: a velocity or displacement v (1, d, *S) and a momentum m
    (1, d, *S), whose product sum(m * v) does not depend on the size of the voxels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        spacing: Sequence[float],
        width: float,
        power: float = 2.0,
        steps: int = 10,
        like: Tensor | None = None,
    ) -> None:
        """shape: of the torus. spacing, width: mm. like: a tensor of the device and the dtype."""
        like = torch.empty(0) if like is None else like
        d = len(shape)
        symbol = torch.ones(1, dtype=torch.float64)
        for axis, (n, size) in enumerate(zip(shape, spacing, strict=True)):
            last = axis == d - 1  # of a real transform, which is half as long
            turns = torch.arange(n // 2 + 1 if last else n, dtype=torch.float64) / n
            wave = width**2 * (2 - 2 * torch.cos(2 * torch.pi * turns)) / size**2
            symbol = symbol + wave.reshape(-1, *[1] * (d - 1 - axis))
        self.symbol = (symbol**power).to(like)  # of L: what it multiplies each wave by
        self.size = like.new_tensor(list(spacing)).reshape(1, d, *[1] * d)
        self.shape, self.steps = tuple(shape), steps

    def filtered(self, field: Tensor, exponent: float) -> Tensor:
        """L^exponent of a field (1, d, *S) in mm, component by component."""
        axes = tuple(range(2, field.ndim))
        waves = torch.fft.rfftn(field, dim=axes) * self.symbol**exponent
        filtered: Tensor = torch.fft.irfftn(waves, s=self.shape, dim=axes)
        return filtered

    def velocity(self, momentum: Tensor) -> Tensor:
        """v = L^-1 m: the velocity of a momentum, both in voxels."""
        return self.filtered(momentum / self.size, -1) / self.size

    def momentum(self, whitened: Tensor) -> Tensor:
        """m = L^(1/2) y, for which sum(m * velocity(m)) is the sum of squares of y (1, d, *S)."""
        return self.filtered(whitened, 0.5) * self.size

    def shoot(self, momentum: Tensor) -> Tensor:
        """The displacement psi_1 - identity (1, d, *S), from the momentum at t = 0.

        Raises:
            Diverged: the momentum is too large for these steps.
        """
        disp, before = torch.zeros_like(momentum), None
        for _ in range(self.steps):
            if momentum.numel() < LARGE:
                disp, before = self._step(momentum, disp, before)
            else:  # what a step works out on the way is worked out again by the backward pass
                disp, before = checkpoint(
                    self._step, momentum, disp, before,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
        return disp

    def path(self, momentum: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The same step by step, from t = 0 to 1: for each of the times, `steps` + 1 of them,

        psi_t - identity, its inverse, the momentum and the velocity, (1, d, *S) each.
        """
        disp, inverse, before = torch.zeros_like(momentum), torch.zeros_like(momentum), None
        for _ in range(self.steps):
            now = self.carried(momentum, disp)
            velocity = self.velocity(now)
            yield disp, inverse, now, velocity
            disp, mean = self._moved(disp, velocity, before)
            inverse = compose(_step_along(mean), inverse)
            before = velocity
        now = self.carried(momentum, disp)
        yield disp, inverse, now, self.velocity(now)

    def carried(self, momentum: Tensor, disp: Tensor) -> Tensor:
        """m_t = det(D psi) (D psi)^T m_0(psi), psi = identity + disp."""
        columns = []  # of D psi: how psi changes along each axis
        for axis in range(disp.ndim - 2):
            column = (disp.roll(-1, axis + 2) - disp.roll(1, axis + 2)) / 2
            column[:, axis] += 1
            columns.append(column)
        if len(columns) == 2:
            det = columns[0][:, 0] * columns[1][:, 1] - columns[0][:, 1] * columns[1][:, 0]
        else:
            det = (columns[0] * torch.linalg.cross(columns[1], columns[2], dim=1)).sum(1)
        there = warp(momentum, disp)
        return torch.stack([(there * column).sum(1) * det for column in columns], 1)

    def _step(self, momentum: Tensor, disp: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        velocity = self.velocity(self.carried(momentum, disp))
        if not velocity.detach().abs().amax() < max(self.shape):  # nor NaN
            raise Diverged
        return self._moved(disp, velocity, before)[0], velocity

    def _moved(
        self, disp: Tensor, velocity: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """psi at the end of a step, and the way that the velocity makes in it.

        The velocity is that in the middle of the step, as it and the one before it let expect.
        """
        middle = velocity if before is None else 1.5 * velocity - 0.5 * before
        way = middle / self.steps
        return compose(disp, _step_along(-way)), way


def _step_along(way: Tensor) -> Tensor:
    """Where a step of a steady velocity leads, to second order: way(x + way / 2)."""
    return compose(way, way / 2) - way / 2


@with_gradients
def lddmm(
    moving: Tensor,
    fixed: Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    similarity: str = "lncc",
    width: float = 14.0,
    sigma: float | None = None,
    power: float = 2.0,
    steps: int = 10,
    levels: Sequence[int] = (4, 2, 1),
    iterations: int = 40,
    progress: Progress | None = None,
) -> Deformation:
    """The diffeomorphism at the end of the geodesic that best lays `moving` over `fixed`.

    Args:
        moving, fixed: (1, 1, *S), floating point, on one grid. 2D or 3D.
        spacing: voxel size, mm, one number or one per axis.
        similarity: "lncc", "mse", "ncc" or "mutual_information", see `regkit.losses`.
        width: of the kernel, mm: a push spreads about so far. Smaller follows finer differences.
        sigma: how far the images may differ, the root of a dissimilarity per mm^2 of the flow's
            energy: smaller lays them closer, and bends more. None: `SIGMA` of the similarity.
        power: of the operator, more than 0; 2 as in Beg et al., larger is smoother.
        steps: of time, 1 or more.
        levels: one image voxel in so many along each axis, from coarse to fine; the velocity is the
            same on all. 1 is the images' own grid.
        iterations: of L-BFGS on each level, at most.
        progress: called with the fraction done, 0 to 1.

    Returns:
        `disp`, `inverse` and `values` (the objective, mm^2) of `Deformation`. `disp` and `inverse`
        come from the same flow: they undo each other but for the error of its steps.

    Raises:
        ValueError: images that are not two (1, 1, *S) of one grid, not finite or constant, or a
            setting out of its range.
    """
    size = check_pair(moving, fixed, spacing, levels)
    if similarity not in SIMILARITIES:
        raise unknown("similarity", similarity, SIMILARITIES)
    for name, value in (("width", width), ("power", power), ("sigma", sigma)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}, expected a positive number.")
    for name, number in (("steps", steps), ("iterations", iterations)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected 1 or more.")
    moving, fixed = moving.float(), fixed.float()
    shape = tuple(fixed.shape[2:])
    torus = _torus(shape, size, width)
    cell = [a * b for a, b in zip(torus.size, size, strict=True)]
    search = _Search(
        Flow(torus.shape, cell, width, power, steps, moving),
        torus,
        SIMILARITIES[similarity],
        (SIGMA[similarity] if sigma is None else sigma) ** -2,
        float(np.prod(np.divide(shape, torus.size))),
    )
    variable = moving.new_zeros(1, len(shape), *torus.shape)
    values: list[tuple[tuple[int, ...], float]] = []
    for number, level in enumerate(levels):
        lattice = _level(shape, size, level)
        told = None
        if progress is not None:
            told = lambda done: progress((number + done) / len(levels))  # noqa: E731, B023
        variable, found = search.descend(
            variable, _on(lattice, moving), _on(lattice, fixed), lattice, iterations, told
        )
        values += [(lattice.shape, value) for value in found]
    disp, inverse = search.answer(variable, _level(shape, size, 1))
    return Deformation(disp, inverse, tuple(values))


class _Search(NamedTuple):
    """What is searched for, on whatever level.

    Its variable x (1, d, *torus) is y, but for the unit: x = y / the root of its length, for L-BFGS
    takes a first step whose absolute values are 1 in sum; this makes it about 1 mm everywhere.

    torus: of the flow. weight: of the dissimilarity. inside: voxels of the torus in the image.
    """

    flow: Flow
    torus: Lattice
    dissimilarity: Callable[[Tensor, Tensor], Tensor]
    weight: float
    inside: float

    def momentum(self, variable: Tensor) -> Tensor:
        return self.flow.momentum(variable * (self.inside * variable.numel()) ** 0.5)

    def descend(
        self,
        variable: Tensor,
        moving: Tensor,
        fixed: Tensor,
        lattice: Lattice,
        iterations: int,
        progress: Progress | None,
    ) -> tuple[Tensor, list[float]]:
        """The variable after L-BFGS on the images of one level, and the objective on the way."""
        variable = variable.clone().requires_grad_(True)
        between = Between(self.torus, lattice, variable)
        outside = OUTSIDE * self.weight * float(self.dissimilarity(moving, fixed).abs() + 1)
        optimiser = torch.optim.LBFGS(
            [variable], max_iter=min(ROUND, iterations), history_size=ROUND,
            tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def objective() -> Tensor:
            optimiser.zero_grad()
            length = variable.square().sum(dtype=torch.float64) * variable.numel() / 2
            try:
                disp = between(self.flow.shoot(self.momentum(variable)))
            except Diverged:  # the line search turns back
                variable.grad = torch.zeros_like(variable)
                return length.detach() * 0 + outside
            worth = length + self.weight * self.dissimilarity(warp(moving, disp), fixed)
            worth.backward()
            return worth.detach()

        values: list[float] = []
        rounds = math.ceil(iterations / ROUND)
        for done in range(1, rounds + 1):
            values.append(float(optimiser.step(objective)))
            if progress is not None:
                progress(done / rounds)
            if done > 1 and values[-2] - values[-1] < GAIN * abs(values[-2]):
                break
        return variable.detach(), values

    @torch.no_grad()
    def answer(self, variable: Tensor, image: Lattice) -> tuple[Tensor, Tensor]:
        """Displacement and inverse on the voxels of the image."""
        *_, (disp, inverse, _, _) = self.flow.path(self.momentum(variable))
        between = Between(self.torus, image, variable)
        return between(disp), between(inverse)


def _torus(shape: Sequence[int], size: Sequence[float], width: float) -> Lattice:
    """Where the velocity lives: the images and a margin, in voxels of half a width or the images'.

    Args:
        shape, size: of the images, voxels and mm.
    """
    cells = [max(1.0, width / 2 / h) for h in size]  # in voxels of the image
    margins = [MARGIN * width / h for h in size]
    counts = [
        next_fast_len(int(np.ceil((n + 2 * margin) / cell)), real=True)
        for n, margin, cell in zip(shape, margins, cells, strict=True)
    ]
    first = [(n - 1 - (m - 1) * cell) / 2 for n, m, cell in zip(shape, counts, cells, strict=True)]
    return Lattice(tuple(counts), tuple(cells), tuple(first))


def _level(shape: Sequence[int], size: Sequence[float], level: int) -> Lattice:
    """The blocks of voxels that a level takes for one, see `regkit.classical.pairs.block`."""
    several = block(shape, size, level)
    counts = tuple(n // s for n, s in zip(shape, several, strict=True))
    return Lattice(counts, tuple(map(float, several)), tuple((s - 1) / 2 for s in several))


def _on(lattice: Lattice, image: Tensor) -> Tensor:
    """An image (1, 1, *S) on the voxels of a level: means over blocks of its own."""
    pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    return pool(image, tuple(int(n) for n in lattice.size))
