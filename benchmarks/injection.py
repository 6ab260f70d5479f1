"""How long fault injection takes: drdna beside PyTorchFI, MRFI and plain hooks

Same network, images, fault list, machine and thread for all; the tools take turns within each round. drdna runs the
whole list in every round, the others one piece of it per round (their time per fault does not fall with the length of
the list; of the slowest lists a part of that, see CASES), and batch 1 a tenth. Writes injection.csv (one row per tool and round), bound.csv (one row per
round), where.csv (where drdna's time goes) and injection.svg.
"""
import argparse, time
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, seaborn as sns, torch, torchvision
from torch.utils import _pytree as pytree

import peers
from drdna.core import layers, undisturbed
from drdna.data_model import normalize, sample, trained_resnet18
from drdna.engine import Cut, Sweep, _bits, run
from drdna.injection import draw_neurons, draw_weights, flip

FOLDER = Path(__file__).parent / 'results'

# ---------------------------------------------------------------- what is compared

def network(name, images):
    "`(network, images)`: the shipped one with test images, or a larger one with random weights and input"
    if name == 'resnet18': return trained_resnet18(), normalize(sample('evaluate').images[:images])
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=10).eval().requires_grad_(False)
    for p in net.parameters():
        if p.ndim > 1 and not p.any(): p.normal_(std=.02) # a head of zeros would mask every fault
    return net, torch.randn(images, 3, 224, 224)

def swept(net, x, batch, faults, found):
    "drdna's outputs, faults in the order of the list"
    return run(net, x.split(batch), faults, found, images=len(x), memory=2**32).answers

@contextmanager
def whole_samples():
    "While open, sweeps compute no part of a feature map without the rest of it"
    strike, narrow = Sweep._strike_window, Sweep._narrow
    Sweep._strike_window, Sweep._narrow = lambda *_: None, lambda *_: False
    try: yield
    finally: Sweep._strike_window, Sweep._narrow = strike, narrow

def tools(kind, net, x, batch, found, bounded):
    "`{(tool, batch): outputs of a fault list}`; weights run on all images, in batches"
    shaped = lambda out: out.reshape(-1, out.shape[-1])
    res = {('drdna', batch): lambda f: swept(net, x, batch, f, found)}
    if kind == 'neurons' and bounded: res['drdna, whole samples', batch] = whole_samples()(lambda f: swept(net, x, batch, f, found))
    for tool in ('hooks', 'pytorchfi', 'mrfi'):
        for b in (batch, 1) if kind == 'neurons' else (batch,):
            res[tool, b] = lambda f, go=getattr(peers, f'{tool}_{kind}'), b=b: shaped(go(net, x, f, b))
    return res

def fault_list(kind, net, x, found, n):
    "Single flips at random bits, uniformly over neurons (or weights) and bits"
    if kind == 'weights': return draw_weights(net, n, flip(), names=[k for k, p in net.named_parameters() if p.ndim > 1 and k.endswith('.weight') and isinstance(net.get_submodule(k[:-7]), peers.TYPES)])
    return draw_neurons(found, n, flip()).assign(image=np.arange(n) % len(x))

# ---------------------------------------------------------------- measuring

