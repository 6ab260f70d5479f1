"A network on a GPU: the same verdicts, the same bits by every way, no waiting. Without a GPU a few of these tests run on the CPU, so that nothing here goes stale, and one on tensors that have a device and no values"
import copy, shutil

import pandas as pd, pytest, torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drdna.baselines import Extremes, fit_detectors
from drdna.campaign import Calibrated, Campaign
from drdna.checksums import Checksum, Together
from drdna.core import layers, weights_hash
from drdna.detection import DrDNA
from drdna.engine import run
from drdna.guard import Guard, SDCDetected
from drdna.injection import draw_neurons, draw_weights, flip, uniform
from drdna.mitigation import Golden, Ladder, Restrict, Rerun, clamp, judged, restored
from drdna.plan import listed
from drdna.profiling import profile
from drdna.sentinel import Sentinel, offers
from test_engine import Look, agree, built, mixture, one_thread, plain # noqa: F401, one_thread is used by being here
from test_guard import DETECTORS, Graphs, Net, data, everywhere, model, same, x # noqa: F401, model, data and x are fixtures

GPU = torch.cuda.is_available()

@pytest.fixture(scope='module')
def device(): return torch.device('cuda' if GPU else 'cpu')

MORE = {'Checksum': lambda m, x: Checksum(m, x), 'Together': lambda m, x: Together([Checksum(m, x), DETECTORS['Extremes'](everywhere(m, [x]))], everywhere(m, [x])),
        'Sentinel': lambda m, x: Sentinel(m, x, [p for p in offers(m, x) if p[0] != 'check'])}

ROUNDING = 'Checksum', 'Together' # Their threshold is what rounding makes of clean inputs; another device or compiler rounds otherwise

@pytest.fixture(autouse=True)
def all_bits():
    "Ten bits of a product's mantissa, as a GPU may take for float32, are too few to compare devices"
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before

def make(model, data, name):
    how = dict(detector=lambda found: MORE[name](model, data[0])) if name in MORE else dict(detector=DETECTORS[name], layers=everywhere(model, data))
    g = Guard.fit(model, data, fpr=.05, k=4, **how)
    if name in ROUNDING: g.threshold *= 100
    return g

@pytest.fixture(scope='module', params=[*DETECTORS, *MORE] if GPU else ['DrDNA', 'Together'])
def guards(request, model, data, device):
    "A guard on the CPU, one of the same detector on the device, and one that was fitted there"
    there = copy.deepcopy(model).to(device)
    with make(model, data, request.param) as a, Guard(there, copy.deepcopy(a.detector), a.threshold) as b, make(there, [d.to(device) for d in data], request.param) as c: yield a, b, c

def close(got, want, rounding=False):
    "Verdicts of two devices: the same alarms at the same layers, and about the same scores, unless these are of rounding itself"
    fine = want.score.isfinite() & (not rounding)
    return torch.equal(got.alarm.cpu(), want.alarm) and torch.equal(got.layer.cpu(), want.layer) and torch.allclose(got.score.cpu()[fine], want.score[fine], rtol=.01, atol=.01)

def on_cpu(verdict): return type(verdict)(*(t.cpu() for t in verdict))

def waiting(mode):
    if GPU: torch.cuda.set_sync_debug_mode(mode)

# ---------------------------------------------------------------- guards

def test_verdicts_are_those_of_the_cpu(guards, x, device):
    a, b, c = guards
    want, z = a(x)[1], x.to(device)
    y, got = b(z)
    assert got.alarm.device.type == y.device.type == device.type and want.alarm[4] and close(got, want, type(a.detector).__name__ in ROUNDING)
    assert c.info['weights'] == a.info['weights'] and torch.equal(c(z)[1].alarm.cpu(), want.alarm), 'fitted there'

def test_nothing_is_waited_for(guards, x, device):
    z = x.to(device)
    for g in guards[1:]:
        want = g(z)[1]
        waiting('error')
        try: got = g(z)[1]
        finally: waiting('default')
        assert same(got, want)

