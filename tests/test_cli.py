"The command as a user meets it"
import os, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest

from drdna.campaign import Results
from drdna.cli import main

COMMAND = [sys.executable, '-c', 'import sys; from drdna.cli import main; sys.exit(main())']
def drdna(*args, **kw): return subprocess.run([*COMMAND, *args], capture_output=True, text=True, **kw)

@pytest.mark.parametrize('args, says', [
    (['reproduce', '--fpr', '0.0001'], 'needs at least 9999 calibration inputs, got 1000'),
    (['reproduce', '--fpr', '2'], 'lies between 0 and 1'),
    (['reproduce', '--bins', '0'], '--bins 0'),
    (['reproduce', '--faults', '1'], '--faults 1: must be at least 2'),
    (['reproduce', '--workers', '0'], '--workers 0'),
    (['reproduce', '--device', 'abacus'], '--device abacus'),
    (['reproduce', '--out', '/proc/1/nowhere'], '/proc/1/nowhere'),
    (['reproduce', '--faults', 'many'], "invalid int value: 'many'"),
    (['conquer'], "invalid choice: 'conquer'"),
])
def test_a_bad_option_is_one_line_and_exit_code_2(args, says, tmp_path):
    r = drdna(*args, cwd=tmp_path)
    assert r.returncode == 2 and says in r.stderr.splitlines()[-1]
    assert 'Traceback' not in r.stderr and not list(tmp_path.iterdir())

