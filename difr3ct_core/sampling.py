"""Samplers: functions of (model, z, schedule) that turn noise into posterior samples (§III-C, §IV-B).

``model(z_t, t)`` returns the clean latent ẑ_0; :func:`guided` makes such a model from a denoiser and a condition.
Every solver is one function, shaped like its equation, and works on tensors of any number of axes:

- :func:`ddpm`: ancestral sampling (Ho et al. 2020, algorithm 2), Eq. 6-7 of the paper;
- :func:`ddim`: deterministic (Song et al. 2021, eq. 12 with σ = 0);
- :func:`dpm_solver_pp_2m`: second-order multistep (Lu et al. 2022, DPM-Solver++, algorithm 2), the paper's choice;
- :func:`dpm_solver_pp_3m`: third-order multistep (the same paper, §4 and appendix B).

Nothing is clipped on the way: latents have no hard range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .diffusion import Denoiser, Schedule
from .files import InputError
from .progress import progress

Model = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
#: One source of noise for a whole batch, or one per sample: then a sample does not depend on its batch.
Noise = torch.Generator | Sequence[torch.Generator] | None


def gaussian(shape: tuple[int, ...], generator: Noise) -> Tensor:
    """Standard normal noise, made on the CPU so that every device draws the same numbers."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator)
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])


def guided(
    denoiser: Denoiser, schedule: Schedule, condition: Float[Tensor, "b k z y x"] | None, guidance: float = 1.0
) -> Model:
    """A model of ẑ_0 with classifier-free guidance (Eq. 8): null + s·(conditional - null).

    Args:
        denoiser: predicts ε or v.
        schedule: says which, and gives γ_t.
        condition: x-ray features, or None for the unconditional model.
        guidance: s; 1 is the conditional model alone, 0 the unconditional one, and each costs one evaluation.
    """

    def model(z: Tensor, t: int) -> Tensor:
        steps = torch.full((len(z),), t, dtype=torch.long, device=z.device)
        if condition is None or guidance == 0:
            prediction = denoiser(z, steps, None)
        else:
            prediction = denoiser(z, steps, condition)
            if guidance != 1:
                null = denoiser(z, steps, None)
                prediction = null + guidance * (prediction - null)
        return schedule.to_x0(z, steps, prediction)

    return model


def time_grid(schedule: Schedule, steps: int, spacing: str = "logsnr") -> list[int]:
    """Falling step indices from T-1 to 0, where a solver evaluates the model.

    Args:
        schedule: forward process with T steps.
        steps: number of evaluations, 1 to T. Where "logsnr" would be finer than the schedule, neighbours are taken.
        spacing: "logsnr" (even in λ = log(α/σ), as DPM-Solver's paper advises) or "time" (even in t).

    Raises:
        InputError: ``steps`` outside 1 to T.
    """
    last = schedule.timesteps - 1
    if not 1 <= steps <= schedule.timesteps:
        raise InputError(f"steps: found {steps}, expected 1 to {schedule.timesteps} (the T of the schedule).")
    if steps == schedule.timesteps:
        return list(range(last, -1, -1))
    if spacing == "time":
        grid = torch.linspace(last, 0, steps).round().long()
    else:
        lam = torch.special.logit(schedule.gamma.cpu()) / 2
        wanted = torch.linspace(float(lam[-1]), float(lam[0]), steps, dtype=lam.dtype)
        grid = (wanted[:, None] - lam[None, :]).abs().argmin(1)
    falling = grid.tolist()
    # Two wanted values can fall on one step: the later one makes room, and what that pushes out at 0 goes back up.
    for i in range(1, steps):
        falling[i] = min(falling[i], falling[i - 1] - 1)
    for i in range(steps - 1, -1, -1):
        falling[i] = max(falling[i], steps - 1 - i)
    return falling


def _alpha_sigma_lambda(schedule: Schedule, t: int) -> tuple[float, float, float]:
    gamma = float(schedule.gamma[t])
    return math.sqrt(gamma), math.sqrt(1 - gamma), 0.5 * math.log(gamma / (1 - gamma))


