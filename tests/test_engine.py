"The sweep against the slow way, bit for bit, on networks of every kind"
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd, pytest, torch, torch.nn.utils.prune, torchvision.models as tv
from torch import nn

from drdna.core import Tap, layers, weights_hash
from drdna.engine import Cut, Sweep, Uncuttable, run
from drdna.injection import bits_of, channel, draw_neurons, draw_rate, draw_weights, flip, noise, row, same_row, scattered, stuck_at, uniform, written
from drdna.mitigation import Restrict
from drdna.profiling import profile

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.cell, self.out = nn.Embedding(50, 16), nn.LSTM(16, 24, 2), nn.GRUCell(24, 12), nn.Linear(12, 5)
    def forward(self, x):
        y, (h, _) = self.lstm(self.embed(x).transpose(0, 1))
        state = h[-1][:, :12]
        for t in range(4): state = self.cell(y[t], state)  # one module, called four times
        return self.out(state)

def small_vgg():
    "VGG-11 with the head of its successors; its own holds 100 million weights"
    model = tv.vgg11_bn(num_classes=10)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model

def image(make, size): return lambda: (make(), torch.randn(6, 3, size, size))
NETS = {
    'resnet': image(lambda: tv.resnet18(num_classes=10), 32), 'vgg': image(small_vgg, 32), 'mobilenet': image(lambda: tv.mobilenet_v2(num_classes=10), 32), 'densenet': image(lambda: tv.densenet121(num_classes=10), 32),
    'inception': image(lambda: tv.inception_v3(num_classes=10, aux_logits=False, init_weights=False), 75), 'vit': image(lambda: tv.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), 32), 'swin': image(lambda: tv.swin_t(num_classes=10), 32),
    'recurrent': lambda: (Recurrent(), torch.randint(50, (6, 7)))}

def settle(model):
    "Statistics and heads as after a training: not all zero, not all one"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(.5, 2); m.weight.uniform_(.5, 1.5); m.bias.normal_()
        if isinstance(m, nn.Linear) and not m.weight.any(): m.weight.normal_()
    return model.eval()

@torch.no_grad()
def built(name):
    torch.manual_seed(0)
    model, x = NETS[name]()
    model.requires_grad_(False)
    return settle(model), x

def mixture(model, found):
    "Every target, one neuron and many, one weight and many"
    owned = [n for n, p in model.named_parameters() if p.ndim > 1 and n.rpartition('.')[0] in {l.path for l in found}]
    lists = [draw_neurons(found, 30, flip(bit=30)), draw_neurons(found, 30, uniform(lo=-100, hi=100), seed=1), draw_neurons(found, 12, stuck_at(value=0.), seed=2, pattern=channel()), draw_neurons(found, 9, noise(sd=2.), seed=3, pattern=same_row()),
             draw_weights(model, 8, flip(bit=30), names=owned), draw_weights(model, 5, uniform(lo=-3, hi=3), seed=1, names=owned), draw_weights(model, 5, uniform(lo=-3, hi=3), seed=2, target='bias'), draw_weights(model, 1, noise(sd=1.), names=owned, pattern=row()),
             draw_rate(model, 20 / (32 * sum(model.get_parameter(n).numel() for n in owned)), 2, names=owned)]
    if any(b.is_floating_point() for b in model.buffers()): lists.append(draw_weights(model, 5, uniform(lo=.1, hi=3), seed=3, target='buffer', names=[n for n, b in model.named_buffers() if n.endswith(('mean', 'var'))]))
    return pd.concat(lists, ignore_index=True)

def plain(x): return bits_of(x.nan_to_num(1.5, torch.inf, -torch.inf))  # which of several NaNs an instruction passes on is not defined

class Look:
    "An observer that sees the whole of every layer's output and input, and of all that is stored: two sums over the bits, in integers, which threads cannot round differently"
    def __init__(self, layers, model): self.layers, self.kept = layers, [n for n, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()]
    def sums(self, x):
        bits = plain(x.flatten(1)).long()
        return torch.stack([bits.sum(1), (bits * torch.arange(1, bits.shape[1] + 1, device=bits.device)).sum(1)], 1)
    def observe(self, x, i, call):
        given = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, torch.Tensor) and a.ndim > 1 and len(a) == len(x)]
        return self.sums(x) + sum((k + 2) * self.sums(a) for k, a in enumerate(given) if a.is_floating_point())
    def stored(self, tensors): return sum(self.sums(t.detach()[None]) for t in tensors)
    def collect(self, records): return torch.stack(records, 1)

