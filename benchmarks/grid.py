"""Which detector sees which faults: the tables behind the leaderboard

Networks, precisions, faults in neurons and in weights, nine error models, thirds of the depth; on a CPU or on a GPU, which
rounds otherwise, so that its cells are cells of their own. A cell is filled until it holds 1,000 SDCs (of 100 different faults
at least) or 100,000 runs (a neuron fault is one run; a weight fault runs on a batch: 100 images, or 1,000 on a GPU).
Faults that make SDCs are found first, without any detector; then they alone run again with all detectors looking on, which
gives the same bits. Profiles and fits use training images, thresholds the 5,000 images held out from training, and faults
strike the 10,000 test images, on which the false-positive rates are measured.

Both are campaigns (`drdna.campaign`), in folders under `--work`, so that a run that was stopped goes on where it was. What they
give goes into the committed tables, cell by cell: found.csv, runs and SDCs; sdcs.parquet, the numbers of the faults that made
them, from which they are drawn again; grid.csv, how many of the SDCs the detectors saw; bits.csv, the same by bit, of cells that
all of them judged; reach.csv, how many layers after the fault they alarm, and how often not without it; false.csv, false positives. So a fresh clone goes on with
larger limits, and judges another detector in minutes (`--stages judge --detectors NAME`), without the hours of the search.
"""
import argparse, fcntl, gzip, itertools, shutil, zlib
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import gaussian_blur

from drdna.baselines import Doubt, Extremes, Mahalanobis, NonFinite, QuantileTree, Range, energy, entropy, fit_detectors
from drdna.campaign import Calibrated, Campaign, observers
from drdna.checksums import Checksum, Together
from drdna.core import layers, replace_file
from drdna.data_model import cifar10_splits, loader, trained_resnet18, trained_vit
from drdna.detection import RULES, DrDNA, collect_clean, fit_rule, threshold
from drdna.engine import run
from drdna.injection import channel, draw_neurons, draw_weights, flip, parameter_places, row, sign, stuck_at, uniform
from drdna.leaderboard import CELL, OUT_OF_RANGE, trials
from drdna.plan import listed
from drdna.profiling import profile
from drdna.sentinel import Sentinel

FOLDER = Path(__file__).parent / 'results'
NETWORKS = {'resnet18': trained_resnet18, 'vit': trained_vit}
EXPONENT = {'float32': (23, 30), 'bfloat16': (7, 14), 'float16': (10, 14)}  # lowest and highest bit
FPRS = .01, .001
SIZE = {'cpu': 100, 'cuda': 1000} # Images in a batch
PORTION = {'cpu': {'neuron': 2000, 'weight': 25}, 'cuda': {'neuron': 20000, 'weight': 25}} # Faults on a batch

# ---------------------------------------------------------------- what strikes

def kinds(dtype) -> dict: # Name to error models that take turns, pattern in neurons, pattern in weights
    "The error models of the grid"
    low, high = EXPONENT[dtype]
    flips = lambda bits: ([flip(bit=b) for b in bits], None, None)
    value = lambda model: ([model], None, None)
    return {'exponent MSB': flips([high]), 'other exponent bits': flips(range(low, high)), 'mantissa': flips(range(low)), 'sign': value(sign()),
            'U(±10)': value(uniform(lo=-10, hi=10)), 'U(±100)': value(uniform(lo=-100, hi=100)), 'U(±1000)': value(uniform(lo=-1000, hi=1000)),
            'zeroed channel': ([stuck_at(value=0.)], channel(), row()), 'stuck at 0': value(stuck_at(value=0.))}

def draw(model, here, target, kind, n, seed, images, struck) -> pd.DataFrame:
    "n faults in the layers `here`; a neuron fault on one image, a weight fault on as many as are `struck`, a batch"
    models, in_neurons, in_weights = kind
    owned = [p.name for p in parameter_places(model) if p.name.rpartition('.')[0] in {l.path for l in here}] if target == 'weight' else None
    parts = [draw_neurons(here, share, m, seed + k, in_neurons) if target == 'neuron' else draw_weights(model, share, m, seed + k, in_weights, names=owned)
             for k, m in enumerate(models) if (share := len(range(k, n, len(models))))]
    faults = pd.concat(parts, ignore_index=True)
    return faults.assign(image=number(faults) * (1 if target == 'neuron' else struck) % images)

class Batches:
    "Images in batches, in some precision"
    def __init__(self, data, dtype, size): self.batches, self.dtype, self.dataset = loader(data, size), dtype, data
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

