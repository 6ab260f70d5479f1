"The guard on its ways: compiled, exported, in threads; acting on alarms; and what it refuses"
import copy, io, pickle, shutil, threading

import pytest, torch
from torch import nn

from drdna import checksums
from drdna.baselines import Doubt, Extremes, Mahalanobis, NonFinite, QuantileTree, Range, energy
from drdna.checksums import Checksum, Together
from drdna.sentinel import Sentinel, checks, inputs, storing
from drdna.core import Tap, has_hooks, layers
from drdna.data_model import ViT
from drdna.guard import Guard, SDCDetected
from drdna.mitigation import Repaired
from drdna.profiling import profile, read_tensors, write_tensors

class Net(nn.Module):
    "A skip path and a module that is called twice"
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 4)
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))

DETECTORS = {'DrDNA': None, 'Range': Range, 'Extremes': Extremes, 'NonFinite': NonFinite, 'Doubt': lambda ls: Doubt(ls, energy), 'Mahalanobis': lambda ls: Mahalanobis(ls[-1:])}

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)

@pytest.fixture(scope='module')
def data(): return torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(50)

@pytest.fixture
def x():
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    x[1] *= 30; x[4] = torch.nan
    return x

def everywhere(model, data): return layers(model, data[0], want=lambda m: True)

def make(model, data, name='DrDNA', **kw): return Guard.fit(model, data, fpr=.05, k=4, layers=everywhere(model, data), detector=DETECTORS[name], **kw)

def closed_behind(model, g):
    "A guard that leaves no hook"
    with g: yield g
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

@pytest.fixture(params=DETECTORS)
def guard(request, model, data): yield from closed_behind(model, make(model, data, request.param))

SUMS = {'Checksum': lambda model, x: lambda found: Checksum(model, x),
        'Together': lambda model, x: lambda found: Together([Checksum(model, x), Extremes(layers(model, x))], layers(model, x, want=lambda m: True)),
        'Sentinel': lambda model, x: lambda found: Sentinel(model, x, [('max in', 'fc'), *(('check', n) for n in checks(model, x)), ('stored', 'fc.weight')])}

def sums(model, data, name, fpr=.05): return Guard.fit(model, data, fpr=fpr, detector=SUMS[name](model, data[0]))

@pytest.fixture(params=[*DETECTORS, *SUMS])
def any_guard(request, model, data): yield from closed_behind(model, (sums if request.param in SUMS else make)(model, data, request.param))

def same(a, b): return all(torch.equal(p.nan_to_num(7e7), q.nan_to_num(7e7)) for p, q in zip(a, b))

def alike(got, want, guard):
    "Sums of another precision alarm on all that is far beyond rounding; of clean inputs, rounding puts others past the threshold"
    far = want.score > 100 * guard.threshold
    return bool(far.any() and got.alarm[far].all() and torch.equal(got.score.isfinite(), want.score.isfinite()))

class Graphs:
    "A backend that counts the graphs and runs them as they are"
    def __init__(self): self.count = 0
    def __call__(self, gm, inputs):
        self.count += 1
        return gm.forward

@pytest.fixture(autouse=True)
def fresh(): torch.compiler.reset()

# ---------------------------------------------------------------- return mode

def test_one_graph_with_the_same_verdicts(guard, x):
    y, want = guard(x)
    assert want.alarm[4], 'an input of NaN raises an alarm'
    backend = Graphs()
    f = torch.compile(guard, fullgraph=True, backend=backend)
    for _ in range(3):
        out, got = f(x)
        assert torch.equal(out.nan_to_num(), y.nan_to_num()) and same(got, want)
    assert backend.count == 1

def test_threads_share_one_graph(model, data, x):
    backend, bad = Graphs(), []
    with make(model, data) as g:
        f, want = torch.compile(g, fullgraph=True, backend=backend, dynamic=True), g(x)[1]
        f(x)
        def work():
            for _ in range(5):
                if not same(f(x)[1], want): bad.append(1)
        run_all([work] * 12)
    assert not bad and backend.count == 1

