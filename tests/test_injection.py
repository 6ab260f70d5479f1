"Faults on odd models, dtypes and moments"
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from drdna.core import layers, weights_hash
from drdna.mitigation import Restrict
from drdna.profiling import profile
from drdna.injection import NeuronFaults, apply_masks, bits_of, draw_neurons, draw_weights, flip, flips, run, stuck_at, stuck_bit, uniform, weight_faults

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INT = {8: 'u8', 4: 'u4', 2: 'u2'}

def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(dtype).eval().requires_grad_(False)

@settings(max_examples=200, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(0, 1))
def test_masks_do_what_integers_say(dtype, pattern, bit, to):
    width = torch.empty(0, dtype=dtype).element_size()
    pattern, bit = pattern % 2**(8 * width), bit % (8 * width)
    signed = int(np.array(pattern, INT[width]).view(INT[width].replace('u', 'i')))
    x = torch.tensor([signed], dtype={8: torch.int64, 4: torch.int32, 2: torch.int16}[width]).view(dtype)
    for model, want in ((flip(bit=bit), pattern ^ 1 << bit), (stuck_bit(bit=bit, to=to), pattern | 1 << bit if to else pattern & ~(1 << bit)), (stuck_at(value=0.), 0)):
        y = apply_masks(x, model(1, dtype, None))
        assert int(bits_of(y)) % 2**(8 * width) == want

@pytest.mark.parametrize('dtype', DTYPES)
def test_flips_are_distinct_bits(dtype):
    masks = flips(k=3)(500, dtype, torch.Generator().manual_seed(0))[:, 2]
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
        if len(calls) == 3: raise RuntimeError('boom')
        return m(b)
    model.train()
    with pytest.raises(RuntimeError, match='boom'): run(model, [x], pd.concat([draw_neurons(found, 8, flip()), draw_weights(model, 3, flip())]), found, images=4, forward=forward)
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
