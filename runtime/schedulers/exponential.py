"""Exponential integrators in lambda = log(alpha / sigma): DPM-Solver, DEIS, UniPC and SA-Solver as sums of symbols.

All of them integrate the linear part of the flow exactly and put a polynomial through the estimates D, which are of
the clean sample ("clean" below) or of the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anamorph.schedulers.grids import Grid
from anamorph.schedulers.solvers import Symbol, Terms

QUADRATURE = np.polynomial.legendre.leggauss(32)


@dataclass(frozen=True, eq=False)
class Points:
    """The levels of a run, one more than calls: call n stands at point n and leads to point n + 1."""

    alpha: list[float]
    sigma: list[float]
    lam: list[float]


def points_of(grid: Grid) -> Points:
    """The points of a grid whose calls follow each other; lambda is infinite where no noise is left."""
    alpha, sigma = np.append(grid.alpha, grid.alpha_next[-1]), np.append(grid.sigma, grid.sigma_next[-1])
    with np.errstate(divide="ignore"):
        return Points(alpha.tolist(), sigma.tolist(), (np.log(alpha) - np.log(sigma)).tolist())


# ---- DPM-Solver ------------------------------------------------------------------------------------------------------


def integrals(algorithm: str, points: Points, start: int, end: int) -> tuple[float, float, float, float, float]:
    """a, phi_0, phi_1, phi_2, c of x' = a x + phi_0 D + phi_1 D' + phi_2 D'' + c noise over a step h in lambda.

    D', D'' are derivatives with respect to lambda, times h and h^2. With k = 1 (ordinary) or 2 (stochastic):

        dpmsolver++   a = sigma'/sigma e^-(k-1)h   phi_0 = alpha' (1 - e^-kh)            (arXiv:2211.01095, eq. 9)
        dpmsolver     a = alpha'/alpha             phi_0 = -k sigma' (e^h - 1)           (arXiv:2206.00927, eq. 3.4)
    """
    k = 2.0 if algorithm.startswith("sde-") else 1.0
    alpha, sigma = points.alpha[end], points.sigma[end]
    h = points.lam[end] - points.lam[start]
    if algorithm.endswith("++"):
        fade, kh = -math.expm1(-k * h), k * h
        a = sigma / points.sigma[start] * (math.exp(-h) if k == 2 else 1.0)
        c = sigma * math.sqrt(max(fade, 0.0))
        phi_0 = alpha * fade
        # An infinite or empty last step is of order 1.
        phi_1 = alpha * (1 - fade / kh) if h else 0.0
        phi_2 = alpha * ((fade - kh) / kh**2 + (0.5 if k == 1 else -0.5)) if h else 0.0
    else:
        growth = math.expm1(h)
        a = alpha / points.alpha[start]
        c = sigma * math.sqrt(max(math.expm1(2 * h), 0.0))
        phi_0 = -k * sigma * growth
        phi_1 = -k * sigma * (growth / h - 1) if h else 0.0
        phi_2 = -sigma * ((growth - h) / h**2 - 0.5) if h else 0.0
    return a, phi_0, phi_1, phi_2, c if k == 2 else 0.0


def dpm_step(
    algorithm: str, points: Points, start: int, end: int, others: Sequence[int], *, halved: bool, bend: float
) -> Terms:
    """A step of DPM-Solver from point `start` to `end`, of order 1 + len(others).

    `others` are further calls whose estimates shape the polynomial. `halved` takes phi_1 = phi_0 / 2 ("midpoint");
    `bend` multiplies the second divided difference, which is half of D'' (0 leaves it out).
    """
    a, phi_0, phi_1, phi_2, c = integrals(algorithm, points, start, end)
    terms = {("X", start): a, ("D", start): phi_0, ("Z", end - 1): c}
    h = points.lam[end] - points.lam[start]
    r = [(points.lam[k] - points.lam[start]) / h for k in others]
    if len(others) == 1 or (len(others) == 2 and not bend):
        slope = {others[-1]: (phi_0 / 2 if halved else phi_1) / r[-1]}  # weights of D_k - D_start
    elif others:
        # f = (D_k - D_start) / r_k; the second divided difference is (f_2 - f_1) / (r_2 - r_1).
        curve = bend * phi_2 / (r[1] - r[0])
        turn = phi_1 * r[0] / (r[1] - r[0])
        slope = {others[0]: (phi_1 + turn - curve) / r[0], others[1]: (curve - turn) / r[1]}
    else:
        slope = {}
    for k, weight in slope.items():
        terms["D", k] = weight
        terms["D", start] -= weight
    return terms


# ---- polynomials through the estimates -------------------------------------------------------------------------------


def lagrange(nodes: Sequence[float], start: float, end: float, rate: float = 0.0) -> list[float]:
    """The integrals from start to end of e^(rate (u - end)) L_i(u) du, for the Lagrange polynomials L_i on the nodes.

    Gauss-Legendre quadrature with 32 points: exact for rate = 0, to the last digits for any step of a sampler.
    """
    x, weights = QUADRATURE
    h, place = end - start, (x + 1) / 2  # 0..1 from start to end
    if h == 0:
        return [0.0] * len(nodes)
    weighted = h / 2 * weights * np.exp(rate * h * (place - 1))
    moments = weighted @ np.vander(place, len(nodes), increasing=True)
    scaled = (np.array(nodes) - start) / h
    found: list[float] = np.linalg.solve(np.vander(scaled, increasing=True).T, moments).tolist()
    return found


def deis_step(points: Points, n: int, order: int) -> Terms:
    """x' = (alpha'/alpha) x + sigma' sum_i w_i D_n-i, polynomials in log(sigma/alpha) (arXiv:2204.13902, eq. 15)."""
    nodes = [-points.lam[n - i] for i in range(order)]
    w = lagrange(nodes, nodes[0], -points.lam[n + 1], 1.0)
    sigma = points.sigma[n + 1]
    return {("X", n): points.alpha[n + 1] / points.alpha[n]} | {("D", n - i): sigma * w[i] for i in range(order)}


