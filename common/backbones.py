"""Backbones by name: torchvision's ResNets, and two small ones of the same layout.

Every backbone maps images (N, C, H, W) to pooled features (N, num_features), and its state dict has
torchvision's keys without a head, so that `backbone.pth` loads into torchvision as it is.
"""

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)
SMALL = {  # blocks and widths of the four stages
    "resnet_tiny": ((1, 1, 1, 1), (16, 32, 64, 128)),
    "resnet18_quarter": ((2, 2, 2, 2), (16, 32, 64, 128)),
}
NAMES = (*SMALL, *TORCHVISION)


def build_backbone(arch: str, *, stem: str, in_chans: int, zero_init_residual: bool) -> nn.Module:
    """Build a ResNet without its classifier; `num_features` is the width of its output.

    Args:
        arch: one of `NAMES`.
        stem: "imagenet" (7x7 stride 2, max-pool) or "small" (3x3 stride 1, no pool; for images of
            64 px and less).
        in_chans: channels of the images.
        zero_init_residual: start every residual block as the identity (last scale 0).
    """
    if arch in SMALL:
        model = SmallResNet(*SMALL[arch], zero_init_residual)
    else:
        model = torchvision.models.get_model(arch, zero_init_residual=zero_init_residual)
        model.num_features = model.fc.in_features
        model.fc = nn.Identity()
    width = model.conv1.out_channels
    if stem == "small":
        model.conv1 = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


class SmallResNet(nn.Module):
    """A ResNet of basic blocks with any widths, for laptops and tests."""

    def __init__(self, blocks: tuple, widths: tuple, zero_init_residual: bool):
        super().__init__()
        self.num_features = widths[-1]
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        before = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if stride != 1 or before != width:
                    shortcut = nn.Sequential(
                        nn.Conv2d(before, width, kernel_size=1, stride=stride, bias=False),
                        nn.BatchNorm2d(width),
                    )
                layers.append(BasicBlock(before, width, stride, shortcut))
                before = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
