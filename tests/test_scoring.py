"The vectorised scores against plain loops over the formulas"
import math

import numpy as np, torch
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from drdna.core import Layer
from drdna.profiling import Profile
from drdna.scoring import CLIP, fit_tables, margin, score

L, K = 2, 4
SIZES = (4, 3) # the second layer is smaller than k, so one of its columns is padding

def make_profile(values):
    layers = [Layer(f'l{i}', f'l{i}', 'Linear', (s,), 'float32') for i, s in enumerate(SIZES)]
    values = torch.from_numpy(values.copy())
    values[:, 1, 3] = values[:, 1, 2] # padding repeats the last site
    return Profile(layers, [torch.arange(s) for s in SIZES], values, None, None, '', '')

def bin_of(v, lo, hi, B):
    if lo == hi: return 0
    return min(int(math.floor(np.float32(np.float32(np.float32(v - lo) / np.float32(hi - lo)) * np.float32(B)))), B - 1)

def loop_tau1(a, prof, l, B):
    total = 0
    for s in range(SIZES[l]):
        seen = prof[:, l, s]
        lo, hi = seen.min(), seen.max()
        if not math.isfinite(a[l, s]) or not lo <= a[l, s] <= hi: total += 1; continue
        here = bin_of(a[l, s], lo, hi, B)
        total += 1 - sum(bin_of(v, lo, hi, B) == here for v in seen) / len(seen)
    return total

def loop_tau2(a, prof, l, B):
    seen = prof[:, l, :SIZES[l]].ravel()
    lo, hi = seen.min(), seen.max()
    share = [sum(bin_of(v, lo, hi, B) == b for v in seen) / len(seen) for b in range(B)]
    def G(u):
        if lo == hi: return float(u >= 0)
        u = min(max(u, 0), 1)
        return sum(share[b] * min(max(u * B - b, 0), 1) for b in range(B))
    us = []
    for v in a[l, :SIZES[l]]:
        if not math.isfinite(v): u = 1 + CLIP
        elif lo == hi: u = 0 if v == lo else 1 + CLIP
        else: u = min(max(float(np.float32(np.float32(v - lo) / np.float32(hi - lo))), -CLIP), 1 + CLIP)
        us.append(u)
    points, area = sorted({*us, *(b / B for b in range(B + 1))}), 0
    for p, q in zip(points, points[1:]):
        F = sum(u <= p for u in us) / len(us)
        d0, d1 = F - G(p), F - (G(q) if lo < hi else G(p)) # a constant layer's G is a step, constant on the segment
        area += (q - p) * (abs(d0 + d1) / 2 if d0 * d1 >= 0 else (d0**2 + d1**2) / (2 * (abs(d0) + abs(d1))))
    return area

def loop_tau3(a, prof, l):
    n = SIZES[l]
    most = lambda pick: max(range(n), key=lambda s: (sum(pick(row[l, :n]) == s for row in prof), -s))
    top, bottom = most(lambda r: int(np.argmax(r))), most(lambda r: int(np.argmin(r)))
    row = a[l, :n]
    if not np.isfinite(row).all(): return 1
    return 1 - (int(row[top] == row.max()) + int(row[bottom] == row.min())) / 2

# Few distinct values give ties, constant sites and values on bin edges; the rest is anything
exact = lambda *vs: st.sampled_from([float(np.float32(v)) for v in vs]) # what float32 can hold
common = exact(0, 0, 0, 1, -1, .5, .25, .75, .1, .2, .3, 2)
usual = st.one_of(common, st.floats(-100, 100, width=32))
odd = st.one_of(usual, exact(math.nan, math.inf, -math.inf, 1e30, -1e30, 101, 3.4e38))

@settings(max_examples=300, deadline=None)
@given(prof=st.integers(1, 8).flatmap(lambda n: arrays(np.float32, (n, L, K), elements=usual)), a=arrays(np.float32, (L, K), elements=odd), B=st.integers(1, 10))
@example(prof=np.zeros((3, L, K), np.float32), a=np.full((L, K), np.nan, np.float32), B=10)
@example(prof=np.zeros((3, L, K), np.float32), a=np.zeros((L, K), np.float32), B=10)
@example(prof=np.linspace(0, 1, 11, dtype=np.float32).repeat(L * K).reshape(11, L, K), a=np.float32([[0, .1, .3, 1], [-.1, .5, np.inf, 0]]), B=10)
def test_scores_equal_loops(prof, a, B):
    with np.errstate(all='ignore'):
        p = make_profile(prof)
        prof = p.values.numpy()
        a[1, 3] = a[1, 2]
        tests = fit_tables(p, B).tests(torch.from_numpy(a)[None])[0].numpy()
        want = [[loop_tau1(a, prof, l, B), loop_tau2(a, prof, l, B), loop_tau3(a, prof, l)] for l in range(L)]
    np.testing.assert_allclose(tests, want, rtol=1e-4, atol=2e-4)
    assert np.isfinite(tests).all()

@given(arrays(np.float64, (3, 5, 3), elements=st.floats(0, 32)), st.tuples(*[st.floats(0, 3)] * 3))
def test_score_and_margin(tau, lam):
    S, T = score(torch.from_numpy(tau), lam).numpy(), tau.mean(0)[:, 0]
    for n in range(3):
        total = 0
        for l in range(5):
            total += sum(w * t for w, t in zip(lam, tau[n, l]))
            assert math.isclose(S[n, l], total, rel_tol=1e-9, abs_tol=1e-9)
    m = margin(torch.from_numpy(S), torch.from_numpy(T))
    np.testing.assert_allclose(m, (S - T) / np.where(T == 0, 1, T))
