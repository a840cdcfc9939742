"""Backbones by name: torchvision's ResNets, two small ones of the same layout, vision transformers.

Every backbone maps images (N, C, H, W) to pooled features (N, num_features). Without a head, the
state dict of a ResNet has torchvision's keys and that of a transformer timm's, so `backbone.pth`
loads there as it is.
"""

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)
SMALL = {  # blocks and widths of the four stages
    "resnet_tiny": ((1, 1, 1, 1), (16, 32, 64, 128)),
    "resnet18_quarter": ((2, 2, 2, 2), (16, 32, 64, 128)),
}
VIT_SIZES = {  # width, blocks, heads
    "vit_micro": (96, 4, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
    "vit_small_12heads": (384, 12, 12),  # MoCo v3's, which its tensors do not tell
    "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16),
}
STEMS = {  # kernel, stride and padding of a ResNet's first layer; a pool follows the large one
    "imagenet": (7, 2, 3), "small": (3, 1, 1), "small-pad2": (3, 1, 2),
}
RESNETS = (*SMALL, *TORCHVISION)
VITS = tuple(VIT_SIZES)
NAMES = (*RESNETS, *VITS)


def build_backbone(
    arch: str, *, in_chans: int, stem: str | None = None, zero_init_residual: bool | None = None,
    image_size: int | tuple[int, int] | None = None, patch_size: int | None = None,
    positions: str | None = None, drop_path: float | None = None,
) -> nn.Module:
    """Build a backbone without its classifier; `num_features` is the width of its output.

    Args:
        arch: one of `NAMES`.
        in_chans: channels of the images.
        stem: of a ResNet: "imagenet" (7x7 stride 2, max-pool), "small" (3x3 stride 1, no pool; for
            images of 64 px and less), or "small-pad2" (the same with a padding of 2 instead of 1,
            as solo-learn has it; for weights that were trained so).
        zero_init_residual: of a ResNet: start every residual block as the identity (last scale 0).
        image_size, patch_size, positions, drop_path: of a transformer, see `VisionTransformer`.

    Raises:
        ValueError: something that this kind of backbone needs is not given.
    """
    if arch in VITS:
        needed = dict(image_size=image_size, patch_size=patch_size, positions=positions,
                      drop_path=drop_path)
    else:
        needed = dict(stem=stem, zero_init_residual=zero_init_residual)
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{arch} needs {', '.join(missing)}")
    if arch in VITS:
        return VisionTransformer(*VIT_SIZES[arch], in_chans=in_chans, **needed)
    if arch in SMALL:
        model = SmallResNet(*SMALL[arch], zero_init_residual)
    else:
        model = torchvision.models.get_model(arch, zero_init_residual=zero_init_residual)
        model.num_features = model.fc.in_features
        model.fc = nn.Identity()
    width = model.conv1.out_channels
    model.conv1 = nn.Conv2d(in_chans, width, *STEMS[stem], bias=False)
    if stem != "imagenet":
        model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


# ------------------------------------------------------------------------------------------ ResNets


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


def is_resnet(backbone: nn.Module) -> bool:
    return isinstance(backbone, torchvision.models.ResNet | SmallResNet)


# ----------------------------------------------------------------------------- vision transformers


class VisionTransformer(nn.Module):
    """A plain vision transformer: class token and patches, pre-norm blocks, a last layer norm.

    Images may have another size at any time, if its sides are multiples of the patch: the position
    embedding is then interpolated.

    Args:
        dim, depth, num_heads: width of the tokens, number of blocks, attention heads of each.
        image_size: side in pixels, or (height, width), that the positions are made for.
        patch_size: side of a patch in pixels.
        positions: "learned", or "sincos" (fixed: a parameter that never has a gradient).
        drop_path: chance of the last block's two branches to be left out for a sample in training;
            it rises linearly from 0 at the first block. Drawn from torch's generator of the device.

    With `recompute` set to True, the backward computes each block anew instead of keeping what is
    in it: the same numbers for much less memory.

    Raises:
        ValueError: the image size is not a multiple of the patch size.

    Reference: Dosovitskiy et al., arXiv 2010.11929; start values as in timm (Linear weights and
    tokens normal with standard deviation 0.02 cut off at 2, biases 0, the convolution as torch's).
    """

    def __init__(
        self, dim: int, depth: int, num_heads: int, *, image_size, patch_size: int, in_chans: int,
        positions: str, drop_path: float,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_features, self.patch_size, self.recompute = dim, patch_size, False
        self.grid = self.grid_of(height, width)  # (rows, columns) that pos_embed is made for
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        init_linears(self, lambda weight: nn.init.trunc_normal_(weight, std=0.02))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if positions == "sincos":
            self.pos_embed.requires_grad_(False)
            self.pos_embed[0, 1:] = sincos_positions(dim, *self.grid)  # the class token's is 0
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """The class token's features (N, num_features)."""
        return self.tokens(images)[0][:, 0]

    def tokens(self, images: Tensor, last: int = 1) -> list[Tensor]:
        """All tokens (N, 1 + L, D) after each of the last blocks, normalised; class token first."""
        return self.encode(self.embed(images), last)

    def embed(self, images: Tensor) -> Tensor:
        """Patches of images as tokens (N, L, D), row by row, with their positions added."""
        rows, columns = self.grid_of(*images.shape[2:])
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        return patches + resample_positions(self.pos_embed[:, 1:], self.grid, (rows, columns))

    def encode(self, patches: Tensor, last: int = 1) -> list[Tensor]:
        """`tokens` of patches that are embedded already: all of an image's, or some (N, L, D)."""
        x = self.with_class_token(patches)
        outputs = []
        for number, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # with the same stochastic depth
            else:
                x = block(x)
            if number >= len(self.blocks) - last:
                outputs.append(self.norm(x))
        return outputs

    def attention(self, images: Tensor) -> Tensor:
        """How much each head of the last block lets the class token look at all tokens.

        Returns:
            (N, heads, 1 + L), which sums to 1 over the tokens; the class token is the first.
        """
        x = self.with_class_token(self.embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.heads_of(last.norm1(x))  # (N, heads, 1 + L, D / heads)
        return (q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(3)[:, :, 0]

    def with_class_token(self, patches: Tensor) -> Tensor:
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} do not divide into patches of "
                             f"{self.patch_size}")
        return height // self.patch_size, width // self.patch_size


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised tokens and added to its input."""

    def __init__(self, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim),
        ))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropped(self.attn(self.norm1(x)))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth: a branch is left out for whole samples, the others make up for it."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, L, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(*self.heads_of(x))
        return self.proj(out.transpose(1, 2).flatten(2))

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, heads, L, D / heads) each."""
        n, length, _ = x.shape
        return self.qkv(x).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def init_linears(module: nn.Module, init_weight):
    """Start every Linear inside a module with `init_weight` and a bias of 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_weight(layer.weight)
            nn.init.zeros_(layer.bias)


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed positions (rows * columns, dim): sines and cosines of column and row.

    The first half of the channels encodes the column, the second the row; a half holds the sines of
    its dim / 4 frequencies 10000^(-4 i / dim), then their cosines. MAE's order of the halves; MoCo
    v3 has them the other way round. Computed in float64.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"two-dimensional positions need a multiple of 4 channels, not {dim}")
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [at.flatten()[:, None] * frequencies for at in (column, row)]
    halves = [part for angle in angles for part in (angle.sin(), angle.cos())]
    return torch.cat(halves, dim=1).to(torch.get_default_dtype())


def resample_positions(positions: Tensor, grid: tuple, wanted: tuple) -> Tensor:
    """Bicubic interpolation of position embeddings (1, L, D) from one grid of patches to another.

    To the exact size wanted, where DINO's code adds 0.1 to the scale against a rounding error.
    As two matrix products, whose backward is deterministic on every device.
    """
    if wanted == grid:
        return positions
    down, across = (
        nn.functional.interpolate(
            torch.eye(old, dtype=positions.dtype, device=positions.device)[None, :, :, None],
            size=(new, 1), mode="bicubic",
        )[0, :, :, 0].T  # (new, old)
        for old, new in zip(grid, wanted, strict=True)
    )
    with torch.autocast(positions.device.type, enabled=False):
        table = positions.unflatten(1, grid)  # (1, rows, columns, D)
        return torch.einsum("ri,nijd,cj->nrcd", down, table, across).flatten(1, 2)


def freeze_blocks(backbone: nn.Module, count: int) -> None:
    """Keep the stem and first blocks (of a ResNet: stages) as they are, batch statistics included.

    With a count of 0 nothing is kept, the stem neither.
    """
    parts = []
    if count and is_resnet(backbone):
        parts = [backbone.conv1, backbone.bn1,
                 *(getattr(backbone, f"layer{stage}") for stage in range(1, count + 1))]
    elif count:
        parts = [backbone.patch_embed, *backbone.blocks[:count]]
        for tokens in (backbone.cls_token, backbone.pos_embed):
            tokens.requires_grad_(False)
    for part in parts:
        part.requires_grad_(False).eval()


def compile(*modules: nn.Module) -> None:
    """Compile modules in place; their random numbers are those of eager mode."""
    from torch._inductor import config

    config.fallback_random = True
    for module in modules:
        module.compile(dynamic=False)
