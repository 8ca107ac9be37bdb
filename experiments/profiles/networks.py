# ruff: noqa: ANN401  # PyTorch has no types here
"""Networks of PyTorch as chains of stages, of random weights: what the sweep times whole and cuts between devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moirai_sim.graphs.work import make_operator

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator


def networks(torch: Any, *, small: bool) -> dict[str, tuple[list[Any], tuple[int, ...]]]:
    """Return by name the stages of a network and the shape of one sample; ``small`` is for trying the path on a CPU."""
    nn = torch.nn

    class Bottleneck(nn.Module):
        """Residual block of ResNet-50 (He et al., CVPR 2016), stride in the 3 x 3 convolution."""

        def __init__(self, into: int, inner: int, stride: int) -> None:
            super().__init__()
            out = 4 * inner
            self.tail = nn.Sequential(
                nn.Conv2d(into, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
                nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
                nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
            )  # fmt: skip
            same = stride == 1 and into == out
            self.shortcut = (
                nn.Identity()
                if same
                else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )

        def forward(self, x: Any) -> Any:
            return torch.relu(self.tail(x) + self.shortcut(x))

    class Attend(nn.Module):
        """Pre-normalised transformer layer; causal as in GPT-2, windowed as in Swin (no shift, no bias)."""

        def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
            super().__init__()
            self.heads, self.causal = heads, causal
            self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            lead, length, width = x.shape[:-2], x.shape[-2], x.shape[-1]
            parts = self.qkv(self.before(x)).view(-1, length, 3, self.heads, width // self.heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            x = x + self.mix(mixed.transpose(1, 2).reshape(*lead, length, width))
            return x + self.down(nn.functional.gelu(self.up(self.between(x))))

    class Swap(nn.Module):
        """Exchange rows and columns: between the two attentions of an Evoformer's pair of axes."""

        def forward(self, x: Any) -> Any:
            return x.transpose(1, 2)

    plan = [(1, 16, 1), (1, 32, 2)] if small else [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)]
    channels = 16 if small else 64
    resnet = [nn.Sequential(nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
                            nn.MaxPool2d(3, 2, 1))]  # fmt: skip
    for blocks, inner, stride in plan:
        for index in range(blocks):
            resnet.append(Bottleneck(channels, inner, stride if index == 0 else 1))
            channels = 4 * inner
    resnet.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)))
    width, layers, length = (64, 2, 16) if small else (768, 12, 128)
    encoder = [Attend(width, width // 64) for _ in range(layers)]
    decoder = [Attend(width, width // 64, causal=True) for _ in range(layers)]
    side = 32 if small else 224
    found = {
        "resnet": (resnet, (3, side, side)),
        "bert": ([*encoder, nn.Linear(width, width)], (length, width)),
        "gpt2": ([*decoder, nn.Linear(width, 512 if small else 50257)], (length, width)),
        "swin-block": ([Attend(96, 3), Attend(96, 3)], (4 if small else 64, 49, 96)),
        "evoformer-axial": ([Attend(64, 4), Swap(), Attend(64, 4), Swap()], (8, 16, 64) if small else (128, 256, 64)),
    }
    return {name: ([stage.eval() for stage in stages], shape) for name, (stages, shape) in found.items()}


def called(torch: Any, stages: Sequence[Any], x: Any) -> list[Operator]:
    """Return the operators that PyTorch calls when a chain of stages runs, in this order; views are none.

    A linear layer is one product of two matrices with its bias, as PyTorch runs it.
    """
    found: list[Operator] = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            rule = _RULES.get(getattr(function, "__name__", ""))
            if rule is not None:
                found.extend(rule(args, kwargs or {}, result))
            return result

    with torch.no_grad(), Record():
        torch.nn.Sequential(*stages)(x)
    return found


def _one(op_type: str, inputs: Sequence[Any], result: Any, attributes: Mapping[str, object] | None = None) -> Any:
    shapes = [tuple(given.shape) if hasattr(given, "shape") else tuple(given) for given in inputs if given is not None]
    return [make_operator(op_type, op_type, shapes, [tuple(result.shape)], attributes)]


def _conv(args: Any, _kwargs: Any, y: Any) -> Any:
    kernel, (stride, pads, dilation, group) = args[1].shape[2:], args[3:7]
    attributes = {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*pads, *pads],
                  "dilations": list(dilation), "group": group}  # fmt: skip
    return _one("Conv", args[:3], y, attributes)


def _max_pool(args: Any, kwargs: Any, y: Any) -> Any:
    kernel, stride, pads = ([size] * 2 for size in (args[1], kwargs["stride"], kwargs["padding"]))
    return _one("MaxPool", args[:1], y, {"kernel_shape": kernel, "strides": stride, "pads": pads * 2})


def _linear(args: Any, _kwargs: Any, y: Any) -> Any:
    x, weight, *bias = args
    flat = y.reshape(-1, y.shape[-1])
    return _one("Gemm", [(flat.shape[0], x.shape[-1]), weight, *bias], flat, {"transB": 1})


def _attention(args: Any, kwargs: Any, y: Any) -> Any:
    return _one("Attention", args[:3], y, {"is_causal": 1} if kwargs.get("is_causal") else {})


def _reshape(args: Any, _kwargs: Any, y: Any) -> Any:
    x = args[0]
    if y.data_ptr() == x.data_ptr():
        return []
    return _one("Transpose", [x.transpose(1, 2)], x, {"perm": [0, 2, 1, *range(3, x.dim())]})


_RULES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "conv2d": _conv,
    "batch_norm": lambda args, _, y: _one("BatchNormalization", [args[0], *[(y.shape[1],)] * 4], y),
    "relu": lambda args, _, y: _one("Relu", args[:1], y),
    "max_pool2d": _max_pool,
    "adaptive_avg_pool2d": lambda args, _, y: _one("GlobalAveragePool", args[:1], y),
    "linear": _linear,
    "layer_norm": lambda args, _, y: _one("LayerNormalization", [args[0], *[(y.shape[-1],)] * 2], y, {"axis": -1}),
    "scaled_dot_product_attention": _attention,
    "gelu": lambda args, _, y: _one("Gelu", args[:1], y),
    "add": lambda args, _, y: _one("Add", args[:2], y),
    "reshape": _reshape,
}