def same(a, b): return torch.equal(*(plain(t) if t.is_floating_point() else t for t in (a, b)))

def agree(a, b):
    pd.testing.assert_frame_equal(a.table, b.table)
    return same(a.answers, b.answers) and same(a.outputs, b.outputs) and all(same(a.faulty[k], b.faulty[k]) and same(a.clean[k], b.clean[k]) for k in a.faulty)

@pytest.fixture(autouse=True)
def one_thread():
    "Several threads share a small batch by the place of its rows, and then not every network can be cut"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.mark.parametrize('threads', (1, 2))
@pytest.mark.parametrize('name', NETS)
def test_swept_is_whole(name, threads):
    torch.set_num_threads(threads)
    model, x = built(name)
    found, before = layers(model, x), weights_hash(model)
    faults, look = mixture(model, found), {'look': Look(found, model)}
    with warnings.catch_warnings():
        warnings.simplefilter('error' if threads == 1 else 'ignore')  # on one thread a network that is not cut would prove nothing
        fast = run(model, [x], faults, found, look, images=6, memory=2**24)
        bare = run(model, [x], faults, found, images=6)  # unobserved, so windows may do
    slow = run(model, [x], faults, found, look, images=6, sweep=False)
    assert agree(fast, slow) and same(bare.answers, slow.answers) and weights_hash(model) == before
    assert (slow.table.outcome != 'masked').mean() >= .3

@pytest.mark.parametrize('name', ('resnet', 'densenet', 'vit', 'recurrent'))
def test_together_is_alone(name):
    model, x = built(name)
    found = layers(model, x)
    faults = mixture(model, found)
    first = (faults.part == 0).cumsum() - 1
    together = run(model, [x], faults.assign(image=first % 6), found, images=6)
    for i in range(0, first.max(), 9):
        alone = run(model, [x], faults[first == i].assign(image=i % 6), found, images=6, sweep=False)
        assert same(alone.answers, together.answers[torch.tensor((together.table.fault == i).tolist())])

@pytest.mark.parametrize('name', ('resnet', 'mobilenet', 'densenet'))
def test_dropped_is_kept(name, monkeypatch):
    model, x = built(name)
    found = layers(model, x)
    faults, look, dropped = mixture(model, found), {'look': Look(found, model)}, []
    alive = Sweep._alive
    def count(self, rows, *rest):
        res = alive(self, rows, *rest)
        dropped.append(len(rows) - len(res[0]))
        return res
    monkeypatch.setattr(Sweep, '_alive', count)
    early = run(model, [x], faults, found, look, images=6)
    monkeypatch.setattr(Sweep, '_alive', lambda self, rows, leaves, s, v: (rows, leaves))
    assert sum(dropped) > 20 and agree(early, run(model, [x], faults, found, look, images=6))

@pytest.mark.parametrize('name', ('resnet', 'mobilenet', 'densenet', 'inception'))
def test_windows_are_taken_and_may_be_refused(name, monkeypatch):
    model, x = built(name)
    found = layers(model, x)
    faults, kept, keep = mixture(model, found), [], Sweep._keep
    def count(self, w, node, v, look):
        kept.append(len(w.rows))
        keep(self, w, node, v, look)
    monkeypatch.setattr(Sweep, '_keep', count)
    narrow = run(model, [x], faults, found, images=6)
    assert sum(kept) > 20
    monkeypatch.setattr(Sweep, '_proven', lambda *_: False)  # as on a processor whose kernels add windows in another order
    assert agree(narrow, run(model, [x], faults, found, images=6))

@pytest.mark.parametrize('memory', (1, 2**20, 2**30))
def test_memory_decides_the_pieces_and_nothing_else(memory):
    model, x = built('resnet')
    found = layers(model, x)
    faults = mixture(model, found)
    assert agree(run(model, [x], faults, found, images=6, memory=memory), run(model, [x], faults, found, images=6))

def test_channels_last():
    model, x = built('resnet')
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    found = layers(model, x)
    faults = mixture(model, found)
    assert agree(run(model, [x], faults, found, images=6), run(model, [x], faults, found, images=6, sweep=False))

