"""Which looks, checks and sums a sentinel should have: chosen by faults in training images, of which the grid uses neither the faults nor the images

For each network all picks at all layers are fitted on 4,000 training images; 3,000 others are the clean inputs, and 400 others are
struck by faults of the grid's kinds (not by those that the grid draws), until 300 different faults of a group made SDCs.
`sentinel.choose` finds the picks that reveal most for a price: on the groups of faults whose values leave the usual range, and on
all groups, for the shares of an inference at which grid.py has sentinels.

Writes sites.csv: the picks for each aim and share, what they cost together, in microseconds, and their recall on the faults that
chose. Rows of networks that are not run this time are kept, and so are those of an aim of which not all groups are collected yet.
Deviations stay in `--work`, group by group, so that a run that was stopped goes on, and `--stages choose` chooses anew in some
minutes; delete the folder before other portions or another version.
"""
import argparse, itertools
from pathlib import Path

import numpy as np, pandas as pd, torch

from drdna.baselines import fit_detectors
from drdna.core import replace_file
from drdna.data_model import cifar10_splits
from drdna.detection import collect_clean
from drdna.leaderboard import OUT_OF_RANGE
from drdna.sentinel import Sentinel, Size, choose, offers, price, sizes

from grid import FITTED, NETWORKS, SENTINELS, SITES, Batches, Net, draw, kinds, number, put, thirds

# ---------------------------------------------------------------- what SDCs look like

CHOOSING = 'exponent MSB', 'U(±100)', 'U(±1000)', 'U(±10)', 'zeroed channel'
ENOUGH, FEWEST, MOST = 300, 20, 4  # different faults that make SDCs: when a group is full, with how few it does not count; SDCs that one of them adds
GROUPS = [*itertools.product(CHOOSING, ('neuron', 'weight'), range(3))]
FAULTS = {'neuron': (2000, 1), 'weight': (200, 20)}  # in a portion, and how many images each strikes: many faults on few images, for SDCs of one weight look alike

def group(net, det, images, portions, kind, target, third) -> torch.Tensor: # `(m, picks)`, of as many SDCs as it takes
    "Deviations of enough SDCs of a group, or of what so many portions of faults give, four times as many where the aim is to see all; two that make none end it"
    (n, struck), seen, made, i = FAULTS[target], [], 0, CHOOSING.index(kind)
    data = Batches(images, net.test.dtype, 100 if target == 'neuron' else struck)
    for k in range(portions * (4 if kind in OUT_OF_RANGE else 1)):
        faults = draw(net.model, thirds(net.found)[third], target, kinds(net.dtype)[kind], n, 10**8 + 10**6 * i + 10**5 * third + 10**4 * k, len(images), struck)
        d, different = look(net, det, data, faults, ENOUGH - made)
        seen.append(d); made += different
        if made >= ENOUGH or (k == 1 and not made): break
    print(net.network, kind, target, 'third', third + 1, f'{made} of {(k + 1) * n} faults made SDCs', flush=True)
    return torch.cat(seen) if made >= FEWEST else seen[0][:0]

def look(net, det, images, faults, most) -> tuple: # Some SDCs, `(m, picks)`, and how many faults made them
    "Deviations of SDCs that the first faults to make some do make"
    t = net.run(faults, images, desc='find').table
    bad = faults[number(faults).isin(t.fault[t.outcome == 'SDC'].unique()[:most])]
    if bad.empty: return torch.empty(0, len(det.picks)), 0
    r = net.run(bad, images, observers={'x': det}, desc='look')
    sdc = r.table.reset_index().query("outcome == 'SDC'").groupby('fault').head(MOST)
    return det.deviations(r.faulty['x'][torch.tensor(sdc.index.to_numpy())]), sdc.fault.nunique()

def file_of(folder, *group): return folder / f'{"-".join(map(str, group))}.pt'

def collect(net, folder, portions):
    "Keep the deviations of all picks, of clean inputs and, group by group, of SDCs; what is there stays"
    folder.mkdir(parents=True, exist_ok=True)
    keep = lambda what, path: replace_file(path, lambda p: torch.save(what, p))
    if not (left := [g for g in GROUPS if not file_of(folder, *g).exists()]): return
    train, first = cifar10_splits()['train'], next(iter(net.test))
    fit, clean = (net.batches(s) for s in (train[:FITTED], train[FITTED:FITTED + 3000]))
    det = fit_detectors(net.model, fit, {'x': Sentinel(net.model, first, offers(net.model, first))})['x']
    if file_of(folder, 'clean').exists() and collected(folder)['picks'] != det.picks: raise SystemExit(f'{folder}: what is collected there is of other picks; delete it first')
    keep(dict(picks=det.picks, heads=det.heads, sizes={n: tuple(s) for n, s in sizes(net.model, first).items()}, clean=det.deviations(collect_clean(net.model, clean, {'x': det})['x'])), file_of(folder, 'clean'))
    for g in left: keep(group(net, det, train[FITTED + 3000:FITTED + 3400], portions, *g), file_of(folder, *g))

def collected(folder) -> dict: # `picks`, `heads`, `sizes`, `clean`, and `seen`: (kind, target, third) to `(m, picks)`
    "What `collect` has kept"
    if not file_of(folder, 'clean').exists(): raise SystemExit(f'{folder}: nothing is collected yet; run the stage collect first')
    load = lambda path: torch.load(path, weights_only=True)
    clean = load(file_of(folder, 'clean'))
    return clean | {'sizes': {n: Size(*s) for n, s in clean['sizes'].items()}, 'seen': {g: load(file_of(folder, *g)) for g in GROUPS if file_of(folder, *g).exists()}}

# ---------------------------------------------------------------- the choice

AIMS = {'out of range': lambda group: group[0] in OUT_OF_RANGE, 'all': lambda group: True}

BARE = {'resnet18': 90_000, 'vit': 80_000}  # microseconds of an inference of 32 images, on the machine that `sentinel.COSTS` are of

def chosen(network, known) -> pd.DataFrame:
    "The picks of one network, for each aim of which all groups are collected"
    how = lambda picks: price(picks, known['heads'], known['sizes']) if any(what != 'stored' for what, _ in picks) else np.inf
    res = []
    for aim, wanted in AIMS.items():
        if left := [g for g in GROUPS if wanted(g) and g not in known['seen']]: print(network, aim, 'is not chosen:', len(left), 'groups are not collected', flush=True); continue
        mine = {k: v for k, v in known['seen'].items() if wanted(k) and len(v)}
        shares = {share * BARE[network]: share for a, share in SENTINELS.values() if a == aim}
        t = choose(known['picks'], known['clean'], mine, how, [*shares])
        res.append(t.assign(network=network, aim=aim, share=t.budget.map(shares), groups=len(mine), sdcs=sum(map(len, mine.values()))))
    return pd.concat(res)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    p.add_argument('--stages', nargs='+', default=['collect', 'choose'], choices=['collect', 'choose'])
    p.add_argument('--portions', type=int, default=5, help='at most so many portions of faults per group')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--work', type=Path, default=Path(__file__).parent / 'sites', help='folder of the deviations')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for n in a.networks:
        folder = a.work / n
        if 'collect' in a.stages: collect(Net(n, 'float32'), folder, a.portions)
        if 'choose' in a.stages: put(SITES, chosen(n, collected(folder)), ['network', 'aim'])

if __name__ == '__main__': main()
