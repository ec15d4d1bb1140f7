"""PyTorch's layers in NumPy, by the formulas of its documentation; channels first."""

import itertools

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def conv2d(w, name, x, padding=0):
    """y[o, i, j] = sum x[c, i + a, j + b] W[o, c, a, b] + bias[o], from the documentation of Conv2d."""
    kernel = w[f"{name}.weight"]
    x = np.pad(x, [(0, 0), (0, 0), (padding,) * 2, (padding,) * 2])
    height, width = (n - k + 1 for n, k in zip(x.shape[2:], kernel.shape[2:], strict=True))
    y = np.zeros((len(x), len(kernel), height, width))
    for a, b in itertools.product(*map(range, kernel.shape[2:])):
        y += np.einsum("nchw,oc->nohw", x[:, :, a : a + height, b : b + width], kernel[:, :, a, b])
    return y + w[f"{name}.bias"][:, None, None] if f"{name}.bias" in w else y


def conv_transpose2d(w, name, x, stride):
    """Each number of the input adds itself times the kernel [in, out, h, w] to the output, stride apart."""
    kernel = w[f"{name}.weight"]
    y = np.zeros(
        (len(x), kernel.shape[1], *((n - 1) * stride + k for n, k in zip(x.shape[2:], kernel.shape[2:], strict=True)))
    )
    for i, j, a, b in itertools.product(*map(range, (*x.shape[2:], *kernel.shape[2:]))):
        y[:, :, stride * i + a, stride * j + b] += x[:, :, i, j] @ kernel[:, :, a, b]
    return y + w[f"{name}.bias"][:, None, None]


def batch_norm(w, name, x, eps=1e-5):
    def by(suffix):
        return w[f"{name}.{suffix}"].reshape(-1, *[1] * (x.ndim - 2))

    return (x - by("running_mean")) / np.sqrt(by("running_var") + eps) * by("weight") + by("bias")


def layer_norm(w, name, x, eps=1e-5):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def recurrent(w, name, x, kind, layer="l0", reverse=False):
    """The formulas of RNN, GRU and LSTM in PyTorch's documentation, with its two biases."""
    tag = f"_{layer}{'_reverse' * reverse}"
    given, back = w[f"{name}.weight_ih{tag}"], w[f"{name}.weight_hh{tag}"]
    zeros = np.zeros(len(given))
    b_ih, b_hh = (w.get(f"{name}.bias_{side}{tag}", zeros) for side in ("ih", "hh"))
    h = c = np.zeros((len(x), back.shape[1]))
    ys = []
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        i, j = x[:, t] @ given.T + b_ih, h @ back.T + b_hh
        if kind == "rnn":
            h = np.tanh(i + j)
        elif kind == "gru":
            (ir, iz, i_n), (hr, hz, hn) = np.split(i, 3, -1), np.split(j, 3, -1)
            n = np.tanh(i_n + sigmoid(ir + hr) * hn)
            h = (1 - sigmoid(iz + hz)) * n + sigmoid(iz + hz) * h
        else:
            a, f, g, o = np.split(i + j, 4, -1)
            c = sigmoid(f) * c + sigmoid(a) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        ys.append(h)
    return np.stack(ys[:: -1 if reverse else 1], 1)


def attention(w, name, x, source, heads):
    """MultiheadAttention: in_proj_weight holds the kernels of q, k and v one after the other."""
    if f"{name}in_proj_weight" in w:
        kernels = np.split(w[f"{name}in_proj_weight"], 3)
    else:
        kernels = [w[f"{name}{letter}_proj_weight"] for letter in "qkv"]
    biases = np.split(w[f"{name}in_proj_bias"], 3)
    q, k, v = (
        (a @ kernel.T + bias).reshape(*a.shape[:2], heads, -1)
        for a, kernel, bias in zip((x, source, source), kernels, biases, strict=True)
    )
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape[0], x.shape[1], -1)
    return y @ w[f"{name}out_proj.weight"].T + w[f"{name}out_proj.bias"]