def test_repairs_act_in_a_sweep_as_in_the_network():
    model, x = built('resnet')
    p = profile(model, [x])
    faults, tight = mixture(model, p.layers), lambda: Restrict(model, p, lambda v, lo, hi: v.nan_to_num(0., 0., 0.).clamp(lo / 2, hi / 2))
    fast, slow = (run(model, [x], faults, p.layers, {'look': Look(p.layers, model)}, {'tight': tight}, images=6, sweep=s) for s in (True, False))
    assert agree(fast, slow) and agree(fast.repaired['tight'], slow.repaired['tight']) and not same(fast.outputs, fast.repaired['tight'].outputs)

class InPlace(nn.Module):
    "Eager code in which a later reader sees what an in-place operation left"
    def __init__(self, view):
        super().__init__()
        self.a, self.b, self.view = nn.Linear(64, 64), nn.Linear(64, 32), view
    def forward(self, x):
        y = self.a(x)
        z = y.view(-1, 8, 8) if self.view else y
        y.relu_()
        return self.b(y + z.reshape(-1, 64))

def test_in_place_operations_reach_later_readers_or_prevent_the_cut():
    x = torch.randn(8, 64)
    model = InPlace(view=False).eval().requires_grad_(False)
    found = layers(model, x)
    faults = draw_neurons(found, 80, flip())
    assert agree(run(model, [x], faults, found, images=8), run(model, [x], faults, found, images=8, sweep=False))
    with pytest.raises(Uncuttable, match='changes .* in place, and a view of it is used later'), torch.no_grad(): Cut(InPlace(view=True).eval().requires_grad_(False), x)

class Tied(nn.Module):
    "One weight under two names, a parameter that no module call uses, a module that is called twice, a dictionary"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.scale = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32), nn.Parameter(torch.ones(2, 64))
        self.b.weight = self.a.weight
    def forward(self, x, shift): return {'n': 3, 'logits': self.c(self.a(self.b(self.a(x).relu()) * self.scale[0] + shift))}

def test_tied_reused_and_loose_parameters():
    torch.manual_seed(0)
    model, batch = Tied().eval().requires_grad_(False), {'x': torch.randn(8, 64), 'shift': torch.randn(8, 64), 'labels': torch.zeros(8)}
    found = layers(model, batch)
    faults = pd.concat([draw_neurons(found, 40, flip(bit=30)), draw_weights(model, 20, uniform(lo=-2, hi=2)), draw_weights(model, 8, uniform(lo=-2, hi=2), target='bias')])
    assert {'a.weight', 'b.weight'} <= set(faults.layer) and 'a#2' in set(faults.layer)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fast = run(model, [batch], faults, found, images=8)
    assert agree(fast, run(model, [batch], faults, found, images=8, sweep=False))
    loose = draw_weights(model, 4, uniform(lo=-2, hi=2), names=['scale'])
    with pytest.warns(UserWarning, match='scale belongs to no step'): fast = run(model, [batch], loose, found, images=8)
    assert agree(fast, run(model, [batch], loose, found, images=8, sweep=False)) and (fast.table.outcome != 'masked').any()

class Fragile(nn.Module):
    "Raises when it meets a large value"
    def __init__(self):
        super().__init__()
        self.a, self.check, self.b = nn.Linear(64, 64), Check(), nn.Linear(64, 32)
    def forward(self, x): return self.b(self.check(self.a(x)))

class Check(nn.Module):
    def forward(self, x):
        if x.abs().max() > 1e6: raise RuntimeError('too large')
        return x * 1

@pytest.mark.parametrize('sweep', (True, False))
@pytest.mark.parametrize('target', ('neuron', 'weight'))
def test_an_error_in_mid_run_names_the_fault_and_restores_everything(sweep, target):
    model, x = Fragile().train().requires_grad_(False), torch.randn(8, 64)
    found, before = layers(model, x), weights_hash(model)
    draw = lambda m: draw_neurons(found[:1], 1, m) if target == 'neuron' else draw_weights(model, 1, m, names=['a.weight'])
    faults = pd.concat([draw(stuck_at(value=0.)), draw(stuck_at(value=0.)), draw(stuck_at(value=1e9))])
    with pytest.raises(RuntimeError, match='too large') as e: run(model, [x], faults, found, images=8, sweep=sweep)
    assert any('fault' in n and '2' in n for n in e.value.__notes__)
    assert weights_hash(model) == before and model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

# Networks on which a careless cut would be wrong: each must agree with the slow way, cut or not.

