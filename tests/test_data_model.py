"What would make no good reading in the chapter: damaged files, missing sources, interrupted runs"
import hashlib, json, os, pickle, warnings

import pytest, torch
from safetensors.torch import save_file

import drdna.data_model as dm
from drdna.data_model import Recipe, accuracy, asset, heldout_indices, load_checkpoint, load_weights, loader, resnet18, sample, train, trained_resnet18

TINY = Recipe(phases=((2, 8, 0),), batch=20)


@pytest.fixture
def tiny_data(): return dict(train=sample('profile')[:40], heldout=sample('calibrate')[:20])


# The embedded sample

def test_sample_is_balanced_and_disjoint():
    sets = {s: sample(s) for s in dm.SPLITS}
    for s, n in dm.SPLITS.items():
        d = sets[s]
        assert d.images.shape == (n, 32, 32, 3) and d.images.dtype == torch.uint8
        assert d.labels.dtype == d.indices.dtype == torch.int64
        assert d.labels.bincount(minlength=10).tolist() == [n//10]*10
        assert len(d.indices.unique()) == n and d.indices.min() >= 0
    held = set(heldout_indices().tolist())
    profile, calibrate = (set(sets[s].indices.tolist()) for s in ('profile', 'calibrate'))
    assert calibrate < held and not profile & held and max(profile | held) < 50_000
    assert sets['evaluate'].indices.max() < 10_000


def test_no_image_occurs_twice_in_the_sample():
    pixels = torch.cat([sample(s).images for s in dm.SPLITS])
    assert len({i.numpy().tobytes() for i in pixels}) == sum(dm.SPLITS.values())


def test_embedded_images_are_small():
    assert sum(asset(f'{s}.png').stat().st_size for s in dm.SPLITS) < 12e6


def test_loader_can_be_iterated_twice_and_is_contiguous():
    batches = loader(sample('calibrate')[:150])
    for _ in range(2): assert [len(y) for x, y in batches if x.is_contiguous() and x.dtype == torch.float32] == [100, 50]


# The shipped weights

def test_right_answers_of_the_shipped_weights():
    record = json.loads(asset('resnet18_cifar10.json').read_text())
    assert hashlib.sha256(asset(dm.weights_file("resnet18")).read_bytes()).hexdigest() == record['sha256']
    assert record['evaluate']['n'] == 2000 and record['test']['n'] == 10_000 and record['heldout']['n'] == 5000
    assert abs(accuracy(trained_resnet18(), sample('evaluate')) - record['evaluate']['right']) <= 2


def test_trained_network_is_private_float32_in_eval_mode():
    before = torch.get_rng_state()
    a, b = trained_resnet18(), trained_resnet18()
    assert torch.get_rng_state().equal(before) and not a.training
    assert {p.dtype for p in a.parameters()} == {torch.float32} and all(p.requires_grad for p in a.parameters())
    with torch.no_grad(): a.conv1.weight.zero_()
    assert b.conv1.weight.any() and trained_resnet18().conv1.weight.any()


def test_damaged_or_foreign_weights_are_named(tmp_path):
    cut = tmp_path/'cut.safetensors'
    cut.write_bytes(asset(dm.weights_file("resnet18")).read_bytes()[:100_000])
    with pytest.raises(ValueError, match='cut.safetensors'): load_weights(cut)
    save_file({'conv1.weight': torch.zeros(64, 3, 7, 7)}, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match=r'other.safetensors(.|\n)*conv1.weight'): load_weights(tmp_path/'other.safetensors')


def test_missing_asset_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(dm, 'files', lambda _: tmp_path)
    for f in trained_resnet18, heldout_indices, lambda: sample('profile'):
        with pytest.raises(FileNotFoundError, match='is missing: this installation of drdna is incomplete'): f()


def test_accuracy_restores_every_mode():
    model = resnet18().train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    stats = model.bn1.running_mean.clone()
    accuracy(model, sample('evaluate')[:100])
    assert [m.training for m in model.modules()] == modes and model.bn1.running_mean.equal(stats)
    model.fc.forward = lambda x: 1/0
    with pytest.raises(ZeroDivisionError): accuracy(model, sample('evaluate')[:100])
    assert [m.training for m in model.modules()] == modes


# The full set and its cache

@pytest.fixture
def source(monkeypatch):
    "Makes torchvision unreachable and npm's answer a small set; counts the calls"
    calls = []
    d = sample('evaluate')[:20]
    def unreachable(tmp): raise OSError('host not found')
    def npm(tmp):
        calls.append(tmp)
        return dict(train=(d.images, d.labels), test=(d.images[:10], d.labels[:10]))
    unreachable.__name__, npm.__name__ = '_from_torchvision', '_from_npm'
    monkeypatch.setattr(dm, '_from_torchvision', unreachable)
    monkeypatch.setattr(dm, '_from_npm', npm)
    monkeypatch.setattr(dm, 'check_cifar10', lambda *a: None)
    return calls


def test_full_set_is_fetched_once(source, tmp_path):
    assert len(dm.cifar10('train', tmp_path/'new')) == 20
    assert len(dm.cifar10('test', tmp_path/'new')) == 10 and len(source) == 1
    assert sorted(os.listdir(tmp_path/'new')) == ['cifar10-test.safetensors', 'cifar10-train.safetensors']


@pytest.mark.parametrize('damage', ['cut', 'flip', 'empty', 'foreign'])
def test_damaged_cache_is_fetched_again(source, tmp_path, damage):
    whole = dm.cifar10('test', tmp_path)
    path = tmp_path/'cifar10-test.safetensors'
    b = bytearray(path.read_bytes())
    if damage == 'cut': b = b[:-1000]
    if damage == 'flip': b[-5000] ^= 1
    if damage == 'empty': b = b''
    if damage == 'foreign': b = pickle.dumps({'images': 1})
    path.write_bytes(b)
    with pytest.warns(UserWarning, match='cifar10-test.safetensors'): again = dm.cifar10('test', tmp_path)
    assert len(source) == 2 and again.images.equal(whole.images)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dm.cifar10('test', tmp_path)


def test_wrong_images_are_not_believed(source, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(dm, '_from_torchvision', lambda tmp: dict(test=(torch.zeros(5, 32, 32, 3, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))))
    monkeypatch.setattr(dm.shutil, 'which', lambda _: None)
    with pytest.raises(ConnectionError, match=r'could not be fetched.*\(5, 32, 32, 3\).*npm was not found'): dm.cifar10('test', tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.name == 'nt', reason='a shell script stands for npm')
def test_failing_npm_says_why(tmp_path, monkeypatch):
    npm = tmp_path/'npm'
    npm.write_text('#!/bin/sh\necho "network unreachable" >&2\nexit 1\n'); npm.chmod(0o755)
    monkeypatch.setattr(dm.shutil, 'which', lambda _: str(npm))
    (tmp_path/'tmp').mkdir()
    with pytest.raises(OSError, match='npm pack x failed: network unreachable'): dm._npm_pack('x', tmp_path/'tmp')


# Training

def test_interrupted_epoch_keeps_the_last_checkpoint(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(dm, 'has_bf16', lambda device: False)  # in bfloat16 not even two equal runs agree to the bit
    train(tmp_path/'whole', TINY, 'cpu', data=tiny_data)
    original, calls = dm.train_epoch, []
    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2: raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(dm, 'train_epoch', interrupted)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'cut', TINY, 'cpu', data=tiny_data)
    assert sorted(os.listdir(tmp_path/'cut')) == ['checkpoint.pt', 'training.csv']
    monkeypatch.setattr(dm, 'train_epoch', original)
    train(tmp_path/'cut', TINY, 'cpu', data=tiny_data)
    for name in dm.weights_file("resnet18"), 'training.csv': assert (tmp_path/'cut'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path/'f'
    path.write_text('old')
    def half(p): p.write_text('ne'); raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): dm.replace_file(path, half)
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['f']


def test_training_leaves_the_global_generator_alone(tmp_path, tiny_data):
    before = torch.get_rng_state()
    train(tmp_path, TINY, 'cpu', epochs=1, data=tiny_data)
    assert torch.get_rng_state().equal(before)


class Payload:
    def __reduce__(self): return os.system, ('touch executed',)


def test_hostile_checkpoint_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'recipe': Payload()}, tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='checkpoint.pt is not a checkpoint that can be read'): load_checkpoint(tmp_path/'checkpoint.pt', TINY)
    assert not (tmp_path/'executed').exists()


def test_foreign_checkpoint_names_what_is_missing(tmp_path):
    torch.save(dict(model={}, epoch=1), tmp_path/'c.pt')
    with pytest.raises(ValueError, match='c.pt .* it has no history, opt, recipe'): load_checkpoint(tmp_path/'c.pt', TINY)
    torch.save([1], tmp_path/'c.pt')
    with pytest.raises(ValueError, match='it has no'): load_checkpoint(tmp_path/'c.pt', TINY)


def test_whole_training_set_is_never_held_out(monkeypatch):
    "The 45,000 of `cifar10_splits` and the 5,000 are a partition"
    full = dm.Images(torch.zeros(50_000, 1, dtype=torch.uint8), torch.arange(50_000) % 10, torch.arange(50_000))
    monkeypatch.setattr(dm, 'cifar10', lambda split, root: full)
    splits = dm.cifar10_splits()
    assert (len(splits['train']), len(splits['heldout'])) == (45_000, 5000)
    assert torch.cat([splits[s].indices for s in ('train', 'heldout')]).sort().values.equal(full.indices)
