"Profiles and guards from strangers: whatever is in the file, one ValueError or a sound object"
import json, pickle

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from safetensors import safe_open
from torch import nn

from drdna.baselines import Extremes
from drdna.checksums import Checksum, Together
from drdna.core import layers
from drdna.guard import Guard
from drdna.profiling import load_profile, profile, save_profile

KINDS = ['guard', 'extremes', 'together', 'profile']

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval().requires_grad_(False)

@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    f = tmp_path_factory.mktemp('files')
    data = torch.randn(400, 6).split(50)
    with Guard.fit(model, data, fpr=.05, k=4) as g: g.save(f / 'guard')
    with Guard.fit(model, data, fpr=.05, detector=Extremes) as g: g.save(f / 'extremes')
    every = layers(model, data[0], want=lambda m: True)
    with Guard.fit(model, data, fpr=.05, detector=lambda found: Together([Checksum(model, data[0], found), Extremes(every[1:2])], every)) as g: g.save(f / 'together')
    save_profile(profile(model, data, k=4), f / 'profile')
    return f

def read(kind, path, model): return Guard.load(path, model).close() if kind != 'profile' else load_profile(path)

@pytest.mark.parametrize('kind', KINDS)
def test_the_whole_file_loads_and_every_truncation_fails(kind, folder, model):
    read(kind, folder / kind, model)
    raw, bad = (folder / kind).read_bytes(), folder / 'cut'
    for n in (0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:n])
        with pytest.raises(ValueError, match='cut: not a safetensors file'): read(kind, bad, model)

@pytest.mark.parametrize('kind', KINDS)
def test_a_pickle_is_not_opened(kind, folder, model, tmp_path):
    class Evil:
        def __reduce__(self): return (tmp_path.joinpath('owned').touch, ())
    (tmp_path / 'evil').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match='evil: not a safetensors file'): read(kind, tmp_path / 'evil', model)
    assert not (tmp_path / 'owned').exists()

@pytest.mark.parametrize('kind', KINDS)
def test_each_missing_field_is_named(kind, folder, model, tmp_path):
    arrays = load_file(folder / kind)
    with safe_open(folder / kind, 'pt') as f: head = f.metadata()
    meta = json.loads(head['meta'])
    for name in arrays:
        save_file({k: v for k, v in arrays.items() if k != name}, tmp_path / 'x', head)
        with pytest.raises(ValueError, match=f"field '{name.split('.')[-1]}'"): read(kind, tmp_path / 'x', model) # '1.mean' is part 1's 'mean'
    for name in meta:
        save_file(arrays, tmp_path / 'x', head | {'meta': json.dumps({k: v for k, v in meta.items() if k != name})})
        with pytest.raises(ValueError, match=f"field '{name}'"): read(kind, tmp_path / 'x', model)
    save_file(arrays, tmp_path / 'x', head | {'version': '99'})
    with pytest.raises(ValueError, match="field 'version'"): read(kind, tmp_path / 'x', model)

def test_a_profile_of_nothing_is_refused(folder, tmp_path):
    arrays = load_file(folder / 'profile')
    with safe_open(folder / 'profile', 'pt') as f: save_file(arrays | {'values': arrays['values'][:0].contiguous()}, tmp_path / 'x', f.metadata())
    with pytest.raises(ValueError, match="field 'values' has no row"): load_profile(tmp_path / 'x')

def dicts(v): # within lists and dictionaries
    if isinstance(v, dict): yield v
    for w in v.values() if isinstance(v, dict) else v if isinstance(v, list) else (): yield from dicts(w)

scalars = st.one_of(st.none(), st.booleans(), st.integers(-10, 10**9), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=3), st.just({}))

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_fields_never_surprise(data, folder, model, tmp_path):
    kind = data.draw(st.sampled_from(KINDS))
    arrays = load_file(folder / kind)
    with safe_open(folder / kind, 'pt') as f: head = f.metadata()
    meta = json.loads(head['meta'])
    where = data.draw(st.sampled_from([*arrays, *meta, 'within']))
    if where in arrays:
        x = arrays[where]
        arrays[where] = data.draw(st.sampled_from([x[:-1], x.double() * torch.nan, x.to(torch.int8), x.flatten(), x[:0], (x.double() + 1e6).to(x.dtype)])).contiguous()
    elif where in meta: meta[where] = data.draw(scalars)
    else:
        row = data.draw(st.sampled_from([*dicts(list(meta.values()))]))
        row[data.draw(st.sampled_from(list(row)))] = data.draw(scalars)
    save_file(arrays, tmp_path / 'x', head | {'meta': json.dumps(meta)})
    try: read(kind, tmp_path / 'x', model)
    except ValueError as e: assert str(tmp_path / 'x') in str(e) or str(e).startswith('layer ')