@pytest.mark.parametrize('name', ['DrDNA', 'Extremes'])
def test_other_backends_alarm_the_same(model, data, x, name):
    with make(model, data, name) as g:
        want = g(x)[1]
        for backend in ['aot_eager'] + ['inductor'] * (shutil.which('g++') is not None):
            torch.compiler.reset()
            got = torch.compile(g, fullgraph=True, backend=backend)(x)[1]
            assert torch.equal(got.alarm, want.alarm) and torch.equal(got.layer, want.layer), backend
            torch.testing.assert_close(got.score, want.score, rtol=1e-3, atol=1e-3, equal_nan=True)

def test_export_for_any_batch_and_save(guard, x):
    shape = {0: torch.export.Dim('n', min=2, max=4096)}
    program = torch.export.export(guard, (x,), dynamic_shapes=((shape,),), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        assert same(run(x)[1], guard(x)[1]) and same(run(x[:3])[1], guard(x[:3])[1])

@pytest.mark.parametrize('name', SUMS)
def test_sums_are_exported_for_any_batch(model, data, x, name):
    with sums(model, data, name) as g:
        program = torch.export.export(g, (x,), dynamic_shapes=(({0: torch.export.Dim('n', min=2, max=4096)},),), strict=False).module()
        for b in (x, x[2:5]): assert same(program(b)[1], torch.compile(g, backend='eager')(b)[1]) and alike(program(b)[1], g(b)[1], g)

@pytest.mark.skipif(not shutil.which('g++'), reason='Inductor needs a compiler')
@pytest.mark.parametrize('name', SUMS)
def test_compiled_sums_are_no_rougher(name):
    model, data = Net().eval().requires_grad_(False), torch.randn(800, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(50)
    with sums(model, data[:8], name) as g, torch.inference_mode():
        torch.compiler.reset()
        f = torch.compile(g, fullgraph=True)
        clean = [(f(b)[1].alarm.sum(), g(b)[1].alarm.sum()) for b in data[8:]]
        compiled, eager = map(sum, zip(*clean))
        assert compiled <= eager + 12, (compiled, eager)  # of 400, of which one in twenty may alarm
        model.fc.weight[0, 0] += 1
        assert f(data[0])[1].alarm.all()

@pytest.mark.parametrize('name', SUMS)
def test_a_verdict_carries_no_gradients(data, name):
    model = Net().eval()
    with torch.inference_mode(): g = sums(model, data, name)
    with g:
        y, v = g(data[0])
        y.sum().backward()
        assert model.conv1.weight.grad is not None and not v.score.requires_grad

def test_strict_export(model, data, x):
    with make(model, data) as g: assert same(torch.export.export(g, (x,), strict=True).module()(x)[1], g(x)[1])

def test_contexts_and_memory_formats(any_guard, x):
    want = any_guard(x)[1]
    with torch.inference_mode(): assert same(any_guard(x)[1], want)
    assert same(any_guard(x)[1], want), 'nothing of inference mode is left'
    got = any_guard(x.to(memory_format=torch.channels_last))[1]
    assert alike(got, want, any_guard) if type(any_guard.detector).__name__ in SUMS else torch.equal(got.alarm, want.alarm)
    with torch.autocast('cpu', torch.bfloat16): low = any_guard(x)[1]
    assert low.alarm[4] and low.score.dtype in (torch.float32, torch.float64)
    assert not any_guard(x[:0])[1].alarm.numel()

@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan')])
def test_a_pixel_that_is_not_finite_raises_an_alarm(any_guard, data, value):
    x = data[0][:4].clone()
    x[2, 1, 3, 3] = value
    assert any_guard(x)[1].alarm[2]

def test_nothing_of_the_model_changes(data):
    model = Net()
    before, keys = {k: v.clone() for k, v in model.state_dict().items()}, list(model.state_dict())
    with Guard.fit(model, data, fpr=.05) as g:
        assert model.training and g.training and list(model.state_dict()) == keys and list(g.state_dict()) == [f'model.{k}' for k in keys]
        assert g.eval() is g and not model.training
        y, v = g(data[0])
        y.sum().backward()
        assert model.fc.weight.grad is not None and not v.score.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def run_all(jobs):
    threads = [threading.Thread(target=j) for j in jobs]
    for t in threads: t.start()
    for t in threads: t.join()

def test_a_verdict_belongs_to_its_call(any_guard, data):
    want, bad = [any_guard(b)[1] for b in data], []
    def work(i):
        for _ in range(20):
            if not same(any_guard(data[i])[1], want[i]): bad.append(i)
    run_all([lambda i=i: work(i) for i in range(len(data))])
    assert not bad

def test_a_failed_forward_leaves_nothing_for_the_next(model, data, x):
    with make(model, data) as g:
        want = g(x)[1]
        with pytest.raises(RuntimeError): g(torch.zeros(2, 5, 8, 8))
        with pytest.raises(ValueError, match='inputs must keep the shape'): g(torch.zeros(2, 3, 9, 9))
        assert same(g(x)[1], want)

def test_several_guards_on_one_model(model, data, x):
    with make(model, data) as a, make(model, data, 'Range') as b:
        va = a(x)[1]
        model(x)
        assert a.recorder.mine.value is None, 'a guard sleeps unless it is called'
        assert same(b(x)[1], b(x)[1])
        b.close(); b.close()
        assert same(a(x)[1], va)
        with pytest.raises(RuntimeError, match='this guard is closed'): b(x)

def test_a_copy_of_a_guarded_model_is_not_watched(model, data, x):
    with make(model, data) as g:
        want, y = g(x)[1], model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x).nan_to_num(), y.nan_to_num()) and same(g(x)[1], want) and not any(has_hooks(m) for m in twin.modules())