def share(faults, tool, batch, k, rounds, full, part):
    "The part of the list that a tool runs in round k"
    if tool.startswith('drdna'): return faults
    piece = faults.iloc[k * len(faults) // rounds:(k + 1) * len(faults) // rounds]
    return piece.iloc[:max(int(len(piece) * part) // (1 if batch == full else 10), 1)]

def same(a, b): return (torch.eq(_bits(a.nan_to_num(1.5)), _bits(b.nan_to_num(1.5)))).all(-1)

def measure(name, kind, n, images, batch, part, rounds):
    """Rows for injection.csv, bound.csv and where.csv

    A row per tool and round has the seconds, and how many faulty outputs have the same bits (the same prediction) as drdna's.
    """
    net, x = network(name, images)
    found = [l for l in layers(net, x[:2]) if isinstance(net.get_submodule(l.path), peers.TYPES)]
    faults, rows, bounds = fault_list(kind, net, x, found, n), [], []
    bounded = name == 'resnet18' # the bound, and where the time goes, take long to measure; one network shows them
    go, per = tools(kind, net, x, batch, found, bounded), len(x) if kind == 'weights' else 1
    with torch.no_grad(): net(x[:batch]) # warm up
    differing = differing_rows(net, x, batch, faults, found) if bounded else None
    for k in range(rounds):
        if bounded: bounds.append(dict(network=name, target=kind, round=k, runs=n * per, **bound(step_times(net, x[:batch]), differing, n * per)))
        order = list(go)
        for tool, b in order[k % len(order):] + order[:k % len(order)]:
            mine = share(faults, tool, b, k, rounds, batch, part)
            start = time.perf_counter()
            out = go[tool, b](mine)
            seconds = time.perf_counter() - start
            if tool == 'drdna': golden = out
            rows.append(dict(network=name, target=kind, tool=tool, batch=b, round=k, faults=len(mine), images=per, seconds=seconds, out=out, first=mine.index[0]))
    parts = [dict(network=name, target=kind, part=p, seconds=s) for p, s in where(net, x, batch, faults, found).items()] if bounded else []
    for r in rows: # after the clock has stopped
        out, first = r.pop('out'), r.pop('first')
        mine = golden[first * per:(first + r['faults']) * per]
        r |= dict(runs=len(out), same_bits=int(same(out, mine).sum()), same_prediction=int((out.argmax(-1) == mine.argmax(-1)).sum()))
        print({k: v for k, v in r.items() if k != 'out'}, flush=True)
    return rows, bounds, parts

# ---------------------------------------------------------------- the bound

@contextmanager
def counting():
    "While open, sweeps go step by step and count the rows whose input differs at each: `{step: rows}`"
    chains, through, counts = Cut.chains, Sweep._through, {}
    def single(self, heads): return [[s] for ch in chains(self, heads) for s in ch]
    def count(self, ch, e, v, look):
        if e.start == 0: counts[ch[0].name] = counts.get(ch[0].name, 0) + len(e.rows)
        return through(self, ch, e, v, True if v.golden is not None else look)
    Cut.chains, Sweep._through = single, count
    try:
        with whole_samples(): yield counts
    finally: Cut.chains, Sweep._through = chains, through

def differing_rows(net, x, batch, faults, found):
    "How many rows differ from the fault-free run in the input of each step, over all faults"
    with counting() as counts: swept(net, x, batch, faults, found)
    return counts

def step_times(net, x, repeats=7):
    "Seconds per row of each step of a fault-free forward: the median"
    with undisturbed(net):
        cut, times = Cut(net, x), {}
        for _ in range(repeats):
            env = cut.inputs(x)
            for node, s in cut.steps.items():
                if s.fn is None: continue
                args = {n: pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, env[n]) for n in node.all_input_nodes}
                start = time.perf_counter()
                env[node] = cut.call(s, args.__getitem__)
                times.setdefault(s.name, []).append(time.perf_counter() - start)
    return {s: float(np.median(t)) / len(x) for s, t in times.items()}

def bound(per, differing, runs):
    "Lower bound without partial recomputation: the time of the steps whose input differs from the fault-free one"
    return dict(bound_seconds=sum(per[s] * n for s, n in differing.items()), whole_seconds=runs * sum(per.values()))

# ---------------------------------------------------------------- where the time goes

PARTS = {'trials': [(Cut, '__init__'), (Sweep, '_proven')], 'fault-free run': [(Cut, 'fresh')], 'whole samples': [(Sweep, '_through')], 'windows': [(Sweep, '_through_windows'), (Sweep, '_strike_window')],
         'one channel of a layer': [(Sweep, '_together')], 'comparing': [(Sweep, '_alive'), (Sweep, '_keep')], 'fetching and joining': [(Sweep, '_fetch'), (Sweep, '_join'), (Sweep, '_entering')]}

@contextmanager
def stopwatch():
    "While open: `{part: seconds}`, each without the parts that run inside it"
    times, inside, before = dict.fromkeys(PARTS, 0.), [0.], {}
    def timed(part, f):
        def go(*args, **kw):
            start = time.perf_counter()
            inside.append(0.)
            try: return f(*args, **kw)
            finally:
                took = time.perf_counter() - start
                times[part] += took - inside.pop()
                inside[-1] += took
        return go
    for part, places in PARTS.items():
        for cls, name in places:
            before[cls, name] = getattr(cls, name)
            setattr(cls, name, timed(part, before[cls, name]))
    try: yield times
    finally:
        for (cls, name), f in before.items(): setattr(cls, name, f)

def where(net, x, batch, faults, found):
    "Seconds of each part of one run of drdna"
    start = time.perf_counter()
    with stopwatch() as times: swept(net, x, batch, faults, found)
    return times | {'lists, tables and the rest': time.perf_counter() - start - sum(times.values())}

# ---------------------------------------------------------------- results

def summary(t):
    "Median and range of the milliseconds per fault, and how many times faster drdna is, paired by round"
    t = t.assign(ms=1000 * t.seconds / t.faults)
    ours = t[t.tool == 'drdna'].set_index(['network', 'target', 'round']).ms
    t['drdna is faster'] = t.ms / t.set_index(['network', 'target', 'round']).index.map(ours)
    g = t.groupby(['network', 'target', 'tool', 'batch'], sort=False)
    res = g.agg(faults=('faults', 'sum'), ms=('ms', 'median'), lo=('ms', 'min'), hi=('ms', 'max'), faster=('drdna is faster', 'median'), faster_lo=('drdna is faster', 'min'), faster_hi=('drdna is faster', 'max'))
    res['same bits'] = [f'{a}/{b}' for a, b in zip(g.same_bits.sum(), g.runs.sum())]
    res['same prediction'] = [f'{a}/{b}' for a, b in zip(g.same_prediction.sum(), g.runs.sum())]
    return res.reset_index()

def chart(s):
    "Bars: how many times faster drdna is than each tool"
    s = s[~s.tool.str.startswith('drdna')].assign(peer=lambda d: d.tool + ', batch ' + d.batch.astype(str), case=lambda d: d.network + ', ' + d.target)
    cases = s.case.unique()
    fig, axs = plt.subplots(1, len(cases), figsize=(1.8 + 1.9 * len(cases), 2.6), layout='constrained', squeeze=False, sharey=False)
    for ax, case in zip(axs[0], cases):
        d = s[s.case == case]
        ax.barh(d.peer, d.faster, xerr=[d.faster - d.faster_lo, d.faster_hi - d.faster], color=sns.color_palette('colorblind')[0])
        ax.axvline(1, color='k', lw=.8); ax.set_title(case, size=8); ax.set_xlabel('times faster', size=8); ax.tick_params(labelsize=7); ax.invert_yaxis()
    return fig

# network: for each target faults, images, batch size, and the part of its list that another tool runs over all rounds
CASES = {'resnet18': dict(neurons=(20480, 128, 32, 1), weights=(2000, 100, 100, 1/12)),
         'vgg16': dict(neurons=(512, 8, 8, 1/8), weights=(24, 8, 8, 1/4)), 'vit_b_16': dict(neurons=(512, 8, 8, 1/8), weights=(24, 8, 8, 1/4))}

def write(file, rows):
    "Put rows into a table; those of other networks and targets stay"
    if not rows: return
    new = pd.DataFrame(rows)
    old = pd.read_csv(file) if file.exists() else new[:0]
    case = lambda t: t.network + ' ' + t.target
    pd.concat([old[~case(old).isin(case(new))], new]).to_csv(file, index=False)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', nargs='+', default=list(CASES), choices=list(CASES))
    p.add_argument('--targets', nargs='+', default=['neurons', 'weights'])
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=FOLDER)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.networks:
        for kind in a.targets:
            found = measure(name, kind, *CASES[name][kind], a.rounds)
            for file, rows in zip(('injection', 'bound', 'where'), found): write(a.out / f'{file}.csv', rows)
    s = summary(pd.read_csv(a.out / 'injection.csv'))
    chart(s).savefig(a.out / 'injection.svg')
    print(s.round(2).to_string(index=False))
    print(pd.read_csv(a.out / 'bound.csv').groupby(['network', 'target'], sort=False)[['runs', 'bound_seconds', 'whole_seconds']].median().round(2))

if __name__ == '__main__': main()
