"""Sentinels: what a feature is, how features are judged together, and the choice"""
import copy, pytest, torch

from drdna.baselines import fit_detectors
from drdna.checksums import Checksum
from drdna.core import Tap, stored_in
from drdna.data_model import ViT
from drdna.detection import collect_clean, threshold
from drdna.sentinel import COSTS, INTO, LOOKS, MARGINS, Sentinel, _bit_sums, _Recalls, choose, inputs, offers, price, sizes, storing
from torchvision.models import resnet18

def net():
    torch.manual_seed(0)
    return resnet18(num_classes=4).eval().requires_grad_(False)

def vit():
    torch.manual_seed(0)
    return ViT(d=16, depth=1, heads=2).eval().requires_grad_(False)

@pytest.fixture(scope='module', params=[net, vit])
def made(request):
    model, data = request.param(), list(torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(8))
    return model, data, fit_detectors(model, data, {'x': Sentinel(model, data[0], offers(model, data[0]))})['x']

def of_pick(det, seen, k): return det.numbers(seen)[:, k]

def test_checks_are_those_of_checksum_to_the_bit(made):
    model, data, det = made
    c = Checksum(model, data[0])
    seen = collect_clean(model, data, {'x': det, 'c': c})
    for k, (what, n) in enumerate(det.picks):
        if what == 'check': assert torch.equal(of_pick(det, seen['x'], k), seen['c'][:, [l.name for l in c.layers].index(n), 0])
    assert sum(w == 'check' for w, _ in det.picks) == len(c.relations)

def test_inputs_are_what_the_layer_reads(made):
    model, data, det = made
    names, seen = [n for w, n in det.picks if w == 'max in'], {}
    with torch.inference_mode(), Tap(model, [l for l in det.layers if l.name in names], lambda x, call: seen.update({call.layer.name: call.args[0].clone()})): model(data[0])
    got = collect_clean(model, data[:1], {'x': det})['x']
    for k, (what, n) in enumerate(det.picks):
        if what in INTO: assert torch.equal(of_pick(det, got, k), INTO[what](seen[n].flatten(1), 1))
    assert names and not any(n.partition('#')[0].endswith('relu') for n in names)  # these work in place, so that the sum before them is gone

def test_clean_inputs_of_the_fit_stay_within_one_unit(made):
    model, data, det = made
    d = det.deviations(collect_clean(model, data, {'x': det})['x'])
    top = d.amax(0)
    assert (((top - 1).abs() < 1e-5) | (top == 0)).all()  # 0: a number that never varies, such as the minimum behind a ReLU
    assert all(t > 0 for t, (w, _) in zip(top, det.picks) if w == "max")

def test_picks_are_judged_in_the_order_of_execution(made):
    model, data, det = made
    r = collect_clean(model, data, {'x': det})['x']
    s, order = det.statistic(r), [l.name for l in det.layers] + det.kept
    assert torch.equal(s, det.deviations(r))
    at = [order.index(n) for _, n in det.picks]
    assert at == sorted(at) and [l.name for l in det.places] == [n for _, n in det.picks]

def test_what_is_not_finite_alarms_at_its_layer_alone(made):
    model, data, det = made
    r = collect_clean(model, data, {'x': det})['x'][:2].clone()
    column = 0 if det.one is None else int(det.one[0])
    r[0, column], r[1, column] = torch.nan, torch.inf
    s = det.statistic(r)
    assert s[:, 0].isinf().all() and s.isinf().sum() == 2

def test_float64_networks_have_sentinels_too(made):
    model, data, det = made
    double, more = copy.deepcopy(model).double(), [x.double() for x in data]
    d = fit_detectors(double, more, {'x': Sentinel(double, more[0], [p for p in det.picks if p[0] != 'check'])})['x']
    got = d.deviations(collect_clean(double, more, {'x': d})['x'])
    assert got.dtype == torch.float64 and (got.amax(0) <= 1 + 1e-9).all()

def test_any_changed_bit_of_what_is_stored_alarms_under_its_name(made):
    model, data, det = made
    model, kept, bits = copy.deepcopy(model), storing(model), torch.Generator().manual_seed(2)
    now = stored_in(model, kept)
    clean = det.statistic(collect_clean(model, data, {'x': det})['x'])
    assert {*kept} == {n for n, t in model.state_dict().items() if t.is_floating_point()} and det.kept == kept
    for i, name in enumerate(kept):
        t = model.state_dict()[name].view(-1)
        at, word = torch.randint(len(t), (), generator=bits), 1 << int(torch.randint(31, (), generator=bits))
        t.view(torch.int32)[at] ^= word
        seen = det.stored(now())
        assert seen.isinf().sum() == 1
        s = det.statistic(det.collect([*[torch.zeros(3, w) for w in widths(det)], seen.expand(3, -1)]))
        k = det.picks.index(('stored', name))
        assert s[:, k].isinf().all() and det.places[k].name == name
        t.view(torch.int32)[at] ^= word
    assert not det.stored(now()).any() and torch.equal(clean, det.statistic(collect_clean(model, data, {'x': det})['x']))

def widths(det): return [(i in det.begins or i in det.ends) + len(ws) for i, ws in enumerate(det.looks)]

@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_bits_add_up_in_any_width_and_layout(dtype):
    model, x = net().to(dtype).to(memory_format=torch.channels_last), torch.zeros(2, 3, 32, 32, dtype=dtype)
    d = Sentinel(model, x, [('max', 'fc'), ('stored', 'conv1.weight'), ('stored', 'fc.bias')])
    now = stored_in(model, d.kept)
    assert not d.stored(now()).any()
    model.fc.bias[0] += 1
    assert d.stored(now()).tolist() == [0, torch.inf]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.complex128])
