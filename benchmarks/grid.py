"""Which detector sees which faults: the tables behind the leaderboard

Networks, precisions, faults in neurons and in weights, nine error models, thirds of the depth. A cell is filled until it holds
1,000 SDCs (of 100 different faults at least) or 100,000 runs (a neuron fault is one run; a weight fault runs on 100 images).
Faults that make SDCs are found first, without any detector; then they alone run again with all detectors looking on, which
gives the same bits. Profiles and fits use training images, thresholds the 5,000 images held out from training, and faults
strike the 10,000 test images, on which the false-positive rates are measured.

What was found and what was judged are files under `--work`, one per cell. So a run that was stopped goes on where it was, one
with larger limits goes on from what it has, and another detector only asks for judging by that one (`--stages judge tables --detectors NAME`).

At its end it writes four tables: found.csv, runs and SDCs of each cell; grid.csv, what the detectors saw of them; bits.csv,
the same by bit; false.csv, false positives.
"""
import argparse, gzip, itertools, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from drdna.baselines import Doubt, Extremes, Mahalanobis, NonFinite, QuantileTree, Range, energy, entropy, fit_detectors
from drdna.checksums import Checksum, Together
from drdna.core import layers, replace_file
from drdna.data_model import cifar10_splits, loader, trained_resnet18, trained_vit
from drdna.detection import RULES, DrDNA, collect_clean, judge, threshold
from drdna.engine import run
from drdna.injection import channel, draw_neurons, draw_weights, flip, parameter_places, row, sign, stuck_at, uniform
from drdna.leaderboard import CELL, OUT_OF_RANGE
from drdna.profiling import profile
from drdna.sentinel import Sentinel

FOLDER = Path(__file__).parent / 'results'
NETWORKS = {'resnet18': trained_resnet18, 'vit': trained_vit}
EXPONENT = {'float32': (23, 30), 'bfloat16': (7, 14), 'float16': (10, 14)}  # lowest and highest bit
FPRS = .01, .001
PORTION = {'neuron': 2000, 'weight': 25}  # faults on a batch of 100 images

# ---------------------------------------------------------------- what strikes

def kinds(dtype) -> dict: # Name to error models that take turns, pattern in neurons, pattern in weights
    "The error models of the grid"
    low, high = EXPONENT[dtype]
    flips = lambda bits: ([flip(bit=b) for b in bits], None, None)
    value = lambda model: ([model], None, None)
    return {'exponent MSB': flips([high]), 'other exponent bits': flips(range(low, high)), 'mantissa': flips(range(low)), 'sign': value(sign()),
            'U(±10)': value(uniform(lo=-10, hi=10)), 'U(±100)': value(uniform(lo=-100, hi=100)), 'U(±1000)': value(uniform(lo=-1000, hi=1000)),
            'zeroed channel': ([stuck_at(value=0.)], channel(), row()), 'stuck at 0': value(stuck_at(value=0.))}

def draw(model, here, target, kind, n, seed, images, struck=100) -> pd.DataFrame:
    "n faults in the layers `here`; a neuron fault on one image, a weight fault on as many as are `struck`, a batch"
    models, in_neurons, in_weights = kind
    owned = [p.name for p in parameter_places(model) if p.name.rpartition('.')[0] in {l.path for l in here}] if target == 'weight' else None
    parts = [draw_neurons(here, share, m, seed + k, in_neurons) if target == 'neuron' else draw_weights(model, share, m, seed + k, in_weights, names=owned)
             for k, m in enumerate(models) if (share := len(range(k, n, len(models))))]
    faults = pd.concat(parts, ignore_index=True)
    return faults.assign(image=number(faults) * (1 if target == 'neuron' else struck) % images)

class Batches:
    "Images in batches, in some precision"
    def __init__(self, data, dtype, size=100): self.batches, self.dtype, self.dataset = loader(data, size), dtype, data
    def __len__(self): return len(self.batches)
    def __iter__(self): return ((x.to(self.dtype), y) for x, y in self.batches)

# ---------------------------------------------------------------- odd inputs

