"""The network once more, slowly: one item, loops over frames, float64, nothing shared with the package.

It reads weights by their checkpoint names, so it is also an oracle for the names.
"""

import cmath
import math

import torch


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def silu(x):
    return x / (1 + torch.exp(-x))


def weight_normed(w, name):
    v, g = w[f"{name}.weight_v"], w[f"{name}.weight_g"]
    return torch.stack([row * (length.item() / row.norm()) for row, length in zip(v, g, strict=True)])


def time_embedding(w, name, t):
    args = [1000 * t * math.exp(-math.log(10000) * k / 128) for k in range(128)]
    embedded = torch.tensor([math.cos(a) for a in args] + [math.sin(a) for a in args], dtype=torch.float64)
    return linear(w, f"{name}.mlp.2", silu(linear(w, f"{name}.mlp.0", embedded)))


def rms(w, name, x):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.norm.weight"]


def modulated(w, name, x, time):
    y = rms(w, name, x)
    if time is None:
        return y
    projected = linear(w, f"{name}.project_layer", time)
    return y * projected[: x.shape[-1]] + projected[x.shape[-1] :]


def turned(vector, position):
    out = []
    for pair in range(len(vector) // 2):
        turn = cmath.exp(1j * position * 10000 ** (-2 * pair / len(vector)))
        z = complex(vector[2 * pair], vector[2 * pair + 1]) * turn
        out += [z.real, z.imag]
    return torch.tensor(out, dtype=torch.float64)


def attention(w, name, x, heads, valid):
    length, dim = x.shape
    size = dim // heads
    q, k, v = linear(w, f"{name}.wqkv", x).split(dim, dim=-1)
    out = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        queries = torch.stack([turned(q[i, part], i) for i in range(length)])
        keys = torch.stack([turned(k[i, part], i) for i in range(valid)])
        weights = torch.exp(queries @ keys.T / math.sqrt(size))
        out[:, part] = weights / weights.sum(-1, keepdim=True) @ v[:valid, part]
    return linear(w, f"{name}.wo", out)


def transformer(w, dit, x, time, valid):
    depth, stack = dit["depth"], []
    for i in range(depth):
        name, block_time = f"transformer.layers.{i}", None if dit["time_as_token"] else time
        if dit["uvit_skip_connection"] and i > depth // 2:
            x = linear(w, f"{name}.skip_in_linear", torch.cat([x, stack.pop()], dim=-1))
        x = x + attention(
            w,
            f"{name}.attention",
            modulated(w, f"{name}.attention_norm", x, block_time),
            dit["num_heads"],
            valid,
        )
        y = modulated(w, f"{name}.ffn_norm", x, block_time)
        gate, value = (linear(w, f"{name}.feed_forward.{n}", y) for n in ("w1", "w3"))
        x = x + linear(w, f"{name}.feed_forward.w2", silu(gate) * value)
        if i < depth // 2:
            stack.append(x)
    return modulated(w, "transformer.norm", x, time)


def convolve(w, name, x, dilation=1):
    """Same-length convolution of x (T, channels), reading reflected frames, by explicit indices."""
    kernel, bias = weight_normed(w, f"{name}.conv.conv"), w[f"{name}.conv.conv.bias"]
    pad = (kernel.shape[-1] - 1) * dilation // 2
    frames = len(x)
    length = max(frames, pad + 1)  # shorter signals continue with zeros before they are reflected
    out = []
    for at in range(frames):
        total = bias.clone()
        for tap in range(kernel.shape[-1]):
            source = abs(at + tap * dilation - pad)
            source = 2 * (length - 1) - source if source >= length else source
            if source < frames:
                total = total + kernel[:, :, tap] @ x[source]
        out.append(total)
    return torch.stack(out)


def wavenet_head(w, wavenet, h, t, time, valid):
    width, layers = wavenet["hidden_dim"], wavenet["num_layers"]
    mask = (torch.arange(len(h)) < valid).double()[:, None]
    condition = convolve(w, "wavenet.cond_layer", time_embedding(w, "t_embedder2", t)[None])[0]
    x, skips = linear(w, "conv1", h), 0
    for i in range(layers):
        y = convolve(w, f"wavenet.in_layers.{i}", x, wavenet["dilation_rate"] ** i)
        y = y + condition[2 * width * i : 2 * width * (i + 1)]
        y = torch.tanh(y[:, :width]) / (1 + torch.exp(-y[:, width:]))
        y = convolve(w, f"wavenet.res_skip_layers.{i}", y)
        if i < layers - 1:
            x, y = (x + y[:, :width]) * mask, y[:, width:]
        skips = skips + y
    y = skips * mask + linear(w, "res_projection", h)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(time)).split(width)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-6)
    y = (y * (1 + scale) + shift) @ weight_normed(w, "final_layer.linear").T + w["final_layer.linear.bias"]
    return y @ w["conv2.weight"][:, :, 0].T + w["conv2.bias"]