def test_ways_to_run(guards, x, device):
    g, z = guards[1], x.to(device)
    want, backend = g(z)[1], Graphs()
    torch.compiler.reset()
    f, sums = torch.compile(g, fullgraph=True, backend=backend), type(g.detector).__name__ in ROUNDING # whose sums run in float64 in a graph
    first = f(z)[1]
    assert same(f(z)[1], first) and backend.count == 1 and close(first, on_cpu(want), sums) and (sums or same(first, want))
    assert same(torch.export.export(g, (z,), strict=False).module()(z)[1], first)
    with torch.inference_mode(): assert same(g(z)[1], want)
    assert torch.equal(g(z.to(memory_format=torch.channels_last))[1].alarm, want.alarm)
    with torch.autocast(device.type, torch.bfloat16): low = g(z)[1]
    assert low.alarm[4] and low.score.dtype in (torch.float32, torch.float64)

@pytest.mark.skipif(not GPU or not shutil.which('g++'), reason='no GPU or no compiler')
def test_compiled_alarms_the_same(guards, x, device):
    torch.compiler.reset()
    want, got = guards[1](x.to(device))[1], torch.compile(guards[1], fullgraph=True)(x.to(device))[1]
    assert torch.equal(got.alarm, want.alarm)

def test_it_follows_the_model(model, data, x, device):
    net = copy.deepcopy(model)
    for name in (*DETECTORS, *MORE):
        with make(net, data, name) as g:
            want = g(x)[1]
            g.to(device); assert close(g(x.to(device))[1], want, name in ROUNDING), name
            g.cpu(); assert same(g(x)[1], want), name

def test_saved_there_and_loaded_here(guards, model, x, device, tmp_path):
    a, _, c = guards
    c.save(tmp_path / 'g')
    with Guard.load(tmp_path / 'g', a.model) as h: assert torch.equal(h(x)[1].alarm, c(x.to(device))[1].alarm.cpu())

def test_acting(guards, x, device):
    g, z = guards[1], x.to(device)
    want = g(z)[1]
    with Guard(g.model, g.detector, g.threshold, on_alarm='raise') as r, pytest.raises(SDCDetected) as e: r(z)
    assert same(e.value.verdict, want)
    if not getattr(g.detector, 'apart', True): return
    with Guard(g.model, g.detector, g.threshold, stop='first') as r, pytest.raises(SDCDetected) as e: r(z)
    assert e.value.layer == g.layers[int(want.layer[want.alarm].min())].name

class Stays(TorchDispatchMode):
    "Refuse what reads or makes tensors of two devices"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.ndim}
        assert len(devices) < 2, f'{func}: {devices}'
        return out

def imagined(detector, threshold):
    "Verdict on a GPU that need not be there: tensors that have a device and a shape, and no values that anybody could wait for"
    detector = copy.deepcopy(detector)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device('cuda'): net, x = Net().eval().requires_grad_(False), torch.empty(6, 3, 8, 8)
        with Guard(net, detector, threshold) as g:
            g(x) # the detector's numbers come along with the first batch
            with Stays(): return g(x)[1]

@pytest.mark.parametrize('name', [*DETECTORS, *MORE])
def test_all_of_it_stays_on_the_device(model, data, name):
    with make(model, data, name) as g: verdict = imagined(g.detector, g.threshold)
    assert all(t.device.type == 'cuda' and t.shape == (6,) for t in verdict)

def test_who_waits_or_copies_is_caught(model, data):
    class Waits(Extremes):
        def statistic(self, records): return super().statistic(records) * records.max().item()
    class Copies(Extremes):
        def statistic(self, records): return super().statistic(records) + torch.ones(1).to(records.device)
    found = everywhere(model, data)
    for kind, error in ((Waits, DataDependentOutputException), (Copies, AssertionError)):
        with pytest.raises(error): imagined(fit_detectors(model, data, {'d': kind(found)})['d'], 5.)

# ---------------------------------------------------------------- the engine

@pytest.fixture(params=['resnet', 'mobilenet', 'vit', 'recurrent'] if GPU else ['vit'])
def net(request, device):
    model, x = built(request.param)
    return model.to(device), x.to(device)