class Two(nn.Module):
    "Two layers and something odd in between"
    def __init__(self, odd=lambda s, y: y, width=64):
        super().__init__()
        self.a, self.b, self.c, self.odd = nn.Linear(64, width), nn.Linear(64, 64), nn.Linear(64, 32), odd
    def forward(self, x): return self.c(self.b(self.odd(self, self.a(x))).relu())

@dataclass
class Answer:
    logits: torch.Tensor

class Wrapped(Two):
    def forward(self, x): return Answer(super().forward(x))

class Alias(Two):
    def __init__(self):
        super().__init__()
        self.w = self.b.weight
        self.d = nn.Linear(64, 64)
        self.d.weight = nn.Parameter(self.b.weight.data)  # the same memory, another parameter
    def forward(self, x): return super().forward(self.d(x))

class Named(Two):
    "A layer and a function of one name"
    def __init__(self):
        super().__init__()
        self.linear, self.w = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64) / 8)
    def forward(self, x): return super().forward(nn.functional.linear(self.linear(x).relu(), self.w))

class Skip(Two):
    "A residual that is not there at first, added in place"
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.a.weight); nn.init.zeros_(self.a.bias)
    def forward(self, x):
        x = self.b(x)
        h = x
        h += self.a(x)
        return self.c(h.relu() + x)

class Shifting(Two):
    "Changes its input"
    def forward(self, x): return super().forward(x.sub_(.5).div_(.25))

class TimeFirst(Two):
    def forward(self, x): return super().forward(x.view(8, 4, 16).transpose(0, 1).repeat(1, 1, 4))

class Shared(Two):
    "An in-place activation whose input is read again"
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
    def forward(self, x):
        y = self.a(x)
        return self.c(self.b(self.act(y)) + y)

class Reread(Two):
    "A value that is read, in the program, before a view of it is changed in place"
    def forward(self, x):
        y = self.a(x)
        v = y.view(-1, 8, 8)
        double = y * 2
        return self.c(double + v.relu_().flatten(1))

class Unfold(nn.Module):
    def forward(self, x): return x.unfold(1, 8, 4)

class Overlapping(Two):
    "A layer whose values share memory"
    def __init__(self):
        super().__init__()
        self.unfold, self.d = Unfold(), nn.Linear(8, 4)
    def forward(self, x): return self.d(self.unfold(self.a(x)).relu()).flatten(1)

class OneToken(Two):
    "A pooled map as the only token of a sequence"
    def __init__(self):
        super().__init__()
        self.d = nn.Linear(16, 32)
    def forward(self, x): return self.d(self.a(x).unflatten(1, (16, 4)).mean(2, keepdim=True).transpose(1, 2)).squeeze(1)

class TimeFirstAnswer(Two):
    "An output whose batch axis is the last"
    def __init__(self):
        super().__init__()
        self.d = nn.Linear(12, 1)
        nn.init.constant_(self.d.bias, -.3)
    def forward(self, x): return self.d(self.a(x)[:, :60].view(-1, 5, 12).transpose(0, 1)).relu().squeeze(-1)

class TimeFirstAnswers(Two):
    "An output of as many time steps as samples"
    def forward(self, x): return super().forward(x).unflatten(1, (8, 4)).transpose(0, 1)

def clamped():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 32))
    conv = model[2]
    conv.forward = lambda x: nn.Conv2d.forward(conv, x).clamp(-2, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 8)), model)

def pruned():
    model = Two()
    torch.nn.utils.prune.l1_unstructured(model.b, 'weight', .5)
    torch.nn.utils.parametrizations.weight_norm(model.c)
    return model

def hooked():
    model = Two()
    model.b.register_forward_hook(lambda m, a, o: o / o.norm(dim=1, keepdim=True))
    return model

ODD = {'scale of the batch': lambda: Two(lambda s, y: (y / y.abs().max() * 127).round()), 'all or nothing': lambda: Two(lambda s, y: torch.where((y < 60).all(), y, 0)), 'assertion': lambda: Two(lambda s, y: y[(y.sum() > -1e9).long() * 0 + torch.arange(len(y))]),
       'slice': lambda: Two(lambda s, y: y[..., 1:65], 200), 'chunk': lambda: Two(lambda s, y: y.chunk(3, -1)[1], 192), 'dataclass': Wrapped, 'alias': Alias, 'names': Named, 'skip': Skip, 'shifting': Shifting, 'time first': TimeFirst, 'shared activation': Shared,
       'read before': Reread, 'overlap': Overlapping, 'one token': OneToken, 'time first answer': TimeFirstAnswer, 'slice of a wide layer': lambda: Two(lambda s, y: y[..., :64], 65), 'list of samples': lambda: Two(lambda s, y: y * y.new_tensor(y.sum(1).tolist()).unsqueeze(1)),
       'replaced forward': clamped, 'pruned': pruned, 'hooked': hooked, 'time first answers': TimeFirstAnswers}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('size', (2, 8))
