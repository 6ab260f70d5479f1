"Layers and taps on networks that were not written for us"
import copy, gc, pickle, threading, weakref
from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest, torch, torchvision
from torch import nn

from drdna.core import Cohort, Recorder, Tap, batch_tensors, draw_sites, has_hooks, is_tapped, layers, samples, structure, to_device, weights_hash
from drdna.injection import bits_of, draw_neurons, flip, NeuronFaults

class Tagger(nn.Module):
    "A time-first LSTM: `(T, N, F)` in, `(T, N, classes)` out"
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 8), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.lstm(x)[0])

@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple

class DictIn(nn.Module):
    "Token ids in a dictionary; a dataclass inside, a dictionary out"
    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.inner, self.head = nn.Embedding(11, 6), nn.LayerNorm(6), Inner(), nn.Linear(6, 2)
    def forward(self, ids): return {'logits': self.head(self.inner(self.norm(self.emb(ids))).logits.mean(1))}

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return Output(x * self.scale, (x,))

image = lambda n, size: torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
NETS = {
    'resnet18': (lambda: torchvision.models.resnet18(), image(2, 64), None, 41),
    'densenet121': (lambda: torchvision.models.densenet121(), image(2, 64), None, 242),
    'vit_b_16': (lambda: torchvision.models.vit_b_16(), image(2, 224), None, 63),
    'swin_t': (lambda: torchvision.models.swin_t(), image(2, 64), None, None),
    'lstm': (Tagger, torch.randn(7, 3, 5), 3, 1),
    'dict': (DictIn, {'ids': torch.tensor([[1, 2, 3], [4, 5, 6]]), 'labels': torch.zeros(2)}, 2, 2),
}

@pytest.fixture(scope='module', params=NETS)
def net(request):
    make, batch, n, count = NETS[request.param]
    torch.manual_seed(0)
    return request.param, make().requires_grad_(False).eval(), batch, n, count

def call(model, batch): return model(ids=batch['ids']) if isinstance(batch, dict) else model(batch)
def first(out): return out['logits'] if isinstance(out, dict) else out

def test_layers_run_once_each_and_read_as_the_hook_sees_them(net):
    name, model, batch, n, count = net
    found = layers(model, batch, batch_size=n)
    assert count is None or len(found) == count
    assert len({l.name for l in found}) == len(found)
    rows = n or batch.shape[0]
    order = []
    with Tap(model, found, lambda x, c: order.append((c.layer.name, tuple(x.shape)))): call(model, batch)
    assert order == [(l.name, (rows, *l.shape)) for l in found]

def test_sites_are_the_same_neurons_one_sample_at_a_time(net):
    name, model, batch, n, _ = net
    found = layers(model, batch, batch_size=n)
    cohort = Cohort(found, draw_sites(found, 8))
    with Recorder(model, found, cohort.read) as rec:
        call(model, batch)
        together = torch.stack(rec.take(), 1)
        for i in range(len(together)):
            one = {'ids': batch['ids'][i:i + 1]} if isinstance(batch, dict) else batch[:, i:i + 1] if name == 'lstm' else batch[i:i + 1]
            call(model, one)
            torch.testing.assert_close(torch.stack(rec.take(), 1)[0], together[i], rtol=1e-3, atol=1e-4)

def test_nothing_is_left_behind(net):
    _, model, batch, n, _ = net
    before, rng = (structure(model), weights_hash(model)), torch.get_rng_state()
    golden = first(call(model, batch))
    found = layers(model.train(), batch, batch_size=n)
    assert model.training and model.eval() is model
    with Recorder(model, found, lambda x, i, call: x.sum(tuple(range(1, x.ndim)))), NeuronFaults(model, found, draw_neurons(found, 2, flip(bit=30))):
        call(model, batch)
    assert torch.equal(bits_of(first(call(model, batch))), bits_of(golden))
    assert (structure(model), weights_hash(model)) == before and torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_memory_format_does_not_move_sites():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().requires_grad_(False)
    x = image(2, 64)
    found = layers(model, x)
    cohort = Cohort(found, draw_sites(found))
    with Recorder(model, found, cohort.read) as rec:
        model(x); contiguous = torch.stack(rec.take(), 1)
        model(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)); last = torch.stack(rec.take(), 1)
    torch.testing.assert_close(last, contiguous, rtol=1e-3, atol=1e-3)

def test_phases_hold_whatever_the_order_of_registration():
    model, x, seen = nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 3), []
    found = layers(model, x)
    say = lambda p: lambda y, c: seen.append(p)
    for order in (('mitigate', 'observe', 'inject'), ('observe', 'inject', 'mitigate')):
        seen.clear()
        taps = [Tap(model, found, say(p), p) for p in order]
        model(x)
        assert seen == ['inject', 'observe', 'mitigate']
        for t in taps: t.close(); t.close()
    assert not model[0]._forward_hooks