def sa_step(points: Points, start: int, calls: Sequence[int], tau: float, clean: bool) -> Terms:
    """A step of SA-Solver from `start` to start + 1 through the estimates of `calls` (arXiv:2309.05019, eq. 14, 17).

    With k = 1 + tau^2, for the clean sample and for the noise:

        x' = e^(-tau^2 h) sigma'/sigma x + k alpha' sum_i w_i D_i + sigma' sqrt(1 - e^(-2 tau^2 h)) noise
        x' = alpha'/alpha x - k sigma' sum_i w_i D_i + tau sigma' sqrt(e^2h - 1) noise

    With two estimates of the clean sample, w is changed so that tau = 0 gives UniPC's and DPM-Solver++'s midpoint.
    """
    end, k = start + 1, 1 + tau**2
    h = points.lam[end] - points.lam[start]
    nodes = [points.lam[i] for i in calls]
    w = lagrange(nodes, points.lam[start], points.lam[end], k if clean else -1.0)
    if clean and len(calls) == 2:
        shift = (h**2 / 2 - (h * k + math.expm1(-k * h)) / k**2) / (nodes[0] - nodes[1])
        w = [w[0] + shift, w[1] - shift]
    if clean:
        a, scale = math.exp(-(tau**2) * h) * points.sigma[end] / points.sigma[start], k * points.alpha[end]
        c = points.sigma[end] * math.sqrt(-math.expm1(-2 * tau**2 * h))
    else:
        a, scale = points.alpha[end] / points.alpha[start], -k * points.sigma[end]
        c = tau * points.sigma[end] * math.sqrt(math.expm1(2 * h))
    terms: Terms = {("X", start): a, ("Z", start): c}
    return terms | {("D", i): scale * weight for i, weight in zip(calls, w, strict=True)}


def unipc_step(points: Points, start: int, others: Sequence[int], clean: bool, kind: str) -> Terms:
    """A step of UniP, or of UniC where start + 1 is among `others` (Zhao et al. 2023, arXiv:2302.04867, eq. 3, 9).

        x' = a x - S (e^g - 1) D - S B sum_k rho_k (D_k - D) / r_k,   r_k = (lambda_k - lambda) / h

    with g = -h, a = sigma'/sigma, S = alpha' for the clean sample, g = h, a = alpha'/alpha, S = sigma' for the noise;
    B = g ("bh1") or e^g - 1 ("bh2"). rho solves sum_k r_k^i rho_k = i! phi_i+1(g) g / B; a single rho is 1/2.
    """
    end = start + 1
    h = points.lam[end] - points.lam[start]
    g = -h if clean else h
    grown = math.expm1(g)
    ratio, scale = (points.sigma, points.alpha) if clean else (points.alpha, points.sigma)
    s = scale[end]
    terms = {("X", start): ratio[end] / ratio[start], ("D", start): -s * grown}
    if not others:
        return terms
    r = np.array([(points.lam[k] - points.lam[start]) / h for k in others])
    b = g if kind == "bh1" else grown
    moments, phi, factorial = [], grown / g - 1, 1.0
    for i in range(len(others)):
        moments.append(phi * factorial / b)
        factorial *= i + 2
        phi = phi / g - 1 / factorial
    rho = np.linalg.solve(np.vander(r, increasing=True).T, moments) if len(others) > 1 else np.array([0.5])
    for k, weight in zip(others, (-s * b * rho / r).tolist(), strict=True):
        terms["D", k] = weight
        terms["D", start] -= weight
    return terms


def through_clean(steps: Sequence[Terms], grid: Grid) -> list[Terms]:
    """Steps in estimates of the noise, rewritten for estimates of the clean sample: D -> (x - alpha D) / sigma.

    Clipping needs it: it acts on the clean sample, and the noise follows from what it left.
    """
    rewritten = []
    for terms in steps:
        found: Terms = {}
        for (kind, n), weight in terms.items():
            parts: list[tuple[Symbol, float]] = [((kind, n), weight)]
            if kind == "D":
                share = weight / float(grid.sigma[n])
                parts = [(("X", n), share), (("D", n), -share * float(grid.alpha[n]))]
            for symbol, part in parts:
                found[symbol] = found.get(symbol, 0.0) + part
        rewritten.append(found)
    return rewritten
