"""Campaigns: a real one, what a second worker brings, and memory

--real runs campaign.toml on the shipped ResNet-18 with two guards, in this process, and goes on where an earlier session
ended. Sessions that end, by themselves or by Ctrl-C, are noted in campaign-sessions.csv; one that is killed is not, but its
parts count. When all is done, campaign.csv gets the weighted rates of SDCs and DUEs by bit class and by layer and bit class, and
campaign-detection.csv the recalls and false positives.

--speed runs one plan with one and with two worker processes, in turns, and divides the seconds of each round, which include
sending the network. The processes start before, for a small campaign. It needs two idle cores, about four minutes long.

--memory runs 1,000, 10,000 and 100,000 neuron faults of a small network, each in a fresh process, and notes the peaks.
"""
import argparse, itertools, multiprocessing, resource, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd, torch
from torch import nn

from drdna.campaign import Campaign, Results
from drdna.cli import shipped
from drdna.plan import Plan, Population

HERE = Path(__file__).parent
FOLDER = HERE / 'results'
spawn = multiprocessing.get_context('spawn')

def peak() -> float: # MB
    "Most memory that this process has had"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)

def append(file, row):
    "One more row of a table"
    old = pd.read_csv(file) if file.exists() else pd.DataFrame()
    pd.concat([old, pd.DataFrame([row])], ignore_index=True).to_csv(file, index=False, float_format='%.6g')

# ---------------------------------------------------------------- the real one

CLASSES = {'mantissa': range(23), 'other exponent bits': range(23, 30), 'exponent MSB': [30], 'sign': [31]}

def rates(runs) -> pd.DataFrame: # One row per population, layer, bit class and outcome; `all` where it is not split
    "Weighted rates of SDCs and DUEs, of everything, by bit class, by layer, and by both"
    of = {b: name for name, bits in CLASSES.items() for b in bits}
    counts, parts = runs.counts.assign(bits=lambda t: t.bit.map(of)), []
    for layer, bits in itertools.product(('all', counts.layer), ('all', counts.bits)):
        cells = counts.assign(cell=pd.Series(layer, counts.index) + ' / ' + bits)
        parts.append(runs.rates(['SDC', 'DUE'], 'cell', cells))
    t = pd.concat(parts, ignore_index=True)
    t[['layer', 'bits']] = t.cell.str.split(' / ', expand=True).to_numpy()
    return t[['population', 'layer', 'bits', 'outcome', 'n', 'rate', 'lo', 'hi']]

def results(folder) -> int:
    "How many results a folder holds"
    return sum(map(len, Results(folder).parts())) if (folder / 'manifest.json').exists() else 0

def real(a):
    "Run what is left, then write the tables"
    campaign, before, start = Campaign(plan=Plan.load(HERE / 'campaign.toml'), **shipped()), results(a.work), time.perf_counter()
    try: runs = campaign.run(a.work)
    finally:
        took = dict(seconds=time.perf_counter() - start, peak_mb=peak())
        if made := results(a.work) - before: append(a.out / 'campaign-sessions.csv', dict(results=made) | took)
    t, found = rates(runs), runs.detection()
    t.to_csv(a.out / 'campaign.csv', index=False, float_format='%.6f')
    found.to_csv(a.out / 'campaign-detection.csv', index=False, float_format='%.6f')
    print(pd.read_csv(a.out / 'campaign-sessions.csv').to_string(), t[t.layer == 'all'].to_string(), found.to_string(), sep='\n\n')

# ---------------------------------------------------------------- two workers

def speed(a):
    "Seconds with one and with two workers, in turns, after a small round to warm up"
    given, rows = shipped(), []
    with tempfile.TemporaryDirectory() as d, ProcessPoolExecutor(1, spawn) as one, ProcessPoolExecutor(2, spawn) as two:
        pools = {1: one, 2: two}
        def seconds(n, k, faults=a.faults):
            campaign = Campaign(plan=Plan((Population(n=faults),), images=400, seed=n), **given)
            start = time.perf_counter()
            campaign.run(Path(d) / f'{n}-{k}', pools[k])
            return time.perf_counter() - start
        for k in pools: seconds(a.rounds, k, 1000)
        for n in range(a.rounds):
            took = {k: seconds(n, k) for k in ((1, 2) if n % 2 else (2, 1))}
            rows.append(dict(round=n, faults=a.faults, one=took[1], two=took[2], ratio=took[1] / took[2]))
    t = pd.DataFrame(rows)
    t.to_csv(a.out / 'campaign-speed.csv', index=False, float_format='%.6g')
    print(t.round(3).to_string(index=False), f'median {t.ratio.median():.3f}', sep='\n')

# ---------------------------------------------------------------- memory

def small(n) -> Campaign:
    "n faults of a small network"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval().requires_grad_(False)
    return Campaign(model, torch.randn(1000, 3, 8, 8).split(100), Plan((Population(n=n),)))

def grow(n, folder) -> dict: # MB
    "The peaks of this process: when the faults are drawn, when they have run, and when they are counted"
    campaign = small(n); made = peak()
    runs = campaign.run(folder); ran = peak()
    runs.rates()
    return dict(drawn_mb=made, ran_mb=ran, counted_mb=peak())

def memory(a):
    "Peaks of fresh processes"
    rows = []
    for n in (1000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as d, ProcessPoolExecutor(1, spawn) as p: rows.append(dict(faults=n) | p.submit(grow, n, d).result())
    t = pd.DataFrame(rows)
    t.to_csv(a.out / 'campaign-memory.csv', index=False, float_format='%.6g')
    print(t.round(1).to_string(index=False))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    for f in (real, speed, memory): what.add_argument(f'--{f.__name__}', dest='run', action='store_const', const=f, help=f.__doc__)
    p.add_argument('--work', type=Path, default=HERE.parent / 'runs' / 'resnet18', help='run folder of --real')
    p.add_argument('--faults', type=int, default=24000, help='of --speed')
    p.add_argument('--rounds', type=int, default=3, help='of --speed')
    p.add_argument('--out', type=Path, default=FOLDER, help='where tables go')
    a = p.parse_args()
    torch.set_num_threads(1)
    a.run(a)

if __name__ == '__main__': main()
