"""Campaigns through kills, full disks, lost workers and damaged folders: the table is that of an undisturbed run, row for row"""
import io, multiprocessing, os, re, resource, shutil, signal, subprocess, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from drdna import campaign as cp
from drdna.baselines import Range, fit_detectors
from drdna.campaign import Calibrated, Campaign, Results, replay
from drdna.core import layers
from drdna.detection import DrDNA
from drdna.engine import run
from drdna.mitigation import Restrict, clamp, zero
from drdna.plan import Plan, Population
from drdna.profiling import profile
from drdna.sentinel import Sentinel

fork = multiprocessing.get_context('fork')
PLAN = Plan((Population(bits=(30,), strata=('layer',), allocation='equal', n=240), Population('weight', n=24), Population('neuron', 'stuck_at', pattern='channel', n=40),
             Population(bits=(29,), margin=.1, looks=(20, 60, 2000))), images=200)

@pytest.fixture(scope='module', autouse=True)
def one_core():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def make(plan=PLAN, chunk=12, seed=0, faults=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval().requires_grad_(False)
    data = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(50)
    found = layers(model, data[0])
    fitted = fit_detectors(model, data, {'range': Range(found), 'sentinel': Sentinel(model, data[0], [('max', '2'), ('min', '2'), ('min in', '5'), ('stored', '5.weight')])})
    watch = {'drdna': Calibrated(DrDNA.fit(profile(model, data, found, k=8)), 5.), 'range': Calibrated(fitted['range'], 0.), 'sentinel': Calibrated(fitted['sentinel'], 1.5)}
    return Campaign(model, data, plan, watch, faults, chunk=chunk)

@pytest.fixture(scope='module')
def campaign(): return make()

@pytest.fixture(scope='module')
def whole(campaign, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    return campaign.run(folder)

def same(a, b): pd.testing.assert_frame_equal(a, b, check_exact=True)

def leftovers(folder): return [p.name for p in folder.rglob('*') if p.name.endswith('.tmp')]

# ---------------------------------------------------------------- what a table says

def test_the_table_is_complete(campaign, whole):
    t = whole.table
    assert t.fault.is_monotonic_increasing and not t.duplicated(['fault', 'image']).any()
    per = t.groupby(['population', 'fault']).size()
    assert (per['weight flip()'] == 100).all() and (per.drop('weight flip()') == 1).all() and len(per['weight flip()']) == 24
    assert set(t.outcome) > {'masked', 'SDC'} and t['drdna.alarm'].any() and t['range.layer'].isin(['', '0', '2', '5']).all()
    assert (t['drdna.alarm'] == (t['drdna.layer'] != '')).all() and len(whole) > 30
    c = whole.counts
    assert c.images.sum() == len(t) and (c[cp.OUTCOMES].sum(axis=1) == c.images).all() and c.SDC.sum() == (t.outcome == 'SDC').sum()

def test_detection_is_that_of_the_table(whole):
    t, found = whole.table, whole.detection().set_index(['population', 'detector', 'outcome'])
    for (p, d, o), row in found.iterrows():
        mine = t[(t.population == p) & (t.outcome == o)]
        hit = mine[f'{d}.alarm']
        assert [row.n, row.detected, row.net] == [len(mine), hit.sum(), (hit & ~mine[f'{d}.twin']).sum()]
        assert row.n == 0 or row.lo <= row.recall <= row.hi
        clean = t.drop_duplicates('image')
        assert (row.fpr_k, row.fpr_n) == (clean[f'{d}.twin'].sum(), len(clean))
    p = 'neuron stuck_at() channel()'  # one stratum: the plain share
    assert found.n[p, 'range', 'SDC'] > 0 and found.recall[p, 'range', 'SDC'] == pytest.approx(found.net[p, 'range', 'SDC'] / found.n[p, 'range', 'SDC'])

def test_rates_of_no_domain_have_columns(whole):
    t = whole.rates(['SDC'], 'layer', whole.counts[:0])
    assert t.empty and list(t) == ['population', 'layer', 'outcome', *cp.RATE]

def test_a_filtered_list_gives_the_same_rows(campaign, whole, tmp_path):
    t = whole.table
    keep = t.fault[(t['look'] > 0) | (t.target == 'weight') & (t.bit > 25)].unique()  # stored faults go round the end of the inputs, too
    assert {1} <= set(t['look']) and (t[t.target == 'weight'].groupby('fault').image.agg(lambda s: s.max() - s.min()) > 100).any()
    some = campaign.faults[campaign.faults.fault.isin(keep)]
    got = make(faults=some).run(tmp_path)
    same(got.table, t[t.fault.isin(keep)].reset_index(drop=True))
    assert 'random sample' in got._repr_html_() and 'random sample' not in whole._repr_html_()

def test_a_list_without_a_plan(campaign, tmp_path):
    some = campaign.faults[(campaign.faults.target == 'weight') & (campaign.faults.image < 50)]
    c = make(None, faults=some)
    t = c.run(tmp_path).table
    assert (t.groupby('fault').image.nunique() == 100).all() and t.fault.nunique() == some.fault.nunique()

def repaired(campaign, how, **more):
    "A campaign with a repair, one detector at two thresholds, and its records"
    model, batches, found, watch, *_ = campaign.setup
    det, p = watch['drdna'].detector, profile(model, batches, found, k=8)
    plan = Plan((Population(bits=(30,), n=60), Population('weight', bits=(30,), n=4)), images=200)
    return Campaign(model, batches, plan, watch | {'drdna, low': Calibrated(det, .5)}, repairs={'repair': partial(Restrict, model, p, how)}, keep=(n for n in ['drdna']), **more)

def test_repairs_and_records_are_those_of_a_run(campaign, tmp_path):
    c = repaired(campaign, clamp)
    t, s = c.run(tmp_path / 'a').table, c.setup
    assert cp.observers(s.detectors)['drdna, low'] == 'drdna' and (t['drdna, low.score'] == t['drdna.score']).all() and t['drdna, low.alarm'].sum() > t['drdna.alarm'].sum()
    neurons = c.faults[c.faults.target == 'neuron']
    r = run(s.model, s.batches, neurons, s.layers, {'d': s.detectors['drdna'].detector}, s.repairs, images=200)
    mine = t[t.target == 'neuron']
    assert (mine['repair.pred'].to_numpy() == r.repaired['repair'].table.pred.to_numpy()).all() and (mine['repair.outcome'].to_numpy() == r.repaired['repair'].table.outcome.to_numpy()).all()
    assert torch.equal(torch.from_numpy(np.stack(mine['drdna.record'])), r.faulty['d'].flatten(1)) and (t['repair.pred'] != t.pred).any()
    with ProcessPoolExecutor(2, mp_context=fork) as pool: same(repaired(campaign, clamp).run(tmp_path / 'b', pool).table, t)
    with pytest.raises(ValueError, match='belongs to another campaign: repairs'): repaired(campaign, zero).run(tmp_path / 'a')

def test_a_sequential_population_stops_in_time(whole):
    p = PLAN.population[-1]
    looks = sorted(whole.counts['look'][whole.counts.population == str(p)].unique())
    assert looks == list(range(len(looks))) and len(looks) < 3 and whole.reached(p, looks[-1]) and not any(whole.reached(p, k) for k in looks[:-1])

def test_rows_are_replayed(campaign, whole):
    t = whole.table
    for _, row in pd.concat([t[t.target == 'weight'].iloc[[0, 99, -1]], t[t.outcome == 'SDC'].iloc[:5], t[t.pattern != 'point()'].iloc[:3]]).iterrows():
        r = replay(whole, row.fault, row.image)
        assert r.output.double().softmax(-1).max().item() == row.confidence and r.clean.argmax().item() == row.clean_pred
        assert row.outcome == 'masked' or any(not torch.equal(a, b) for a, b in r.layers.values())

# ---------------------------------------------------------------- the same table, whoever computes it

def test_the_bar_shows_rate_time_left_and_sdc_rate(tmp_path, monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(cp, 'tqdm', partial(cp.tqdm, disable=False, file=text, mininterval=0))
    c = make(Plan((Population(bits=(30,), n=60),), images=200))
    c.run(tmp_path)
    e = Results(tmp_path).rates(['SDC']).iloc[0]
    assert f'SDC {e.rate:.2%} [{e.lo:.2%}, {e.hi:.2%}]' in text.getvalue() and 'fault/s' in text.getvalue() and re.search(r'\d\d:\d\d<\d\d:\d\d', text.getvalue())

class Counted(ProcessPoolExecutor):
    setups = 0
    def submit(self, fn, *args): self.setups += args[4] is not None; return super().submit(fn, *args)

def test_processes_give_the_same_table_and_get_the_network_once(campaign, whole, tmp_path):
    with Counted(2, fork) as pool: same(campaign.run(tmp_path, pool).table, whole.table)
    assert 1 <= pool.setups <= 4 < len(whole)

def test_chunks_and_order_do_not_matter(campaign, whole, tmp_path, monkeypatch):
    same(make(chunk=100).run(tmp_path / 'a').table, whole.table)
    compute = Campaign._compute
    monkeypatch.setattr(Campaign, '_compute', lambda self, todo, ex: compute(self, todo[::-1], ex))
    same(campaign.run(tmp_path / 'b').table, whole.table)

def test_a_worker_that_would_give_other_bits_refuses(campaign, tmp_path, monkeypatch):
    real, asked = cp.environment, []
    monkeypatch.setattr(cp, 'environment', lambda m: real(m) | ({'torch': '0.1'} if asked.append(0) or len(asked) > 3 else {}))  # bind and two comparisons come first
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="would give other bits: torch is '.*' in the campaign, '0.1' in the worker"): campaign.run(tmp_path, pool)

def test_what_cannot_be_sent_is_named(tmp_path):
    c = make()
    c.setup.model.lock = threading.Lock()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match='cannot be sent to workers .*lock'): c.run(tmp_path, pool)

def test_a_dead_worker_process_costs_its_units_alone(campaign, whole, tmp_path):
    with Counted(1, fork) as pool:
        def strike():
            while not list(tmp_path.glob('parts/*.parquet')): time.sleep(.01)
            for pid in list(pool._processes): os.kill(pid, signal.SIGKILL)
        hit = threading.Thread(target=strike); hit.start()
        with pytest.raises(ChildProcessError, match='all finished parts are kept: run again'): campaign.run(tmp_path, pool)
        hit.join()
    assert 0 < len(Results(tmp_path)) < len(whole)
    same(campaign.run(tmp_path).table, whole.table)

def test_dask_with_a_worker_killed_in_the_middle(campaign, whole, tmp_path):
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path / 'dask')) as cluster, Client(cluster) as client:
        pids = list(client.run(os.getpid).values())
        assert len(set(pids)) == 2
        killed = []
        def strike():
            while len(list((tmp_path / 'run').glob('parts/*.parquet'))) < 5: time.sleep(.01)
            os.kill(pids[0], signal.SIGKILL); killed.append(len(list((tmp_path / 'run').glob('parts/*.parquet'))))
        hit = threading.Thread(target=strike); hit.start()
        got = campaign.run(tmp_path / 'run', client.get_executor())
        hit.join()
        assert killed and killed[0] < len(whole)
    same(got.table, whole.table)

