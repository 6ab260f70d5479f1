"""What each mitigation gives back, and what it costs: every rung alone, and the ladder

The shipped ResNet-18, `Extremes` over all layers at 0.1 % FPR (fitted on `profile`, calibrated on `calibrate`), faults on
the 2,000 `evaluate` images. Repairs that are always on (clamp, zero, mean, re-run layer) run in the engine's sweep, which
gives the bits of the whole network. Whatever answers an alarm (again, restore, ladder) is really executed, with one
forward after the other: a transient fault strikes the first inference alone, a permanent one every inference and every
layer's second run, a weight fault stays until it is restored. Two rows follow from others and are not executed:
re-running a layer under a permanent neuron fault (the fault strikes again, so nothing changes), and `zero first`, where
clipping to zero is always on and the ladder is climbed only if the detector objects to what that leaves.

    OMP_NUM_THREADS=1 python benchmarks/mitigation.py

writes results/mitigation.csv (rates) and results/mitigation_cost.csv (clean accuracy and processor time).
"""
import argparse, math, time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, torch

from drdna import analysis as an
from drdna.baselines import Extremes, fit_detectors
from drdna.data_model import loader, sample, trained_resnet18
from drdna.detection import collect_clean, threshold
from drdna.engine import run
from drdna.injection import NeuronFaults, draw_neurons, draw_weights, flip, outcomes, uniform, weight_faults
from drdna.mitigation import Golden, Ladder, Repaired, Rerun, Restrict, channel_means, clamp, judged, restored, to_mean, zero
from drdna.profiling import profile

FOLDER, FPR, BATCH = Path(__file__).parent / 'results', .001, 100
NEURONS = flip(bit=30), uniform(lo=-1000, hi=1000), uniform(lo=-100, hi=100)
WEIGHTS = flip(bit=30), uniform(lo=-1000, hi=1000)

# ---------------------------------------------------------------- what is compared

def prepared() -> SimpleNamespace:
    "Network, detector, threshold, repairs and ladder"
    model, sets = trained_resnet18(), {s: loader(sample(s)) for s in ('profile', 'calibrate', 'evaluate')}
    p = profile(model, sets['profile'])
    det = fit_detectors(model, sets['profile'], {'x': Extremes(p.layers)})['x']
    t = threshold(det.statistic(collect_clean(model, sets['calibrate'], {'x': det})['x']).amax(1), FPR)
    repairs = {'clamp': partial(Restrict, model, p, clamp), 'zero': partial(Restrict, model, p, zero),
               'mean': partial(Restrict, model, p, to_mean(channel_means(model, sets['profile'], p.layers))), 're-run layer': partial(Rerun, model, p.layers, p.ranges)}
    b = SimpleNamespace(model=model, data=sets['evaluate'], labels=sample('evaluate').labels, p=p, det=det, t=t, repairs=repairs, golden=Golden(model))
    b.guard, b.zeroed = judged(model, det, t), judged(model, Repaired(det, p, zero), t, repairs['zero'])
    return b

def neuron_faults(layers, n):
    "n of each error model, the j-th on image j (mod 2,000): a batch carries one fault per sample and error model"
    return [draw_neurons(layers, n, m, seed=120 + i).assign(image=np.arange(n) % 2000) for i, m in enumerate(NEURONS)]

def stored_faults(model, n):
    "n of each error model, each on all samples of one batch"
    return [draw_weights(model, n, m, seed=130 + i).assign(image=BATCH * (np.arange(n) % 20)) for i, m in enumerate(WEIGHTS)]

# ---------------------------------------------------------------- executed, one forward after the other