def test_bits_add_up_to_the_same_wherever_they_lie(dtype):
    torch.manual_seed(0)
    t = torch.randn(6, 4, 3, 3).to(dtype)
    last = t.to(memory_format=torch.channels_last)
    a, b = (_bit_sums([v]) for v in (t, last))
    assert torch.equal(a, b) and a.dtype == torch.int64
    last[0] *= -1
    assert not torch.equal(a, _bit_sums([last]))

def test_words_must_begin_where_they_can():
    model = net()
    model.fc.bias = torch.nn.Parameter(torch.zeros(5)[1:], requires_grad=False)
    with pytest.raises(ValueError, match="'fc.bias' is part of a larger one"): Sentinel(model, torch.zeros(2, 3, 32, 32), [('max', 'fc'), ('stored', 'fc.bias')])

def test_picks_may_be_lists(made):
    model, data, det = made
    picks = [p for p in det.picks if p[0] in LOOKS][:3]
    assert Sentinel(model, data[0], [[*p] for p in picks]).picks == picks

def test_a_list_of_tokens_is_no_input_to_look_at():
    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3)
        def forward(self, y): return self.out(self.embed(y))
    assert inputs(Labelled(), torch.tensor([0, 1, 4])) == ['out']

def test_channels_last_sees_the_same(made):
    model, data, det = made
    same = [x.contiguous(memory_format=torch.channels_last) for x in data]
    looks = [k for k, (what, _) in enumerate(det.picks) if what in LOOKS]
    a, b = (det.numbers(collect_clean(model, d, {'x': det})['x'])[:, looks] for d in (data, same))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('picks, why', [([], 'no picks'), ([('stored', 'fc.weight')], 'no picks of activations'), ([('max', 'fc'), ('stored', 'fc')], "('stored', 'fc')"), ([('max', 'fc9')], "('max', 'fc9')"), ([('mean', 'fc')], "'mean'"), ([('max in', 'relu')], "('max in', 'relu')"), ([('check', 'relu')], "('check', 'relu')")])
def test_a_pick_that_does_not_exist_is_named(picks, why):
    model = net()
    with pytest.raises(ValueError) as e: Sentinel(model, torch.zeros(2, 3, 32, 32), picks)
    assert why in str(e.value)

def test_a_second_look_is_cheaper_than_a_first(made):
    model, data, det = made
    size = sizes(model, data[0])
    cost = lambda *p, **kw: price([*p], det.heads, size, **kw) - price([], det.heads, size, **kw)
    a, b, *_, far = size
    assert cost(('max', a)) < cost(('max', a), ('min', a)) < 2 * cost(('max', a))
    assert cost(('max', a), ('max', b)) < cost(('max', a)) + cost(('max', b)) == pytest.approx(cost(('max', a), ('max', b), costs=COSTS | {'warm': COSTS['cold']}))  # right behind another
    assert cost(('max', a), ('max', far)) == pytest.approx(cost(('max', a)) + cost(('max', far)))
    assert cost(*det.picks, batch=64) > cost(*det.picks, batch=32)

def test_the_choice_keeps_its_budget_and_leaves_out_what_gains_nothing():
    clean = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    seen = {'a': torch.tensor([[9., 0, 0]]).expand(30, 3), 'b': torch.tensor([[0., 9, 0]]).expand(30, 3)}
    picks, cost = [('max', n) for n in 'abc'], lambda p: sum({'a': 1, 'b': 2, 'c': .5}[n] for _, n in p)
    t = choose(picks, clean, seen, cost, [9, 1.5])
    small, large = (t[t.budget == b] for b in (1.5, 9))
    assert small.layer.tolist() == ['a'] and small['mean'].tolist() == [.5] and small.worst.tolist() == [0] and small.cost.tolist() == [1]
    assert sorted(large.layer) == ['a', 'b'] and large['mean'].tolist() == [1, 1]
    with pytest.raises(ValueError, match='999'): choose(picks, clean[:50], seen, cost, [9])  # too few clean inputs for the rate
    with pytest.raises(ValueError, match="group 'c' has no SDCs"): choose(picks, clean, seen | {'c': torch.empty(0, 3)}, cost, [9])

def test_recalls_of_the_choice_are_those_of_the_threshold():
    g = torch.Generator().manual_seed(3)
    clean, seen = torch.rand(2000, 4, generator=g), {'a': 2 * torch.rand(30, 4, generator=g), 'b': 2 * torch.rand(50, 4, generator=g)}
    seen['a'][0, 2] = torch.nan
    r, mine = _Recalls(clean, seen, .01), [0, 3]
    for m, got in zip(MARGINS, r.of(mine)):
        for k in range(4):
            t = m * threshold(clean[:, [*mine, k]].amax(1), .01)
            want = [float((~(v[:, [*mine, k]].amax(1) <= t)).float().mean()) for v in seen.values()]  # the maximum hands a NaN on
            assert got[:, k].tolist() == pytest.approx(want)

@pytest.mark.parametrize('seed', [14, 24, 27])  # single steps from nothing end lower there with more to spend
def test_a_larger_budget_sees_no_less(seed):
    g = torch.Generator().manual_seed(seed)
    clean, seen = torch.rand(1000, 8, generator=g), {n: 10 * (torch.rand(12, 8, generator=g) < .3).float() for n in 'abc'}
    prices = (1 + 4 * torch.rand(8, generator=g)).tolist()
    t = choose([('max', k) for k in range(8)], clean, seen, lambda p: sum(prices[k] for _, k in p), [4, 5, 6, 7, 8]).groupby('budget').first()
    assert (t['mean'] + t.worst).is_monotonic_increasing
