"Repairs, the golden copy and the ladder where they could go wrong"
from collections import UserDict
from dataclasses import dataclass
from functools import partial

import pytest, torch
from torch import nn

from drdna.baselines import Extremes, fit_detectors
from drdna.core import Recorder, layers, tensors, weights_hash
from drdna.detection import Verdict
from drdna.engine import run
from drdna.injection import (NeuronFaults, bits_of, column, draw_neurons, draw_rate, draw_runs, draw_weights, flip, flips, noise, random_bits, row,
                             stuck_at, uniform, weight_faults)
from drdna.mitigation import Climb, Golden, Ladder, Repaired, Rerun, Restrict, channel_means, judged, mix, reexecute, restored, to_mean, zero
from drdna.profiling import profile
from test_engine import Look, agree, built, mixture, one_thread # noqa: F401, used by being here

@torch.no_grad()
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6)).requires_grad_(False)
    model(torch.randn(32, 3, 8, 8))  # statistics
    return model.eval(), torch.randn(16, 3, 8, 8)

# ---------------------------------------------------------------- rewrites and second runs

def test_means_are_those_of_the_channels():
    model, x = small()
    found = layers(model, x)
    means = channel_means(model, x.split(5), found)
    with torch.no_grad(), Recorder(model, found, lambda v, i, call: v.clone()) as rec:
        model(x)
        for l, v in zip(found, rec.take()): torch.testing.assert_close(means[l.name], v.mean((0, 2, 3)).view(-1, 1, 1) if v.ndim == 4 else v.mean(0))

def test_tokens_have_their_features_last():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    means = channel_means(model, [torch.randn(3, 5, 4)], layers(model, torch.randn(3, 5, 4)))
    assert [tuple(m.shape) for m in means.values()] == [(1, 6), (1, 6)]

def test_what_leaves_its_range_becomes_the_mean():
    model, x = small()
    p = profile(model, [x])
    means, seen = channel_means(model, [x], p.layers), []
    strike = draw_neurons(p.layers[:1], 8, stuck_at(value=float('nan')), seed=3)
    with torch.no_grad(), NeuronFaults(model, p.layers, strike), Restrict(model, p, to_mean(means)):
        h = model[0].register_forward_hook(lambda m, a, out: seen.append(out))
        model(x)
        h.remove()
    at = torch.unravel_index(torch.tensor(strike['index'].to_numpy()), p.layers[0].shape)
    assert torch.equal(seen[0][(torch.arange(8), *at)], means['0'].flatten()[at[0]]) and seen[0].isfinite().all()

def test_half_precision():
    model, x = small()
    model, x = model.bfloat16(), x.bfloat16()
    p = profile(model, [x])
    means = channel_means(model, [x], p.layers)
    assert {m.dtype for m in means.values()} == {torch.bfloat16}
    with torch.no_grad(), NeuronFaults(model, p.layers, draw_neurons(p.layers, 16, flip(bit=14))), Restrict(model, p, to_mean(means)): assert model(x).isfinite().all()

@torch.no_grad()
def test_a_mean_takes_the_dtype_that_autocast_gives():
    model, x = small()
    p, seen = profile(model, [x]), []
    with Restrict(model, p, to_mean(channel_means(model, [x], p.layers))), torch.autocast('cpu', torch.bfloat16):
        h = model[0].register_forward_hook(lambda m, a, out: seen.append(out))
        model(3 * x)  # some leave their range
        h.remove()
    assert seen[0].dtype == torch.bfloat16

@pytest.mark.parametrize('name', ('resnet', 'vit', 'recurrent'))
def test_a_layer_runs_again_in_a_sweep_as_in_the_network(name):
    model, x = built(name)
    p = profile(model, [x])
    tight = {n: (lo / 4, hi / 4) for n, (lo, hi) in p.ranges.items()}
    repairs = {'always': lambda: Rerun(model, p.layers), 'tight': lambda: Rerun(model, p.layers, tight)}
    fast, slow = (run(model, [x], mixture(model, p.layers), p.layers, {'look': Look(p.layers, model)}, repairs, images=6, sweep=s) for s in (True, False))
    assert all(agree(fast.repaired[n], slow.repaired[n]) for n in repairs)
    t = fast.repaired['always'].table
    assert (t.outcome[t.target == 'neuron'] == 'masked').all() and (t.outcome[t.target == 'weight'] != 'masked').any()

