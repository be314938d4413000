"""When things happen in the picture: impacts, pendulum passages, lights, turns, mouths and rolling, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from soundstage.world.kinds.drums import DIM, FADE
from soundstage.world.kinds.metronome import PIVOT, SWING
from soundstage.world.kinds.talker import MOUTH
from soundstage.world.oracle.video import Body, patch

MARK, MARK_AT = 0.24, 0.68  # radius of a rolling ball's mark and its distance from the centre, in radii


def refine(
    model: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    data: np.ndarray,
    steps: np.ndarray,
    scale: float,
    num: int = 25,
) -> tuple[np.ndarray, float]:
    """Gauss-Newton with Huber weights: (parameters, robust RMS of the residual).

    steps: finite-difference step of each parameter. scale: residual beyond which an observation counts linearly.
    """
    p, damping = start.astype(float), 1e-3
    residual = data - model(p)
    for _ in range(num):
        jacobian = np.stack([(model(p + e) - model(p - e)) / (2 * e.sum()) for e in np.diag(steps)], 1)
        weight = np.minimum(1, scale / np.maximum(np.abs(residual), 1e-12))[:, None]
        normal = jacobian.T @ (weight * jacobian)
        normal += damping * np.diag(np.diag(normal) + 1e-12)
        move = np.linalg.solve(normal, jacobian.T @ (weight[:, 0] * residual))
        trial = data - model(p + move)
        if _huber(trial, scale) <= _huber(residual, scale):
            p, residual, damping = p + move, trial, max(damping / 5, 1e-9)
            if np.all(np.abs(move) < 0.01 * steps):
                break
        else:
            damping *= 8
    return p, float(np.sqrt(2 * _huber(residual, scale)))


def _huber(residual: np.ndarray, scale: float) -> float:
    size = np.abs(residual)
    return float(np.mean(np.where(size < scale, 0.5 * size**2, scale * (size - 0.5 * scale))))


def _lowest(y: np.ndarray, prominence: float) -> np.ndarray:
    """Indices of local maxima of y (lowest points of the body) that stand out by `prominence` on both sides."""
    found = []
    for i in range(1, len(y) - 1):
        if y[i] >= y[i - 1] and y[i] > y[i + 1]:
            left, right = y[i], y[i]
            for j in range(i - 1, -1, -1):
                if y[j] > y[i]:
                    break
                left = min(left, y[j])
            for j in range(i + 1, len(y)):
                if y[j] > y[i]:
                    break
                right = min(right, y[j])
            if y[i] - max(left, right) >= prominence:
                found.append(i)
    return np.array(found, int)


def flights(t: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Height-down position of a bouncing body: p = contact times (one before and one after the seen ones), g, contact
    level; before its first apex the body is held still."""
    times, gravity, level = p[:-2], p[-2], p[-1]
    n = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    since, left = t - times[n], times[n + 1] - t
    hold = (n == 0) & (since < left)
    half = 0.5 * (times[1] - times[0])
    return level - 0.5 * gravity * np.where(hold, half * half, since * left)


