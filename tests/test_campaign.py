"""Campaigns through kills, full disks, lost workers and damaged folders: the table is that of an undisturbed run, row for row"""
import multiprocessing, os, resource, shutil, signal, subprocess, threading, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from drdna import campaign as cp
from drdna.baselines import Range, fit_detectors
from drdna.campaign import Calibrated, Campaign, Results, replay
from drdna.core import layers
from drdna.detection import DrDNA
from drdna.plan import Plan, Population
from drdna.profiling import profile

fork = multiprocessing.get_context('fork')
PLAN = Plan((Population(bits=(30,), strata=('layer',), allocation='equal', n=240), Population('weight', n=24), Population('neuron', 'stuck_at', pattern='channel', n=40),
             Population(bits=(29,), margin=.1, looks=(20, 60, 2000))), images=200)

@pytest.fixture(scope='module', autouse=True)
def one_core():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def make(plan=PLAN, chunk=12, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval().requires_grad_(False)
    data = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(50)
    found = layers(model, data[0])
    watch = {'drdna': Calibrated(DrDNA.fit(profile(model, data, found, k=8)), 5.), 'range': Calibrated(fit_detectors(model, data, {'r': Range(found)})['r'], 0.)}
    return Campaign(model, data, plan, watch, chunk=chunk)

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

def test_a_dead_worker_process_costs_its_units_alone(campaign, whole, tmp_path):
    with Counted(1, fork) as pool:
        def strike():
            while not list(tmp_path.glob('parts/*.parquet')): time.sleep(.01)
            for pid in list(pool._processes): os.kill(pid, signal.SIGKILL)
        hit = threading.Thread(target=strike); hit.start()
        with pytest.raises(RuntimeError, match='all finished parts are kept: run again'): campaign.run(tmp_path, pool)
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
    "Make this process die at the n-th part, at one point of its way to the disk"
    import pyarrow.parquet as pq
    left, real = [n], {'write': pq.write_table, 'fsync': os.fsync, 'replace': os.replace}
    def due(path): left[0] -= 'parquet' in str(path); return left[0] <= 0
    def write(t, path, **kw):
        if point == 'before write' and due(path): die()
        real['write'](t, path, **kw)
        if point == 'half written' and due(path): os.truncate(path, os.path.getsize(path) // 2); die()
    def fsync(fd):
        name = os.readlink(f'/proc/self/fd/{fd}')
        if point == 'before sync' and due(name): die()
        real['fsync'](fd)
        if point == 'after sync' and due(name): die()
    def move(a, b):
        if point == 'before rename' and due(b): die()
        real['replace'](a, b)
        if point == 'after rename' and due(b): die()
    pq.write_table, os.fsync, os.replace = write, fsync, move

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

def test_twelve_kills_at_the_points_that_matter(campaign, whole, tmp_path):
    done = 0
    for k, point in enumerate(POINTS * 2):
        p = fork.Process(target=child, args=(campaign, tmp_path, point, 1 + k % 3 + (k < 6)))  # the manifest's and the list's files come first
        p.start(); p.join(60)
        assert p.exitcode == -signal.SIGKILL, point
        now = len(Results(tmp_path)) if (tmp_path / 'manifest.json').exists() else 0
        assert done <= now < len(whole)
        done = now
    assert done > 5
    same(campaign.run(tmp_path).table, whole.table)
    assert not leftovers(tmp_path)

def test_twelve_kills_at_any_moment(campaign, whole, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(12):
        started = fork.Event()
        p = fork.Process(target=child, args=(campaign, tmp_path, None, 0, .02, started))
        p.start()
        assert started.wait(60)
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

def limited(campaign, folder, told):
    "Run where no file may grow beyond 6 kB"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6144, resource.RLIM_INFINITY))
    try: campaign.run(folder)
    except OSError as e: told.put(str(e))

def test_a_full_disk(campaign, whole, tmp_path):
    with small_disk(tmp_path / 'disk') as enlarge:
        folder = tmp_path / 'disk' / 'run'
        if enlarge:
            with pytest.raises(OSError, match='(?i)space'): campaign.run(folder)
            assert 0 < len(Results(folder)) < len(whole) and not leftovers(folder)
            enlarge()
        else: limit_file_size(campaign, folder)
        same(campaign.run(folder).table, whole.table)

def limit_file_size(campaign, folder):
    told = fork.SimpleQueue()
    p = fork.Process(target=limited, args=(campaign, folder, told))
    p.start(); p.join(60)
    assert p.exitcode == 0 and 'too large' in told.get() and not leftovers(folder)

def test_files_that_must_not_grow(campaign, whole, tmp_path):
    limit_file_size(campaign, tmp_path)
    same(campaign.run(tmp_path).table, whole.table)

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
    campaign.bind(tmp_path) if (tmp_path / 'parts').mkdir() is None else None
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

def test_a_foreign_part_is_refused_and_a_lost_one_is_computed_again(campaign, whole, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(whole.folder, folder)
    a, b = sorted((folder / 'parts').iterdir())[:2]
    shutil.copy(a, b)
    for act in (lambda: campaign.run(folder), lambda: Results(folder).table):
        with pytest.raises(ValueError, match=f'{b.name}: not a part of this run; delete it'): act()
    b.unlink()
    same(campaign.run(folder).table, whole.table)
