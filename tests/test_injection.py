"Faults on odd models, dtypes and moments"
from contextlib import nullcontext
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from drdna.core import layers, weights_hash
from drdna.engine import run
from drdna.mitigation import Restrict
from drdna.profiling import profile
from drdna.injection import (NeuronFaults, apply_masks, bits_of, block, bullet_wake, burst, channel, column, draw_neurons, draw_rate, draw_runs, draw_weights, flip, flips, noise, outside,
    random_bits, row, same_row, scattered, shattered_channel, sign, stuck_at, stuck_bit, uniform, value_class, weight_faults)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INT = {8: 'u8', 4: 'u4', 2: 'u2', 1: 'u1'}

def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(dtype).eval().requires_grad_(False)

@settings(max_examples=200, deadline=None)
@given(st.sampled_from((*DTYPES, torch.int8)), st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(0, 1))
def test_masks_do_what_integers_say(dtype, pattern, bit, to):
    width = torch.empty(0, dtype=dtype).element_size()
    pattern, bit = pattern % 2**(8 * width), bit % (8 * width)
    signed = int(np.array(pattern, INT[width]).view(INT[width].replace('u', 'i')))
    x = torch.tensor([signed], dtype={8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width]).view(dtype)
    for model, want in ((flip(bit=bit), pattern ^ 1 << bit), (stuck_bit(bit=bit, to=to), pattern | 1 << bit if to else pattern & ~(1 << bit)), (stuck_at(value=0.), 0)):
        y = apply_masks(x, model(1, dtype, None))
        assert int(bits_of(y)) % 2**(8 * width) == want

@pytest.mark.parametrize('dtype', DTYPES)
def test_flips_are_distinct_bits(dtype):
    masks = flips(k=3)(500, dtype, torch.Generator().manual_seed(0)).flip
    width = 8 * torch.empty(0, dtype=dtype).element_size()
    assert {bin(int(m) % 2**64).count('1') for m in masks} == {3} and all(int(m) % 2**64 < 2**width for m in masks)

@pytest.mark.parametrize('dtype', DTYPES)
def test_every_dtype_runs_and_is_left_alone(dtype):
    model, x = net(dtype), torch.randn(4, 3, 6, 6).to(dtype)
    found, before = layers(model, x), weights_hash(model)
    faults = pd.concat([draw_neurons(found, 4, m) for m in (flip(), flips(k=2), uniform(lo=-9, hi=9), stuck_at(value=float('nan')))])
    r = run(model, [x], faults, found, images=4)
    assert len(r.table) == 16 and set(r.table.dtype) == {str(dtype)[6:]} and (r.table.outcome != 'masked').any()
    with weight_faults(model, draw_weights(model, 20, flip())): assert weights_hash(model) != before
    assert weights_hash(model) == before

def test_same_place_twice_is_restored():
    model = net()
    before, one = weights_hash(model), draw_weights(model, 1, flip(bit=3))
    with weight_faults(model, pd.concat([one, one.assign(flip=1 << 5)], ignore_index=True)): pass
    assert weights_hash(model) == before

def test_error_in_mid_run_restores_everything():
    model, x = net(), torch.randn(4, 3, 6, 6)
    found, before, calls = layers(model, x), weights_hash(model), []
    def forward(m, b):
        calls.append(1)
        if len(calls) > 2: raise RuntimeError('boom')
        return m(b)
    model.train()
    with pytest.raises(RuntimeError, match='boom'): run(model, [x], pd.concat([draw_neurons(found, 8, flip()), draw_weights(model, 3, flip())]), found, images=4, forward=forward, sweep=False)
    assert weights_hash(model) == before and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_a_list_does_not_depend_on_batch_size():
    model, x = net(), torch.randn(12, 3, 6, 6)
    found = layers(model, x[:2])
    faults = draw_neurons(found, 24, uniform(lo=-5, hi=5))
    a, b = (run(model, x.split(n), faults, found, images=12).table for n in (4, 6))
    pd.testing.assert_frame_equal(a[['fault', 'layer', 'index', 'image', 'pred', 'outcome']], b[['fault', 'layer', 'index', 'image', 'pred', 'outcome']])

def test_a_fault_reaches_its_own_sample_only():
    model, x = net(), torch.randn(6, 3, 6, 6)
    found = layers(model, x)
    golden = model(x)
    with NeuronFaults(model, found, draw_neurons(found[:1], 1, stuck_at(value=1e6)), rows=[4]): y = model(x)
    same = (y == golden).all(1)
    assert same.tolist() == [True] * 4 + [False] + [True]

