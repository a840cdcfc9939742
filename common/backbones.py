"""Backbones by name: torchvision's ResNets, two small ones of the same layout, vision transformers.

Every backbone maps images (N, C, H, W) to pooled features (N, num_features). Without a head, the
state dict of a ResNet has torchvision's keys and that of a transformer timm's, so `backbone.pth`
loads there as it is. `torchvision:NAME` and `timm:NAME` are the other trunks of these libraries
(`common/trunks.py`), for the pooled feature alone.
"""

import difflib
import math
from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from common import trunks
from common.distributed import RunError

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
# Which not every transformer has
VIT_PARTS = ("class_token", "layer_scale", "registers", "relative_positions")
STEMS = {  # kernel, stride and padding of a ResNet's first layer; a pool follows the large ones
    "imagenet": (7, 2, 3), "small": (3, 1, 1), "small-pad2": (3, 1, 2),
    "imagenet-sobel": (7, 2, 3), "small-sobel": (3, 1, 1),  # of edges, not of colours
}
RESNETS = (*SMALL, *TORCHVISION)
VITS = tuple(VIT_SIZES)
FOREIGN = ("torchvision:NAME", "timm:NAME")  # any NAME of the library
POOLED = (*RESNETS, *FOREIGN)  # for methods that see pooled features alone
NAMES = (*RESNETS, *VITS, *FOREIGN)


def check_name(arch: str, archs: tuple = NAMES) -> str:
    """Return a backbone's name if it is one of `archs`.

    Raises:
        RunError: it is not, with names that are alike; or timm is not installed.
    """
    library = arch.partition(":")[0]
    if f"{library}:NAME" in FOREIGN and f"{library}:NAME" not in archs:
        raise RunError(f"{arch} gives a pooled feature alone, and this needs what is inside of a "
                       f"backbone; choose from {' '.join(archs)}")
    known = [name for name in archs if name not in FOREIGN]
    if library == "timm":
        known = trunks.names("timm")
    elif "torchvision:NAME" in archs:
        known += trunks.names("torchvision")
    if arch in known:
        return arch
    alike = difflib.get_close_matches(arch, known)
    raise RunError(f"{arch!r} is not a backbone; " + (
        f"did you mean {' or '.join(alike)}?" if alike else f"choose from {' '.join(archs)}"))


def build_backbone(
    arch: str, *, in_chans: int, stem: str | None = None, zero_init_residual: bool | None = None,
    image_size: int | tuple[int, int] | None = None, patch_size: int | None = None,
    positions: str | None = None, drop_path: float | None = None, **parts,
) -> nn.Module:
    """Build a backbone without its classifier; `num_features` is the width of its output.

    Args:
        arch: one of `NAMES`.
        in_chans: channels of the images.
        stem: of a ResNet, one of `STEMS`; "small" is for images of 64 px and less, "small-pad2" for
            weights of solo-learn.
        zero_init_residual: of a ResNet: start every residual block as the identity (last scale 0).
        image_size, patch_size, positions, drop_path, **parts: of a transformer, see
            `VisionTransformer`; of another library's trunk the image size alone.

    Raises:
        ValueError: something that this kind of backbone needs is not given.
        RunError: the other library has no such trunk, or it does not take images of this size.
    """
    if ":" in arch:
        needed = dict(image_size=image_size)
    elif arch in VITS:
        needed = dict(image_size=image_size, patch_size=patch_size, positions=positions,
                      drop_path=drop_path)
    else:
        needed = dict(stem=stem, zero_init_residual=zero_init_residual)
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{arch} needs {', '.join(missing)}")
    if ":" in arch:
        return trunks.build(check_name(arch), in_chans, image_size)
    if arch in VITS:
        return VisionTransformer(*VIT_SIZES[arch], in_chans=in_chans, **needed, **parts)
    if arch in SMALL:
        model = SmallResNet(*SMALL[arch], zero_init_residual)
    else:
        model = torchvision.models.get_model(arch, zero_init_residual=zero_init_residual)
        model.num_features = model.fc.in_features
        model.fc = nn.Identity()
    width = model.conv1.out_channels
    if stem.endswith("-sobel"):
        model.conv1 = SobelConv2d(width, *STEMS[stem])
    else:
        model.conv1 = nn.Conv2d(in_chans, width, *STEMS[stem], bias=False)
    if not stem.startswith("imagenet"):
        model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


