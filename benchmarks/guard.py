"""What watching costs: latency and memory of a network with a guard, against the same network without

Eager, all share one model object: the taps of a detector are open for one run and closed for the next. Compiled, hooks
are part of the graph, so the bare network and each guard are compiled apart, round module objects of their own that share
one set of weight tensors. In a round the bare network and all guards take turns, and who comes first changes from round
to round; each time is divided by the bare one of its round. The run that counts follows another one of the same kind, for
whoever has a guard keeps it open. Several processes run one after the other, for a process keeps what its memory layout costs it.

The summary gives, for each detector, batch and mode, the median ratio over all rounds, and its 95 % interval from a
bootstrap that draws processes and then rounds of each. A target counts as met if the upper end meets it.

Writes guard-NETWORK.csv, or guard-NETWORK-cuda.csv (one row per detector, batch, mode and process), guard-NETWORK-summary.csv and guard-NETWORK.svg.
Rows of detectors that are not measured this time are kept.
Seconds of every run go to guard_raw/, one file per process and mode; files that are there are not measured again, so delete the
folder before other detectors or rounds.
"""
import argparse, copy, subprocess, sys, time
from itertools import chain
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, seaborn as sns, torch

from drdna.baselines import fit_detectors
from drdna.core import layers
from drdna.data_model import cifar10_splits, loader, normalize, sample
from drdna.detection import DrDNA
from drdna.guard import Guard
from drdna.profiling import profile
from drdna.scoring import Tables

from grid import NETWORKS, Net, rivals, sentinels, tree

FOLDER = Path(__file__).parent / 'results'

# ---------------------------------------------------------------- what is compared

def detectors(model, a):
    "`{name: fitted detector}`, of all or of some; how well they are fitted changes nothing in what they cost"
    data = sample('profile')
    first = next(iter(loader(data)))
    found = layers(model, first)
    wanted = lambda named: {n: d for n, d in named.items() if not a.detectors or n in a.detectors}
    dna = {n: DrDNA.fit(profile(model, loader(data), found, k)) for n, k in wanted({f'Dr. DNA, k={k}': k for k in (8, 16, 32, 64, 128)}).items()}
    trees = wanted({'quantile tree': lambda: tree(Net(a.network, 'float32', a.device), cifar10_splits()['train'][1000:3000])}) if a.mode == 'eager' else {} # scikit-learn's trees cannot be compiled
    return dna | {n: grow() for n, grow in trees.items()} | fit_detectors(model, loader(data), wanted(rivals(a.network, model, first, found) | sentinels(a.network, model, first)))

def stored(detector) -> int:
    "Bytes of the numbers that a detector keeps, sites and vectors included"
    if hasattr(detector, 'parts'): return sum(map(stored, detector.parts))
    parts = [detector, *(v for v in vars(detector).values() if isinstance(v, Tables))]
    vectors = sum(r.v.nbytes for r in getattr(detector, 'relations', []) if r.v)
    sites = sum(s.nbytes for s in detector.cohort.sites) if hasattr(detector, 'cohort') else 0
    nodes = detector.tree.tree_.__getstate__()['nodes'].nbytes if hasattr(detector, 'tree') else 0
    return vectors + sites + nodes + sum(v.nbytes for p in parts for v in vars(p).values() if isinstance(v, torch.Tensor))

def twin(model):
    "Module objects of its own, the same weight tensors"
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)

# ---------------------------------------------------------------- measuring

def seconds(run, x):
    "Of the second of two runs: opening taps has left other things in the caches than inferences do"
    run(x)
    wait(x)
    start = time.perf_counter()
    run(x)
    wait(x)
    return time.perf_counter() - start

def wait(x):
    "Until a GPU has done what it was given"
    if x.is_cuda: torch.cuda.synchronize()

def eager(model, watch):
    "`{name: f(x) -> seconds}` of one model object; opening and closing the taps is not timed"
    def guarded(d):
        def f(x):
            with Guard(model, d, 0.) as g: return seconds(g, x)
        return f
    return {'bare': lambda x: seconds(model, x)} | {name: guarded(d) for name, d in watch.items()}

def compiled(model, watch):
    "The same of compiled callables, whose guards stay open"
    nets = {'bare': twin(model)} | {name: Guard(twin(model), d, 0.) for name, d in watch.items()}
    torch._dynamo.config.recompile_limit = 1000 # all guards share one `forward`, and each has a graph for each batch
    runs = {name: torch.compile(n, fullgraph=True, dynamic=False) for name, n in nets.items()}
    return {name: lambda x, run=run: seconds(run, x) for name, run in runs.items()}

def turns(timers, x, n) -> np.ndarray: # Seconds `(timers, n)`
    "n rounds in which all take turns, after three to warm up"
    kinds, res = list(timers), np.empty((len(timers), n), np.float32)
    for k in range(-3, n):
        at = k % len(kinds)
        for i in (*range(at, len(kinds)), *range(at)):
            took = timers[kinds[i]](x)
            if k >= 0: res[i, k] = took
    return res

def measure(a):
    "Write the raw file of one process and mode"
    model = NETWORKS[a.network](a.device)
    weights, images = sum(p.nbytes for p in model.parameters()), normalize(sample('evaluate').images[:max(a.batches)]).to(a.device)
    watch = detectors(model, a)
    with torch.inference_mode():
        timers = {'eager': eager, 'compiled': compiled}[a.mode](model, watch)
        res = {str(b): turns(timers, images[:b], a.rounds) for b in a.batches}
    memory = [stored(d) / weights for d in watch.values()]
    np.savez(a.raw, names=list(timers), memory=memory, **res)