def test_repairs_are_judged_against_the_unprotected_answer():
    model, x = net(), torch.randn(8, 3, 6, 6)
    p = profile(model, [x])
    faults = draw_neurons(p.layers, 40, flip(bit=30))
    r = run(model, [x], faults, p.layers, repairs={'clamp': partial(Restrict, model, p)}, images=8)
    mended = r.repaired['clamp']
    assert (mended.table.fault == r.table.fault).all() and torch.equal(mended.outputs, r.outputs) # the profiled images stay in their range
    assert (mended.table.clean_pred == r.table.clean_pred).all()
    assert (r.table.outcome == 'DUE').any() and not (mended.table.outcome == 'DUE').any()
    alone = run(model, [x], faults, p.layers, images=8)
    pd.testing.assert_frame_equal(alone.table, r.table)

def test_no_fault_is_dropped_in_silence():
    model, x = net(), torch.randn(4, 3, 6, 6)
    found = layers(model, x)
    with pytest.raises(ValueError, match='the loader gave 4 inputs, but a fault strikes image 8'): run(model, [x], draw_neurons(found, 9, flip()), found, images=9)
    with pytest.raises(ValueError, match='empty'): run(model, [x], draw_neurons(found, 1, flip()).iloc[:0], found, images=4)

def of(dtype, model, n=400): return model(n, dtype, torch.Generator().manual_seed(0))

@pytest.mark.parametrize('dtype', (*DTYPES, torch.int8))
def test_error_models_do_what_their_names_say(dtype):
    x = (torch.randn(400, dtype=torch.float64) * 20).to(dtype)
    width = 8 * dtype.itemsize
    unsigned = lambda m: [int(f) % 2**width for f in m.flip]
    assert {f >> (f & -f).bit_length() - 1 for f in unsigned(of(dtype, burst(k=3)))} == {7}
    assert len(set(unsigned(of(dtype, burst(k=3))))) == width - 2
    if dtype.is_floating_point:
        assert torch.equal(apply_masks(x, of(dtype, sign())), -x)
        moved = (apply_masks(x, of(dtype, noise(sd=.1))).double() / x.double() - 1)[x != 0]
        assert .08 < moved.std() < .12
        out = apply_masks(x, of(dtype, outside(lo=-3, hi=5)))
        assert out.isfinite().all() and ((out < -3) | (out > 5)).all() and (out > 5).any()
    spread = apply_masks(x, of(dtype, random_bits()))
    assert len(bits_of(spread).unique()) > 200 and (bits_of(spread) < 0).any() and (bits_of(spread) > 0).any()

def test_value_classes_follow_the_range_of_each_layer():
    model, x = net(), torch.randn(16, 3, 6, 6)
    p = profile(model, [x])
    drawn = {k: draw_neurons(p.layers, 300, value_class(k, p.ranges)) for k in ('in_range', 'out_of_range', 'nan', 'zero')}
    for name, (lo, hi) in p.ranges.items():
        value = lambda k: torch.tensor(drawn[k].set[drawn[k].layer == name].to_numpy()).to(torch.int32).view(torch.float32)
        assert ((value('in_range') >= lo) & (value('in_range') <= hi)).all() and ((value('out_of_range') < lo) | (value('out_of_range') > hi)).all()
        assert value('nan').isnan().all() and (value('zero') == 0).all() and len(value('in_range'))
    assert set(drawn['in_range'].model) == {'value_class(in_range)'}
    with pytest.raises(ValueError, match='value class .huge.: choose one of in_range'): value_class('huge', p.ranges)
    with pytest.raises(ValueError, match='no error model is given for 0'): draw_neurons(p.layers, 3, {})

PATTERNS = {'same_row': (same_row(k=3), 3), 'bullet_wake': (bullet_wake(k=3), 3), 'block': (block(k=5), 5), 'channel': (channel(), 16), 'shattered_channel': (shattered_channel(k=2, span=4), None), 'scattered': (scattered(k=7), 7)}