def test_closing_one_tap_keeps_the_others():
    model, x, seen = nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 3), []
    found = layers(model, x)
    a, b = (Tap(model, found, lambda y, c, n=n: seen.append(n)) for n in 'ab')
    a.close(); model(x)
    assert seen == ['b']
    b.close()

def test_exception_in_mid_run_starts_the_next_call_count_anew():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(3, 3)
        def forward(self, x, fail=False):
            x = self.l(x)
            if fail: raise RuntimeError('boom')
            return self.l(x)
    model, x, seen = Twice(), torch.ones(2, 3), []
    found = layers(model, x)
    assert [l.name for l in found] == ['l', 'l#2']
    with Tap(model, found, lambda y, c: seen.append(c.layer.name)):
        with pytest.raises(RuntimeError, match='boom'): model(x, fail=True)
        model(x)
    assert seen == ['l', 'l', 'l#2']

def test_each_thread_has_its_own_record():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    found, bad = layers(model, torch.ones(2, 4)), []
    with Recorder(model, found, lambda x, i, call: x.sum(1)) as rec:
        def work(v):
            x = torch.full((2, 4), float(v))
            want = model[0](x).sum(1)
            for _ in range(100):
                model(x)
                if not torch.equal(rec.take()[0], want): bad.append(v)
        threads = [threading.Thread(target=work, args=(v,)) for v in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert not bad

def test_a_tapped_network_is_freed_with_its_taps():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    tap = Tap(model, layers(model, torch.randn(4, 3)), lambda x, call: None)
    left = weakref.ref(model[0].weight)
    del model, tap
    gc.collect()
    assert left() is None

def test_a_tapped_network_goes_into_a_file_without_its_taps():
    model, x, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3), []
    with Tap(model, layers(model, x), lambda x, call: seen.append(x)):
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(x), twin[1](twin[0](x))) and not seen and not any(is_tapped(m) or has_hooks(m) for m in twin.modules())

class Named(NamedTuple):
    image: object

@dataclass
class Record:
    image: object
    name: str = 'x'

@pytest.mark.parametrize('batch', [Named(torch.zeros(4, 2)), Record(torch.zeros(4, 2)), UserDict(image=torch.zeros(4, 2)), [torch.tensor(1.), {'image': torch.zeros(4, 2)}]])
def test_batches_of_any_kind(batch):
    moved = to_device(batch, 'meta')
    assert type(moved) is type(batch) and samples(batch) == 4 and [t.device.type for t in batch_tensors(moved)] == ['meta'] * (1 + isinstance(batch, list))

def test_layers_by_name():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.zeros(2, 3)
    for want in ('0', ['0'], (n for n in ['0'])): assert [l.name for l in layers(model, x, want)] == ['0']
    with pytest.raises(ValueError, match="no layer is named .'conv1'."): layers(model, x, 'conv1')

def test_batches_that_say_nothing():
    with pytest.raises(ValueError, match='a batch of type dict holds no tensor'): samples({'text': ['a', 'b']})
    with pytest.raises(ValueError, match='the batch is empty'): layers(nn.Linear(3, 3), torch.empty(0, 3))

def test_nested_tensors_are_refused():
    torch.manual_seed(0)
    enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval().requires_grad_(False)
    x, pad = torch.randn(4, 6, 16), torch.zeros(4, 6, dtype=torch.bool)
    pad[:, 4:] = True
    with pytest.raises(ValueError, match='enable_nested_tensor=False'): layers(enc, dict(src=x, src_key_padding_mask=pad))
    with Tap(enc, layers(enc, x), lambda x, call: None), pytest.raises(ValueError, match='enable_nested_tensor=False'): enc(x, src_key_padding_mask=pad)

def test_a_copy_of_a_tapped_network_is_not_tapped():
    act = nn.ReLU()
    model, x, seen = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act).eval(), torch.randn(4, 3), []
    found, clean = layers(model, x, lambda m: True), model(x)
    more = lambda x, call: x + 1
    with Tap(model, found, more, 'mitigate'), Tap(model, found[:1], lambda x, call: seen.append(call.layer.name)):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), clean) and not seen and not any(is_tapped(m) or has_hooks(m) for m in twin.modules())
        changed = model(x)
        with Tap(twin, found, more, 'mitigate'): assert torch.equal(twin(x), changed)
        assert seen == [found[0].name] and torch.equal(model(x), changed)
    assert torch.equal(twin(x), clean) and torch.equal(model(x), clean)