def test_a_second_run_passes_hooks_by():
    model, x = small()
    found, calls = layers(model, x), []
    golden = model(x)
    h = model[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), NeuronFaults(model, found, draw_neurons(found[:1], 16, flip(bit=30))), Rerun(model, found): y = model(x)
    h.remove()
    assert len(calls) == 1 and torch.equal(bits_of(y), bits_of(golden)) and not any(m._forward_hooks for m in model.modules())

def test_bad_input():
    (model, x), other = small(), built('resnet')[0]
    p = profile(model, [x])
    with pytest.raises(ValueError, match='another network'): Restrict(other, p)
    with pytest.raises(ValueError, match='another dtype'): Restrict(small()[0].double(), p)
    with pytest.raises(ValueError, match='no rewrite is given for layer 0'): Restrict(model, p, {})
    with pytest.raises(ValueError, match='no range is given for layer 0'): Rerun(model, p.layers, {})
    over = nn.Sequential(nn.Linear(4, 4), nn.Hardswish(inplace=True))
    with pytest.raises(ValueError, match='layer 1 works in place'): Rerun(over, layers(over, torch.randn(2, 4), want=lambda m: True))
    assert not any(m._forward_hooks for m in over.modules())
    with pytest.raises(ValueError, match='no batch'): channel_means(model, [], p.layers)
    with pytest.raises(ValueError, match='layer 0: non-finite'): channel_means(model, [x * float('nan')], p.layers)
    with pytest.raises(ValueError, match='not in the profile'): Repaired(Extremes(layers(other, torch.randn(2, 3, 32, 32))), p)
    with pytest.raises(ValueError, match="rung 'clamp' is no function"): Ladder(lambda x: None, {'clamp': 'clamp'})
    with pytest.raises(ValueError, match='at least one rung'): Ladder(lambda x: None, {})
    assert not any(m._forward_hooks for m in model.modules())

# ---------------------------------------------------------------- the golden copy

class Tied(nn.Module):
    "Tied weights, buffers of several kinds, a buffer outside the state dictionary"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.b.weight = self.a.weight
        self.register_buffer('mask', torch.tensor([True, False]))
        self.register_buffer('scale', torch.randn(3), persistent=False)
    def forward(self, x): return self.norm(self.b(self.a(x)))

ERRORS = (flip(), flip(bit=15), flips(k=2), random_bits(), stuck_at(value=0.), stuck_at(value=float('nan')), noise(sd=.1), uniform(lo=-9, hi=9))

@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.float16, torch.bfloat16))
def test_restore_is_exact_for_every_kind_of_fault(dtype):
    model = small()[0].to(dtype)
    golden, before, places = Golden(model), weights_hash(model), {n: t.data_ptr() for n, t in model.state_dict().items()}
    lists = [draw_weights(model, 7, m, seed=i) for i, m in enumerate(ERRORS)] + [draw_weights(model, 3, flip(), pattern=s()) for s in (row, column)]
    lists += [draw_weights(model, 5, flip(), target=t) for t in ('bias', 'buffer')] + [draw_runs(model, 2, 40), draw_rate(model, .01)]
    for faults in lists:
        with weight_faults(model, faults):
            assert set(golden.restore()) <= set(faults.layer) and weights_hash(model) == before and golden.check() == []
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == places

def test_check_names_what_differs_even_the_sign_of_zero():
    model = small()[0]
    model[0].bias[0] = 0.
    golden = Golden(model)
    assert golden.check() == []
    model[0].bias[0] = -0.
    model[1].num_batches_tracked += 1
    assert golden.check() == ['0.bias', '1.num_batches_tracked']
    assert golden.restore() == ['0.bias', '1.num_batches_tracked'] and not model[0].bias[0].signbit()