def settings() -> dict: # Name to `(k, bins, lam, rule)`
    "Settings of Dr. DNA"
    lams = {'τ1': (1, 0, 0), 'τ2': (0, 1, 0), 'τ3': (0, 0, 1), 'τ1+τ2': (1, 1, 0), 'τ1+τ3': (1, 0, 1), 'τ2+τ3': (0, 1, 1), 'all': (1, 1, 1), 'all, τ2 × 32': (1, 32, 1)}
    res = {f'Dr. DNA {n}, {rule}': (32, 10, l, rule) for n, l in lams.items() for rule in RULES}
    for n, rule in itertools.product(('all', 'τ2'), ('per_layer', 'final')):
        res |= {f'Dr. DNA {n}, {rule}, k={k}': (k, 10, lams[n], rule) for k in (8, 16, 64, 128)}
        res |= {f'Dr. DNA {n}, {rule}, {b} bins': (32, b, lams[n], rule) for b in (5, 20, 40)}
    return res

SITES = FOLDER / 'sites.csv'  # from sites.py
SENTINELS = {f'sentinel, {s}%': ('out of range', s / 100) for s in (1.5, 2, 3, 5, 10)} | {f'sentinel for all, {s}%': ('all', s / 100) for s in (1.5, 2, 5, 10)}  # aim, and share of an inference at a batch of 32, as sites.py reckons it

def sentinels(network, model, batch) -> dict:
    "Sentinels of the picks that sites.py chose for a network"
    t = pd.read_csv(SITES).query('network == @network')
    picks = lambda aim, share: list(t[(t.aim == aim) & (t.share == share)][['what', 'layer']].itertuples(index=False, name=None))
    return {name: Sentinel(model, batch, picks(*how)) for name, how in SENTINELS.items()}

FITTED = 4000 # Training images that sentinels are fitted on, since their units are the largest of so many; the others take the first 1,000 of them

def rivals(network, model, batch, found) -> dict:
    "Everything but Dr. DNA and sentinels, not fitted yet"
    every = layers(model, batch, want=lambda m: True)
    blocks = [l for l in every if l.name in ('maxpool', 'stem.5', 'avgpool', 'fc', 'norm', 'head') or l.name.endswith(('relu#2', 'norm1'))]
    pooled = {'Mahalanobis': Mahalanobis([l for l in blocks if l.name == 'avgpool'])} if any(l.name == 'avgpool' for l in blocks) else {}
    return {'non-finite': NonFinite(found), 'range': Range(found), 'range, every 8th layer': Range(found[::8]), 'extremes': Extremes(found), 'extremes, block outputs': Extremes(blocks),
            'softmax': Doubt(found), 'entropy': Doubt(found, entropy), 'energy': Doubt(found, energy), **pooled,
            'checksums, one by one': Checksum(model, batch, fuse=False), 'checksums': Checksum(model, batch), 'checksums and extremes': Together([Checksum(model, batch), Extremes(blocks)], every)}