def fashion(n) -> torch.Tensor: # `uint8`, (n, 32, 32, 3)
    "Fashion-MNIST, as grey images with a border, from Debian's package dataset-fashion-mnist"
    path = Path('/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz')
    if not path.exists(): raise FileNotFoundError(f'{path}: install the package dataset-fashion-mnist, or leave it out with --no-odd')
    x = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=16).view(-1, 28, 28)[:n]
    return F.pad(x, (2, 2, 2, 2)).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()

def odd(data, n=2000) -> dict: # Name to `Images`
    "Inputs that are unusual and not faulty, made of the first n test images"
    x, g = data.images[:n], torch.Generator().manual_seed(0)
    first = lambda y: y.permute(0, 3, 1, 2).float()
    last = lambda y: y.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    sets = {'noise, sd 25': last(first(x) + 25 * torch.randn(first(x).shape, generator=g)), 'blur, sd 1.5 px': last(gaussian_blur(first(x), 9, 1.5)),
            'contrast × 0.3': last(first(x).mean((1, 2, 3), keepdim=True) * .7 + .3 * first(x)), 'Fashion-MNIST': fashion(n)}
    return {k: replace(data[:n], images=v) for k, v in sets.items()}

# ---------------------------------------------------------------- who watches

class Sites:
    "Keeps the sites' values themselves, for all settings of Dr. DNA that share them"
    def __init__(self, p): self.layers, self.observe = p.layers, p.cohort.read
    def collect(self, records): return torch.stack(records, 1)

def settings() -> dict: # Name to `(k, bins, lam, rule)`
    "Settings of Dr. DNA"
    lams = {'τ1': (1, 0, 0), 'τ2': (0, 1, 0), 'τ3': (0, 0, 1), 'τ1+τ2': (1, 1, 0), 'τ1+τ3': (1, 0, 1), 'τ2+τ3': (0, 1, 1), 'all': (1, 1, 1), 'all, τ2 × 32': (1, 32, 1)}
    res = {f'Dr. DNA {n}, {rule}': (32, 10, l, rule) for n, l in lams.items() for rule in RULES}
    res |= {f'Dr. DNA {n}, per_layer, k={k}': (k, 10, lams[n], 'per_layer') for n in ('all', 'τ2') for k in (8, 16, 64, 128)}
    return res | {f'Dr. DNA {n}, per_layer, {b} bins': (32, b, lams[n], 'per_layer') for n in ('all', 'τ2') for b in (5, 20, 40)}

SITES = FOLDER / 'sites.csv'  # from sites.py
SENTINELS = {'sentinel, 1%': ('out of range', .01), 'sentinel, 1.5%': ('out of range', .015), 'sentinel, 2%': ('out of range', .02), 'sentinel, 4%': ('out of range', .04), 'sentinel for all, 2%': ('all', .02)}  # aim, and share of an inference at a batch of 32, as sites.py reckons it

def sentinels(network, model, batch) -> dict:
    "Sentinels of the picks that sites.py chose for a network, up to a share of an inference"
    t = pd.read_csv(SITES).query('network == @network')
    picks = lambda aim, share: list(t[(t.aim == aim) & (t.added <= share)][['what', 'layer']].itertuples(index=False, name=None))
    return {name: Sentinel(model, batch, picks(*how)) for name, how in SENTINELS.items()}

def rivals(network, model, batch, found) -> dict:
    "Everything but Dr. DNA, not fitted yet"
    every = layers(model, batch, want=lambda m: True)
    blocks = [l for l in every if l.name in ('maxpool', 'stem.5', 'avgpool', 'fc', 'norm', 'head') or l.name.endswith(('relu#2', 'norm1'))]
    pooled = {'Mahalanobis': Mahalanobis([l for l in blocks if l.name == 'avgpool'])} if any(l.name == 'avgpool' for l in blocks) else {}
    return {'non-finite': NonFinite(found), 'range': Range(found), 'range, every 8th layer': Range(found[::8]), 'extremes': Extremes(found), 'extremes, block outputs': Extremes(blocks),
            'softmax': Doubt(found), 'entropy': Doubt(found, entropy), 'energy': Doubt(found, energy), **pooled,
            'checksums, one by one': Checksum(model, batch, fuse=False), 'checksums': Checksum(model, batch), 'checksums and extremes': Together([Checksum(model, batch), Extremes(blocks)], every), **sentinels(network, model, batch)}