def impacts(t: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Impact times of a body from its heights `y` (fractions, downwards, nan where unseen) at frame times `t`.

    One fit of the whole course: parabolas of one gravity that meet at one contact level (Huber, Gauss-Newton).
    """
    seen = np.isfinite(y)
    t, y = t[seen], y[seen]
    if len(t) < 5:
        return np.zeros(0)
    low = _lowest(y, max(0.022, 0.06 * (y.max() - y.min())))
    if not len(low):
        return np.zeros(0)
    frame = float(np.median(np.diff(t)))
    start = _first_guess(t, y, low, frame)
    p, residual = _fit(t, y, start)
    late = t[-1] - 0.5 * frame
    if residual > 0.0015 and late - p[-4] > 1.5 * frame:
        # An impact between the last two frames leaves no lowest point; it shows as a last frame off the parabola.
        more = np.concatenate([p[:-3], [late, 2 * late - p[-4], *p[-2:]]])
        tried, better = _fit(t, y, more)
        if better < 0.4 * residual and p[-4] < tried[-4] < t[-1]:
            start, p, residual = more, tried, better
    times, rough = p[1:-3], start[1:-3]
    if residual > 0.05 or np.any(np.abs(times - rough) > 1.5 * frame) or np.any(np.diff(p[:-2]) <= 0):
        return rough
    return times


def _fit(t: np.ndarray, y: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
    steps = np.concatenate([np.full(len(start) - 2, 1e-4), [1e-3, 1e-5]])
    return refine(lambda p: flights(t, p), start, y, steps, 0.006)


def _first_guess(t: np.ndarray, y: np.ndarray, low: np.ndarray, frame: float) -> np.ndarray:
    """Contact times by the vertex through three frames; gravity by the highest flight."""
    a, b, c = y[low - 1], y[low], y[low + 1]
    times = t[low] + np.clip(0.5 * (a - c) / np.minimum(a - 2 * b + c, -1e-6), -1, 1) * frame
    level = float(y[low].max() + 0.01)
    before, after = level - y[: low[0] + 1].min(), level - y[low[-1] :].min()
    guesses = []
    for i, j in pairwise(low):
        guesses.append(8 * (level - y[i : j + 1].min()) / (t[j] - t[i]) ** 2)
    if not guesses:
        k = slice(max(0, low[0] - 4), low[0] + 1)
        if len(t[k]) < 3:
            k = slice(low[0], low[0] + 5)
        guesses = [2 * float(np.polyfit(t[k] - t[low[0]], y[k], 2)[0])]
    gravity = max(float(np.median(guesses)), 0.5)
    first = times[0] - 2 * np.sqrt(2 * max(before, 0.01) / gravity)
    rise = t[-1] - times[-1]
    flight = 0.8 * (times[-1] - times[-2]) if len(times) > 1 else 2 * np.sqrt(2 * max(after, 0.01) / gravity)
    return np.concatenate([[first], times, [times[-1] + max(flight, rise + 0.2 * frame)], [gravity, level]])


def passages(t: np.ndarray, body: Body, duration: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(times, directions, bpm) at which a pendulum passes upright; direction +1 is to the right.

    angle = a sin(w t) + b cos(w t), the frequency by a grid and then Gauss-Newton. Where the swing is not a sine
    (residual above 0.12 rad) the passages are read between frames.
    """
    seen = np.isfinite(body.x)
    angle = np.arctan2(body.x - PIVOT[0], PIVOT[1] - body.y)[seen]
    t = t[seen]
    if len(t) < 5 or np.ptp(angle) < 0.15:
        return np.zeros(0), np.zeros(0), float("nan")

    def wave(p: np.ndarray) -> np.ndarray:
        return p[1] * np.sin(p[0] * t) + p[2] * np.cos(p[0] * t)

    best = None
    highest = min(2 * np.pi * 2.3, 0.95 * np.pi / float(np.median(np.diff(t))))
    for omega in np.arange(1.6, highest, 0.35):
        basis = np.stack([np.sin(omega * t), np.cos(omega * t)], 1)
        normal = basis.T @ basis + 0.02 * len(t) * np.eye(2)
        weights = np.linalg.solve(normal, basis.T @ angle)
        error = float(np.mean((angle - basis @ weights) ** 2))
        if best is None or error < best[0]:
            best = (error, omega, *weights)
    p, residual = refine(wave, np.array(best[1:]), angle, np.array([1e-3, 1e-4, 1e-4]), 0.05)
    if residual > 0.12 or not 0.5 * SWING < np.hypot(p[1], p[2]) < 2 * SWING:
        return _crossings(t, angle)
    phase = np.arctan2(p[2], p[1])
    numbers = np.arange(np.ceil(phase / np.pi), np.floor((p[0] * (duration - 0.03) + phase) / np.pi) + 1)
    times = (np.pi * numbers - phase) / p[0]
    return times, np.where(numbers % 2 == 0, 1, -1), float(60 * p[0] / np.pi)


def _crossings(t: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    at = np.flatnonzero(np.sign(angle[1:]) != np.sign(angle[:-1]))
    part = angle[at] / (angle[at] - angle[at + 1])
    times = t[at] + part * (t[at + 1] - t[at])
    bpm = 60 / float(np.median(np.diff(times))) if len(times) > 1 else float("nan")
    return times, np.sign(angle[at + 1]), bpm


def flashes(
    t: np.ndarray, frames: np.ndarray, boxes: tuple[tuple[float, ...], ...], rgb: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(times, box numbers) at which boxes light up, from the fall of their light exp(-t / FADE) after each hit.

    Between frames the time follows from the level: t_hit = t + FADE ln(light), averaged over the frames after.
    """
    unit = rgb / max(float(np.linalg.norm(rgb)), 1e-6)
    level = np.stack([(patch(frames, box).mean((1, 2)) @ unit) for box in boxes])
    dim = float(np.percentile(level, 10))
    full = max(dim / DIM, float(level.max()) if level.max() > 1.4 * dim else 0.0)
    light = (level - dim) / max(full - dim, 20.0)
    found = []
    for box, row in enumerate(light):
        fade = np.exp(-np.diff(t) / FADE)
        rise = row[1:] - row[:-1] * fade
        for i in np.flatnonzero(rise > 0.24) + 1:
            if i >= 2 and rise[i - 2] > 0.24 and row[i] < 1.15 * row[i - 1]:
                continue
            found.append((_lit(t, row, i), box))
    found.sort()
    return np.array([f[0] for f in found]), np.array([f[1] for f in found], int)


def _lit(t: np.ndarray, row: np.ndarray, i: int) -> float:
    last = i
    while last + 1 < len(row) and last - i < 3 and 0.15 < row[last + 1] < row[last]:
        last += 1
    level = np.clip(row[i : last + 1], 0.05, 1.2)
    guess = np.average(t[i : last + 1] + FADE * np.log(level), weights=level**2)
    return float(np.clip(guess, t[i - 1], t[i]))


def turning(frames: np.ndarray, body: Body) -> np.ndarray:
    """(F,) unwrapped angle in radians of the dark spoke of a wheel or mark of a ball; constant where it has none."""
    height, width = frames.shape[1:3]
    x, y = (np.where(np.isfinite(c), c, np.nanmedian(c)) for c in (body.x, body.y))
    dx = ((np.arange(width) + 0.5) / width - x[:, None])[:, None, :]
    dy = ((np.arange(height) + 0.5) / height - y[:, None])[:, :, None]
    dark = (1 - body.inside) * (dx**2 + dy**2 < (0.88 * body.radius) ** 2)
    return np.unwrap(np.arctan2((dark * dy).sum((1, 2)), (dark * dx).sum((1, 2))))


def rolling(frames: np.ndarray, body: Body) -> tuple[np.ndarray, np.ndarray]:
    """(F,) x as a fraction of the frame, and (F,) angle in radians, of a ball with a dark mark near its rim.

    Its centroid is not moved by blur, as its outline is where the mark lies at the rim; the mark draws it away by a
    known part of the radius, in the direction that the turning tells, and the turning is read again about the result.
    """
    height, width = frames.shape[1:3]
    dx = ((np.arange(width) + 0.5) / width - body.x[:, None])[:, None, :]
    dy = ((np.arange(height) + 0.5) / height - body.y[:, None])[:, :, None]
    reach = body.radius + 2.5 / height
    weight = body.inside * np.clip((reach - np.hypot(dx, dy)) * height + 0.5, 0, 1)
    area = np.maximum(weight.sum((1, 2)), 1e-6)
    x, y = body.x + (weight * dx).sum((1, 2)) / area, body.y + (weight * dy).sum((1, 2)) / area
    pull = MARK_AT * MARK**2 / (1 - MARK**2) * body.radius
    angle = turning(frames, body)
    for _ in range(2):
        centred = replace(body, x=x + pull * np.cos(angle), y=y + pull * np.sin(angle))
        angle = turning(frames, centred)
    return x + pull * np.cos(angle), angle


def mouth(frames: np.ndarray, body: Body) -> tuple[np.ndarray, np.ndarray]:
    """(F,) open height and (F,) half width of the mouth, in radii of the face."""
    height, width = frames.shape[1:3]
    radius, x, y = body.radius, float(np.nanmedian(body.x)), float(np.nanmedian(body.y))
    dx = (np.arange(width) + 0.5) / width - x
    dy = (np.arange(height) + 0.5) / height - y
    inner = (dx[None, :] ** 2 + dy[:, None] ** 2 < (0.86 * radius) ** 2) & (dy[:, None] > 0)
    y0, y1 = int(np.argmax(dy > 0)), int(np.searchsorted(dy, 0.84 * radius)) + 1
    x0, x1 = round((x - 0.7 * radius) * width), round((x + 0.7 * radius) * width)
    dark = ((1 - body.inside) * inner)[:, y0:y1, x0:x1]
    middle = dark.shape[2] // 2
    half = max(1, round(0.1 * radius * width))
    tall = dark[:, :, middle - half : middle + half].mean(2).sum(1) / (radius * height)
    wide = dark.max(1).sum(1) / 2 / (radius * width)
    return tall, wide


def syllables(t: np.ndarray, tall: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """(starts in seconds, vowels, (F,) openness with each syllable's peak at 1) of a mouth."""
    rest = float(np.percentile(tall, 10))
    opening = tall - rest
    loud = opening > max(0.06, 0.25 * opening.max())
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud.astype(int), [0]])))
    starts, vowels, openness = [], [], np.clip(opening / max(opening.max(), 1e-6), 0, None) * 0
    bounds = [0, *((edges[1:-1:2] + edges[2::2]) // 2), len(t)]
    for n, (first, last) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        peak = float(np.percentile(opening[first:last], 80))
        part = slice(bounds[n], bounds[n + 1])
        openness[part] = opening[part] / peak
        shape = np.array([np.median(wide[first:last][opening[first:last] >= 0.7 * peak]), peak / 2])
        names = list(MOUTH)
        vowels.append(names[int(np.argmin([np.abs(shape - np.array(MOUTH[v])).sum() for v in names]))])
        starts.append(float(np.interp(0.5, openness[max(first - 1, 0) : first + 1], t[max(first - 1, 0) : first + 1])))
    return np.array(starts), tuple(vowels), openness


def best_lag(
    t: np.ndarray, seen: np.ndarray, fine: np.ndarray, heard: np.ndarray, reach: float = 0.4
) -> tuple[float, float, float]:
    """(lag, correlation, rest): the shift in seconds at which heard(t + lag) explains seen(t) best, and how well.

    Level and scale are free: the residual of seen on [1, heard(t + lag)] is minimised over lags of 2 ms and refined by
    a parabola; rest is its share of the variance. The correlation is that of the curves without their straight trends.
    """
    lags = np.arange(-reach, reach + 0.001, 0.002)
    error = np.full(len(lags), np.inf)
    for k, lag in enumerate(lags):
        use = (t + lag >= fine[0]) & (t + lag <= fine[-1])
        if use.sum() >= max(6, len(t) // 2):
            error[k] = _unexplained(seen[use], np.interp(t[use] + lag, fine, heard))
    k = int(np.argmin(error))
    lag = float(lags[k])
    if 0 < k < len(lags) - 1 and np.isfinite(error[[k - 1, k + 1]]).all():
        low, here, high = error[k - 1 : k + 2]
        lag += 0.001 * float((low - high) / max(low - 2 * here + high, 1e-15))
    use = (t + lag >= fine[0]) & (t + lag <= fine[-1])
    a, b = (c - np.polyval(np.polyfit(t[use], c, 1), t[use]) for c in (seen[use], np.interp(t[use] + lag, fine, heard)))
    power = float(np.sqrt((a @ a) * (b @ b)))
    return lag, abs(float(a @ b)) / power if power > 1e-12 else 0.0, float(error[k])


def joint_lag(
    t: np.ndarray, curves: tuple[np.ndarray, ...], fine: np.ndarray, heard: np.ndarray, reach: float = 0.03
) -> tuple[float, float]:
    """(lag, correlation) as of `best_lag`, from several readings (F,) of one motion with errors of unknown size.

    Around the lag of the best reading, the product of what the readings leave unexplained is minimised (the maximum of
    the Gaussian likelihood). All lags are compared over the same frames, for a frame more or less makes a step.
    """
    lag, correlation, _ = min((best_lag(t, curve, fine, heard) for curve in curves), key=lambda fit: fit[2])
    lags = lag + np.arange(-reach, reach + 0.0005, 0.001)
    use = (t + lags[0] >= fine[0]) & (t + lags[-1] <= fine[-1])
    if use.sum() < 6:
        return lag, correlation
    shifted = [np.interp(t[use] + s, fine, heard) for s in lags]
    error = np.array([sum(np.log(_unexplained(c[use], h) + 1e-9) for c in curves) for h in shifted])
    k = int(np.argmin(error))
    if not 0 < k < len(lags) - 1:
        return float(lags[k]), correlation
    low, here, high = error[k - 1 : k + 2]
    return float(lags[k]) + 0.0005 * float((low - high) / max(low - 2 * here + high, 1e-15)), correlation


def _unexplained(seen: np.ndarray, heard: np.ndarray) -> float:
    """Share of the variance of `seen` that a straight line in `heard` leaves."""
    a, b = seen - seen.mean(), heard - heard.mean()
    power = float(b @ b)
    if power < 1e-12:
        return 1.0
    rest = a - (a @ b) / power * b
    return float(rest @ rest) / max(float(a @ a), 1e-12)
