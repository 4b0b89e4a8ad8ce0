"""Chapter 11: demons, diffusion, both directions, noise, a start from afar, and when to stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regkit import metrics, spatial
from regkit.book.exercise import Exercise, Mistake

# 1, a step of demons


def _some_forces() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 1, 6, 7), torch.randn(2, 2, 6, 7))]


def _demons(miss: Tensor, slope: Tensor) -> Tensor:
    return miss * slope / (_length(slope) ** 2 + miss**2)


def _length(disp: Tensor) -> Tensor:
    length: Tensor = disp.norm(dim=1, keepdim=True)
    return length


# 3, there and back


def _both_ways() -> list[tuple[Tensor, Tensor, Tensor]]:
    i, j = spatial.identity_grid((30, 40))
    there = torch.stack([3 * torch.sin(j / 5), 2 * torch.cos(i / 6)])[None]
    back = torch.stack([-2.5 * torch.sin(j / 5 + 0.2), -2 * torch.cos(i / 6)])[None]
    inside = (i - 15) ** 2 + (j - 20) ** 2 < 100
    return [(there, back, inside[None])]


def _mean(x: Tensor, head: Tensor) -> Tensor:
    return x[head].mean()


# 5, from afar


def _two_steps() -> list[tuple[Tensor, Tensor]]:
    i, j = spatial.identity_grid((24, 30))
    first = torch.stack([2 + 2 * torch.sin(j / 4), 3 * torch.cos(i / 5)])[None]
    then = torch.stack([1.5 * torch.cos(i / 3), torch.sin(j / 3) - 1])[None]
    return [(first, then)]


# 6, the spread of the Jacobian


def _some_fields() -> list[tuple[Tensor]]:
    i, j = spatial.identity_grid((20, 16))
    smooth = torch.stack([torch.sin(j / 3), 1.2 * torch.cos(i / 2.5)])[None]
    bumpy = torch.stack([1.5 * torch.sin(i / 3), torch.cos(j / 2)])[None]
    return [(smooth,), (bumpy,)]


def _spread(disp: Tensor, identity: float = 1.0, correction: int = 0) -> Tensor:
    rows = torch.gradient(disp, dim=(2, 3))
    a, b = rows[0][:, 0] + identity, rows[1][:, 1] + identity
    det = a * b - rows[0][:, 1] * rows[1][:, 0]
    return det.clamp(1e-9, 1e9).log().std(correction=correction)


EXERCISES = (
    Exercise(
        asks="tensor",
        inputs=_some_forces,
        reference=_demons,
        mistakes=(
            Mistake(
                "mismatch missing below",
                lambda miss, slope: miss * slope / _length(slope) ** 2,
                "The square of the mismatch is missing below. Where the image is flat this step "
                "would be as long as it likes.",
            ),
            Mistake(
                "each component by itself",
                lambda miss, slope: miss * slope / (slope**2 + miss**2),
                "Below stands the squared *length* of the slope, over both components, and not the "
                "square of each.",
            ),
            Mistake(
                "length not squared",
                lambda miss, slope: miss * slope / (_length(slope) + miss.abs()),
                "Both are squared below. As they are, the step has the units of a grey value.",
            ),
            Mistake(
                "pushed the other way",
                lambda miss, slope: -_demons(miss, slope),
                "The sign is wrong: with f - m as the mismatch, the step goes up the slope where m "
                "is too dark.",
            ),
            Mistake(
                "only the direction",
                lambda miss, slope: slope / (2 * _length(slope)),
                "All these steps are half a voxel long. That is the longest; a step is shorter "
                "where slope and mismatch differ.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [(0.1, 45), (0.2, 10), (0.05, 100)],
        reference=lambda tau, n: math.sqrt(2 * n * tau),
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "both axes together",
                lambda tau, n: math.sqrt(4 * n * tau),
                "This is the spread over both axes together. The sigma of a Gaussian is that along "
                "one axis.",
            ),
            Mistake(
                "variance",
                lambda tau, n: 2 * n * tau,
                "This is the variance. Sigma is its square root.",
            ),
            Mistake(
                "one neighbour only",
                lambda tau, n: math.sqrt(n * tau),
                "Along an axis there are two neighbours, and each gets its part.",
            ),
            Mistake(
                "sigmas added",
                lambda tau, n: n * math.sqrt(2 * tau),
                "You have added the sigmas of the rounds. It is the variances that add.",
            ),
            Mistake(
                "n against n - 1",
                lambda tau, n: math.sqrt(2 * (n - 1) * tau),
                "One round is missing: heat spreads in the first one already.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_both_ways,
        reference=lambda there, back, head: _mean(spatial.compose(there, back).norm(dim=1), head),
        mistakes=(
            Mistake(
                "added instead of composed",
                lambda there, back, head: _mean((there + back).norm(dim=1), head),
                "The two were added. The second has to be read off where the first has led.",
            ),
            Mistake(
                "wrong order",
                lambda there, back, head: _mean(spatial.compose(back, there).norm(dim=1), head),
                "The order is the other one: `compose(there, back)` is asked, which lives on the "
                "grid of the head.",
            ),
            Mistake(
                "components instead of lengths",
                lambda there, back, head: _mean(
                    spatial.compose(there, back).abs().mean(dim=1), head
                ),
                "You have averaged the components. The distance is their length: squares, sum, "
                "root.",
            ),
            Mistake(
                "background as well",
                lambda there, back, head: spatial.compose(there, back).norm(dim=1).mean(),
                "The background counts here too. Only voxels of the head are asked.",
            ),
        ),
    ),
    Exercise(
        asks="choice",
        reference=lambda: "lncc",
        remark="The table of your experiment is the argument.",
        mistakes=(
            Mistake(
                "the other one",
                lambda: "mse",
                "Look again at how much each error grows between no noise and the largest: which "
                "of the two divides by something small in flat tissue?",
            ),
            Mistake(
                "no difference",
                lambda: "both alike",
                "They are not alike. Subtract the error without noise from that with the largest "
                "noise, for each.",
            ),
            Mistake(
                "no effect",
                lambda: "neither",
                "Both get worse. Have you added the noise to both images, and another one to each?",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_two_steps,
        reference=spatial.compose,
        remark="When the start decides is for you to measure.",
        mistakes=(
            Mistake(
                "added instead of composed",
                lambda first, then: first + then,
                "The two displacements were added. The first one has to be read off at the place "
                "to which the second leads.",
            ),
            Mistake(
                "wrong order",
                lambda first, then: spatial.compose(then, first),
                "The order is wrong: the image is shifted first, and the network has seen the "
                "shifted one.",
            ),
            Mistake(
                "only the second",
                lambda first, then: then,
                "The shift is lost: this is the network's answer alone.",
            ),
            Mistake(
                "first undone",
                lambda first, then: spatial.compose(-first, then),
                "The shift goes the opposite way: it was found as a displacement already and needs "
                "no sign.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_fields,
        reference=metrics.sd_log_jacobian,
        tolerance=1e-4,
        remark="One of the three numbers is right. Which of them says when to stop is still open.",
        mistakes=(
            Mistake(
                "without the logarithm",
                lambda disp: spatial.jacobian_determinant(disp).std(correction=0),
                "This is the spread of J itself. Half and double should count alike: take the "
                "logarithm first.",
            ),
            Mistake(
                "missing identity",
                lambda disp: _spread(disp, identity=0.0),
                "The map is x + disp(x), so the identity belongs to its derivative.",
            ),
            Mistake(
                "n against n - 1",
                lambda disp: _spread(disp, correction=1),
                "Nearly: `std` divides by n - 1 unless told otherwise. All voxels are there, so "
                "divide by n.",
            ),
            Mistake(
                "variance",
                lambda disp: metrics.sd_log_jacobian(disp) ** 2,
                "This is the variance. The standard deviation is its square root.",
            ),
            Mistake(
                "mean instead of spread",
                lambda disp: spatial.jacobian_determinant(disp).clamp(1e-9, 1e9).log().mean(),
                "This is the mean of log J. How far the voxels differ from it is asked.",
            ),
        ),
    ),
)