def test_ties_and_formats_stay():
    model = Tied().requires_grad_(False)
    golden = Golden(model)
    assert golden.nbytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    model.a.weight[0, 0] = torch.nan
    model.mask[0], model.scale[1] = False, 7.
    assert golden.check() == ['a.weight', 'mask', 'scale'] and golden.restore() == ['a.weight', 'mask', 'scale']
    assert model.b.weight is model.a.weight and golden.check() == [] and model.mask.tolist() == [True, False]
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    golden, stride = Golden(conv), conv.weight.stride()
    with weight_faults(conv, draw_weights(conv, 9, flip())): golden.restore(); assert golden.check() == []
    assert conv.weight.stride() == stride and conv.weight.requires_grad

def test_a_damaged_copy_is_refused_and_nothing_is_written():
    model = small()[0]
    golden = Golden(model)
    golden.copies['3.weight'][0, 0, 0, 0] += 1
    assert golden.damaged() == ['3.weight'] and golden.check() == ['3.weight']
    model[0].weight[0], model[3].weight[0] = 0, 0
    broken = weights_hash(model)
    with pytest.raises(RuntimeError, match='golden copy of 3.weight is damaged as well'): golden.restore()
    assert weights_hash(model) == broken and golden.damaged() == ['3.weight']

@torch.no_grad()
def test_a_damaged_copy_of_sound_weights_is_healed_from_them_and_stops_no_ladder():
    model, x = small()
    golden, before = Golden(model), weights_hash(model)
    stands, zeroed = lambda x: (torch.zeros(len(x), 2), said(*[True] * len(x))), lambda x: (torch.ones(len(x), 2), said(*[False] * len(x)))
    golden.copies['3.weight'][0, 0, 0, 0] += 1
    y, v, at = Ladder(stands, {'restore': restored(golden, stands), 'zero': zeroed})(x)
    assert set(at.tolist()) == {2} and y.all() and not v.alarm.any() and golden.damaged() == golden.check() == [] and weights_hash(model) == before
    golden.copies['3.weight'][0, 0, 0, 0] += 1
    model[0].weight[0] = 0
    assert golden.restore() == ['0.weight'] and golden.damaged() == golden.check() == [] and weights_hash(model) == before

def test_another_model_is_refused():
    model = small()[0]
    golden = Golden(model)
    model.half()
    with pytest.raises(ValueError, match='0.weight: the model has other tensors'): golden.check()

# ---------------------------------------------------------------- the ladder

def said(*alarms): return Verdict(torch.tensor(alarms), torch.tensor([0 if a else -1 for a in alarms]), torch.tensor(alarms).float())

def test_it_stops_at_the_rung_that_clears_and_touches_alarmed_samples_only():
    tried = []
    def rung(name, value, *alarms):
        def go(x): tried.append(name); return torch.full((4, 2), value), said(*alarms)
        return go
    first = lambda x: (torch.zeros(4, 2), said(False, True, True, True))
    rungs = {'a': rung('a', 1., True, False, True, True), 'passes': lambda x: tried.append('passes'), 'b': rung('b', 2., False, True, False, True), 'c': rung('c', 3., False, False, False, False), 'd': rung('d', 4., True, True, True, True)}
    y, v, at = Ladder(first, rungs)(None)
    assert tried == ['a', 'passes', 'b', 'c'] and at.tolist() == [0, 1, 3, 4] and y[:, 0].tolist() == [0, 1, 2, 3] and not v.alarm.any() and v.layer.tolist() == [-1] * 4
    y, v, at = Ladder(first, {n: rungs[n] for n in ('a', 'passes')})(None)
    assert at.tolist() == [0, 1, -1, -1] and v.alarm.tolist() == [False, False, True, True] and y[:, 0].tolist() == [0, 1, 1, 1]

