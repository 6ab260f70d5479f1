"""Run a given fault list with plain hooks, PyTorchFI 0.6.0 and MRFI 2.1.0

Every function takes a network in evaluation mode, images `x` (N, C, H, W) in float32, a fault list (a data frame)
and a batch size, and returns the faulty outputs, one row per fault in the order of the list. Neuron faults have
the columns layer, index (flat, in the layer's output without the batch axis), bit and image; weight faults have
layer (a parameter's name), index (flat) and bit. The network is left as it was.
"""
import copy, logging, math
from contextlib import contextmanager
from functools import partial

import numpy as np, torch
from mrfi import MRFI, EasyConfig
from pytorchfi.core import fault_injection
from torch import nn

TYPES = nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Linear


# ---------------------------------------------------------------- shared

def chunks(items, n):
    "`items` in pieces of at most n, in order"
    return [items[i:i + n] for i in range(0, len(items), n)]

def rows(faults):
    "The faults as named tuples of Python values"
    columns = [c for c in ('layer', 'index', 'bit', 'image') if c in faults]
    return list(faults[columns].itertuples(index=False, name='Fault'))

def images_of(x, part):
    "The images that the faults `part` strike, one per fault"
    return x[[f.image for f in part]]

def mask(bit):
    "The int32 that has only this bit set"
    return 1 << bit if bit < 31 else -1 << 31

def flipped(value, bit):
    "A float32 tensor with one bit of each element flipped"
    return (value.view(torch.int32) ^ mask(bit)).view(torch.float32)

def forward(model, x, batch):
    "The outputs for all images, `batch` at a time"
    return torch.cat([model(part) for part in x.split(batch)])

def layer_shapes(model, x):
    "`{path: output shape without the batch axis}` of the layers of `TYPES`, in the order in which they run"
    shapes = {}
    def note(name, module, args, out): shapes[name] = tuple(out.shape[1:])
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, TYPES)]
    handles = [m.register_forward_hook(partial(note, n)) for n, m in found]
    try: model(x[:1])
    finally:
        for h in handles: h.remove()
    return shapes

@contextmanager
def traceless():
    "Put back the root logger's handlers and torch's random state, both of which the peers change"
    handlers = logging.root.handlers[:]
    with torch.random.fork_rng():
        try: yield
        finally: logging.root.handlers[:] = handlers

def module_path(fault):
    "The module whose weight the fault strikes"
    return fault.layer.removesuffix('.weight')


# ---------------------------------------------------------------- plain hooks

def flip_hook(samples, indices, masks):
    "A forward hook that flips one bit in each of some samples, in place"
    def hook(module, args, out):
        bits = out.view(len(out), -1).view(torch.int32)
        bits[samples, indices] ^= masks
    return hook

def add_hooks(model, part, device):
    "One hook on each layer that the faults `part` strike; fault i goes to sample i"
    by_layer = {}
    for sample, f in enumerate(part): by_layer.setdefault(f.layer, []).append((sample, f.index, mask(f.bit)))
    handles = []
    for layer, places in by_layer.items():
        samples, indices, masks = zip(*places)
        masks = torch.tensor(masks, dtype=torch.int32, device=device)
        handles.append(model.get_submodule(layer).register_forward_hook(flip_hook(samples, indices, masks)))
    return handles

@torch.no_grad()
def hooks_neurons(model, x, faults, batch):
    "Plain forward hooks; `batch` faults per forward, each on a sample of its own"
    outputs = []
    for part in chunks(rows(faults), batch):
        handles = add_hooks(model, part, x.device)
        try: outputs.append(model(images_of(x, part)))
        finally:
            for h in handles: h.remove()
    return torch.cat(outputs)

@torch.no_grad()
def hooks_weights(model, x, faults, batch):
    "Flip the weight in place, run all images, put the weight back"
    outputs = []
    for f in rows(faults):
        weight = model.get_parameter(f.layer).view(-1)
        old = weight[f.index].clone()
        weight[f.index] = flipped(old, f.bit)
        try: outputs.append(forward(model, x, batch))
        finally: weight[f.index] = old
    return torch.stack(outputs)


# ---------------------------------------------------------------- PyTorchFI

def pytorchfi(model, x, batch):
    "PyTorchFI's injector for convolution, batch normalisation and linear layers"
    return fault_injection(model, batch, input_shape=list(x.shape[1:]), layer_types=list(TYPES))

def pytorchfi_place(index, shape):
    "A flat index as `dim1, dim2, dim3`, with None for the axes that the layer does not have"
    place = [int(i) for i in np.unravel_index(index, shape)]
    return place + [None] * (3 - len(place))

def pytorchfi_flip(pfi, bits, module, args, out):
    "What PyTorchFI calls after each layer: like its `single_bit_flip_signed_across_batch`, but on the bits of a float32"
    for i, layer in enumerate(pfi.get_corrupt_layer()):
        if layer != pfi.get_current_layer(): continue
        place = pfi.corrupt_batch[i], pfi.corrupt_dim1[i], pfi.corrupt_dim2[i], pfi.corrupt_dim3[i]
        where = tuple(p for p in place if p is not None)
        out[where] = flipped(out[where], bits[i])
    pfi.updateLayer()