def test_a_copy_of_a_guard_stands_by_itself(any_guard, x):
    want, twin = any_guard(x)[1], copy.deepcopy(any_guard)
    again = copy.deepcopy(twin)
    assert same(twin(x)[1], want) and twin.model is not any_guard.model and repr(twin) == repr(any_guard)
    twin.close()
    assert same(any_guard(x)[1], want) and same(again(x)[1], want), 'each has taps of its own'
    with pytest.raises(RuntimeError, match='closed'): copy.deepcopy(twin)(x)

# ---------------------------------------------------------------- acting

def test_callback(any_guard, x):
    y, want = any_guard(x)
    calls = []
    with Guard(any_guard.model, any_guard.detector, any_guard.threshold, on_alarm=lambda v, out: calls.append((v, out))) as g:
        out, v = g(x)
        assert same(v, want) and same(calls[0][0], want) and calls[0][1] is out
        g.threshold = torch.inf
        g(x[:1])
        assert len(calls) == 1, 'no alarm, no call'
    with Guard(any_guard.model, any_guard.detector, any_guard.threshold, on_alarm=lambda v, out: 'mended') as g: assert g(x)[0] == 'mended'

def test_raise(any_guard, x):
    want = any_guard(x)[1]
    with Guard(any_guard.model, any_guard.detector, any_guard.threshold, on_alarm='raise') as g:
        with pytest.raises(SDCDetected, match='of 6 samples look corrupted') as e: g(x)
    for err in (e.value, pickle.loads(pickle.dumps(e.value)), copy.copy(e.value)): assert same(err.verdict, want) and err.layer == any_guard.layers[int(want.layer[want.alarm].min())].name

@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('rule', ['global', 'per_layer'])
def test_stop_ends_the_forward_at_the_alarm_layer(model, data, x, name, rule):
    ran, new = [], torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(3)) # a calibration input may lie on the threshold
    with make(model, data, name, rule=rule) as whole: want, clean = whole(x)[1], whole(new)[1]
    first = int(want.layer[want.alarm].min())
    with Guard(model, whole.detector, whole.threshold, stop='first') as g:
        with Tap(model, everywhere(model, data), lambda v, call: ran.append(call.layer.name)), pytest.raises(SDCDetected) as e: g(x)
        assert e.value.layer == whole.layers[first].name
        assert torch.equal(e.value.verdict.alarm, want.alarm & (want.layer == first))
        names = [l.name for l in everywhere(model, data)]
        assert ran in (names[:names.index(e.value.layer)], names[:names.index(e.value.layer) + 1]), 'no later layer runs'
        fine = new[~clean.alarm]
        y, v = g(fine)
        assert not v.alarm.any() and torch.equal(y, model(fine))
        torch.testing.assert_close(v.score, clean.score[~clean.alarm], rtol=1e-4, atol=1e-4)