def test_without_an_alarm_nothing_runs():
    def never(x): raise AssertionError
    assert isinstance(Ladder(lambda x: (x, said(False)), {'never': never})(torch.ones(1, 2)), Climb)
    assert reexecute(never, 'as it was', torch.tensor([False])) == 'as it was'

@dataclass
class Answer:
    y: object
    said: str = ''

def test_outputs_of_any_nesting():
    which = torch.tensor([True, False])
    new, old = ({'logits': torch.full((2, 3), v), 'more': (torch.full((2,), int(v)), None)} for v in (1., 0.))
    got = mix(which, new, old)
    assert got['logits'].tolist() == [[1] * 3, [0] * 3] and got['more'][0].tolist() == [1, 0] and got['more'][1] is None
    with pytest.raises(ValueError, match='cannot be told apart'): mix(which, torch.ones(3), torch.zeros(3))
    record = mix(which, Answer({'logits': new['logits']}, 'new'), Answer({'logits': old['logits']}, 'old'))
    assert record.y['logits'].tolist() == [[1] * 3, [0] * 3] and record.said == 'old'
    assert [*reexecute(lambda: [Answer(torch.ones(2))], [Answer(torch.zeros(2))], which)[0].y] == [1, 0]

class Logits(dict): pass
class Opaque: pass

@pytest.mark.parametrize('wrap', [lambda v: Logits(logits=v), lambda v: UserDict(logits=v), lambda v: type('Pair', (tuple,), {})((v, 'x'))])
def test_outputs_of_derived_types(wrap):
    got = mix(torch.tensor([True, False]), wrap(torch.ones(2, 3)), old := wrap(torch.zeros(2, 3)))
    assert [t.tolist() for _, t in tensors(got)] == [[[1] * 3, [0] * 3]] and type(got) is type(old) and not next(tensors(old))[1].any()
    with pytest.raises(ValueError, match='a part of the output is a Opaque'): mix(torch.tensor([True, False]), [Opaque()], [Opaque()])

def test_complex_buffers_are_restored():
    model = nn.Linear(2, 2)
    model.register_buffer('turn', torch.polar(torch.ones(3), torch.arange(3.)))
    golden, before = Golden(model), model.turn.clone()
    model.turn[1] += 1j
    assert golden.restore() == ['turn'] and torch.equal(model.turn, before) and golden.check() == []

@torch.no_grad()
def test_each_rung_heals_its_kind_of_fault():
    model, x = small()
    p, clean = profile(model, [x]), model(x)
    det, golden = fit_detectors(model, [x], {'e': Extremes(p.layers)})['e'], Golden(model)
    guard = judged(model, det, 20.)
    clamped = judged(model, Repaired(det, p, zero), 20., partial(Restrict, model, p, zero))
    strike = lambda: NeuronFaults(model, p.layers, draw_neurons(p.layers[:1], 3, stuck_at(value=1e9)), [1, 5, 6])
    def first(x):
        with strike(): return guard(x)
    rungs = {'again': guard, 'restore': restored(golden, guard), 'clamp': clamped}
    y, v, at = Ladder(first, rungs)(x)
    assert at.nonzero().flatten().tolist() == [1, 5, 6] and set(at.tolist()) == {0, 1} and torch.equal(bits_of(y), bits_of(clean))
    with weight_faults(model, draw_weights(model, 1, stuck_at(value=1e9), names=['0.weight'])): y, v, at = Ladder(guard, rungs)(x)
    assert set(at.tolist()) == {2} and torch.equal(bits_of(y), bits_of(clean)) and not v.alarm.any()
    with strike(): y, v, at = Ladder(guard, rungs)(x)
    assert at[[1, 5, 6]].tolist() == [3] * 3 and not v.alarm.any() and y.isfinite().all() and torch.equal(y[at == 0], clean[at == 0])
    with strike(): y, v, at = Ladder(guard, {'again': guard})(x)
    assert at[[1, 5, 6]].tolist() == [-1] * 3 and v.alarm.sum() == 3