# ---------------------------------------------------------------- results

def read(files) -> dict: # (detector, batch, mode) to `(bare seconds, ratios, memory)`, a list over processes
    res = {}
    for (mode, process), file in files.items():
        with np.load(file) as z:
            for b in (k for k in z.files if k.isdigit()):
                for name, t, memory in zip(z['names'][1:], z[b][1:], z['memory']):
                    res.setdefault((str(name), int(b), mode), []).append((process, z[b][0], t / z[b][0], memory))
    return res

def order_interval(v) -> tuple: # 95 %
    "Order-statistic interval of the median"
    v, half = np.sort(v), .98 * len(v)**.5
    at = lambda r: v[int(np.clip(r, 0, len(v) - 1))]
    return at(np.floor(len(v) / 2 - half)), at(np.ceil(len(v) / 2 + half))

def cluster_interval(ratios, draws=2000) -> tuple: # 95 %
    "Bootstrap of the median: processes are drawn, then rounds of each"
    rng, m = np.random.default_rng(0), len(ratios)
    one = lambda r: rng.choice(r, len(r))
    medians = [np.median(np.concatenate([one(ratios[p]) for p in rng.integers(m, size=m)])) for _ in range(draws)]
    return tuple(np.quantile(medians, (.025, .975)))

def tables(files) -> tuple: # Per process, and over all processes
    rows, total = [], []
    for (name, b, mode), runs in read(files).items():
        case = dict(detector=name, batch=b, mode=mode)
        for process, bare, r, memory in runs:
            lo, hi = order_interval(r)
            rows.append(case | dict(process=process, rounds=len(r), bare_ms=1e3 * np.median(bare), ratio=np.median(r), lower=lo, upper=hi, memory=memory))
        lo, hi = cluster_interval([r for _, _, r, _ in runs])
        total.append(case | dict(processes=len(runs), rounds=sum(len(r) for _, _, r, _ in runs), bare_ms=np.median([1e3 * np.median(b) for _, b, _, _ in runs]),
                                 ratio=np.median(np.concatenate([r for _, _, r, _ in runs])), lower=lo, upper=hi, memory=runs[0][3]))
    return pd.DataFrame(rows), pd.DataFrame(total)

def merged(path, new) -> pd.DataFrame:
    "The rows `new`, and those of an earlier table that they do not replace"
    if not path.exists(): return new
    case = lambda t: t.set_index(['detector', 'batch', 'mode']).index
    old = pd.read_csv(path)
    return pd.concat([old[~case(old).isin(case(new))], new], ignore_index=True).sort_values(['mode', 'batch'], ascending=[False, True], kind='stable')

def chart(s):
    "Bars: added latency in per cent, a panel for each batch and mode"
    s = s.assign(added=100 * (s.ratio - 1), low=100 * (s.lower - 1), high=100 * (s.upper - 1), case=[f'batch {b}, {m}' for b, m in zip(s.batch, s['mode'])])
    cases = s.case.unique()
    fig, axs = plt.subplots(1, len(cases), figsize=(1.8 + 2 * len(cases), .8 + .25 * s.detector.nunique()), layout='constrained', squeeze=False, sharey=True)
    for ax, case in zip(axs[0], cases):
        d = s[s.case == case]
        ax.barh(d.detector, d.added, xerr=np.array([d.added - d.low, d.high - d.added]).clip(0), color=sns.color_palette('colorblind')[0])
        ax.axvline(2, color='.5', lw=.8, ls=':')
        ax.set_title(case, size=8); ax.set_xlabel('added latency, %', size=8); ax.tick_params(labelsize=7)
    axs[0][0].invert_yaxis()
    return fig

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--network', choices=NETWORKS, default='resnet18')
    p.add_argument('--batches', type=int, nargs='+', default=[1, 32, 128])
    p.add_argument('--modes', nargs='+', choices=('eager', 'compiled'), default=['eager', 'compiled'])
    p.add_argument('--rounds', type=int, default=100, help='in each process')
    p.add_argument('--processes', type=int, default=5)
    p.add_argument('--detectors', nargs='+', default=[], help='only these')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--out', type=Path, default=FOLDER)
    p.add_argument('--mode', help=argparse.SUPPRESS) # these two are set in the processes that this one starts
    p.add_argument('--raw', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.raw: return measure(a)
    folder = a.out / 'guard_raw'
    folder.mkdir(parents=True, exist_ok=True)
    name = a.network if a.device == 'cpu' else f'{a.network}-{a.device}'
    files = {(mode, k): folder / f'{name}-{mode}-{k}.npz' for k in range(a.processes) for mode in a.modes}
    for (mode, _), file in files.items():
        tmp = file.with_suffix('.tmp.npz')
        if file.exists(): continue
        subprocess.run([sys.executable, __file__, *sys.argv[1:], '--mode', mode, '--raw', tmp], check=True)
        tmp.rename(file)
    rows, s = tables(files)
    paths = [a.out / f'guard-{name}{end}.csv' for end in ('', '-summary')]
    rows, s = (merged(*z) for z in zip(paths, (rows, s)))
    for file, t in zip(paths, (rows, s)): t.to_csv(file, index=False, float_format='%.6g')
    chart(s).savefig(a.out / f'guard-{name}.svg')
    print(s.round(4).to_string(index=False))

if __name__ == '__main__': main()