def ddpm(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    steps: int | None = None,
    generator: Noise = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling. Fewer than T steps use the posterior between the chosen ones.

    Args:
        model: (z_t, t) -> ẑ_0.
        z: standard normal noise; every step keeps its shape.
        schedule: forward process.
        steps: evaluations; None for all T.
        generator: source of the noise of each step.
        callback: called with (t, z_t, ẑ_0) after each evaluation.
    """
    grid = time_grid(schedule, schedule.timesteps if steps is None else steps, "time")
    for t, s in progress(list(zip(grid, [*grid[1:], None], strict=True)), "ancestral sampling"):
        x0 = model(z, t)
        if callback:
            callback(t, z, x0)
        if s is None:
            return x0
        gamma_t, gamma_s = float(schedule.gamma[t]), float(schedule.gamma[s])
        ratio = gamma_t / gamma_s  # 1 - β between s and t
        # q(z_s | z_t, z_0) is Gaussian (Eq. 6): mean and variance in closed form.
        mean = (math.sqrt(gamma_s) * (1 - ratio) * x0 + math.sqrt(ratio) * (1 - gamma_s) * z) / (1 - gamma_t)
        variance = (1 - ratio) * (1 - gamma_s) / (1 - gamma_t)
        z = mean + math.sqrt(variance) * gaussian(z.shape, generator).to(z)
    return z


def ddim(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    steps: int = 50,
    callback: Callback | None = None,
    spacing: str = "time",
) -> Tensor:
    """Deterministic sampling: z_s = α_s ẑ_0 + σ_s ε̂. First order in the step size."""
    grid = time_grid(schedule, steps, spacing)
    for t, s in zip(grid, [*grid[1:], None], strict=True):
        x0 = model(z, t)
        if callback:
            callback(t, z, x0)
        if s is None:
            return x0
        alpha_t, sigma_t, _ = _alpha_sigma_lambda(schedule, t)
        alpha_s, sigma_s, _ = _alpha_sigma_lambda(schedule, s)
        z = alpha_s * x0 + sigma_s * (z - alpha_t * x0) / sigma_t
    return z


def dpm_solver_pp_2m(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    steps: int = 20,
    callback: Callback | None = None,
    spacing: str = "logsnr",
) -> Tensor:
    """DPM-Solver++(2M). Second order; the first and the last step are of first order, for stability.

    With λ = log(α/σ), h = λ_s - λ_t and r = h_before/h:

        D   = ẑ_0 + (ẑ_0 - ẑ_0,before) / (2r)
        z_s = (σ_s/σ_t) z_t - α_s (e^(-h) - 1) D

    Args:
        model: (z_t, t) -> ẑ_0.
        z: standard normal noise at the grid's first step.
        schedule: forward process.
        steps: evaluations of the model.
        callback: called with (t, z_t, ẑ_0) after each evaluation.
        spacing: see :func:`time_grid`.
    """
    grid = time_grid(schedule, steps, spacing)
    x0_before, h_before = None, 0.0
    for i, (t, s) in enumerate(zip(grid, [*grid[1:], None], strict=True)):
        x0 = model(z, t)
        if callback:
            callback(t, z, x0)
        if s is None:
            return x0
        _, sigma_t, lambda_t = _alpha_sigma_lambda(schedule, t)
        alpha_s, sigma_s, lambda_s = _alpha_sigma_lambda(schedule, s)
        h = lambda_s - lambda_t
        d = x0
        if x0_before is not None and i < len(grid) - 2:
            d = x0 + (x0 - x0_before) * (h / h_before) / 2
        z = (sigma_s / sigma_t) * z - alpha_s * math.expm1(-h) * d
        x0_before, h_before = x0, h
    return z


def dpm_solver_pp_3m(
    model: Model,
    z: Tensor,
    schedule: Schedule,
    steps: int = 20,
    callback: Callback | None = None,
    spacing: str = "logsnr",
) -> Tensor:
    """DPM-Solver++(3M). Third order; the first and last step are of first order, the second and last but one of second.

    ẑ_0 as a function of λ is continued by its Newton polynomial through the last three evaluations. With h, h_1, h_2
    the present step in λ and the two before it, r_1 = h_1/h, r_2 = h_2/h, and divided differences

        a = (ẑ_0 - ẑ_0,1) / r_1,   b = (ẑ_0,1 - ẑ_0,2) / r_2
        D1 = a + r_1/(r_1 + r_2) (a - b),   D2 = (a - b)/(r_1 + r_2)
        z_s = (σ_s/σ_t) z_t - α_s [(e^(-h) - 1) ẑ_0 - ((e^(-h) - 1)/h + 1) D1 + ((e^(-h) - 1 + h)/h² - 1/2) D2]

    Arguments as in :func:`dpm_solver_pp_2m`.
    """
    grid = time_grid(schedule, steps, spacing)
    before: list[Tensor] = []  # ẑ_0 of the last evaluations, newest first
    widths: list[float] = []  # and the steps in λ between them
    for i, (t, s) in enumerate(zip(grid, [*grid[1:], None], strict=True)):
        x0 = model(z, t)
        if callback:
            callback(t, z, x0)
        if s is None:
            return x0
        _, sigma_t, lambda_t = _alpha_sigma_lambda(schedule, t)
        alpha_s, sigma_s, lambda_s = _alpha_sigma_lambda(schedule, s)
        h = lambda_s - lambda_t
        shrink = math.expm1(-h)
        order = min(3, len(before) + 1, len(grid) - 1 - i)
        step = shrink * x0
        if order > 1:
            r1 = widths[0] / h
            first = (x0 - before[0]) / r1
        if order == 2:
            step = step + shrink * first / 2
        elif order == 3:
            r2 = widths[1] / h
            older = (before[0] - before[1]) / r2
            d1, d2 = first + r1 / (r1 + r2) * (first - older), (first - older) / (r1 + r2)
            step = step - (shrink / h + 1) * d1 + ((shrink + h) / h**2 - 0.5) * d2
        z = (sigma_s / sigma_t) * z - alpha_s * step
        before, widths = [x0, *before[:1]], [h, *widths[:1]]
    return z


def draw(
    denoiser: Denoiser,
    schedule: Schedule,
    condition: Float[Tensor, "b k z y x"] | None,
    shape: tuple[int, ...],
    solver: str = "dpm++2m",
    steps: int = 20,
    guidance: float = 1.0,
    generator: Noise = None,
    device: torch.device | str = "cpu",
    callback: Callback | None = None,
) -> Tensor:
    """Draw latents of the given shape with one of the solvers, from noise made by ``generator``.

    Raises:
        InputError: unknown solver.
    """
    z = gaussian(shape, generator).to(device)
    model = guided(denoiser, schedule, condition, guidance)
    if solver == "dpm++2m":
        return dpm_solver_pp_2m(model, z, schedule, steps, callback)
    if solver == "dpm++3m":
        return dpm_solver_pp_3m(model, z, schedule, steps, callback)
    if solver == "ddim":
        return ddim(model, z, schedule, steps, callback)
    if solver == "ddpm":
        return ddpm(model, z, schedule, steps, generator, callback)
    raise InputError(f"sampling.solver: found {solver!r}, expected 'dpm++2m', 'dpm++3m', 'ddim' or 'ddpm'.")
