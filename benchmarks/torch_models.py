"""Small networks in PyTorch, exported to ONNX: forms of export and of network that the zoo does not have."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import onnx

HELD_OUT = (
    "torch-encoder", "torch-encoder-norm-first", "torch-mobilenet-v2", "torch-efficientnet", "torch-convnext",
    "torch-mlp", "torch-densenet", "torch-shufflenet",
)  # fmt: skip
"""Networks that no rule was tuned on."""


def exported(*names: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield the named networks; they need the extra ``torch``."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    def encoder(*, first: bool, activation: str) -> nn.Module:
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, activation, batch_first=True, norm_first=first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    class Squeeze(nn.Module):
        """Squeeze and excitation of a MobileNetV3 block."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = nn.functional.adaptive_avg_pool2d(x, 1)
            return x * nn.functional.hardsigmoid(self.up(nn.functional.relu(self.down(pooled))))

    class Inverted(nn.Module):
        """Inverted residual block with a depthwise convolution."""

        def __init__(self, width: int, act: type[nn.Module], *, squeeze: bool) -> None:
            super().__init__()
            wide = 4 * width
            body = [nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), act()]
            body += [nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), act()]
            body += [Squeeze(wide)] if squeeze else []
            self.body = nn.Sequential(*body, nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    class ConvNext(nn.Module):
        """ConvNeXt block: depthwise convolution, then layer norm and two linear layers, channels last."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)

    class Dense(nn.Module):
        """Layer of a DenseNet: what it computes is joined to what it read."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 64, 1, bias=False))
            self.second = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 16, 3, padding=1, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.second(self.first(x))], 1)

    class Shuffle(nn.Module):
        """ShuffleNetV2 unit: half of the channels pass by, then all are shuffled."""

        def __init__(self, width: int) -> None:
            super().__init__()
            half = width // 2
            body = [nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()]
            body += [nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)]
            self.body = nn.Sequential(*body, nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, 1)
            joined = torch.cat([left, self.body(right)], 1)
            return joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    image, tokens = torch.randn(1, 32, 28, 28), torch.randn(1, 16, 64)
    networks: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        "torch-encoder": (encoder(first=False, activation="relu"), (tokens,)),
        "torch-encoder-norm-first": (encoder(first=True, activation="gelu"), (tokens,)),
        "torch-mobilenet-v2": (nn.Sequential(*(Inverted(32, nn.ReLU6, squeeze=False) for _ in range(4))), (image,)),
        "torch-mobilenet-v3": (nn.Sequential(*(Inverted(32, nn.Hardswish, squeeze=True) for _ in range(4))), (image,)),
        "torch-efficientnet": (nn.Sequential(*(Inverted(32, nn.SiLU, squeeze=True) for _ in range(4))), (image,)),
        "torch-convnext": (nn.Sequential(*(ConvNext(32) for _ in range(4))), (image,)),
        "torch-densenet": (nn.Sequential(*(Dense(32 + 16 * i) for i in range(4))), (image,)),
        "torch-shufflenet": (nn.Sequential(*(Shuffle(32) for _ in range(4))), (image,)),
        "torch-mlp": (nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh()))), (tokens,)),
    }
    for name in names:
        network, inputs = networks[name]
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(network.eval(), inputs, buffer, dynamo=False, opset_version=17)
        yield name, onnx.load_from_string(buffer.getvalue())
