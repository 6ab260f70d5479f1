"Relations of sums: found where they hold, nowhere else, and broken by every fault that they cover"
import pytest, torch, torchvision
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from drdna.baselines import Doubt, Extremes, NonFinite, Range, energy, fit_detectors
from drdna.checksums import Checksum, Together, relations
from drdna.core import Recorder, Tap, layers
from drdna.data_model import AttentionProduct, ViT
from drdna.detection import collect_clean, places_of
from drdna.guard import Guard
from drdna.injection import NeuronFaults, draw_neurons, uniform
from drdna.sentinel import Sentinel

def image(n=4, px=32): return torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(1))

class Twice(nn.Module):
    "One linear layer, called twice, with an activation that works in place between the calls"
    def __init__(self):
        super().__init__()
        self.l, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
    def forward(self, x): return self.l(self.act(self.l(x)))

def built(name):
    torch.manual_seed(0)
    nets = {'resnet': lambda: torchvision.models.resnet18(num_classes=10), 'mobilenet': lambda: torchvision.models.mobilenet_v2(num_classes=10), 'densenet': lambda: torchvision.models.densenet121(num_classes=10),
            'swin': lambda: torchvision.models.swin_t(num_classes=10), 'vit': ViT, 'twice': Twice}
    model = nets[name]().eval().requires_grad_(False)
    return model, torch.randn(4, 6) if name == 'twice' else image()

def left_over(model, check, x):
    "What the relations leave over, `(N, L)`, for each neuron that was added up"
    with torch.no_grad(), Recorder(model, check.layers, check.observe) as rec:
        model(x)
        records = rec.take()
    return check.collect(records)[..., 0] / torch.tensor([l.size for l in check.layers])

@pytest.mark.parametrize('name', ('resnet', 'mobilenet', 'densenet', 'swin', 'vit', 'twice'))
def test_sums_agree_and_every_fault_breaks_one(name):
    model, x = built(name)
    check, found = Checksum(model, x), layers(model, x)
    assert left_over(model, check, x).abs().max() < 1e-5
    covered = [l for l in found if l.name not in check.uncovered]
    assert len(covered) > .8 * len(found)
    for layer in covered[::max(1, len(covered) // 12)]:
        fault = draw_neurons([layer], 1, uniform(lo=1e4, hi=2e4), seed=3).assign(image=2)
        clean = left_over(model, check, x)
        with NeuronFaults(model, found, fault, torch.tensor([2])): faulty = left_over(model, check, x)
        changed = (faulty - clean).abs().amax(1) > 1e-3
        assert changed.tolist() == [False, False, True, False], layer.name

@pytest.mark.parametrize('name', ('resnet', 'vit'))
def test_a_weight_that_changes_later_breaks_a_relation(name):
    model, x = built(name)
    check = Checksum(model, x)
    for n, p in list(model.named_parameters())[::7]:
        if n == 'position': continue
        old = p.flatten()[0].clone()
        p.data.view(-1)[0] += 50
        assert left_over(model, check, x).abs().max() > 1e-4, n
        p.data.view(-1)[0] = old
    assert left_over(model, check, x).abs().max() < 1e-5

def test_fusion_stops_where_memory_was_written():
    model, x = built('twice')
    assert [(r.head, r.tail) for r in relations(model, x, layers(model, x))] == [(0, 0), (1, 1)]
    assert Checksum(model, x).layers[1].name == 'l#2'

def test_fusion_stops_where_axes_change_places():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        def forward(self, x): return self.b(self.a(x).transpose(1, 2))
    model, x = Mixer().eval(), torch.randn(4, 6, 6)
    assert [(r.head, r.tail) for r in relations(model, x, layers(model, x))] == [(0, 0), (1, 1)]

def test_fused_relations_cover_the_same():
    model, x = built('resnet')
    one, two = Checksum(model, x, fuse=False), Checksum(model, x)
    assert (len(one.relations), len(two.relations)) == (41, 21) and one.uncovered == two.uncovered == []

def test_unknown_layers_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    torch.nn.init.normal_(model[1].weight)  # all ones, its sum would be 0: a relation after all
    assert Checksum(model, image()).uncovered == ['1']
    with pytest.raises(ValueError, match='nothing to add up'): Checksum(nn.Sequential(model[1]), torch.randn(4, 4, 5, 5))

def test_open_taps_do_not_matter_and_the_model_stays_as_it_was():
    model, x = built('resnet')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    with Tap(model, layers(model, x), lambda y, call: None): check = Checksum(model, x)
    assert check.uncovered == [] and model.training and all(v.equal(before[k]) for k, v in model.state_dict().items())

def test_made_within_inference_mode():
    model, x = built('resnet')
    with torch.inference_mode(): check = Checksum(model, x + 0)
    assert len(check.relations) == 21

def test_non_finite_values_are_abnormal():
    model, x = built('resnet')
    check = Checksum(model, x)
    check.mean, check.unit = torch.zeros(len(check.layers), 1), torch.ones(len(check.layers), 1)
    x[1, 0, 3, 3] = float('nan')
    with torch.no_grad(), Recorder(model, check.layers, check.observe) as rec:
        model(x)
        stat = check.statistic(check.collect(rec.take()))
    assert stat[1].max() == torch.inf and stat[0].isfinite().all()

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float64))
def test_other_precisions(dtype):
    model, x = built('resnet')
    model, x = model.to(dtype), x.to(dtype)
    check = Checksum(model, x)
    assert check.uncovered == [] and left_over(model, check, x).abs().max() < {torch.bfloat16: .01, torch.float64: 1e-5}[dtype]