def tree(net, data) -> QuantileTree:
    "Grown on faults in training images: large values, and the exponent's highest bit"
    det, found = QuantileTree([net.found[len(net.found) // 2], net.found[-4], net.found[-2]]), net.found
    faults = pd.concat([draw_neurons(found, 2000, m, seed=10**6 + i) for i, m in enumerate(v for n in OUT_OF_RANGE for v in kinds(net.dtype)[n][0])], ignore_index=True)
    r = net.run(faults.assign(image=faults.index % 300), net.batches(data), observers={'tree': det}, desc='grow a tree')
    det.learn_faults(r.clean['tree'], r.faulty['tree'][torch.tensor((r.table.outcome == 'SDC').tolist())])
    return det

class Bench:
    "A network in one precision, detectors, their thresholds and false positives"
    def __init__(self, net, odd_too=True, only=()):
        sets = cifar10_splits()
        fit, wanted = net.batches(sets['train'][:1000]), lambda named: {n: v for n, v in named.items() if not only or n in only}
        self.net = net
        first = next(iter(net.test))
        dets = fit_detectors(net.model, fit, wanted(rivals(net.network, net.model, first, net.found)))
        dets |= fit_detectors(net.model, net.batches(sets['train'][:FITTED]), wanted(sentinels(net.network, net.model, first)))
        dets |= {n: grow() for n, grow in wanted({'quantile tree': lambda: tree(net, sets['train'][1000:3000])}).items()}
        self.detectors = dets | dna(net, fit, wanted(settings()))
        self.thresholds = {(n, f): threshold(m, f) for n, m in self.clean(net.batches(sets['heldout']), 'calibrate').items() for f in FPRS}
        looks = {'test': sets['test'], **(odd(sets['test']) if odd_too else {})}
        self.false = pd.DataFrame([dict(network=net.network, dtype=net.dtype, device=net.device, inputs=inputs, detector=n, fpr=f, alarms=int((~(m <= self.thresholds[n, f])).sum()), images=len(m))
                                   for inputs, d in looks.items() for n, m in self.clean(net.batches(d), inputs).items() for f in FPRS])

    def clean(self, data, desc) -> dict: # Name to `(n,)`
        "The statistic of every detector on clean images"
        who = observers({n: Calibrated(d, np.inf) for n, d in self.detectors.items()})
        seen = collect_clean(self.net.model, data, {n: self.detectors[n] for n in who.values()}, desc=f'{self.net.network} {self.net.dtype}, {desc}')
        return {n: d.statistic(seen[who[n]]).amax(1) for n, d in self.detectors.items()}

    def watch(self) -> dict: return {n: Calibrated(d, self.thresholds[n, min(FPRS)]) for n, d in self.detectors.items()}

def dna(net, fit, settings) -> dict:
    "Dr. DNA in many settings; those with the same sites and bins share their tables, so that they are observed once"
    profiles = {k: profile(net.model, fit, net.found, k) for k in {k for k, *_ in settings.values()}}
    tables = {(k, bins): DrDNA.fit(profiles[k], bins) for k, bins, *_ in settings.values()}
    tests = {(k, bins): d.tables.tests(profiles[k].values) for (k, bins), d in tables.items()}
    def one(k, bins, lam, rule):
        T, sd = fit_rule(tests[k, bins], lam)
        return replace(tables[k, bins], T=T, sd=sd, lam=lam, rule=rule)
    return {n: one(*how) for n, how in settings.items()}

# ---------------------------------------------------------------- find faults that make SDCs

CLUSTERS = 100  # different faults that a full cell of weights has: with fewer, Wilson's lower bound of "all seen" stays below 96 %
SDCS, FOUND, GRID, BITS, REACH, FALSE = FOLDER / 'sdcs.parquet', *(FOLDER / f'{n}.csv' for n in ('found', 'grid', 'bits', 'reach', 'false'))

PRODUCTS = {getattr(torch.ops.aten, n) for n in ('convolution', 'mm', 'addmm', 'bmm', 'baddbmm')}

class InFloat(TorchDispatchMode):
    "Products of float16 in float32, rounded once; PyTorch's own kernels add up in float32, too, and take many times as long where a CPU has no instructions for float16"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS or args[0].dtype != torch.float16: return func(*args, **kwargs)
        return func(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **kwargs).half()

class Net:
    "A network in one precision, its layers and the test images"
    def __init__(self, network, dtype, device='cpu'):
        self.network, self.dtype, self.device, self.size = network, dtype, device, SIZE[device]
        self.model, self.test = NETWORKS[network]().to(device, getattr(torch, dtype)), self.batches(cifar10_splits()['test'])
        self.found = layers(self.model, next(iter(self.test)))

    def cells(self, args) -> list: # Values of `CELL`
        return [(self.network, self.dtype, self.device, t, k, third) for k, t, third in itertools.product(args.kinds or kinds(self.dtype), args.targets, range(3))]

    def run(self, faults, images, **more): return run(self.model, images, faults, self.found, **more)
    def batches(self, data): return Batches(data, getattr(torch, self.dtype), self.size)
    def images(self, first, n): return self.batches(self.test.dataset[first:first + n])

    def campaign(self, faults, images, folder, **more) -> pd.DataFrame:
        "Rows of a campaign, which goes on where it was stopped"
        return Campaign(self.model, images, faults=faults, chunk=10 * self.size, **more).run(folder).table

def name_of(cell) -> str: # Without the device
    network, dtype, _, *rest = cell
    return '-'.join(map(str, (network, dtype, *rest)))

def number(faults) -> pd.Series: return (faults.part == 0).cumsum() - 1 # Which fault of the list a row belongs to
def thirds(found) -> list: return [found[len(found) * i // 3:len(found) * (i + 1) // 3] for i in range(3)]

def portion(net, cell, done) -> tuple: # Faults on their images, where these begin among all, and how many there are
    "The faults of a cell that come after the first so many"
    *_, target, kind, third = cell
    each, batches = PORTION[net.device][target], 4 if done else 1  # a look first: where most faults are SDCs, few are needed
    first, images = net.size * (done // each) % (len(net.test.dataset) - 4 * net.size), net.size * batches
    faults = draw(net.model, thirds(net.found)[third], target, kinds(net.dtype)[kind], batches * each, zlib.crc32(name_of(cell).encode()) // 4 + done, images, net.size)
    return listed(faults, name_of(cell)), first, images

COUNTS = ['faults', 'runs', 'sdcs', 'made_by'] # Of a cell: faults drawn, inferences with them, SDCs, faults that made these

def is_cell(t, cell) -> pd.Series: return (t[CELL] == list(cell)).all(axis=1) # Which rows of a table are of a cell

def known(cell) -> tuple: # Its `COUNTS`, and the numbers of the faults that made SDCs
    "What the committed tables say of a cell; one whose faults they do not list is as good as unknown"
    t, bad = pd.read_csv(FOUND), pd.read_parquet(SDCS)
    row, bad = t[is_cell(t, cell)].to_dict('records'), bad.fault[is_cell(bad, cell)].to_numpy()
    if row and row[0]['made_by'] == len(bad): return {c: row[0][c] for c in COUNTS}, bad
    return dict.fromkeys(COUNTS, 0), bad[:0]

def find(net, args):
    "Draw until the cells have enough SDCs, or enough runs"
    for cell in net.cells(args):
        at, bad = known(cell)
        begun = at['faults']
        while not is_full(cell, at, args):
            faults, first, n = portion(net, cell, done := at['faults'])
            folder = args.work / 'found' / f'{name_of(cell)}-{done}'
            sdc = net.campaign(faults, net.images(first, n), folder).query("outcome == 'SDC'")
            bad, here = np.append(bad, done + sdc.fault.unique()), faults.fault.nunique()
            at = dict(zip(COUNTS, (done + here, at['runs'] + here * (net.size if 'weight' in cell else 1), at['sdcs'] + len(sdc), len(bad))))
            keep(cell, at, bad)
            shutil.rmtree(folder)
        if at['faults'] > begun: print(name_of(cell), at, flush=True)

def is_full(cell, at, args) -> bool:
    return at['runs'] >= args.runs or (at['sdcs'] >= args.sdcs and at['made_by'] >= min(CLUSTERS, args.sdcs))

@contextmanager
def alone():
    "One process at a time changes the tables; two networks may be at work at once"
    with open(FOLDER / '.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def put(path, new, by):
    "Put rows into a table, in place of those that have the same `by`"
    read, write = (pd.read_parquet, pd.DataFrame.to_parquet) if path.suffix == '.parquet' else (pd.read_csv, pd.DataFrame.to_csv)
    with alone():
        old = read(path)
        t = pd.concat([old[~old.set_index(by).index.isin(new.set_index(by).index)], new]).sort_values(by, kind='stable')
        replace_file(path, lambda p: write(t.convert_dtypes(), p, index=False))

def keep(cell, at, bad):
    "Put a cell into the tables, the list of its faults first"
    row = dict(zip(CELL, cell))
    put(SDCS, pd.DataFrame({**row, 'fault': bad}), CELL)
    put(FOUND, pd.DataFrame([row | at]), CELL)

# ---------------------------------------------------------------- judge

def of_cell(net, cell, at, bad) -> pd.DataFrame:
    "The faults of a cell that make SDCs, on their images among all test images"
    parts, done = [], 0
    while done < at['faults']:
        faults, first, _ = portion(net, cell, done)
        mine = faults[faults.fault.isin(bad - done)] # at once: a channel of every fault of the cell is more than fits into memory
        parts.append(mine.assign(fault=mine.fault + done, image=mine.image + first))
        done += faults.fault.nunique()
    return pd.concat(parts, ignore_index=True)

def judge_cells(b:Bench, args):
    "Judge what was found; what other detectors said of the same SDCs is kept"
    for cell in b.net.cells(args):
        at, bad = known(cell)
        if not at['runs']: print(name_of(cell), 'is not found yet', flush=True); continue
        t = pd.read_csv(GRID)
        old = next((r for r in t[is_cell(t, cell)].to_dict('records') if all(r[c] == at[c] for c in COUNTS)), {})
        if not args.detectors and all(np.isfinite(old.get(f'{n} @ {f}', np.nan)) for n, f in b.thresholds): continue
        row, t = dict(zip(CELL, cell)), again(b, cell, at, bad, args.work / 'judged' / name_of(cell))
        seen = pd.DataFrame({f'{n} @ {f}': ~(t[f'{n}.score'] <= v) for (n, f), v in b.thresholds.items()}, index=t.index)
        put(GRID, pd.DataFrame([old | row | at | seen.sum().astype(int).to_dict()]), CELL)
        put(REACH, reach(t, b, 'fault' if 'weight' in cell else 'image').assign(**row), [*CELL, 'detector'])
        bits = by_bit(t, seen)
        if args.detectors: bits = beside(cell, bits) if old else bits[:0]
        if len(bits): put(BITS, bits.assign(**row), [*CELL, 'bit'])
        print(name_of(cell), at, flush=True)

def again(b:Bench, cell, at, bad, folder) -> pd.DataFrame: # A row per SDC
    "The faults of a cell that make SDCs once more, with all detectors looking on"
    if not len(bad): return pd.DataFrame({f'{n}.{c}': [] for n in b.detectors for c in ('score', 'alarm')} | {'model': []}, dtype=object)
    faults = of_cell(b.net, cell, at, bad)
    t = b.net.campaign(faults, b.net.images(0, (faults.image.max() // b.net.size + 1) * b.net.size), folder, detectors=b.watch()).query("outcome == 'SDC'")
    if len(t) != at['sdcs']: raise RuntimeError(f'{name_of(cell)}: {at["sdcs"]} SDCs became {len(t)} when they were run again')
    shutil.rmtree(folder)
    return t

def by_bit(t, seen) -> pd.DataFrame:
    "Flips and how many of them each detector saw at the lowest rate"
    flips = t[t.model.str.startswith('flip(')]
    groups = seen.loc[flips.index, [c for c in seen if c.endswith(f' @ {min(FPRS)}')]].groupby(flips.bit) if len(flips) else None
    return pd.DataFrame() if groups is None else groups.sum().assign(sdcs=groups.size()).reset_index()

def beside(cell, bits) -> pd.DataFrame:
    "The same, and what other detectors saw of these flips; nothing, if these have not judged them"
    t = pd.read_csv(BITS)
    old = t[is_cell(t, cell)].drop(columns=CELL)
    return old if old.empty or bits.empty else bits.set_index('bit').combine_first(old.set_index('bit')).reset_index()

def reach(t, b:Bench, cluster) -> pd.DataFrame: # A row per detector
    """How many of the SDCs that a detector saw raise no alarm without the fault (`net`), how many independent trials its recall is worth, since SDCs share a `cluster`, fault or image, and how many layers lie
    between the struck one and the first abnormal one; a stored tensor that looks abnormal is no layer"""
    order = {l.name: i for i, l in enumerate(layers(b.net.model, next(iter(b.net.test)), want=lambda m: True))}
    def row(n):
        hit = t[t[f'{n}.alarm'].astype(bool)]
        where, struck, names = hit[f'{n}.layer'].map(order), hit.layer.map(lambda s: order.get(s, order.get(s.rpartition('.')[0]))), hit[f'{n}.layer'].value_counts()
        behind = where - struck
        return dict(detector=n, seen=len(hit), net=int((~hit[f'{n}.twin'].astype(bool)).sum()), trials=round(trials(t[f'{n}.alarm'].astype(bool), t[cluster]), 1), stored=int(where.isna().sum()), median=behind.median(), upper=behind.quantile(.95), most=behind.max(), layer=names.index[0], share=names.iloc[0] / len(hit))
    return pd.DataFrame([row(n) for n in b.detectors if t[f'{n}.alarm'].any()], columns=['detector', 'seen', 'net', 'trials', 'stored', 'median', 'upper', 'most', 'layer', 'share'])

def fill(net, args):
    "The cells of a network in one precision"
    if 'find' in args.stages: find(net, args)
    if 'judge' not in args.stages: return
    b = Bench(net, not args.no_odd, args.detectors)
    put(FALSE, b.false, ['network', 'dtype', 'device', 'inputs', 'detector', 'fpr'])
    judge_cells(b, args)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    p.add_argument('--dtypes', nargs='+', default=list(EXPONENT), choices=EXPONENT)
    p.add_argument('--targets', nargs='+', default=['neuron', 'weight'], choices=['neuron', 'weight'])
    p.add_argument('--kinds', nargs='+', default=None, help='only these error models')
    p.add_argument('--sdcs', type=int, default=1000, help='a cell is full with so many SDCs')
    p.add_argument('--runs', type=int, default=100_000, help='or with so many runs')
    p.add_argument('--stages', nargs='+', default=['find', 'judge'], choices=['find', 'judge'])
    p.add_argument('--detectors', nargs='+', default=[], help='judge by these only, named as in grid.csv, and keep what the others said')
    p.add_argument('--no-odd', action='store_true', help='leave out the unusual inputs')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--work', type=Path, default=Path(__file__).parent / 'grid', help='folder of the campaigns that are under way')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    for network, dtype in itertools.product(args.networks, args.dtypes):
        with InFloat() if (args.device, dtype) == ('cpu', 'float16') else nullcontext(): fill(Net(network, dtype, args.device), args)

if __name__ == '__main__': main()