# ------------------------------------------------------------------------------------------ ResNets


class SmallResNet(torchvision.models.ResNet):
    """A ResNet of basic blocks with any widths, for laptops and tests."""

    def __init__(self, blocks: tuple, widths: tuple, zero_init_residual: bool):
        nn.Module.__init__(self)  # in place of torchvision's, whose widths are fixed
        self._norm_layer, self.groups, self.base_width, self.dilation = nn.BatchNorm2d, 1, 64, 1
        self.inplanes, self.num_features = widths[0], widths[-1]
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layer = self._make_layer(BasicBlock, width, count, stride=1 if stage == 1 else 2)
            self.add_module(f"layer{stage}", layer)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)


class SobelConv2d(nn.Conv2d):
    """A convolution of two Sobel maps of images (N, C, H, W), the mean of whose channels it takes.

    The maps are the slopes to the right and downwards, four times in 3 x 3 pixels, zero beyond the
    border.
    """

    def __init__(self, width: int, kernel_size: int, stride: int, padding: int):
        super().__init__(2, width, kernel_size, stride, padding, bias=False)
        slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        self.register_buffer("sobel", torch.stack([slope, slope.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):  # differences of like numbers
            gray = images.mean(1, keepdim=True)
            slopes = nn.functional.conv2d(gray, self.sobel.to(gray.dtype), padding=1)
        return super().forward(slopes)


def is_resnet(backbone: nn.Module) -> bool:
    return isinstance(backbone, torchvision.models.ResNet)


# ----------------------------------------------------------------------------- vision transformers


class VisionTransformer(nn.Module):
    """A plain vision transformer: class token and patches, pre-norm blocks, a last layer norm.

    Images may have another size at any time, if its sides are multiples of the patch: the position
    embedding is then interpolated, in training without antialiasing, as all authors do. Loading
    released weights with registers sets `antialias`, as their authors do. timm always antialiases,
    so its features of DINOv2 without registers differ from ours at sizes other than 518 px.

    Args:
        dim, depth, num_heads: width of the tokens, number of blocks, attention heads of each.
        image_size: side in pixels, or (height, width), that the positions are made for.
        patch_size: side of a patch in pixels.
        positions: "learned", or "sincos" (fixed: a parameter that never has a gradient).
        drop_path: chance of the last block's two branches to be left out for a sample in training;
            it rises linearly from 0 at the first block. Drawn from torch's generator of the device.
        uniform_drop_path: the same chance in every block.
        layer_scale: start value of a trained scale of every channel of every branch; 0: none.
        class_token: without it, the feature is the mean of the patches.
        registers: tokens without a position beside the class token, left out of the result.
        relative_positions: `RelativePositions` in the place of `positions`.

    With `recompute` set to True, the backward computes each block anew instead of keeping what is
    in it: the same numbers for much less memory.

    Raises:
        ValueError: the image size is not a multiple of the patch size.

    Reference: Dosovitskiy et al., arXiv 2010.11929; start values as in timm (Linear weights and
    tokens normal with standard deviation 0.02 cut off at 2, biases 0, the convolution as torch's).
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, image_size, patch_size: int,
                 in_chans: int, positions: str, drop_path: float, uniform_drop_path: bool = False,
                 layer_scale: float = 0.0, class_token: bool = True, registers: int = 0,
                 relative_positions: bool = False):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_features, self.patch_size = dim, patch_size
        self.recompute = self.antialias = False
        self.grid = self.grid_of(height, width)  # (rows, columns) that pos_embed is made for
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = self.shared_rel_pos = None
        if relative_positions:
            self.shared_rel_pos = RelativePositions(num_heads, self.grid)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, class_token + math.prod(self.grid), dim))
        proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        first = drop_path if uniform_drop_path else 0
        rates = torch.linspace(first, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        init_linears(self, lambda weight: nn.init.trunc_normal_(weight, std=0.02))
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if self.pos_embed is not None and positions == "sincos":
            self.pos_embed.requires_grad_(False)
            self.pos_embed[0, class_token:] = sincos_positions(dim, *self.grid)  # the token's is 0
        elif self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """The class token's features (N, num_features), or the mean of the patches'."""
        x = self.tokens(images)[0]
        return x.mean(1) if self.cls_token is None else x[:, 0]

    def tokens(self, images: Tensor, last: int = 1) -> list[Tensor]:
        """All tokens (N, 1 + L, D) after each of the last blocks, normalised; class token first.

        Without a class token (N, L, D).
        """
        return self.encode(self.embed(images), last, self.grid_of(*images.shape[2:]))

    def embed(self, images: Tensor, mask: Tensor | None = None,
              mask_token: Tensor | None = None) -> Tensor:
        """Patches of images as tokens (N, L, D), row by row, with their positions, if not relative.

        Where the bool mask (N, L) is True, the mask token (1, 1, D) is in the patch's place.
        """
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask[:, :, None], mask_token.to(patches.dtype), patches)
        if self.pos_embed is None:
            return patches
        positions = self.pos_embed[:, -math.prod(self.grid):]  # the class token's may come first
        wanted = self.grid_of(*images.shape[2:])
        return patches + resample_positions(positions, self.grid, wanted, self.antialias)

    def encode(self, patches: Tensor, last: int = 1, grid: tuple | None = None) -> list[Tensor]:
        """`tokens` of patches that are embedded already: all of an image's, or some (N, L, D).

        Relative positions need all of them, and their `grid`, where images have another size.
        """
        x, bias = self.with_first_tokens(patches), self.position_bias(grid or self.grid)
        outputs = []
        for number, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)  # the same stochastic depth
            else:
                x = block(x, bias)
            if number >= len(self.blocks) - last:
                outputs.append(self.without_registers(self.norm(x)))
        return outputs

    def attention(self, images: Tensor) -> Tensor:
        """How much each head of the last block lets the class token look at all tokens.

        Returns:
            (N, heads, 1 + L); the class token is the first. Sums to 1 over the tokens, with what
            registers have, which are left out.
        """
        x = self.with_first_tokens(self.embed(images))
        bias = self.position_bias(self.grid_of(*images.shape[2:]))
        for block in self.blocks[:-1]:
            x = block(x, bias)
        last = self.blocks[-1]
        q, k, _ = last.attn.heads_of(last.norm1(x))  # (N, heads, 1 + L, D / heads)
        logits = q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        logits = logits if bias is None else logits + bias[:, :, :1]
        return self.without_registers(logits.softmax(3)[:, :, 0], dim=2)

    def position_bias(self, grid: tuple[int, int]) -> Tensor | None:
        """What blocks add to the logits of attention between the tokens of a grid of patches."""
        return None if self.shared_rel_pos is None else self.shared_rel_pos(grid)

    def with_first_tokens(self, patches: Tensor) -> Tensor:
        """Class token and registers, if there are any, before patches (N, L, D)."""
        first = []
        if self.cls_token is not None:
            has_position = self.pos_embed is not None and (
                self.pos_embed.shape[1] > math.prod(self.grid))
            first.append(self.cls_token + self.pos_embed[:, :1] if has_position else self.cls_token)
        if self.reg_token is not None:
            first.append(self.reg_token)
        return torch.cat([*(x.expand(len(patches), -1, -1) for x in first), patches], dim=1)

    def without_registers(self, x: Tensor, dim: int = 1) -> Tensor:
        """Leave out the registers among tokens; they stand behind the class token."""
        if self.reg_token is None:
            return x
        first = int(self.cls_token is not None)
        sizes = [first, self.reg_token.shape[1], x.shape[dim] - first - self.reg_token.shape[1]]
        before, _, patches = x.split(sizes, dim)
        return torch.cat([before, patches], dim)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} do not divide into patches of "
                             f"{self.patch_size}")
        return height // self.patch_size, width // self.patch_size


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised tokens and added to its input."""

    def __init__(self, dim: int, num_heads: int, drop_path: float,
                 layer_scale: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim),
        ))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = drop_path

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.dropped(self.ls1(self.attn(self.norm1(x), bias)))
        return x + self.dropped(self.ls2(self.mlp(self.norm2(x))))

    def dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth: a branch is left out for whole samples, the others make up for it."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)


