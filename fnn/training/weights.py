"""Weights from PyTorch and Flax, and back: `from_torch`, `to_torch`, `from_flax`, `to_flax`.

    params, state, report = fnn.weights.from_torch(module.state_dict(), net, x[:1])

A state dict is a mapping of names to arrays; PyTorch itself is not needed, and files of `safetensors` do as well. Layers and
modules are paired by kind and shapes, and where several are alike, by their order; what has no partner, or an order that
cannot be known, is refused by name. The report, which prints as a table, says what went where: read it once. `names=
{path of a layer: name of a module}`, both as the report writes them, decides for single ones.

What is no weight is not in there, and up to you: activations, strides and padding, the number of heads (of Flax's attention
it is checked), dropout, `eps`, and the `decay` of batch norm (1 - momentum in PyTorch). PyTorch's norms have eps=1e-5, as
`batch_norm` here; give `layer_norm`, `group_norm` and `rms_norm` that `eps`. So compare outputs once, of the two models in
eval mode. A module that keeps its kernel as (in, out), as GPT-2's `Conv1D` does, must be transposed before.

What is exact: kernels are transposed, mirrored for `conv_transpose`, and rows behind `flatten` reordered, since PyTorch has
channels first; biases that PyTorch adds to one another are summed; running statistics get weight 1, so that eval mode
uses them as they are. Numbers are rounded to the dtypes of the net. All arrays are read as NumPy, on the host.

Equinox: arrays by their paths are such a state dict, with Linear, Conv, LayerNorm, Embedding, MultiheadAttention, LSTMCell
and GRUCell in PyTorch's layout:

    leaves = jax.tree_util.tree_leaves_with_path(equinox.filter(model, equinox.is_array))
    state_dict = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

Haiku: `w` and `b` are Flax's kernel and bias (Linear and Conv; not its LSTM, whose gates are in another order, and whose
forget gate adds 1):

    known = {"w": "kernel", "b": "bias", "offset": "bias", "embeddings": "embedding"}
    variables = {m: {known.get(name, name): a for name, a in module.items()} for m, module in params.items()}
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from fnn import admission
from fnn.core import Layer
from fnn.training import weights_flax, weights_torch
from fnn.training.weights_layers import Arrays, Slot, leaf, rewritten, slots
from fnn.training.weights_layout import UNKNOWN, rows_of
from fnn.training.weights_match import Group, Pair, Report, brief, pairs, shown
from fnn.tree import PyTree

Names = Mapping[str, str | None]


class Loaded(NamedTuple):
    """Parameters and a state of a net, and what came from where."""

    params: PyTree
    state: PyTree
    report: Report


def from_torch(
    state_dict: Mapping[str, ArrayLike],
    net: Layer,
    spec: PyTree,
    *,
    names: Names | None = None,
    flattened: Mapping[str, Sequence[int] | None] | None = None,
    key: jax.Array | None = None,
) -> Loaded:
    """Take the weights of a PyTorch state dict: (params, state, report) of a net.

    `spec` is an example batch of the net's, or its `jax.ShapeDtypeStruct`. Modules: Linear, Conv and ConvTranspose,
    BatchNorm, LayerNorm, GroupNorm, RMSNorm, Embedding, RNN, GRU, LSTM and their cells (each layer and direction is one
    module, `lstm.l0_reverse`), MultiheadAttention and four Linear modules `q_proj, k_proj, v_proj, out_proj` (or other
    usual names) as attention, single parameters as positions. Modules that are alike are taken in the order in which
    PyTorch registered them; in a file whose names are sorted, by the numbers in them, and where names differ in words,
    `names` must decide.

    `names` pairs layers with modules; `None` in the place of a module leaves a layer as `net.init(key, spec)` draws it (by
    default with key 0). `flattened` is for a layer behind a convolution where the order of its inputs is not known: there is
    no `flatten`, or another layer before it has as many outputs. It gives the shape (height, width, channels) of the image
    that comes in, or None if none does. Layers behind `flatten` inside a residual block cannot be loaded. Six arguments:
    what, whereto, and what cannot be known.

    Errors: ValueError for layers and modules without a partner, for an order that is not known, and for heads of another
    size; TypeError for weights that are not floating point.
    """
    return _loaded("weights.from_torch", net, spec, key, names, _reader(state_dict), flattened)


def to_torch(
    params: PyTree,
    state: PyTree,
    *,
    like: Mapping[str, ArrayLike] | None = None,
    names: Names | None = None,
    flattened: Mapping[str, Sequence[int] | None] | None = None,
) -> dict[str, np.ndarray]:
    """Write a net's weights as a PyTorch state dict of NumPy arrays, the inverse of `from_torch`.

    With `like`, a state dict of the module that is to get them, entries have its names, shapes and dtypes, and layers are
    paired with modules as in `from_torch`. Without it names are the layers' paths, as `torch.nn.Sequential` has them. Of two
    biases that PyTorch adds the second is zero. `module.load_state_dict({name: torch.tensor(a) for name, a in ...})`.

    Errors: ValueError as in `from_torch`, and for weights that the module has no place for.
    """
    who = "weights.to_torch"
    found, order = _slots(who, params, state, flattened, True), weights_torch.order
    if like is None:
        like, order = {}, lambda who, groups: groups
        for slot in found:
            place = slot.path.replace("/", ".").replace("[", "").replace("]", "")
            own = weights_torch.template(slot)
            like |= {".".join(filter(None, (place, name))): np.zeros_like(a) for name, a in own.items()}
        names = None
    matched = pairs(who, found, _reader(like)(who, found), names, order)
    return {name: np.asarray(a) for name, a in _written(who, matched, like).items()}


def from_flax(
    variables: PyTree, net: Layer, spec: PyTree, *, names: Names | None = None, key: jax.Array | None = None
) -> Loaded:
    """Take the weights of Flax: (params, state, report) of a net.

    `variables` are Linen's ("params" and "batch_stats"), an NNX module or its state. Modules: Dense, Conv, ConvTranspose,
    the norms, Embed, MultiHeadDotProductAttention, SimpleCell, GRUCell, LSTMCell and OptimizedLSTMCell; those that
    `nn.scan` or `nnx.vmap` has stacked are taken apart. A dict of Flax has no order, so that modules which are alike are
    taken in the order of the numbers in their names, `Dense_2` before `Dense_10`; where names differ in words, `names` must
    decide. All else is as in `from_torch`; there, channels are last, as here.
    """
    return _loaded("weights.from_flax", net, spec, key, names, _flax_reader(variables), None)


def to_flax(params: PyTree, state: PyTree, *, like: PyTree, names: Names | None = None) -> PyTree:
    """Write a net's weights into variables of Flax, the inverse of `from_flax`.

    `like` are Linen's variables or an NNX state, arrays or the specs of `jax.eval_shape(module.init, ...)`; what comes back
    has their form, names, shapes and dtypes, and what holds no weights (random keys) as it was. Of an NNX state that is a
    pure dict: `nnx.replace_by_pure_dict(state, ...)`.
    Errors: ValueError as in `from_flax`, and for weights that the module has no place for.
    """
    who = "weights.to_flax"
    found = _slots(who, params, state, None, False)
    matched = pairs(who, found, _flax_reader(like)(who, found), names, weights_flax.order)
    return weights_flax.filled(like, {name: jnp.asarray(a) for name, a in _written(who, matched, {}).items()})


Reader = Callable[[str, list[Slot]], list[Group]]


def _reader(state_dict: Mapping[str, ArrayLike]) -> Reader:
    def read(who, found):
        if not isinstance(state_dict, Mapping):
            got = type(state_dict).__name__
            raise TypeError(f"{who}: state_dict must map names to arrays, got {got}; pass module.state_dict()")
        return weights_torch.groups(who, state_dict, any(slot.kind == "attention" for slot in found))

    return read


def _flax_reader(variables: Any) -> Reader:
    return lambda who, found: weights_flax.groups(who, variables, any(slot.kind == "recurrent" for slot in found))


def _loaded(who: str, net: Layer, spec: Any, key: Any, names: Any, read: Reader, flattened: Any) -> Loaded:
    """Draw a net's parameters and put weights in their place. Seven arguments: those of `from_torch`, and its reader."""
    admission.net(who, net)
    spec = admission.example(who, spec)
    params, state = jax.jit(lambda key: net.init(key, spec))(jax.random.key(0) if key is None else key)
    torch = who.endswith("torch")
    found = _slots(who, params, state, flattened, torch)
    order = weights_torch.order if torch else weights_flax.order
    matched, values = pairs(who, found, read(who, found), names, order), {}
    for pair in matched:
        for name, a in pair.reading.arrays.items():
            a = _cast(who, a, pair.slot.arrays[name].dtype, pair.group.name)
            values[leaf(pair.slot.path, name)] = _turned(pair.slot, a, pair.slot.rows)
        if pair.slot.kind == "batch_norm":
            values[leaf(pair.slot.path, "weight")] = np.ones(())
    rows = ((pair.slot.path, brief(pair.slot), pair.group.name) for pair in matched)
    return Loaded(rewritten(params, values), rewritten(state, values), Report(rows))


