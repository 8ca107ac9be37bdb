# ruff: noqa: ANN401  # PyTorch has no types here
"""Networks of PyTorch as chains of stages, of random weights: what the sweep times whole and cuts between devices."""

from __future__ import annotations

from typing import Any


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