# ---------------------------------------------------------------- SIGKILL

def die(): os.kill(os.getpid(), signal.SIGKILL)

def at_point(point, n):
    "Make this process die when it gets to a point of a file's way to the disk for the n-th time; folders are synced, too"
    import pyarrow.parquet as pq
    left, fsync, replace, text, table = [n], os.fsync, os.replace, Path.write_text, pq.write_table
    def here(name):
        left[0] -= name == point
        if not left[0]: die()
    def written(go, path):
        here('before write'); go()
        if point == 'half written' and left[0] == 1: os.truncate(path, os.path.getsize(path) // 2)
        here('half written')
    def around(name, go, *args): here(f'before {name}'); go(*args); here(f'after {name}')
    pq.write_table = lambda t, path, **kw: written(lambda: table(t, path, **kw), path)
    Path.write_text = lambda self, *args, **kw: written(lambda: text(self, *args, **kw), self)
    os.fsync, os.replace = (lambda fd: around('sync', fsync, fd)), (lambda a, b: around('rename', replace, a, b))

def child(campaign, folder, point=None, n=0, slow=0., started=None):
    if point: at_point(point, n)
    do = cp.Worker.do
    def slowly(self, *args):
        if started is not None: started.set()
        time.sleep(slow)
        return do(self, *args)
    cp.Worker.do = slowly
    campaign.run(folder)

POINTS = 'before write', 'half written', 'before sync', 'after sync', 'before rename', 'after rename'

def test_kills_at_the_points_that_matter(campaign, whole, tmp_path):
    "At each point of the manifest's way, of the list's, of a part's and of a later part's"
    done = []
    for n in (1, 1, 1, 3):
        for point in POINTS:
            p = fork.Process(target=child, args=(campaign, tmp_path, point, n))
            p.start(); p.join(60)
            assert p.exitcode == -signal.SIGKILL, (n, point)
            done.append(sum(1 for _ in tmp_path.glob('parts/*.parquet')))
        assert (tmp_path / 'manifest.json').exists()
    assert done == sorted(done) and done[:12] == [0] * 12 and 1 == done[17] < done[-1] < len(whole)
    same(campaign.run(tmp_path).table, whole.table)
    assert not leftovers(tmp_path)

def test_twelve_kills_at_any_moment(campaign, whole, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(12):
        started = fork.Event()
        p = fork.Process(target=child, args=(campaign, tmp_path, None, 0, .02, started))
        p.start()
        assert started.wait(60)
        while k == 11 and not list(tmp_path.glob('parts/0*')): time.sleep(.01)  # a busy machine may have got nowhere yet
        time.sleep(rng.uniform(0, .15))
        p.kill(); p.join(60)
        assert p.exitcode == -signal.SIGKILL
    assert 0 < len(Results(tmp_path)) < len(whole)
    same(campaign.run(tmp_path).table, whole.table)
    assert not leftovers(tmp_path)

# ---------------------------------------------------------------- no space

@contextmanager
def small_disk(path):
    "A file system of 128 kB and a way to enlarge it; None where mounting is not allowed"
    path.mkdir()
    if shutil.which('mount') is None or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', path], capture_output=True).returncode: yield None; return
    try: yield lambda: subprocess.run(['mount', '-o', 'remount,size=64m', path], check=True)
    finally: subprocess.run(['umount', '-l', path], check=True)

def limited(campaign, folder, size, told):
    "Run where no file may grow beyond a size"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try: campaign.run(folder)
    except OSError as e: told.put(str(e))

def limit_file_size(campaign, folder, size):
    told = fork.SimpleQueue()
    p = fork.Process(target=limited, args=(campaign, folder, size, told))
    p.start(); p.join(60)
    assert p.exitcode == 0 and 'too large' in told.get() and not leftovers(folder)

def test_a_full_disk(campaign, whole, tmp_path):
    with small_disk(tmp_path / 'disk') as enlarge:
        folder = tmp_path / 'disk' / 'run'
        if enlarge:
            with pytest.raises(OSError, match='(?i)space'): campaign.run(folder)
            assert 0 < len(Results(folder)) < len(whole) and not leftovers(folder)
            enlarge()
        else: limit_file_size(campaign, folder, 1024)
        same(campaign.run(folder).table, whole.table)

def test_files_that_must_not_grow(campaign, whole, tmp_path):
    "First the manifest does not fit, then the list, then some part"
    parts = [p.stat().st_size for p in whole.folder.glob('parts/*')]
    for size in (1024, (whole.folder / 'manifest.json').stat().st_size + 1): limit_file_size(campaign, tmp_path, size)
    campaign.bind(tmp_path)
    limit_file_size(campaign, tmp_path, max(parts) - 1)
    assert 0 < len(Results(tmp_path)) < len(whole)
    same(campaign.run(tmp_path).table, whole.table)

# ---------------------------------------------------------------- memory

def growth(n, folder, told):
    "Bytes by which a run of n faults, late in the network, lets this process grow"
    campaign = make(Plan((Population(layers=('5',), n=n),), images=200), chunk=1000)
    campaign.run(folder)
    told.put(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

def test_memory_does_not_grow_with_the_list(tmp_path):
    told = fork.SimpleQueue()
    for n in (1000, 20000):
        p = fork.Process(target=growth, args=(n, tmp_path / str(n), told))
        p.start(); p.join(120)
        assert p.exitcode == 0
    few, many = told.get(), told.get()
    assert many < 1.1 * few

# ---------------------------------------------------------------- whose folder

def hold(folder, ready, orphan):
    with cp.claimed(folder):
        if orphan and not os.fork(): time.sleep(20); os._exit(0)
        ready.set(); time.sleep(20)

@pytest.mark.parametrize('orphan', [False, True])
def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(campaign, tmp_path, orphan):
    ready = fork.Event()
    p = fork.Process(target=hold, args=(tmp_path, ready, orphan))
    p.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match='another process runs here'): campaign.run(tmp_path)
    p.kill(); p.join()
    with cp.claimed(tmp_path): pass  # though a child of the dead one may live

def test_another_campaign_is_refused_and_the_difference_named(campaign, tmp_path):
    campaign.bind(tmp_path)
    for other, why in ((make(Plan(PLAN.population, images=200, seed=3)), "plan is 'as usual' in the folder, 'seed = 3' in this one"), (make(seed=1), 'weights is'), (make(chunk=13), 'chunk is 12 in the folder'.replace('12', "'12'"))):
        with pytest.raises(ValueError, match='belongs to another campaign') as e: other.run(tmp_path)
        assert why in str(e.value)
    (tmp_path / 'other').mkdir(); (tmp_path / 'other' / 'thesis.tex').touch()
    with pytest.raises(ValueError, match="holds 'thesis.tex' and no manifest"): campaign.run(tmp_path / 'other')
    assert [f.name for f in (tmp_path / 'other').iterdir() if f.name != 'lock'] == ['thesis.tex']

# ---------------------------------------------------------------- damage

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(campaign, whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('damaged') / 'run'
    shutil.copytree(whole.folder, folder)
    path = folder / data.draw(st.sampled_from(['manifest.json', 'faults.parquet', 'parts/000000.parquet', 'parts/000007.parquet']))
    raw = path.read_bytes()
    at, size, junk = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.sampled_from([0, 1, 5, len(raw)])), data.draw(st.binary(max_size=5))
    path.write_bytes(raw[:at] + junk + raw[at + size:])
    try: same(Results(folder).table, whole.table)
    except ValueError as e: assert path.name in str(e) or 'parts' in str(e)
    with suppress(ValueError): same(campaign.run(folder).table, whole.table)

def test_a_lost_fault_list_is_written_again(campaign, whole, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(whole.folder, folder)
    (folder / 'faults.parquet').unlink()
    with pytest.raises(FileNotFoundError): Results(folder).table
    same(campaign.run(folder).table, whole.table)

def test_a_foreign_part_is_refused_and_a_lost_one_is_computed_again(campaign, whole, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(whole.folder, folder)
    a, b = sorted((folder / 'parts').iterdir())[:2]
    shutil.copy(a, b)
    for act in (lambda: campaign.run(folder), lambda: Results(folder).table):
        with pytest.raises(ValueError, match=f'{b.name}: not a part of this run; delete it'): act()
    b.unlink()
    same(campaign.run(folder).table, whole.table)