def _slots(who: str, params: Any, state: Any, flattened: Any, channels_first: bool) -> list[Slot]:
    """List a net's layers; refuse one of which the layout is not known, where that matters."""
    given, result = dict(flattened or {}), []
    for slot in slots(params, state):
        rows = slot.rows if channels_first else None
        if slot.path in given:
            shape = given.pop(slot.path)
            rows = None if shape is None else rows_of(shape)
        if rows is UNKNOWN:
            name, a = next(item for item in slot.arrays.items() if item[0] == "kernel" or slot.kind != "dense")
            raise ValueError(
                f"{who}: the order of a layer's inputs must be known behind a convolution, got {slot.path} with {name} "
                f"{list(a.shape)} without fnn.flatten() before it, or with another layer of as many outputs; pass "
                f"flattened={{{slot.path!r}: (height, width, channels)}} of the image that comes in, or None if none does"
            )
        result.append(dataclasses.replace(slot, rows=rows))
    if given:
        raise ValueError(f"{who}: flattened= must hold paths of layers, got {sorted(given)}")
    return result


def _cast(who: str, a: np.ndarray, dtype: Any, place: str) -> np.ndarray:
    """Round to a dtype; refuse numbers that would become infinite."""
    with np.errstate(over="ignore"):
        rounded = np.array(a, dtype)
    if np.any(np.isfinite(a) & ~np.isfinite(rounded)):
        largest = np.max(np.abs(a[np.isfinite(a)].astype(np.float64)))
        raise ValueError(
            f"{who}: weights must fit in {dtype}, got {largest:.3g} in {place or 'the root'}; use a wider dtype"
        )
    return rounded