def test_stop_in_threads(model, data, x):
    new = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with make(model, data) as whole: clean = new[~whole(new)[1].alarm]
    bad = []
    with Guard(model, whole.detector, whole.threshold, stop='first') as g:
        def fine():
            for _ in range(10):
                try: g(clean)
                except SDCDetected: bad.append('fine')
        def broken():
            for _ in range(10):
                try: g(x); bad.append('broken')
                except SDCDetected: pass
        run_all([fine, broken] * 2)
    assert not bad

# ---------------------------------------------------------------- files

def test_save_and_load(guard, x, tmp_path):
    guard.save(tmp_path / 'g')
    with Guard.load(tmp_path / 'g', guard.model) as g:
        assert same(g(x)[1], guard(x)[1]) and g.info == guard.info and repr(g) == repr(guard)
    with pytest.raises(ValueError, match='other modules, shapes or dtypes'): Guard.load(tmp_path / 'g', Net().eval().double())
    with Guard.load(tmp_path / 'g', guard.model, on_alarm='raise') as g, pytest.raises(SDCDetected): g(x)

def test_a_detector_of_your_own_is_not_saved(model, data, tmp_path):
    class Mine(Range): pass
    with Guard.fit(model, data, fpr=.05, detector=Mine) as g, pytest.raises(ValueError, match='a Mine cannot be saved'): g.save(tmp_path / 'g')
    with Guard(model, g.detector, 1.) as g, pytest.raises(ValueError, match='lacks .*fpr'): g.save(tmp_path / 'g')

INFO = {'fpr': .05, 'profiled': 1, 'calibrated': 1}

def test_what_holds_code_is_not_saved(model, data, tmp_path):
    every = everywhere(model, data)
    for d, why in ((QuantileTree(every[:1]), 'a QuantileTree cannot be saved; there are'), (Doubt(every, how=lambda z: z[:, 0]), 'a Doubt <lambda> cannot be saved'),
                   (Together([QuantileTree(every[:1]), Range(every)], every), 'a QuantileTree cannot be saved as a part'), (Together([Together([Range(every)], every)], every), 'a Together cannot be saved as a part')):
        with Guard(model, d, 1., INFO) as g, pytest.raises(ValueError, match=why): g.save(tmp_path / 'g')
    assert not list(tmp_path.iterdir()), 'not even half a file'