class LayerScale(nn.Module):
    """A trained factor for every channel (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, L, D), with a bias (1, heads, L, L) or none."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(*self.heads_of(x), attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, heads, L, D / heads) each."""
        n, length, _ = x.shape
        return self.qkv(x).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class RelativePositions(nn.Module):
    """A bias of attention for where a query is relative to a key: one table for all blocks.

    Rows of the table: a query's distance from a key by rows and columns, (1 - rows, 1 - columns)
    first, then row by row; the class token to a patch, a patch to it, it to itself.

    Reference: Bao et al., arXiv 2106.08254; the names, and the order of the rows, are timm's.
    """

    def __init__(self, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        distances = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances + 3, num_heads))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The bias (1, heads, 1 + L, 1 + L) of queries and keys; the class token is the first.

        For another grid, the distances are interpolated as position embeddings are.
        """
        patches, others = self.relative_position_bias_table.tensor_split([-3])
        spans = [(2 * rows - 1, 2 * columns - 1) for rows, columns in (self.grid, grid)]
        table = torch.cat([resample_positions(patches[None], *spans)[0], others])
        at = torch.arange(math.prod(grid), device=table.device)
        row, column = at // grid[1], at % grid[1]
        down = row[:, None] - row + grid[0] - 1  # (L, L): of queries from keys, 0 the least
        across = column[:, None] - column + grid[1] - 1
        index = nn.functional.pad(down * spans[1][1] + across, (1, 0, 1, 0), value=len(table) - 1)
        index[0, 1:], index[1:, 0] = len(table) - 3, len(table) - 2
        return table[index].permute(2, 0, 1)[None].contiguous()


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


def resample_positions(positions: Tensor, grid: tuple, wanted: tuple,
                       antialias: bool = False) -> Tensor:
    """Bicubic interpolation of position embeddings (1, L, D) from one grid of patches to another.

    To the exact size wanted, where DINO's code adds 0.1 to the scale against a rounding error.
    As two matrix products, whose backward is deterministic on every device.
    """
    if wanted == grid:
        return positions
    down, across = (resizing_matrix(old, new, positions, mode="bicubic", antialias=antialias)
                    for old, new in zip(grid, wanted, strict=True))
    with torch.autocast(positions.device.type, enabled=False):
        table = positions.unflatten(1, grid)  # (1, rows, columns, D)
        return torch.einsum("ri,nijd,cj->nrcd", down, table, across).flatten(1, 2)


@torch.no_grad()
def resizing_matrix(old: int, new: int, like: Tensor, **options) -> Tensor:
    """Matrix (new, old) that interpolates a row as `torch.nn.functional.interpolate` does."""
    eye = torch.eye(old, dtype=like.dtype, device=like.device)[None, :, None]
    # With antialiasing, torch is wrong for a size of (new, 1).
    return nn.functional.interpolate(eye, size=(1, new), **options)[0, :, 0].T


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
        for part in (backbone.cls_token, backbone.reg_token, backbone.pos_embed,
                     backbone.shared_rel_pos):
            if part is not None:
                part.requires_grad_(False)
    for part in parts:
        part.requires_grad_(False).eval()


def without_dropping(module: nn.Module) -> nn.Module:
    """Switch stochastic depth and dropout off for good, as teachers have it; the module itself."""
    for layer in module.modules():
        if isinstance(layer, Block):
            layer.drop_path = 0.0
        elif isinstance(layer, nn.Dropout | torchvision.ops.StochasticDepth):
            layer.p = 0.0
        elif hasattr(layer, "drop_prob"):  # timm's stochastic depth
            layer.drop_prob = 0.0
    return module


def compile(*modules: nn.Module, dynamic: bool = False) -> None:
    """Compile modules in place; their random numbers are those of eager mode.

    `dynamic` for inputs whose sizes change from step to step.
    """
    from torch._inductor import config

    config.fallback_random = True
    # A block's code is compiled anew for every rate of stochastic depth, crop size and mode; after
    # 8 times torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 128
    if dynamic:  # fails on sizes that change (torch 2.11 on CUDA)
        config.triton.coalesce_tiling_analysis = False
    for module in modules:
        module.compile(dynamic=dynamic)