def test_no_oddity_is_swept_wrongly(name, size):
    if name == 'time first' and size == 2: size = 8
    torch.manual_seed(0)
    model = ODD[name]().eval().requires_grad_(False)
    x = torch.randn(size, 64)
    if name == 'replaced forward': x = torch.randn(size, 8, 8)
    found, kept, before = layers(model, x, want=lambda m: True), x.clone(), weights_hash(model)
    faults = pd.concat([draw_neurons(found, 60, uniform(lo=-100, hi=100)), draw_weights(model, 12, uniform(lo=-3, hi=3), names=[n for n, p in model.named_parameters() if p.ndim > 1]), draw_weights(model, 6, uniform(lo=-3, hi=3), target='bias')])
    fast, slow = (run(model, [x], faults, found, images=size, sweep=s) for s in (True, False))
    assert agree(fast, slow) and weights_hash(model) == before and torch.equal(x, kept)

def test_tokens_that_meet_are_found_out():
    "NaN cannot stand among tokens; it is put behind the embedding"
    class Meets(nn.Module):
        "Samples meet where a value is very large, which none is"
        def forward(self, x): return x + torch.relu(x.roll(1, 0) - 100)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(96, 16), Meets()).eval().requires_grad_(False)
    x = torch.randint(50, (8, 6))
    with pytest.raises(Uncuttable, match='at 3 the bits of a sample depend on its neighbours'): Cut(model, x)

def test_a_repair_that_raises_names_the_fault():
    model, x = Two().eval().requires_grad_(False), torch.randn(8, 64)
    found = layers(model, x)
    def breaks(v, call):
        if v.abs().max() > 1e6: raise RuntimeError('no')
    faults = draw_neurons(found, 8, stuck_at(value=1e9))
    with pytest.raises(RuntimeError) as e: run(model, [x], faults, found, repairs={'breaks': lambda: Tap(model, found, breaks, 'mitigate')}, images=8)
    assert 'while running fault' in ''.join(e.value.__notes__)

def test_each_batch_and_each_repair_is_cut_for_itself():
    torch.manual_seed(0)
    model = Two().eval().requires_grad_(False)
    found = layers(model, torch.randn(8, 64))
    batches = [{'x': torch.randn(8, 64), 'scale': torch.tensor([s])} for s in (1., 3.)]
    go = lambda m, b: m(b['x'] * b['scale'])
    @contextmanager
    def other():
        b, model.b = model.b, nn.Sequential(model.b, nn.Hardtanh(0, 1))
        try: yield
        finally: model.b = b
    faults = draw_neurons([l for l in found if l.name in 'ac'], 60, uniform(lo=-100, hi=100))
    fast, slow = (run(model, batches, faults, found, repairs={'other': other}, forward=go, images=16, sweep=s) for s in (True, False))
    assert agree(fast, slow) and agree(fast.repaired['other'], slow.repaired['other']) and not same(fast.outputs, fast.repaired['other'].outputs)

def test_a_scalar_parameter_is_restored():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.))
    with written(model, draw_weights(model, 1, stuck_at(value=7.), names=['scale'])): assert model.scale == 7
    assert model.scale == 2

def test_a_fault_is_of_one_kind_on_one_image():
    model, x = Two().eval().requires_grad_(False), torch.randn(8, 64)
    found = layers(model, x)
    pair = draw_neurons(found, 1, flip(), pattern=scattered(k=2))
    for bad, says in ((pair.assign(image=[0, 1]), 'on different images'), (pd.concat([pair.iloc[:1], pair.iloc[:1].assign(part=1)]), 'twice'), (pair.assign(target='synapse'), "target 'synapse'"), (pair.assign(index=[.5, 1.5]), 'whole numbers')):
        with pytest.raises(ValueError, match=says): run(model, [x], bad.reset_index(drop=True), found, images=8)

