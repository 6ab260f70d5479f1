"""Plans and fault lists: what is damaged is refused in words, what is drawn can be run, and intervals keep what they promise"""
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from drdna.core import layers
from drdna.engine import run
from drdna.plan import ERRORS, Plan, Population, estimate, find_places, read_faults, write_faults

PLAN = Plan((Population('neuron', bits=(30,), strata=('layer',), allocation='equal', n=60), Population('weight', 'uniform', {'lo': -10., 'hi': 10.}, n=20), Population('neuron', 'stuck_at', pattern='channel', n=10)), images=200)

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval().requires_grad_(False)
    return model, torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(100)

@pytest.fixture(scope='module')
def faults(net): return PLAN.draw(find_places(PLAN, net[0], net[1][0]))

def test_a_drawn_list_runs(net, faults):
    model, data = net
    r = run(model, data, faults, layers(model, data[0]), images=200)
    assert set(r.table.fault) == set(faults.fault) and faults.fault.nunique() == 90
    assert (r.table[r.table.target == 'weight'].groupby('fault').size() == 100).all()

@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**4), junk=st.text(max_size=3), cut=st.integers(0, 12))
def test_a_damaged_plan_is_refused_in_words(at, junk, cut):
    text = PLAN.to_toml()
    at %= len(text)
    try: Plan.from_toml(text[:at] + junk + text[at + cut:])
    except ValueError as e: assert len(str(e)) > 10

@settings(max_examples=100, deadline=None)
@given(st.builds(dict, target=st.sampled_from(['neuron', 'weight', 'bias']), model=st.sampled_from([*ERRORS]), n=st.integers(-5, 10**9), margin=st.floats(-1, 2), expected=st.floats(-1, 2), bits=st.lists(st.integers(-3, 70), max_size=4), strata=st.lists(st.sampled_from(['layer', 'bit', 'channel']), max_size=3)))
def test_what_a_plan_accepts_comes_back_from_toml(fields):
    try: p = Population(**fields)
    except ValueError: return
    plan = Plan((p,))
    assert Plan.from_toml(plan.to_toml()) == plan

@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
@settings(max_examples=100, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), junk=st.binary(max_size=4), cut=st.sampled_from([0, 1, 9, 10**6]))
def test_a_damaged_fault_list_is_refused_in_words(faults, tmp_path_factory, suffix, at, junk, cut):
    path = tmp_path_factory.mktemp('lists') / f'faults.{suffix}'
    write_faults(faults, path)
    whole = path.read_bytes()
    at = int(at * len(whole))
    path.write_bytes(whole[:at] + junk + whole[at + cut:])
    try: got = read_faults(path)
    except ValueError as e: assert path.name in str(e)
    else: assert {*faults} <= {*got}  # a digit may become another digit, a comma make a column of the reader's own

def test_a_missing_list_and_a_strange_suffix(faults, tmp_path):
    with pytest.raises(FileNotFoundError): read_faults(tmp_path / 'none.csv')
    for act in (lambda: read_faults(tmp_path / 'x.txt'), lambda: write_faults(faults, tmp_path / 'x.txt')):
        with pytest.raises(ValueError, match='.parquet or .csv'): act()
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('rates, n', [((.5, .01), (300, 300)), ((.2, .2), (50, 200)), ((.002, .03), (400, 400))])
def test_intervals_of_stratified_samples_cover(rates, n):
    "Simulated: the nominal 95 % within the noise of 1,000 draws"
    rng, sizes = np.random.default_rng(0), (10**4, 10**6)
    truth, hit = sum(r * N for r, N in zip(rates, sizes)) / sum(sizes), 0
    h, N = np.repeat([0, 1], n), np.repeat(sizes, n)
    for _ in range(1000):
        e = estimate(np.concatenate([rng.random(k) < r for k, r in zip(n, rates)]), h, N)
        hit += e['lo'] <= truth <= e['hi']
    assert hit >= 935  # 950 less two standard errors