@pytest.mark.parametrize('name', PATTERNS)
def test_patterns_strike_distinct_places_the_anchor_among_them(name):
    model, x = net(), torch.randn(4, 3, 6, 6)
    shape, many = PATTERNS[name]
    conv, point = layers(model, x)[:1], draw_neurons(layers(model, x)[:1], 40, flip(), seed=3)
    faults = draw_neurons(conv, 40, flip(), seed=3, pattern=shape)
    for anchor, (_, part) in zip(point['index'], faults.groupby((faults.part == 0).cumsum())):
        places = [(i // 16, i % 16 // 4, i % 4) for i in part['index']]
        assert part['index'].is_unique and list(part.part) == list(range(len(part))) and (many is None or len(part) == many)
        assert anchor in set(part['index']) or name == 'block'
        c, h, w = (set(v) for v in zip(*places))
        assert {'same_row': len(c) == len(h) == 1, 'bullet_wake': len(h) == len(w) == 1, 'block': part['index'].max() - part['index'].min() == 4, 'channel': len(c) == 1, 'shattered_channel': len(c) == 2, 'scattered': True}[name]

def test_rows_and_columns_of_weights():
    model = nn.Linear(7, 5)
    r, c = (draw_weights(model, 3, stuck_at(value=0.), pattern=p) for p in (row(), column()))
    with weight_faults(model, r[(r.part == 0).cumsum() == 1]): assert (model.weight == 0).all(1).sum() == 1 and (model.weight == 0).sum() == 7
    with weight_faults(model, c[(c.part == 0).cumsum() == 1]): assert (model.weight == 0).all(0).sum() == 1 and (model.weight == 0).sum() == 5

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4096), st.sampled_from((torch.float32, torch.bfloat16)), st.integers(0, 99))
def test_a_run_is_one_stretch_of_bits(bits, dtype, seed):
    model = nn.Linear(40, 30).to(dtype).requires_grad_(False)
    before = bits_of(model.weight).clone()
    with weight_faults(model, draw_runs(model, 1, bits, seed)):
        changed = (bits_of(model.weight) ^ before).numpy().view(np.uint8)
    struck = np.flatnonzero(np.unpackbits(changed, bitorder='little'))
    assert len(struck) == bits and struck[-1] - struck[0] == bits - 1

def test_a_rate_is_drawn_by_count_and_stands_for_its_layer():
    model, table = net(), draw_rate(net(), 0.01, n=200, names=['3.weight'])
    assert set(table.layer) == {'3.weight'}
    struck = np.array([sum(int(f % 2**64).bit_count() for f in part.flip) for _, part in table.groupby((table.part == 0).cumsum())])
    assert abs(struck.mean() / (320 * 32 * .01) - 1) < .05 and .7 < struck.var() / struck.mean() < 1.3  # as a binomial of small p
    with pytest.raises(ValueError, match='a rate lies in'): draw_rate(model, 0)
    with pytest.raises(ValueError, match='not one of'): draw_rate(model, 1e-9)

class Int8(nn.Module):
    "A layer whose output is int8, as in quantised networks, and one that goes on from it"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)
        self.register_buffer('table', torch.randint(-128, 127, (64, 64), dtype=torch.int8))
        self.quant = nn.Identity()
    def forward(self, x): return self.b(self.quant((self.a(x) * 20).round().clamp(-128, 127).to(torch.int8)).float() @ self.table.float())

@pytest.mark.parametrize('sweep', (True, False))
def test_int8_neurons_and_buffers(sweep):
    torch.manual_seed(0)
    model, x = Int8().eval().requires_grad_(False), torch.randn(8, 64)
    found = layers(model, x, want=lambda m: True)
    assert {l.name: l.dtype for l in found}['quant'] == 'int8'
    faults = pd.concat([draw_neurons([l for l in found if l.name == 'quant'], 60, flip(bit=7)), draw_weights(model, 9, flip(), target='buffer')])
    before = weights_hash(model)
    with pytest.warns(UserWarning, match='table belongs to no step') if sweep else nullcontext(): r = run(model, [x], faults, found, images=8, sweep=sweep)
    assert (r.table.outcome[r.table.target == 'neuron'] != 'masked').all() and set(r.table.dtype) == {'int8'} and weights_hash(model) == before

@pytest.mark.parametrize('column, value, says', [('layer', 'nowhere', "there is no layer or parameter 'nowhere'"), ('index', -1, 'index -1 is outside'), ('dtype', 'float16', 'made for float16'), ('dtype', 'sofa', 'made for sofa'),
    ('flip', 1 << 33, 'flip 8589934592 has bits beyond the width of float32'), ('keep', -(1 << 33), 'keep .* has bits beyond'), ('scale', float('nan'), 'scale nan is not a number'), ('part', 2, 'part 2 of it does not follow part 1'), ('image', 4, 'image 4, but there are 4')])
def test_bad_lists_name_the_fault_before_anything_runs(column, value, says):
    model, x = net(), torch.randn(4, 3, 6, 6)
    found = layers(model, x)
    faults = draw_neurons(found, 6, flip()).assign(image=0)
    faults[column] = faults[column].astype(object)
    faults.loc[3, column] = value
    def never(m, b): raise AssertionError('ran')
    with pytest.raises(ValueError, match=f'fault 3: .*{says}'): run(model, [x], faults.infer_objects(), found, images=4, forward=never)
    with pytest.raises(ValueError, match="no column 'flip'"): run(model, [x], faults.drop(columns='flip'), found, images=4, forward=never)