@pytest.mark.parametrize('sweep', (True, False))
def test_where_samples_meet_a_fault_has_a_forward_to_itself(sweep):
    torch.manual_seed(0)
    model, x = ODD['scale of the batch']().eval().requires_grad_(False), torch.randn(8, 64)
    found = layers(model, x)
    faults = draw_neurons(found, 24, uniform(lo=-100, hi=100))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        go = lambda f: run(model, [x], f, found, images=8, sweep=sweep).answers
        together, alone = go(faults), torch.cat([go(faults.iloc[[i]].assign(image=i % 8)) for i in range(24)])
    assert same(together, alone)

def test_windows_pass_through_sums_of_every_kind():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 256, 9)
        def forward(self, x):
            y = (self.a(x) + 3).relu()
            y = y + y
            y += y
            return self.c(self.b(torch.add(1 + y, 2)).flatten(1))
    torch.manual_seed(0)
    model, x = Sums().eval().requires_grad_(False), torch.randn(8, 3, 16, 16)
    found = layers(model, x)
    faults = draw_neurons(found, 80, uniform(lo=-100, hi=100))
    assert agree(run(model, [x], faults, found, images=8), run(model, [x], faults, found, images=8, sweep=False))

@pytest.mark.parametrize('known', (True, False))
def test_repairs_in_place_and_across_channels(known):
    torch.manual_seed(0)
    model, x = Two().eval().requires_grad_(False), torch.randn(8, 64)
    found = layers(model, x)
    faults = draw_weights(model, 30, uniform(lo=-20, hi=20))
    if known: faults = pd.concat([faults, draw_neurons(found, 60, flip())])
    repairs = {'in place': lambda: Tap(model, found, lambda v, call: v.clamp_(-.3, .3), 'mitigate'), 'across': lambda: Tap(model, found, lambda v, call: torch.where(v.abs().amax(1, keepdim=True) > 3, 0, v), 'mitigate')}
    fast, slow = (run(model, [x], faults, found if known else [], {'look': Look(found, model)} if known else {}, repairs, images=8, sweep=s) for s in (True, False))
    assert agree(fast, slow) and all(agree(fast.repaired[n], slow.repaired[n]) for n in repairs)

def test_memory_counts_what_a_row_takes():
    model, x = nn.Sequential(nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4)).eval().requires_grad_(False), torch.randn(8, 2048)
    with torch.no_grad(): cut = Cut(model, x)
    assert cut.room(cut.chains(set()))[0] >= 2 * 512 * 4

@dataclass
class Images:
    pixels: torch.Tensor

class OfImages(nn.Sequential):
    def forward(self, batch): return super().forward(batch.pixels if isinstance(batch, Images) else batch)

def test_a_batch_that_cannot_be_traced_runs_whole():
    model, x = OfImages(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval().requires_grad_(False), torch.randn(20, 6)
    found = layers(model, x)
    faults = draw_neurons(found, 200, flip()).assign(image=lambda t: t.index % 20)
    with pytest.warns(UserWarning, match='the whole network runs instead'): whole = run(model, [Images(x[:10]), Images(x[10:])], faults, found, images=20)
    assert whole.table.equals(run(model, x.split(10), faults, found, images=20).table) and whole.table.outcome.eq('SDC').any()

def test_a_bad_call_gets_one_clear_error():
    class Number(Two):
        def forward(self, x): return super().forward(x)[:, 0]
    class Integers(Two):
        def forward(self, x): return super().forward(x).argmax(1)
    model, x = Two().eval().requires_grad_(False), torch.randn(8, 64)
    found = layers(model, x)
    faults = draw_neurons(found, 8, flip())
    for bad, says in ((faults.drop(columns='target'), "no column 'target'"), (faults.assign(flip=.5), "'flip' holds float64"), (faults.assign(part='0'), "'part' holds")):
        with pytest.raises(ValueError, match=says): run(model, [x], bad, found, images=8)
    with pytest.raises(ValueError, match='images='): run(model, [x], faults, found)
    for other, says in ((Number(), 'give a criterion'), (Integers(), 'no floating-point tensor')):
        with pytest.raises(ValueError, match=says), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            run(other.eval().requires_grad_(False), [x], faults, found, images=8)
    with pytest.raises(ValueError, match='made for float32, but the layer gives torch.float16'): run(model.half(), [x.half()], faults, found, images=8)