@pytest.mark.parametrize('low', (torch.bfloat16, torch.float16))
@pytest.mark.parametrize('name', ('twice', 'vit'))
def test_autocast_leaves_the_sums_alone(name, low):
    model, x = built(name)
    det, records = Checksum(model, x), []
    def both(y, i, call):
        with torch.autocast('cpu', low): rough = det.observe(y, i, call)
        records.append((rough, det.observe(y, i, call)))
        return rough
    with torch.no_grad(), Recorder(model, det.layers, both): model(x)
    for rough, want in records: torch.testing.assert_close(rough, want, rtol=1e-5, atol=1e-2) # of a sum over thousands of values

def test_together_is_the_larger_of_its_parts():
    model, x = built('resnet')
    every = layers(model, x, want=lambda m: True)
    blocks = [l for l in every if l.name.endswith('relu#2')]
    both, *parts = fit_detectors(model, [image(16), image(16) + .1], {'both': Together([Checksum(model, x), Extremes(blocks)], every), 'sums': Checksum(model, x), 'extremes': Extremes(blocks)}).values()
    seen = collect_clean(model, [x * 3], {'both': both, 'sums': parts[0], 'extremes': parts[1]})
    want = torch.stack([d.statistic(seen[n]).amax(1) / s for d, n, s in zip(parts, ('sums', 'extremes'), both.scale)]).amax(0)
    got = both.statistic(seen['both'])
    assert torch.equal(got.amax(1), want)
    assert got.shape == (4, len(both.layers)) and [l.name for l in both.layers] == [l.name for l in every if l.name in {m.name for p in parts for m in p.layers}]
    with pytest.raises(ValueError, match='layer1.0.relu#2'): Together([Extremes(blocks)], every[:3])
    with pytest.raises(ValueError, match='stored tensors'): Together([Sentinel(model, x, [('max', 'fc'), ('stored', 'fc.weight')]), Extremes(blocks)], every)

@pytest.mark.parametrize('part', (NonFinite, Range, lambda ls: Doubt(ls, energy)))
def test_what_measures_no_deviation_cannot_be_joined(part):
    model, x = built('resnet')
    every = layers(model, x, want=lambda m: True)
    both = Together([part(every), Extremes(every)], every)
    with pytest.raises(ValueError, match=f'a {type(both.parts[0]).__name__} cannot be a part'): fit_detectors(model, [image(16)], {'both': both})

@pytest.mark.parametrize('picks', ([('max', 'conv1'), ('min', 'conv1'), ('max', 'fc')], [('max', 'conv1'), ('max in', 'fc')]))
def test_picks_of_a_sentinel_are_part_of_the_whole(picks):
    model, x = built('resnet')
    every = layers(model, x, want=lambda m: True)
    pair = lambda: [Sentinel(model, x, picks), Extremes([l for l in every if l.name in ('layer2.0.relu#2', 'fc')])]
    both, *parts = fit_detectors(model, [image(16), image(16) + .1], dict(zip('bse', (Together(pair(), every), *pair())))).values()
    seen = collect_clean(model, [x * 3], {'b': both, 's': parts[0], 'e': parts[1]})
    want = {}
    for d, n, unit in zip(parts, 'se', both.scale):
        for l, v in zip(places_of(d), (d.statistic(seen[n]) / unit).T): want[l.name] = torch.maximum(want.get(l.name, v), v)
    assert torch.equal(both.statistic(seen['b']), torch.stack([want[l.name] for l in both.layers], 1))

class Styled(nn.Module):
    "A normalisation with a second argument, and layers that are called by keyword"
    class Scaled(nn.LayerNorm):
        def forward(self, x, scale): return super().forward(x) * (1 + scale)
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.zero, self.wrong = nn.Linear(6, 6), self.Scaled(6), nn.Linear(6, 6), nn.LayerNorm(6), AcrossChannels(6)
        nn.init.uniform_(self.zero.weight, .5, 2); self.zero.weight.data[2] = 0
        nn.init.uniform_(self.wrong.weight, .5, 2)
    def forward(self, x): return self.wrong(self.zero(self.b(input=self.norm(self.a(input=x), x.tanh()))).view(-1, 6, 1).expand(-1, -1, 6)).sum(2)