@traceless()
@torch.no_grad()
def pytorchfi_neurons(model, x, faults, batch):
    """PyTorchFI's `declare_neuron_fi`; `batch` faults per declaration and forward, each on a batch element of its own

    Its neuron layers are numbered in the order in which they run. A custom function is registered as a forward hook
    on all of them and asks the injector which layer it is at; the bits reach it as a bound argument.
    """
    pfi, outputs = pytorchfi(model, x, batch), []
    number = {name: i for i, name in enumerate(layer_shapes(model, x))}
    for part in chunks(rows(faults), batch):
        layers = [number[f.layer] for f in part]
        dim1, dim2, dim3 = zip(*(pytorchfi_place(f.index, pfi.get_layer_shape(i)[1:]) for f, i in zip(part, layers)))
        flip = partial(pytorchfi_flip, pfi, [f.bit for f in part])
        corrupted = pfi.declare_neuron_fi(function=flip, batch=list(range(len(part))), layer_num=layers,
            dim1=list(dim1), dim2=list(dim2), dim3=list(dim3))
        outputs.append(corrupted(images_of(x, part)))
    return torch.cat(outputs)

def pytorchfi_flip_weight(bit, weight, where):
    "What PyTorchFI calls for the new value of a weight"
    return flipped(weight[where], bit)

@traceless()
@torch.no_grad()
def pytorchfi_weights(model, x, faults, batch):
    """PyTorchFI's `declare_weight_fi`; one declaration per fault

    Its weight layers are numbered in the order of `modules()`. A linear weight has two axes; None stands for the others.
    """
    pfi, outputs = pytorchfi(model, x, batch), []
    number = {name: i for i, name in enumerate(n for n, m in model.named_modules() if isinstance(m, TYPES))}
    for f in rows(faults):
        place = [int(i) for i in np.unravel_index(f.index, model.get_parameter(f.layer).shape)]
        k, dim1, dim2, dim3 = place + [None] * (4 - len(place))
        corrupted = pfi.declare_weight_fi(function=partial(pytorchfi_flip_weight, f.bit),
            layer_num=[number[module_path(f)]], k=[k], dim1=[dim1], dim2=[dim2], dim3=[dim3])
        outputs.append(forward(corrupted, x, batch))
    return torch.stack(outputs)


# ---------------------------------------------------------------- MRFI

def mrfi(model, kind, types):
    "A copy of the network under MRFI, with an injector (switched off) in every layer of these types"
    injector = dict(type=kind, module_type=types, enabled=False,
        selector=dict(method='FixPositions', positions=[]), error_mode=dict(method='FloatFixedBitFlip', bit=[]))
    return MRFI(copy.deepcopy(model), EasyConfig(dict(faultinject=[injector])))

def aim(node, positions, bits):
    "Switch an injector on and say what it flips"
    node.selector.args.positions, node.error_mode.args.bit, node.enabled = positions, bits, True

def mrfi_aim(nodes, part, sizes):
    "Aim the injectors of the layers that the faults `part` strike, fault i at sample i; returns these injectors"
    by_layer = {}
    for sample, f in enumerate(part): by_layer.setdefault(f.layer, []).append((sample * sizes[f.layer] + f.index, f.bit))
    for layer, places in by_layer.items(): aim(nodes[layer], *map(list, zip(*places)))
    return [nodes[layer] for layer in by_layer]

@traceless()
@torch.no_grad()
def mrfi_neurons(model, x, faults, batch):
    """MRFI's fixed positions and fixed bits on `activation_out`; `batch` faults per forward, each on a sample of its own

    A fixed position counts through the whole output, batch axis included, and the bits may be a list: so one forward
    carries a different fault per sample. The network is wrapped once; injectors without a fault are switched off.
    """
    fi = mrfi(model, 'activation_out', [t.__name__ for t in TYPES])
    sizes, outputs = {n: math.prod(s) for n, s in layer_shapes(model, x).items()}, []
    nodes = {n: fi.get_activation_configs(is_out=True, module_fullname=n)[0] for n in faults['layer'].unique()}
    for part in chunks(rows(faults), batch):
        aimed = mrfi_aim(nodes, part, sizes)
        outputs.append(fi(images_of(x, part)))
        for node in aimed: node.enabled = False
    return torch.cat(outputs)

@traceless()
@torch.no_grad()
def mrfi_weights(model, x, faults, batch):
    """MRFI's fixed position and fixed bit on `weights`; one fault at a time

    MRFI keeps a copy of an injected weight, and puts it back at the next forward in which the injector is on. So the
    injector of the previous fault stays on for one more fault, without a position, and only then is switched off.
    """
    fi = mrfi(model, 'weights', ['Conv2d', 'Linear'])
    nodes = {n: fi.get_weights_configs(module_fullname=n.removesuffix('.weight'))[0] for n in faults['layer'].unique()}
    previous, outputs = None, []
    for f in rows(faults):
        if previous is not None: aim(previous, [], [])
        aim(nodes[f.layer], [f.index], [f.bit])
        outputs.append(forward(fi, x, batch))
        if previous is not None and previous is not nodes[f.layer]: previous.enabled = False
        previous = nodes[f.layer]
    return torch.stack(outputs)