def test_ctrl_c_leaves_no_half_report_and_what_was_computed(tmp_path, capsys):
    p = subprocess.Popen([*COMMAND, 'reproduce', '--out', str(tmp_path / 'r')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a shell's background job ignores it, and so would its children
    deadline = time.time() + 120
    while not list(tmp_path.glob('r/campaign/parts/*.parquet')) and time.time() < deadline: time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and b'interrupted' in err and [f.name for f in (tmp_path / 'r').iterdir()] == ['campaign']
    assert main(['reproduce', '--out', str(tmp_path / 'r'), '--seed', '1']) == 2  # not another one into the same folder
    assert 'belongs to another campaign' in capsys.readouterr().err

# ---------------------------------------------------------------- campaigns

MINE = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval().requires_grad_(False)
    return dict(model=net, data=torch.randn(200, 3, 8, 8).split(50))
def tuple_instead(): return 1, 2
def more(): return make() | {'plan': 1}
number = 3
"""
PLAN = """
version = 1
images = 200
[[population]]
bits = [30]
strata = ["layer"]
n = 400
[[population]]
target = "weight"
n = 20
"""

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text(MINE); Path('plan.toml').write_text(PLAN)
    return tmp_path

CAMPAIGN = ['campaign', 'plan.toml', '--out', 'runs/x', '--model', 'mine:make']
def campaign(*args): return drdna(*CAMPAIGN, *args)

@pytest.fixture
def refused(here, capsys, monkeypatch):
    "Run a command that must end with exit code 2 and one line, in this process: a fresh one takes seconds"
    monkeypatch.setattr(sys, 'path', [*sys.path])
    def run(*args):
        try: code = main([*args])
        except SystemExit as e: code = e.code
        err = capsys.readouterr().err
        assert code == 2 and 'Traceback' not in err
        return err.splitlines()[-1]
    yield run
    sys.modules.pop('mine', None)

def test_a_campaign_of_ones_own_network_and_its_report(here):
    r = campaign()
    assert r.returncode == 0 and f'executing mine:make from {here / "mine.py"}' in r.stderr
    assert 'runs/x: ' in r.stdout and 'intervals at 95%' in r.stdout and 'neuron flip(bits=30)' in r.stdout and 'SDC' in r.stdout
    whole = Results('runs/x').table
    assert campaign().returncode == 0  # nothing left to do
    r = drdna('report', 'runs/x')
    assert r.returncode == 0 and 'report: runs/x/report/index.html' in r.stdout
    assert {'index.html', 'outcomes.csv', 'by_layer.csv', 'by_bit.csv', 'by_channel.csv', 'propagation.csv'} == {f.name for f in Path('runs/x/report').iterdir()}
    assert drdna('report', 'runs/x').returncode == 0  # written anew
    pd.testing.assert_frame_equal(Results('runs/x').table, whole)

def test_workers_and_dask_give_the_same_table(here, monkeypatch):
    from distributed import LocalCluster
    assert campaign().returncode == 0
    whole = Results('runs/x').table
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(here), *filter(None, [os.environ.get('PYTHONPATH')])]))  # workers of a cluster import what the factory made
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(here / 'dask')) as cluster:
        for name, how in {'workers': ['--workers', '2'], 'dask': ['--dask', cluster.scheduler_address]}.items():
            r = campaign(*how, '--out', f'runs/{name}')
            assert r.returncode == 0, r.stderr
            pd.testing.assert_frame_equal(Results(f'runs/{name}').table, whole)

@pytest.mark.parametrize('args, says', [
    (['--model', 'mine'], '--model mine: '), (['--model', 'mine:nothing'], "no attribute 'nothing'; it is to be package.module:factory"), (['--model', 'no_such:make'], "No module named 'no_such'"),
    (['--model', 'mine:number'], '--model mine:number: not a function'), (['--model', 'mine:tuple_instead'], 'gives tuple; it is to give a dictionary with model, data'), (['--model', 'mine:more'], "gives ['data', 'model', 'plan']; it is to"),
    (['--workers', '0'], '--workers 0: must be at least 1'), (['--workers', '2', '--dask', 'tcp://127.0.0.1:1'], 'not allowed with argument'), (['--out', '/proc/1/nowhere'], '/proc/1/nowhere')])
def test_a_bad_option_of_a_campaign(refused, args, says):
    assert says in refused(*CAMPAIGN, *args) and not Path('runs').exists()

@pytest.mark.parametrize('a, b, says', [
    ('bits = [30]', 'bits = [32]', 'plan.toml: population 0: bits = [32]; allowed: increasing whole numbers from 0 to 31'), ('images = 200', 'speed = 3', "plan.toml: there is no field 'speed'; there are"),
    ('["layer"]', '["channel"]', "strata = ['channel']; allowed: layer, and bit"), ('"weight"', '"wieght"', "target = 'wieght'; allowed: neuron, weight, bias, buffer"), ('n = 20', 'n = "many"', "n = 'many'; allowed: a whole number"), ('version = 1', 'version = = 1', 'plan.toml: not TOML')])
def test_a_wrong_field_of_a_plan_is_named(refused, a, b, says):
    Path('plan.toml').write_text(PLAN.replace(a, b, 1))
    assert says in refused(*CAMPAIGN) and not Path('runs').exists()

def test_reports_of_what_is_none(refused):
    assert main(CAMPAIGN) == 0
    Path('runs/x/propagation.csv').write_text('a,b\n1,2\n')
    Path('runs/y').mkdir(); Path('runs/y/manifest.json').write_text('{"drdna": "campaign", "version": 7}')
    for folder, says in (('runs/none', 'runs/none'), ('runs/y', 'manifest.json'), ('runs/x', 'propagation.csv: not a table of propagation')):
        assert says in refused('report', folder) and not Path(folder, 'report').exists()

def test_ctrl_c_ends_a_campaign_that_goes_on_later(here):
    Path('plan.toml').write_text(PLAN.replace('n = 400', 'n = 40000'))
    p = subprocess.Popen([*COMMAND, 'campaign', 'plan.toml', '--out', 'runs/x', '--model', 'mine:make'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 120
    while not list(here.glob('runs/x/parts/0*')) and time.time() < deadline: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    assert b'interrupted' in p.communicate(timeout=60)[1] and p.returncode == 130
    left = Results('runs/x')
    assert 0 < len(left) < left.manifest['units']
    assert campaign().returncode == 0 and len(left) == left.manifest['units']
