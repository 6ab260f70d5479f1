"""Which looks and checks a sentinel should have: chosen by faults in training images, which no other benchmark touches

For each network all looks at all layers and all checks are fitted on 4,000 training images; 2,000 others are the clean inputs, and
400 others are struck by faults of the grid's kinds (not by those that the grid draws), until 100 different faults of a group made
SDCs. `sentinel.choose` orders the picks by what they reveal for their price: once on the groups of faults whose values leave the usual
range, and once on all groups. Writes sites.csv: the picks in the order of choice, with the price up to each, in microseconds and as a
share of an inference, and recall on the faults that chose. grid.py and guard.py take those up to some share. Rows of networks that
are not run this time are kept.
"""
import argparse, itertools, time

import numpy as np, pandas as pd, torch

from drdna.baselines import fit_detectors
from drdna.core import replace_file
from drdna.data_model import cifar10_splits, normalize, sample
from drdna.detection import collect_clean
from drdna.leaderboard import OUT_OF_RANGE
from drdna.sentinel import Sentinel, choose, offers, price, sizes

from grid import FITTED, NETWORKS, SITES, Batches, Net, draw, kinds, number, thirds

CHOOSING = 'exponent MSB', 'U(±100)', 'U(±1000)', 'U(±10)', 'zeroed channel'
ENOUGH, FEWEST, MOST = 100, 20, 4  # different faults that make SDCs: when a group is full, with how few it does not count; SDCs that one of them adds
FAULTS = {'neuron': (2000, 1), 'weight': (200, 20)}  # in a portion, and how many images each strikes: many faults on few images, for SDCs of one weight look alike

def groups(net, det, images, portions) -> dict: # (kind, target, third) to `(m, picks)`, the deviations of its SDCs
    "What SDCs look like: of each group enough, or what so many portions of faults give, four times as many where the aim is to see all; two that make none end the group"
    res = {}
    for (i, kind), target, (third, here) in itertools.product(enumerate(CHOOSING), FAULTS, enumerate(thirds(net.found))):
        (n, struck), seen, made = FAULTS[target], [], 0
        data = Batches(images, net.test.dtype, 100 if target == 'neuron' else struck)
        for k in range(portions * (4 if kind in OUT_OF_RANGE else 1)):
            faults = draw(net.model, here, target, kinds(net.dtype)[kind], n, 10**8 + 10**6 * i + 10**5 * third + 10**4 * k, len(images), struck)
            d, different = look(net, det, data, faults, ENOUGH - made)
            seen.append(d); made += different
            if made >= ENOUGH or (k == 1 and not made): break
        if made >= FEWEST: res[kind, target, third] = torch.cat(seen)
        print(net.network, kind, target, 'third', third + 1, f'{made} of {(k + 1) * n} faults made SDCs', flush=True)
    return res

def look(net, det, images, faults, most) -> tuple: # Some SDCs, `(m, picks)`, and how many faults made them
    "Deviations of SDCs that the first faults to make some do make"
    t = net.run(faults, images, desc='find').table
    bad = faults[number(faults).isin(t.fault[t.outcome == 'SDC'].unique()[:most])]
    if bad.empty: return torch.empty(0, len(det.picks)), 0
    r = net.run(bad, images, observers={'x': det}, desc='look')
    sdc = r.table.reset_index().query("outcome == 'SDC'").groupby('fault').head(MOST)
    return det.deviations(r.faulty['x'][torch.tensor(sdc.index.to_numpy())]), sdc.fault.nunique()

@torch.inference_mode()
def bare(model, batch) -> float: # Microseconds
    "Median time of an inference"
    x, took = normalize(sample('evaluate').images[:batch]), []
    for _ in range(30):
        start = time.perf_counter(); model(x); took.append(time.perf_counter() - start)
    return 1e6 * float(np.median(took))

AIMS = {'out of range': lambda group: group[0] in OUT_OF_RANGE, 'all': lambda group: True}

def chosen(network, portions, share, batch) -> pd.DataFrame:
    "The picks of one network, for each aim"
    net, train = Net(network, 'float32'), cifar10_splits()['train']
    fit, clean = (Batches(s, torch.float32) for s in (train[:FITTED], train[FITTED:FITTED + 2000]))
    first = next(iter(net.test))
    det = fit_detectors(net.model, fit, {'x': Sentinel(net.model, first, offers(net.model, first))})['x']
    clean, seen = det.deviations(collect_clean(net.model, clean, {'x': det})['x']), groups(net, det, train[FITTED + 2000:FITTED + 2400], portions)
    size, us = sizes(net.model, first), bare(net.model, batch)
    cost = lambda picks: price(picks, det.heads, size, batch)
    res = []
    for aim, wanted in AIMS.items():
        mine = {k: v for k, v in seen.items() if wanted(k)}
        t = choose(det.picks, clean, mine, cost, share * us)
        res.append(t.assign(network=network, aim=aim, added=t.cost / us, groups=len(mine), sdcs=sum(map(len, mine.values()))))
    return pd.concat(res)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    p.add_argument('--portions', type=int, default=5, help='at most so many portions of faults per group')
    p.add_argument('--share', type=float, default=.05, help='where the choice ends, as a share of an inference')
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for n in a.networks:
        t, old = chosen(n, a.portions, a.share, a.batch), pd.read_csv(SITES)
        t = pd.concat([old[old.network != n], t]).sort_values('network', kind='stable')
        replace_file(SITES, lambda path: t.to_csv(path, index=False, float_format='%.5g'))

if __name__ == '__main__': main()