def _turned(slot: Slot, a: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """Reorder the rows of a dense layer's kernel, or the units of a norm."""
    return a if rows is None or (slot.kind == "dense" and a.ndim < 2) else a[rows]


def _written(who: str, matched: list[Pair], like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Write layers into the entries of `like`; read each back, to see that nothing is lost."""
    values: dict[str, Any] = dict(like)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for slot, group, reading in matched:
        back = None if slot.rows is None else np.argsort(slot.rows)
        arrays = {name: _turned(slot, a, back) for name, a in slot.arrays.items()}
        written = {n: _cast(who, a, group.arrays[n].dtype, slot.path) for n, a in reading.write(arrays).items()}
        again = [r.arrays for r in group.readings(group.arrays | written) if r.kind == slot.kind]
        if not any(_same(arrays, other) for other in again):
            raise ValueError(
                f"{who}: a module must have a place for all weights of its layer, got {slot.path} ({shown(slot.arrays)}), of "
                f"which {group.name} cannot hold a part that is not zero (a bias); use a module that can"
            )
        for name, a in written.items():
            if group.index is None:
                values[group.entries[name]] = a
            else:
                stacks.setdefault(group.entries[name], {})[group.index] = a
    return values | {entry: np.stack([parts[i] for i in sorted(parts)]) for entry, parts in stacks.items()}


def _same(arrays: Arrays, others: Arrays) -> bool:
    return arrays.keys() == others.keys() and all(
        np.array_equal(np.asarray(a, others[name].dtype), others[name], equal_nan=True) for name, a in arrays.items()
    )