def test_swept_is_whole(net):
    model, x = net
    found, before = layers(model, x), weights_hash(model)
    faults, look = mixture(model, found), {'look': Look(found, model)}
    fast = run(model, [x], faults, found, look, images=6, memory=2**24)
    bare = run(model, [x], faults, found, images=6)
    slow = run(model, [x], faults, found, look, images=6, sweep=False)
    assert agree(fast, slow) and torch.equal(plain(bare.answers), plain(slow.answers)) and weights_hash(model) == before
    assert (slow.table.outcome != 'masked').mean() >= .3

def test_repairs(net):
    model, x = net
    p = profile(model, [x])
    repairs = {'again': lambda: Rerun(model, p.layers), 'clamp': lambda: Restrict(model, p, clamp)}
    fast, slow = (run(model, [x], mixture(model, p.layers), p.layers, {'look': Look(p.layers, model)}, repairs, images=6, sweep=s) for s in (True, False))
    assert all(agree(fast.repaired[n], slow.repaired[n]) for n in repairs)
    t = fast.repaired['again'].table
    assert (t.outcome[t.target == 'neuron'] == 'masked').all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    model, x = built('resnet')
    model, x = model.to(device, dtype), x.to(device, dtype)
    found = layers(model, x)
    faults = pd.concat([draw_neurons(found, 40, flip(bit=14)), draw_weights(model, 10, flip(bit=13))], ignore_index=True)
    fast, slow = (run(model, [x], faults, found, {'look': Look(found, model)}, images=6, sweep=s) for s in (True, False))
    assert agree(fast, slow) and (slow.table.outcome != 'masked').any()

def test_campaigns_go_on(model, data, device, tmp_path):
    there, batches = Net().eval().requires_grad_(False).to(device), data[:4]
    there.load_state_dict(model.state_dict())
    found = layers(there, data[0])
    p = profile(there, data, found, k=4)
    fitted = fit_detectors(there, data, {n: MORE[n](there, data[0]) for n in ('Checksum', 'Sentinel')})
    watch = {'drdna': Calibrated(DrDNA.fit(p), 5.)} | {n: Calibrated(d, 2.) for n, d in fitted.items()}
    faults = pd.concat([draw_neurons(found, 150, flip(bit=30)), draw_neurons(found, 50, uniform(lo=-100, hi=100)), draw_weights(there, 4, flip(bit=30))], ignore_index=True)
    faults = listed(faults.assign(image=faults.index % 200), 'all')
    one = Campaign(there, batches, detectors=watch, faults=faults, chunk=16).run(tmp_path / 'run')
    parts = sorted((tmp_path / 'run').rglob('*.parquet'))
    parts[len(parts) // 2].unlink()
    again = Campaign(there, batches, detectors=watch, faults=faults, chunk=16).run(tmp_path / 'run')
    pd.testing.assert_frame_equal(again.table, one.table)
    sdc = one.table.query("outcome == 'SDC'")
    assert len(sdc) and sdc['Sentinel.alarm'].any() and sdc['drdna.alarm'].any()

# ---------------------------------------------------------------- profiles and repairs

def test_profiles_are_those_of_the_cpu(model, data, device):
    a, b = profile(model, data, k=4), profile(copy.deepcopy(model).to(device), data, k=4)
    torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-4)
    for n, ends in a.ranges.items(): torch.testing.assert_close(ends, b.ranges[n], rtol=1e-3, atol=1e-4)

@torch.no_grad()
def test_the_ladder_and_the_golden_copy(model, data, device):
    net, x = copy.deepcopy(model).to(device), data[0].to(device)
    golden, clean = Golden(net), net(x)
    with make(net, data, 'Extremes') as g: det, t = g.detector, 4 * g.threshold
    guard = judged(net, det, t)
    rungs = {'again': guard, 'restore': restored(golden, guard)}
    net.conv2.weight[0, 0, 0, 0] = 1e9
    y, v, at = Ladder(guard, rungs)(x)
    assert set(at.tolist()) == {2} and torch.equal(y, clean) and not v.alarm.any() and v.alarm.device.type == device.type
    assert not golden.check()