@pytest.fixture(scope='module', params=['net', 'vit'])
def summed(request):
    "A model, inputs, and guards of its checksums: alone, with extremes, in a sentinel"
    torch.manual_seed(0)
    model = {'net': Net, 'vit': lambda: ViT(d=16, depth=1, heads=2)}[request.param]().eval().requires_grad_(False)
    data = torch.randn(160, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(20)
    every = layers(model, data[0], want=lambda m: True)
    check = lambda found: Checksum(model, data[0], found)
    picks = [('check', n) for n in checks(model, data[0])] + [('max', l.name) for l in every[1::2]] + [('min in', n) for n in inputs(model, data[0])] + [('stored', n) for n in storing(model)]
    guards = [Guard.fit(model, data, fpr=.05, detector=make) for make in (check, lambda found: Together([check(found), Extremes(every[1::2])], every), lambda found: Sentinel(model, data[0], picks))]
    x = data[0][:4].clone(); x[1] *= 1e4; x[2, 0, 0, 0] = torch.nan
    yield model, x, guards
    for g in guards: g.close()

def test_checksums_are_read_and_not_made_anew(summed, tmp_path, monkeypatch):
    model, x, guards = summed
    monkeypatch.setattr(checksums, '_sums', None); monkeypatch.setattr(checksums, 'relations', None)
    for n, g in enumerate(guards):
        g.save(tmp_path / f'{n}')
        with Guard.load(tmp_path / f'{n}', model) as h:
            backend = Graphs()
            f = torch.compile(h, fullgraph=True, backend=backend)
            v = f(x)[1] # before it has seen any other batch; its sums run in float64
            assert same(h(x)[1], g(x)[1]) and alike(v, g(x)[1], g) and same(v, torch.compile(g, backend='eager')(x)[1])
            assert backend.count == 1 and h.info == g.info and repr(h) == repr(g)
            h.save(tmp_path / 'again')
        (a, m), (b, k) = (read_tensors(tmp_path / file, 'guard') for file in (f'{n}', 'again'))
        assert m == k and a.keys() == b.keys() and all(torch.equal(v, b[name]) for name, v in a.items())
    check = guards[0].detector
    assert {type(r).__name__ for r in check.relations} == ({'Affine', 'Norm', 'Product'} if isinstance(model, ViT) else {'Affine'})
    with Guard.load(tmp_path / '0', model) as h: assert h.detector.uncovered == check.uncovered and all(torch.equal(a.v(), b.v()) for a, b in zip(h.detector.relations, check.relations))

def test_checksums_belong_to_their_weights(summed, tmp_path):
    model, x, guards = summed
    other = copy.deepcopy(model)
    next(m for m in other.modules() if isinstance(m, nn.Linear)).weight[0, 0] += 1
    for g in guards:
        g.save(tmp_path / 'g')
        with pytest.raises(ValueError, match="field 'weights' belongs to other weights"): Guard.load(tmp_path / 'g', other)
        with Guard.load(tmp_path / 'g', other, strict=False) as h: assert h(x)[1].alarm.all()

def test_a_guard_that_was_calibrated_anew_belongs_to_what_it_was_calibrated_on(model, data, tmp_path):
    other = Net().eval()
    with make(model, data, 'Range') as g: g.save(tmp_path / 'g')
    with Guard.load(tmp_path / 'g', other, strict=False) as h: h.calibrate(data, .05).save(tmp_path / 'h')
    with Guard.load(tmp_path / 'h', other) as h: assert h.info['calibrated'] == 400
    with pytest.raises(ValueError, match='other weights'): Guard.load(tmp_path / 'h', model)

def test_a_sentinel_beside_others_is_saved(summed, tmp_path):
    model, x, _ = summed
    every, data = layers(model, x, want=lambda m: True), [torch.randn(160, 3, 32, 32)]
    make = lambda found: Together([Sentinel(model, x, [('max', every[0].name), ('min', every[0].name), ('max', every[-1].name)]), Extremes(every[1::2])], every)
    with Guard.fit(model, data, fpr=.05, detector=make) as g:
        g.save(tmp_path / 'g')
        with Guard.load(tmp_path / 'g', model) as h: assert same(h(x)[1], g(x)[1]) and [l.name for l in h.layers] == [l.name for l in g.layers]

def refused(model, guard, file, message, change):
    "A file of a guard that was changed, `change(meta, arrays)`, is not read"
    guard.save(file)
    arrays, meta = read_tensors(file, 'guard')
    change(meta, arrays)
    write_tensors(file, 'guard', arrays, meta)
    with pytest.raises(ValueError, match=message): Guard.load(file, model)

@pytest.mark.parametrize('field, change', [
    ('v', lambda rows, a: a.update(v=a['v'][:-1])),
    ('v', lambda rows, a: a.update(v=a['v'] * torch.inf)),
    ('v', lambda rows, a: a.update(v=a['v'].double())),
    ('v', lambda rows, a: rows[0].update(kept=[1], shape=[1])),
    ('index', lambda rows, a: a.update(index=a['index'] + 1)),
    ('index', lambda rows, a: a.update(index=a['index'].float())),
    ('index', lambda rows, a: rows[0].update(shape=[10**9] * len(rows[0]['kept']))),
    ('mean', lambda rows, a: a.update(mean=a['mean'][1:])),
    ('relations', lambda rows, a: rows.pop()),
    ('relations', lambda rows, a: rows.clear()),
    ('relations', lambda rows, a: rows.append(rows[0])),
    ('relations', lambda rows, a: rows.append([])),
    *[('relations', lambda rows, a, change=change: rows[-1].update(change)) for change in (
        {'kind': 'Tap'}, {'kind': []}, {'head': -1}, {'tail': 10**9}, {'tail': 0.}, {'c': float('nan')}, {'c': '0'}, {'kept': []}, {'kept': [0]}, {'kept': '', 'shape': ''}, {'shape': None}, {'kind': 'Norm', 'shape': [7], 'kept': [7]})]])
def test_damaged_checksums(summed, tmp_path, field, change):
    model, x, guards = summed
    refused(model, guards[0], tmp_path / 'g', f"g: field '{field}'", lambda meta, a: change(meta['relations'], a))

@pytest.mark.parametrize('message, change', [
    ("field 'parts'", lambda meta, a: meta.update(parts=[])),
    ("field 'parts'", lambda meta, a: meta.update(parts=[1])),
    ("field 'scale'", lambda meta, a: meta['parts'].pop()),
    ("part 0: field 'v' is missing", lambda meta, a: a.pop('0.v')),
    ("part 1: field 'detector'", lambda meta, a: meta['parts'][1].update(detector='Together', parts=[])),
    ("part 1: field 'detector'", lambda meta, a: meta['parts'][1].update(detector='DrDNA')),
    ("part 1: field 'layers'", lambda meta, a: meta['parts'][1]['layers'].clear()),
    ("g: field 'layers' order has no layer", lambda meta, a: meta['layers'].pop()),
    ("g: field 'layers' are not those", lambda meta, a: meta['layers'][0].update(batch_dim=1))])
def test_damaged_parts(summed, tmp_path, message, change):
    model, x, guards = summed
    refused(model, guards[1], tmp_path / 'g', message, change)

@pytest.mark.parametrize('looks', [[], [['median']], [['min', 'min']], [['max', 'max']], [['min', 'max']], 'max', [[]], [{'max': 1}], [['max'], ['max']]])
def test_damaged_looks(model, data, tmp_path, looks):
    with Guard.fit(model, data, fpr=.05, detector=lambda found: Sentinel(model, data[0], [('max', found[0].name)])) as g:
        refused(model, g, tmp_path / 'g', "field 'looks'", lambda meta, a: meta.update(looks=looks))

@pytest.mark.parametrize('field, change', [
    ('threshold', lambda meta: meta.update(threshold=10**400)),
    ('threshold', lambda meta: meta.update(threshold=float('nan'))),
    ('layers', lambda meta: meta['layers'][0].update(call=2))])
def test_damaged_header(model, data, tmp_path, field, change):
    with Guard.fit(model, data, fpr=.05, detector=Extremes) as g: refused(model, g, tmp_path / 'g', f"field '{field}'", lambda meta, a: change(meta))

def test_a_whole_number_for_a_threshold(model, data, x, tmp_path):
    with Guard.fit(model, data, fpr=.05, detector=Extremes) as g:
        g.threshold = 10**300
        g.save(tmp_path / 'g')
    with Guard.load(tmp_path / 'g', model) as g: assert not g(x)[1].alarm.any()

@pytest.mark.parametrize('message, change', [
    ("field 'kept'", lambda meta, a: meta['kept'].append(1)),
    ("field 'kept'", lambda meta, a: meta.update(kept='fc.weight')),
    ("field 'sums'", lambda meta, a: meta['kept'].pop()),
    ("field 'sums'", lambda meta, a: a.update(sums=a['sums'].float())),
    ("stores no tensor 'nowhere.weight'", lambda meta, a: meta['kept'].__setitem__(0, 'nowhere.weight'))])
def test_damaged_sums(summed, tmp_path, message, change):
    model, x, guards = summed
    refused(model, guards[2], tmp_path / 'g', message, change)

# ---------------------------------------------------------------- bad input

def test_too_few_inputs_say_how_many_it_takes(model, data):
    few = [b[:10] for b in data[:3]]
    for kind in (None, Range):
        with pytest.raises(ValueError, match='fpr=0.01 needs at least 99 calibration inputs, got 15; .*twice as many'): Guard.fit(model, few, detector=kind)
        with pytest.raises(ValueError, match='1 input.*two to profile and two to calibrate'): Guard.fit(model, [data[0][:1]], detector=kind, layers=everywhere(model, data))
        with pytest.raises(ValueError, match='no batch'): Guard.fit(model, [], detector=kind)
        with pytest.raises(ValueError, match='no batch'): Guard.fit(model, iter([]), detector=kind)
    with make(model, data) as g:
        t = g.threshold
        with pytest.raises(ValueError, match='needs at least 99 calibration inputs, got 50'): g.calibrate(data[:1])
        with pytest.raises(ValueError, match='no batch'): g.calibrate([])
        assert g.threshold == t

@pytest.mark.parametrize('name', DETECTORS)
def test_clean_data_must_be_finite(model, data, name):
    with pytest.raises(ValueError, match='not finite|non-finite'): make(model, [*data[:-1], torch.full_like(data[-1], torch.nan)], name)

@pytest.mark.parametrize('fpr', [0, 1, -1])
def test_rates_that_no_number_of_inputs_resolves(model, data, fpr):
    with pytest.raises(ValueError, match=f'fpr={fpr}: a false-positive rate lies between 0 and 1$'): Guard.fit(model, data, fpr=fpr)

def test_loaders_of_any_length(model, data):
    some = torch.utils.data.TensorDataset(torch.cat(data)[:30])
    again = torch.utils.data.DataLoader(some, 10, sampler=torch.utils.data.RandomSampler(some, True, 60))
    for loader in (again, [*data[:2], data[0][:0]]):
        for kind in (None, Range):
            with Guard.fit(model, loader, fpr=.05, detector=kind) as g: assert g.info['profiled'] + g.info['calibrated'] == sum(map(len, loader)) if isinstance(loader, list) else 60

def test_one_shot_loaders(model, data, x):
    for kind in (None, Range):
        with Guard.fit(model, data, fpr=.05, detector=kind) as a, Guard.fit(model, iter(data), fpr=.05, detector=kind) as b: assert same(a(x)[1], b(x)[1])

def test_another_model(model, data, x):
    with make(model, data) as g: pass
    with pytest.raises(ValueError, match='fitted on another model than this Linear'): Guard(nn.Linear(2, 2), g.detector, 1., g.info)
    with pytest.raises(ValueError, match="has no module 'conv1'"): Guard(nn.Linear(2, 2), g.detector, 1.)
    with pytest.raises(ValueError, match='no layer to monitor'): Guard.fit(nn.ReLU(), data)
    low = Net().eval().bfloat16()
    with Guard(low, g.detector, 1.) as h, pytest.raises(ValueError, match='torch.bfloat16, but float32 in the dry run'): h(x.bfloat16())
    with pytest.raises(ValueError, match='compile the guard'): Guard(torch.compile(model), g.detector, 1.)
    with pytest.raises(ValueError, match='compile the guard'): Guard.fit(torch.compile(model), data)
    inside, within = copy.deepcopy(model), copy.deepcopy(model)
    inside.compile(); within.conv2 = torch.compile(within.conv2)
    for m in (inside, within):
        with pytest.raises(ValueError, match='or a part of it, is compiled'): Guard.fit(m, data)
    assert not any(m._forward_hooks for n in (low, model) for m in n.modules())

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_formats_have_guards_of_their_own(data, x, dtype):
    model = Net().eval().to(dtype).requires_grad_(False)
    for kind in (None, Range):
        with Guard.fit(model, [b.to(dtype) for b in data], fpr=.05, detector=kind) as g:
            v = g(x.to(dtype))[1]
            assert v.alarm[4] and v.alarm[1]

def test_bad_options(model, data):
    with make(model, data, rule='final') as g: pass
    with pytest.raises(ValueError, match="rule 'final'"): Guard(model, g.detector, 1., stop='first')
    with pytest.raises(ValueError, match='three weights'): make(model, data, lam=(1, 1))
    with pytest.raises(ValueError, match="stop='last'"): Guard(model, g.detector, 1., stop='last')
    with pytest.raises(ValueError, match="on_alarm='shout'"): Guard(model, g.detector, 1., on_alarm='shout')
    with pytest.raises(ValueError, match='no output for a callback'): Guard(model, Range(everywhere(model, data)), 1., on_alarm=print, stop='first')
    for d in (QuantileTree(everywhere(model, data)[:2]), Repaired(g.detector, profile(model, data, everywhere(model, data)))):
        with pytest.raises(ValueError, match=f'which a {type(d).__name__} does not'): Guard(model, d, 1., stop='first')
    assert not any(m._forward_hooks for m in model.modules())