def climb(b, x, first=nullcontext, always=nullcontext) -> dict:
    "`(y, alarm)` of every rung alone and of the ladder, for a batch; `first` holds during the first inference, `always` during all"
    seen = {}
    def noted(name, f):
        def go(x):
            with always(): seen[name] = out = f(x)
            return out
        return go
    def start(x):
        with first(), always(): seen['none'] = out = b.guard(x)
        return out
    ladder = Ladder(start, {'again': noted('again', b.guard), 'restore': noted('restore', restored(b.golden, b.guard)), 'zero': noted('zero', b.zeroed)})
    y, v, rung = ladder(x)
    y0, v0 = seen['none']
    res = {'none': (y0, v0.alarm), 'ladder': (y, v.alarm), 'rung': rung}
    for name in ('again', 'restore'):
        tried = seen.get(name)  # a rung that was not reached, or that passed, leaves everything as it was
        res[name] = res['none'] if tried is None else (torch.where(v0.alarm[:, None], tried[0], y0), torch.where(v0.alarm, tried[1].alarm, False))
    return res

@torch.inference_mode()
def executed(b, lists, kind) -> dict:
    "`climb` for whole fault lists: name to `(answers, alarms)`, rows in the order of the sweep's table"
    batches, parts = [x for x, _ in b.data], []
    for faults in lists:
        for i in range(0, len(faults), BATCH if kind != 'weight' else 1):
            part = faults.iloc[i:i + (BATCH if kind != 'weight' else 1)]
            x = batches[part.image.iloc[0] // BATCH]
            if kind == 'weight':
                with weight_faults(b.model, part): parts.append(climb(b, x))
            else:
                strike = partial(NeuronFaults, b.model, b.p.layers, part, part.image.to_numpy() % BATCH)
                parts.append(climb(b, x, **{'first' if kind == 'transient neuron' else 'always': strike}))
    return {n: tuple(map(torch.cat, zip(*(p[n] for p in parts)))) for n in ('none', 'again', 'restore', 'ladder')} | {'rung': torch.cat([p['rung'] for p in parts])}

# ---------------------------------------------------------------- tables

def rate(hit, table, name): return {f'{name}_{c}': v for c, v in an.observed_rate(hit, table).items() if c != 'rate'}

def row(kind, model, rung, how, base, detected, golden, y, alarm) -> dict:
    "One line of mitigation.csv: `base` is the unprotected run, the rest its rows"
    right, sdc = (y.argmax(1) == golden.argmax(1)).numpy() & y.isfinite().all(1).numpy(), detected & (base.outcome == 'SDC').to_numpy()
    cleared = sdc & ~alarm if alarm is not None else np.zeros(len(sdc), bool)
    return dict(faults=kind, model=model, rung=rung, how=how, trials=len(base), sdc=int((base.outcome == 'SDC').sum()), **rate(right[sdc], base[sdc], 'recovered'),
                **rate(outcomes(y, golden) == 'SDC', base, 'residual'), due_left=int((outcomes(y, golden) == 'DUE').sum()),
                cleared_k=int(cleared.sum()) if alarm is not None else math.nan, cleared_right_k=int((cleared & right).sum()) if alarm is not None else math.nan)

def swept(b, lists) -> tuple: # `(Run, alarms, Run under zero, its alarms)`
    "What is always on, on fault lists: observed without a repair and under `zero`, and then under all repairs"
    faults = pd.concat(lists, ignore_index=True)
    watched = lambda det: run(b.model, b.data, faults, b.p.layers, {'x': det})
    over = lambda seen: (~(b.det.statistic(seen.faulty['x']) <= b.t)).any(1)
    r = watched(b.det)
    with b.repairs['zero'](): z = watched(Repaired(b.det, b.p, zero))
    more = run(b.model, b.data, faults, b.p.layers, repairs={n: f for n, f in b.repairs.items() if n != 'zero'}).repaired
    return replace(r, repaired=more), over(r), z, over(z)

def compared(b, lists, kind, sweep) -> pd.DataFrame:
    "All rungs on the fault lists of one kind, by error model and together"
    r, detected, z, uneasy = sweep
    ex, golden = executed(b, lists, kind), r.outputs[torch.tensor(r.table.image.to_numpy())]
    assert torch.equal(r.answers.argmax(1), ex['none'][0].argmax(1)) and torch.equal(r.answers.isfinite(), ex['none'][0].isfinite())
    assert torch.equal(detected, ex['none'][1])
    found = {n: ('sweep', seen.answers, None) for n, seen in {'none': r, **r.repaired}.items()}
    if kind == 'permanent neuron': found['re-run layer'] = 'derived', r.answers, None
    found['zero'] = 'sweep', z.answers, uneasy.numpy()
    found |= {n: ('executed', ex[n][0], ex[n][1].numpy()) for n in ('again', 'restore', 'ladder')}
    found['zero first'] = 'derived', torch.where(uneasy[:, None], ex['ladder'][0], z.answers), (uneasy & ex['ladder'][1]).numpy()
    print(kind, 'rungs of the detected SDCs', pd.Series(ex['rung'].numpy()[(detected.numpy()) & (r.table.outcome == 'SDC')]).value_counts().to_dict(), flush=True)
    rows = []
    for model in ('all', *r.table.model.unique()):
        at = np.arange(len(r.table)) if model == 'all' else np.flatnonzero(r.table.model == model)
        base = r.table.iloc[at].reset_index(drop=True)
        rows += [row(kind, model, n, how, base, detected.numpy()[at], golden[at], y[at], None if alarm is None else alarm[at]) for n, (how, y, alarm) in found.items()]
    return pd.DataFrame(rows)

# ---------------------------------------------------------------- what it costs

@torch.inference_mode()
def clean_answers(b) -> dict:
    "Name to `(answers to the evaluate images, alarms)`"
    res = {'none': [], **{n: [] for n in b.repairs}, 'again': [], 'restore': [], 'ladder': []}
    for x, _ in b.data:
        for n, repair in b.repairs.items():
            with repair(): res[n].append((b.model(x), torch.zeros(len(x), dtype=torch.bool)))
        c = climb(b, x)
        for n in ('none', 'again', 'restore', 'ladder'): res[n].append(c[n])
    return {n: tuple(map(torch.cat, zip(*z))) for n, z in res.items()}

@torch.inference_mode()
def seconds(b, rounds) -> dict:
    "Median processor seconds for a batch, all taken in turn, in another order each round, for what runs after a long one finds its memory cold: (name, fault) to seconds"
    x = next(iter(b.data))[0]
    for x in (x for x, _ in b.data):  # a batch on which the detector is silent
        if not b.guard(x)[1].alarm.any(): break
    strike = partial(NeuronFaults, b.model, b.p.layers, draw_neurons(b.p.layers[:1], 1, flip(bit=30)))
    def repaired(repair):
        with repair(): b.model(x)
    def laddered(faults=None, **how):
        with weight_faults(b.model, faults) if faults is not None else nullcontext(): climb_once(b, x, **how)
    weight = draw_weights(b.model, 1, uniform(lo=500, hi=1000), names=['conv1.weight'])
    jobs = {('bare', 'clean'): lambda: b.model(x), ('guard', 'clean'): lambda: b.guard(x), **{(n, 'clean'): partial(repaired, f) for n, f in b.repairs.items()}, ('ladder', 'clean'): laddered,
            ('ladder', 'transient neuron'): partial(laddered, first=strike), ('ladder', 'weight'): partial(laddered, weight), ('ladder', 'permanent neuron'): partial(laddered, always=strike),
            ('again', 'transient neuron'): partial(laddered, first=strike, only='again'), ('restore', 'weight'): partial(laddered, weight, only='restore'), ('check', 'clean'): b.golden.check}
    jobs |= {(n, 'transient neuron'): partial(faulty, b, x, strike, f) for n, f in {'none': nullcontext, **b.repairs}.items()}
    took, turns = {n: [] for n in jobs}, np.random.default_rng(0)
    for _ in range(rounds):
        for n in map([*jobs].__getitem__, turns.permutation(len(jobs))):
            start = time.process_time(); jobs[n](); took[n].append(time.process_time() - start)
    return {n: float(np.median(t)) for n, t in took.items()}

def faulty(b, x, strike, repair):
    with strike(), repair(): b.model(x)

def climb_once(b, x, first=nullcontext, always=nullcontext, only=None):
    "The ladder as a user has it, or one rung of it"
    rungs = {'again': b.guard, 'restore': restored(b.golden, b.guard), 'zero': b.zeroed}
    def start(x):
        with first(): return b.guard(x)
    with always(): return Ladder(start, {n: f for n, f in rungs.items() if only in (None, n)})(x)

def costs(b, rounds) -> pd.DataFrame:
    "Clean accuracy, clean alarms, and processor time in bare inferences"
    took, clean, rows = seconds(b, rounds), clean_answers(b), []
    bare, right = took['bare', 'clean'], clean['none'][0].argmax(1)
    for n, (y, _) in clean.items():
        alarms, rel = int(clean['none'][1].sum()), lambda *key: took[key] / bare if key in took else math.nan
        rows.append(dict(rung=n, clean_right=int((y.argmax(1) == b.labels).sum()), images=len(y), changed=int((y.argmax(1) != right).sum()), clean_alarms=alarms,
                         clean=rel({'none': 'bare', 'again': 'guard', 'restore': 'guard'}.get(n, n), 'clean'), **{k.replace(' ', '_'): rel(n, k) for k in ('transient neuron', 'weight', 'permanent neuron')}))
    return pd.DataFrame(rows).assign(guard=took['guard', 'clean'] / bare, check=took['check', 'clean'] / bare)

def healed(b, n) -> tuple: # k, n
    "How many weight faults of every kind `restore` heals bit for bit, as `Golden` and the hash of all weights see it"
    from drdna.core import weights_hash
    from drdna.injection import column, draw_runs, flips, noise, random_bits, row as whole_row, stuck_at
    before, k = weights_hash(b.model), 0
    lists = [draw_weights(b.model, n, m, seed=i) for i, m in enumerate((flip(), flip(bit=30), flips(k=2), random_bits(), stuck_at(value=math.nan), noise(sd=.1), uniform(lo=-1000, hi=1000)))]
    lists += [draw_weights(b.model, n, flip(), pattern=s()) for s in (whole_row, column)] + [draw_runs(b.model, n), draw_weights(b.model, n, flip(), target='bias'), draw_weights(b.model, n, flip(), target='buffer')]
    tried = 0
    for faults in lists:
        for _, f in faults.groupby((faults.part == 0).cumsum()):
            with weight_faults(b.model, f):
                b.golden.restore()
                k, tried = k + (weights_hash(b.model) == before), tried + 1
    return k, tried

def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--neurons', type=int, default=1400, help='neuron faults per error model, a multiple of 100')
    a.add_argument('--weights', type=int, default=100, help='weight faults per error model')
    a.add_argument('--rounds', type=int, default=25, help='rounds of timing')
    a.add_argument('--stages', nargs='+', default=['costs', 'rates'], choices=['costs', 'rates'])
    a.add_argument('--out', type=Path, default=FOLDER)
    a = a.parse_args()
    b = prepared()
    if 'costs' in a.stages: costs(b, a.rounds).to_csv(a.out / 'mitigation_cost.csv', index=False, float_format='%.3f')
    if 'rates' not in a.stages: return
    neurons = neuron_faults(b.p.layers, a.neurons)
    stored, rows = stored_faults(b.model, a.weights), []
    for faults, kinds in ((stored, ['weight']), (neurons, ['transient neuron', 'permanent neuron'])):
        sweep = swept(b, faults)  # the same for transient and permanent faults: one inference each
        rows += [compared(b, faults, k, sweep) for k in kinds]
    pd.concat(rows, ignore_index=True).to_csv(a.out / 'mitigation.csv', index=False, float_format='%.6f')
    print('weight faults healed bit for bit: %d of %d' % healed(b, 5))

if __name__ == '__main__': main()