class Heads(nn.Module):
    "Attention's product with samples and heads in one axis"
    def __init__(self):
        super().__init__()
        self.l, self.scores = nn.Linear(6, 6), AttentionProduct()
    def forward(self, x):
        q = self.l(x).unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1)
        return self.scores(q, q.mT).sum((1, 2)).view(len(x), 2)

def test_a_product_of_all_heads_at_once_obeys_its_relation():
    torch.manual_seed(0)
    model, x = Heads().eval().requires_grad_(False), torch.randn(4, 5, 6)
    check = Checksum(model, x, layers(model, x, want=lambda m: True))
    assert check.uncovered == [] and left_over(model, check, x).abs().max() < 1e-5

class AcrossChannels(nn.LayerNorm):
    "A normalisation of another axis"
    def forward(self, x): return super().forward(x.movedim(1, -1)).movedim(-1, 1)

def test_what_obeys_no_relation_is_named():
    torch.manual_seed(0)
    model, x = nn.Sequential(Styled(), nn.Linear(6, 4)).eval().requires_grad_(False), torch.randn(8, 6)
    check = Checksum(model, x, layers(model, x, want=lambda m: True))
    assert check.uncovered == ['0.a', '0.norm', '0.b', '0.zero', '0.wrong'] and [l.name for l in check.layers] == ['1']
    assert left_over(model, check, x).abs().max() < 1e-5

def test_a_compiler_may_keep_the_order_of_what_a_convolution_reads():
    "A view with another axis fixes it, and costs a transposition for each convolution"
    model, x = built('resnet')
    r = Checksum(model, x).relations[1]
    graph = make_fx(lambda a: r.before([a], 4, torch.float64))(torch.randn(4, *r.v.shape[1:])).graph
    graph.eliminate_dead_code()
    assert not [n for n in graph.nodes if 'view' in str(n.target) or 'unsqueeze' in str(n.target)]
    assert r.v.shape[0] == 1 and r.v.kept.is_contiguous(memory_format=torch.channels_last)

def test_a_guard_of_both_compiles_and_says_what_it_cannot():
    model, x = built('vit')
    every = layers(model, x, want=lambda m: True)
    make = lambda found: Together([Checksum(model, x, found), Extremes(every[-1:])], every)
    guard = Guard.fit(model, [image(16), image(16) + .1], fpr=.1, detector=make)
    [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight[0, 0] += 1
    with torch.no_grad():
        eager, graph = guard(x)[1], torch.compile(guard, fullgraph=True, backend='eager')(x)[1]
    assert eager.alarm.all() and graph.alarm.all() and torch.equal(eager.layer, graph.layer)
    with pytest.raises(ValueError, match='by itself, which a Together does not'): Guard(model, guard.detector, 1., stop='first')

NORMS = {'layer': lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), 'instance': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), 'group': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))}

@pytest.mark.parametrize('name', NORMS)
def test_a_sum_that_never_changes_covers_its_own_layer_only(name):
    torch.manual_seed(0)
    model, x = NORMS[name]().eval().requires_grad_(False), torch.randn(4, 6) if name == 'layer' else image(px=8)
    check = Checksum(model, x)
    assert [(r.head, r.tail) for r in check.relations] == [(0, 0), (1, 1)] and left_over(model, check, x).abs().max() < 1e-5
    model[0].weight.view(-1)[0] += 50
    assert left_over(model, check, x).abs().max() > 1e-3

def test_what_depends_on_the_rest_of_the_batch_obeys_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert Checksum(model, image()).uncovered == ['1']

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)
    def forward(self, x): return self.fc(self.lstm(x)[0][:, -1])

def test_layers_of_several_outputs_are_named():
    model, x = Recurrent().eval(), torch.randn(3, 5, 4)
    assert Checksum(model, x, layers(model, x, want=lambda m: True)).uncovered == ['lstm']

class Scaled(AttentionProduct):
    def forward(self, a, b): return a @ b / 8
class Product(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.l, self.product = nn.Linear(4, 4), kind()
    def forward(self, x): return self.product(x, self.l(x).mT)

@pytest.mark.parametrize('kind,uncovered', [(AttentionProduct, []), (Scaled, ['product'])])
def test_small_products_are_looked_at_as_closely(kind, uncovered):
    model, x = Product(kind).eval(), .01 * torch.randn(3, 4, 4)
    assert Checksum(model, x, layers(model, x, want=lambda m: True)).uncovered == uncovered
