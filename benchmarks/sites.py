"""Which looks and checks a sentinel should have: chosen by faults in training images, which no other benchmark touches

For each network all looks at all layers and all checks are fitted on 1,000 training images; 2,000 others are the clean inputs, and
400 others are struck by faults of the grid's kinds (not by those that the grid draws). `sentinel.choose` orders the picks by what they
reveal for their price: once on the groups of faults whose values leave the usual range, and once on all groups. Writes sites.csv: the
picks in the order of choice, with the price up to each, in microseconds and as a share of an inference, and recall on the faults that
chose. grid.py and guard.py take those up to some share.
"""
import argparse, time

import numpy as np, pandas as pd, torch

from drdna.baselines import fit_detectors
from drdna.data_model import cifar10_splits, normalize, sample
from drdna.detection import collect_clean
from drdna.leaderboard import OUT_OF_RANGE
from drdna.sentinel import Sentinel, choose, offers, price, sizes

from grid import NETWORKS, PORTION, SITES, Batches, Net, draw, kinds, number, thirds

CHOOSING = 'exponent MSB', 'U(±100)', 'U(±1000)', 'U(±10)', 'zeroed channel'
ENOUGH, FEWEST = 60, 20  # SDCs of a group; a group with fewer does not count

def groups(net, det, images, portions) -> dict: # (kind, target, third) to the deviations of its SDCs
    "What SDCs look like: of each group enough, or what so many portions of faults give"
    res = {}
    for i, kind in enumerate(CHOOSING):
        for target in PORTION:
            for third, here in enumerate(thirds(net.found)):
                seen, seed = [], 10**8 + 10**6 * i + 10**5 * third
                while len(seen) < portions and sum(map(len, seen)) < ENOUGH:
                    faults = draw(net.model, here, target, kinds(net.dtype)[kind], 2 * PORTION[target], seed + 10**4 * len(seen), len(images.dataset))
                    seen.append(look(net, det, images, faults))
                if sum(map(len, seen)) >= FEWEST: res[kind, target, third] = torch.cat(seen)
    return res

def look(net, det, images, faults) -> torch.Tensor: # One row per SDC
    "Deviations of the SDCs that these faults make"
    t = net.run(faults, images, desc='find').table
    bad = faults[number(faults).isin(t.fault[t.outcome == 'SDC'])]
    if bad.empty: return torch.empty(0, len(det.picks))
    r = net.run(bad, images, observers={'x': det}, desc='look')
    return det.deviations(r.faulty['x'][torch.tensor((r.table.outcome == 'SDC').to_numpy())])

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
    fit, clean, struck = (Batches(s, torch.float32) for s in (train[:1000], train[1000:3000], train[3000:3400]))
    first = next(iter(net.test))
    det = fit_detectors(net.model, fit, {'x': Sentinel(net.model, first, offers(net.model, first))})['x']
    clean, seen = det.deviations(collect_clean(net.model, clean, {'x': det})['x']), groups(net, det, struck, portions)
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
    p.add_argument('--portions', type=int, default=6, help='at most so many faults per group, in twice the portions of the grid')
    p.add_argument('--share', type=float, default=.05, help='where the choice ends, as a share of an inference')
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    pd.concat([chosen(n, a.portions, a.share, a.batch) for n in a.networks]).to_csv(SITES, index=False, float_format='%.5g')

if __name__ == '__main__': main()