def tree(model, data, found, dt) -> QuantileTree:
    "Grown on faults in training images: large values, and the exponent's highest bit"
    det = QuantileTree([found[len(found) // 2], found[-4], found[-2]])
    faults = pd.concat([draw_neurons(found, 2000, m, seed=10**6 + i) for i, m in enumerate(v for n in OUT_OF_RANGE for v in kinds(str(dt)[6:])[n][0])], ignore_index=True)
    r = run(model, Batches(data, dt), faults.assign(image=faults.index % 300), found, {'tree': det}, desc='grow a tree')
    det.learn_faults(r.clean['tree'], r.faulty['tree'][torch.tensor((r.table.outcome == 'SDC').tolist())])
    return det

class Bench:
    "A network in one precision, detectors, their thresholds and false positives"
    def __init__(self, net, odd_too=True, only=()):
        dt, sets = net.test.dtype, cifar10_splits()
        model, found, fit = net.model, net.found, Batches(sets['train'][:1000], dt)
        wanted = lambda named: {n: v for n, v in named.items() if not only or n in only}
        self.net, self.settings = net, wanted(settings())
        profiles = {k: profile(model, fit, found, k) for k in {k for k, *_ in self.settings.values()}}
        self.rivals = fit_detectors(model, fit, wanted(rivals(net.network, model, next(iter(net.test)), found)))
        self.rivals |= {n: grow() for n, grow in wanted({'quantile tree': lambda: tree(model, sets['train'][1000:3000], found, dt)}).items()}
        self.dna = {n: DrDNA.fit(profiles[k], bins, lam, rule) for n, (k, bins, lam, rule) in self.settings.items()}
        self.observers = self.rivals | {k: Sites(p) for k, p in profiles.items()}
        clean = lambda batches, desc: {n: v.amax(1) for n, v in self.statistics(collect_clean(model, batches, self.observers, desc=f'{net.network} {net.dtype}, {desc}')).items()}
        self.thresholds = {(n, f): threshold(m, f) for n, m in clean(Batches(sets['heldout'], dt), 'calibrate').items() for f in FPRS}
        looks = {'test': sets['test'], **(odd(sets['test']) if odd_too else {})}
        self.false = pd.DataFrame([dict(network=net.network, dtype=net.dtype, inputs=inputs, detector=n, fpr=f, alarms=int((~(m <= self.thresholds[n, f])).sum()), images=len(m))
                                   for inputs, d in looks.items() for n, m in clean(Batches(d, dt), inputs).items() for f in FPRS])

    def statistics(self, seen) -> dict: # Name to `(N, L)`
        "What every detector makes of what the observers saw"
        tests = {}
        def of(k, bins, tables):
            if (k, bins) not in tests: tests[k, bins] = torch.cat([tables.tests(v) for v in seen[k].split(500)])
            return tests[k, bins]
        return {n: d.statistic(seen[n]) for n, d in self.rivals.items()} | {n: d.statistic(of(*self.settings[n][:2], d.tables)) for n, d in self.dna.items()}

    def verdicts(self, seen) -> dict:
        "The number of the layer that alarms, -1 for none, by detector and rate"
        place = {l.name: i for i, l in enumerate(self.net.found)}
        def where(n): return torch.tensor([place.get(l.name, len(place)) for l in (self.rivals.get(n) or self.dna[n]).layers] + [-1])
        return {f'{n} @ {f}': where(n)[judge(s, self.thresholds[n, f]).layer].numpy() for n, s in self.statistics(seen).items() for f in FPRS}

# ---------------------------------------------------------------- find faults that make SDCs

CLUSTERS = 100  # different faults that a full cell of weights has: with fewer, Wilson's lower bound of "all seen" stays below 96 %

class Net:
    "A network in one precision, its layers and the test images"
    def __init__(self, network, dtype):
        self.network, self.dtype, dt = network, dtype, getattr(torch, dtype)
        self.model, self.test = NETWORKS[network]().to(dt), Batches(cifar10_splits()['test'], dt)
        self.found = layers(self.model, next(iter(self.test)))

    def cells(self, args, folder) -> list: # (path, target, kind, third)
        return [(folder / f'{self.network}-{self.dtype}-{t}-{k}-{third}.parquet', t, k, third)
                for k, t, third in itertools.product(args.kinds or kinds(self.dtype), args.targets, range(3))]

    def run(self, faults, images, **more): return run(self.model, images, faults, self.found, **more)
    def images(self, first, n): return Batches(self.test.dataset[first:first + n], self.test.dtype)

def find(net, folder, args):
    "Draw until the cells have enough SDCs, or enough runs"
    for path, target, kind, third in net.cells(args, folder):
        here, seed = thirds(net.found)[third], zlib.crc32(path.stem.encode()) // 4
        t = pd.read_parquet(path) if path.exists() else None
        at = t.attrs if path.exists() else dict(zip(CELL, (net.network, net.dtype, target, kind, third))) | dict(faults=0, runs=0, sdcs=0)
        begun = at['faults']
        while not is_full(t, at, args):
            t, at = portion(net, here, target, kind, seed, t, at)
            t.attrs = at
            replace_file(path, t.to_parquet)
        if at['faults'] > begun: print(at, flush=True)

def is_full(t, at, args) -> bool:
    different = at['sdcs'] if at['target'] == 'neuron' or t is None else t.fault.nunique()
    return at['runs'] >= args.runs or (at['sdcs'] >= args.sdcs and different >= min(CLUSTERS, args.sdcs))

def portion(net, here, target, kind, seed, t, at) -> tuple[pd.DataFrame, dict]:
    "Some more faults on the next images: those that make SDCs join the others"
    size, done = PORTION[target], at['faults']
    batches, first = 4 if done else 1, 100 * (done // size) % (len(net.test.dataset) - 400)  # a look first: where most faults are SDCs, few are needed
    faults = draw(net.model, here, target, kinds(net.dtype)[kind], batches * size, seed + done, 100 * batches)
    sdc = net.run(faults, net.images(first, 100 * batches), desc=f'{at["sdcs"]} SDCs, {at["runs"]} runs').table.query("outcome == 'SDC'")
    head = number(faults)
    bad = faults.assign(image=faults.image + first, fault=head + done)[head.isin(sdc.fault)]
    runs = batches * size * (1 if target == 'neuron' else 100)
    return pd.concat([t, bad], ignore_index=True), at | dict(faults=done + batches * size, runs=at['runs'] + runs, sdcs=at['sdcs'] + len(sdc))

def number(faults) -> pd.Series: return (faults.part == 0).cumsum() - 1 # Which fault of the list a row belongs to
def thirds(found) -> list: return [found[len(found) * i // 3:len(found) * (i + 1) // 3] for i in range(3)]

# ---------------------------------------------------------------- judge

SDC = ['cluster', 'model', 'at'] # Number of its fault, error model, number of the layer

def judged(b:Bench, faults) -> pd.DataFrame:
    "Faults that make SDCs once more, with all detectors looking on; a row for each SDC"
    if faults.empty: return pd.DataFrame()
    r = b.net.run(faults.drop(columns='fault'), b.net.images(0, faults.image.max() // 100 * 100 + 100), observers=b.observers, desc='judge')
    keep = (r.table.outcome == 'SDC').to_numpy()
    if keep.sum() != faults.attrs['sdcs']: raise RuntimeError(f'{faults.attrs["sdcs"]} SDCs became {keep.sum()} when they were run again')
    t, place = r.table[keep], {n: i for i, l in enumerate(b.net.found) for n in (l.name, f'{l.path}.weight')}
    seen = b.verdicts({k: v[torch.tensor(keep)] for k, v in r.faulty.items()})
    return pd.DataFrame(dict(zip(SDC, (faults.fault[faults.part == 0].to_numpy()[t.fault], t.model.to_numpy(), t.layer.map(place).to_numpy()))) | seen)

def judge_cells(b:Bench, folder, work, args):
    "Judge what was found and not judged yet, or has grown since; by some detectors only, what was judged by all before"
    for path, *_ in b.net.cells(args, folder):
        mine, found = work / path.name, pd.read_parquet(path) if path.exists() else None
        old = pd.read_parquet(mine) if mine.exists() else None
        known = found is not None and old is not None and old.attrs == found.attrs
        if found is None or known != bool(args.detectors): continue
        t = judged(b, found)
        if known and len(t): t = joined(old, t)
        t.attrs = found.attrs
        replace_file(mine, t.to_parquet)
        print(t.attrs, flush=True)

def joined(old, new) -> pd.DataFrame:
    "Old verdicts, and new ones in their place or beside them"
    if not (old[SDC].to_numpy() == new[SDC].to_numpy()).all(): raise RuntimeError('other SDCs than those that were judged before')
    return pd.concat([old.drop(columns=new.columns.difference(SDC), errors='ignore'), new.drop(columns=SDC)], axis=1)

# ---------------------------------------------------------------- tables

def row_of(t, **more) -> dict:
    "A cell's row: SDCs, faults that made them, and how many each detector saw"
    names = [c for c in t if ' @ ' in c]
    return t.attrs | more | {c: int((t[c] >= 0).sum()) for c in names if not t[c].isna().any()}

def tables(work):
    "The committed tables, from the files of the cells"
    found = [pd.read_parquet(p) for p in sorted((work / 'found').glob('*.parquet'))]
    pd.DataFrame([t.attrs | dict(made_by=t.fault.nunique()) for t in found]).sort_values(CELL).to_csv(FOLDER / 'found.csv', index=False)
    full, order = [pd.read_parquet(p) for p in sorted(work.glob('*.parquet'))], CELL
    if not full: return print('no cell is judged yet')
    pd.DataFrame([row_of(t, made_by=t.cluster.nunique() if len(t) else 0) for t in full]).sort_values(order).to_csv(FOLDER / 'grid.csv', index=False, float_format='%.0f')
    flips = pd.concat([t.assign(**{k: t.attrs[k] for k in order[:3]}) for t in full if len(t) and t.model.str.startswith('flip(').all()], ignore_index=True).copy()
    flips = flips.assign(bit=flips.model.str.extract(r'bit=(\d+)')[0].astype(int))
    by_bit = [dict(zip([*order[:3], 'bit'], k)) | {'sdcs': len(g)} | {c: int((g[c] >= 0).sum()) for c in g if ' @ 0.001' in c and not g[c].isna().any()} for k, g in flips.groupby([*order[:3], 'bit'])]
    pd.DataFrame(by_bit).to_csv(FOLDER / 'bits.csv', index=False, float_format='%.0f')
    pd.concat([pd.read_csv(p) for p in sorted(work.glob('*.false.csv'))]).to_csv(FOLDER / 'false.csv', index=False)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    p.add_argument('--dtypes', nargs='+', default=list(EXPONENT), choices=EXPONENT)
    p.add_argument('--targets', nargs='+', default=['neuron', 'weight'], choices=['neuron', 'weight'])
    p.add_argument('--kinds', nargs='+', default=None, help='only these error models')
    p.add_argument('--sdcs', type=int, default=1000, help='a cell is full with so many SDCs')
    p.add_argument('--runs', type=int, default=100_000, help='or with so many runs')
    p.add_argument('--stages', nargs='+', default=['find', 'judge', 'tables'], choices=['find', 'judge', 'tables'])
    p.add_argument('--detectors', nargs='+', default=[], help='judge by these only, named as in grid.csv, and keep what the others said')
    p.add_argument('--no-odd', action='store_true', help='leave out the unusual inputs')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--work', type=Path, default=Path(__file__).parent / 'grid', help='folder of the cells')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.work / 'found'
    folder.mkdir(parents=True, exist_ok=True)
    for network, dtype in () if args.stages == ['tables'] else itertools.product(args.networks, args.dtypes):
        net = Net(network, dtype)
        if 'find' in args.stages: find(net, folder, args)
        if 'judge' not in args.stages: continue
        b, false = Bench(net, not args.no_odd, args.detectors), args.work / f'{network}-{dtype}.false.csv'
        old = pd.read_csv(false).query('detector not in @args.detectors') if args.detectors else None
        pd.concat([old, b.false]).to_csv(false, index=False)
        judge_cells(b, folder, args.work, args)
    if 'tables' in args.stages: tables(args.work)

if __name__ == '__main__': main()