def estimate(weights, params, x, prompt_x, x_len, t, style, cond, dropped):
    """The flow (C, T) of one item; weights under the names of `cfm.estimator`."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    dit, frames = params["DiT"], x.shape[-1]
    x, prompt_x, style, cond = x.double().T, prompt_x.double().T, style.double(), cond.double()
    time = time_embedding(w, "t_embedder", float(t))
    features = [prompt_x, linear(w, "cond_projection", cond)]
    if dit["style_condition"] and not dit["style_as_token"]:
        features.append(style.repeat(frames, 1))
    features = torch.cat(features, dim=-1)
    h = linear(w, "cond_x_merge_linear", torch.cat([x, torch.zeros_like(features) if dropped else features], -1))
    tokens = [time] if dit["time_as_token"] else []
    if dit["style_as_token"]:
        token = linear(w, "style_in", style)
        tokens.append(torch.zeros_like(token) if dropped else token)
    h = torch.cat([*(token[None] for token in tokens), h])
    h = transformer(w, dit, h, time, len(tokens) + int(x_len))[len(tokens) :]
    if dit["long_skip_connection"]:
        h = linear(w, "skip_linear", torch.cat([h, x], dim=-1))
    if dit["final_layer_type"] == "wavenet":
        return wavenet_head(w, params["wavenet"], h, float(t), time, int(x_len)).T
    return linear(w, "final_mlp.2", silu(linear(w, "final_mlp.0", h))).T


def regulate(w, params, content, ylen, longest, f0):
    """The conditioning (longest, channels) of one item; F0 in Hz or None."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = linear(w, "content_in_proj", content.double())
    x = torch.stack([x[at * len(content) // longest] for at in range(longest)])
    if params["f0_condition"]:
        if f0 is None:
            x = x + w["f0_mask"][0]
        else:
            rows = [f0_bin(float(f0[at * len(f0) // longest]), params["n_f0_bins"]) for at in range(longest)]
            x = x + w["f0_embedding.weight"][rows]
    for i in range(len(params["sampling_ratios"])):
        kernel, bias = w[f"model.{3 * i}.weight"], w[f"model.{3 * i}.bias"]
        padded = torch.cat([torch.zeros_like(x[:1]), x, torch.zeros_like(x[:1])])
        x = torch.stack([bias + sum(kernel[:, :, k] @ padded[at + k] for k in range(3)) for at in range(longest)])
        x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5)
        x = x * w[f"model.{3 * i + 1}.weight"] + w[f"model.{3 * i + 1}.bias"]
        x = x * torch.tanh(torch.log1p(torch.exp(x)))
    last = f"model.{3 * len(params['sampling_ratios'])}"
    x = x @ w[f"{last}.weight"][:, :, 0].T + w[f"{last}.bias"]
    x[int(ylen) :] = 0
    return x


def f0_bin(hz, bins):
    def mel(hz):
        return 1127 * math.log(1 + hz / 700)

    position = 1 + (mel(hz) - mel(50)) / (mel(1100) - mel(50)) * (bins - 2)
    return min(max(round(position) if hz > 0 else 0, 1), bins - 1)


def loss(weights, params, x1, x_lens, prompt_lens, cond, style, t, z):
    """The training loss of a batch without dropout, item by item."""
    items = []
    for b in range(len(x1)):
        prompt, end = int(prompt_lens[b]), int(x_lens[b])
        target, noise, now = x1[b].double(), z[b].double(), float(t[b])
        y = (1 - (1 - 1e-6) * now) * noise + now * target
        y[:, :prompt] = 0
        prompt_x = target.clone()
        prompt_x[:, prompt:] = 0
        u = target - (1 - 1e-6) * noise
        difference = (estimate(weights, params, y, prompt_x, end, now, style[b], cond[b], dropped=False) - u)[
            :, prompt:end
        ]
        items.append((difference.abs() if params["reg_loss_type"] == "l1" else difference**2).mean())
    return sum(items) / len(items)
