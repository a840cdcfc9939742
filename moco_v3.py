"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057.

1. Make two views of every image: the first always blurred, the second sometimes solarised.
2. Embed both as queries: backbone h, projector, predictor, one view after the other.
3. Momentum update: the key encoder, which has no predictor, is an EMA of the rest, more and more
   slowly over the run. Embed both views as keys with it, without a gradient.
4. The key of the other view of the same image is the positive; the negatives are the keys of all
   other images, of all processes. There is no queue.

Letters: N images per process, W processes, D embedding size, H backbone width.

A transformer's patch projection stays as it starts (`--freeze-patches`): its gradient is the first
to grow out of bounds, and accuracy dips there without a trace in the loss.

Differs from the official code (facebookresearch/moco-v3): fixed positions are computed in float64.
Blur is a true Gaussian, there Pillow's chain of box filters. The official runs use fp16; here CUDA
has bf16 unless `--amp fp16`. Left out: the convolutional stem. `vit_small_12heads` has the official
ViT-S's 12 heads, `vit_small` timm's 6.

    python moco_v3.py
    torchrun --nproc_per_node=8 moco_v3.py --data /path/to/imagenet --output runs/moco-v3
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # the official CONFIG.md; it has ResNet-50 with 1,000, 300 and 100 epochs
    arch="resnet50", stem="imagenet", image_size=224, patch_size=16, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.2, 1.0], blur=True, freeze_patches=True,
    hidden_dim=4096, embedding_dim=256, temperature=1.0, momentum=0.996, optimizer="lars",
    epochs=1000, batch_size=4096, lr=0.3, weight_decay=1.5e-6, warmup_epochs=10, sync_bn=True,
)
VIT = IMAGENET | dict(
    crop_scale=[0.08, 1.0], temperature=0.2, momentum=0.99, optimizer="adamw",
    epochs=300, lr=1.5e-4, weight_decay=0.1, warmup_epochs=40,
)
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet_300": IMAGENET | dict(epochs=300, weight_decay=1e-6, momentum=0.99),
    "imagenet_100": IMAGENET | dict(epochs=100, lr=0.6, weight_decay=1e-6, momentum=0.99),
    "imagenet_vit_small": VIT | dict(arch="vit_small_12heads"),
    "imagenet_vit_base": VIT | dict(arch="vit_base"),
    # Sizes, batch, rate and decay of solo-learn's CIFAR-10 run. Its 93.1 linear is not promised:
    # its LARS takes steps of .02 |p| at any rate, but no longer than SGD's; ours are .001 lr |p|.
    # Its crops are bicubic, and its stem pads by 2 pixels.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32, patch_size=4,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        crop_scale=[0.08, 1.0], blur=False,
        temperature=0.2, momentum=0.99, batch_size=256, weight_decay=1e-6,
    ),
    # Ours, chosen on the built-in digits: some minutes on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, patch_size=4, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], blur=False,
        hidden_dim=256, embedding_dim=64, temperature=0.2, momentum=0.96,
        epochs=30, batch_size=128, lr=4.0, weight_decay=1e-6, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.NAMES, crops="one", decay="both")
    group.add_argument("--patch-size", type=cli.pos_int,
                       help="transformer: side of a patch in pixels; smaller is better, and slower")
    group.add_argument("--freeze-patches", action=cli.Switch,
                       help="transformer: keep the patch projection as it starts: steadier")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--hidden-dim", type=cli.pos_int,
                       help="hidden width of projector and predictor")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    group.add_argument("--momentum", type=cli.fraction,
                       help="EMA momentum of the key encoder in the first step, a cosine takes it "
                       "to 1; lower for short runs")
    group.add_argument("--optimizer", choices=("lars", "adamw"),
                       help="lars for ResNets; adamw for transformers: decays biases and norms too")
    args = cli.parse(parser, RECIPES, argv)
    cli.check_patches(parser, args)
    return args


# -------------------------------------------------------------------------------------------- views


def photo_view(image_size, crop_scale, blur, blur_p, solarize_p):
    """A view of one of two kinds, as in BYOL (paper, section 4)."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.4, 0.4, saturation=0.2, hue=0.1, p=0.8),
        augment.Grayscale(p=0.2),
        augment.GaussianBlur(sigma=(0.1, 2.0), p=blur_p if blur else 0.0),
        augment.Solarize(threshold=128 / 255, p=solarize_p),
    ]
    return image_size, steps


# -------------------------------------------------------------------------------------------- model


def mlp(*dims: int, norm_at_end: bool) -> nn.Sequential:
    """Linear layers without bias, with batch norm and ReLU between them.

    With `norm_at_end`, a batch norm without scale and shift follows the last one.
    """
    layers = []
    for inputs, outputs in zip(dims[:-1], dims[1:], strict=True):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs),
                   nn.ReLU(inplace=True)]
    layers[-2:] = [nn.BatchNorm1d(dims[-1], affine=False)] if norm_at_end else []
    return nn.Sequential(*layers)


@torch.no_grad()
def start_transformer(vit: nn.Module, freeze_patches: bool) -> None:
    """Give a transformer the paper's start values, and its positions row before column."""
    backbones.init_linears(vit, nn.init.xavier_uniform_)
    for block in vit.blocks:
        for weight in block.attn.qkv.weight.chunk(3):  # three matrices, not one
            nn.init.xavier_uniform_(weight)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))  # as a matrix
    nn.init.zeros_(vit.patch_embed.proj.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    vit.pos_embed.copy_(vit.pos_embed.roll(vit.num_features // 2, dims=2))
    vit.patch_embed.requires_grad_(not freeze_patches)


class MoCoV3(nn.Module):
    """Backbone, projector H -> hidden -> D and predictor D -> hidden -> D.

    With a transformer, the projector has one more hidden layer and the predictor a last batch norm.
    """

    def __init__(self, backbone: nn.Module, hidden_dim: int, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        vit = isinstance(backbone, backbones.VisionTransformer)
        dims = [backbone.num_features, *[hidden_dim] * (2 if vit else 1), embedding_dim]
        self.projector = mlp(*dims, norm_at_end=True)
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim, norm_at_end=vit)

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics; (N, D) each."""
        return [self.predictor(self.projector(self.backbone(view))) for view in views]


def make_key_encoder(model: nn.Module) -> nn.Module:
    """A copy without predictor that is never trained; in train mode like the model."""
    key_encoder = backbones.without_dropping(copy.deepcopy(model).requires_grad_(False))
    key_encoder.predictor = nn.Identity()
    return key_encoder


# --------------------------------------------------------------------------------- loss and updates


@comm.outside_autocast
def contrastive_loss(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of identifying each query's key among those of all processes.

    Averaged over processes, the loss and its gradient are those of the joined batch: keys have no
    gradient, so each row's is that of its own process alone.

    Args:
        q: queries (N, D) of one view; normalised here.
        k: keys (N, D) of the other view, row by row; normalised here, detached.
        temperature: T, divides the cosines.

    Returns:
        Scalar: mean over the N rows of -log softmax at the positive key among WN, times 2 T, which
        keeps the size of the gradient when T changes.

    Reference: equation 1 and algorithm 1.
    """
    q, k = F.normalize(comm.upcast(q), dim=1), F.normalize(comm.upcast(k), dim=1)
    logits = q @ comm.all_gather_no_grad(k).T / temperature  # (N, WN)
    positive = torch.arange(len(q), device=q.device) + comm.rank() * len(q)
    return 2 * temperature * F.cross_entropy(logits, positive)


@torch.no_grad()
def update_ema(key_encoder: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the key encoder's parameters to the model's of the same names.

    They keep a share `momentum` of their own. Buffers stay as they are: the key encoder's batch
    statistics come from its own forwards.
    """
    old = dict(key_encoder.named_parameters())
    torch._foreach_lerp_([*old.values()], [*map(model.get_parameter, old)], 1 - momentum)


@torch.no_grad()
def indicators(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on this process's queries and keys (N, D)."""
    q, k = F.normalize(comm.upcast(q), dim=1), F.normalize(comm.upcast(k), dim=1)
    cosines = q @ k.T
    found = cosines.argmax(1) == torch.arange(len(q), device=q.device)
    return {
        "contrast_accuracy": found.float().mean(),  # the positive key is the nearest in this batch
        "positive_similarity": cosines.diagonal().mean(),
        "z_std": q.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    size, scale, blur = args.image_size, args.crop_scale, args.blur
    if args.views == "digits":
        views = augment.digit_views([(2, size, scale)], jitter=0.5, blur=blur)
    else:
        views = [photo_view(size, scale, blur, blur_p=1.0, solarize_p=0.0),
                 photo_view(size, scale, blur, blur_p=0.1, solarize_p=0.2)]
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, stem=args.stem, zero_init_residual=True,
        image_size=args.image_size, patch_size=args.patch_size, positions="sincos", drop_path=0.0)
    if args.arch in backbones.VITS:
        start_transformer(backbone, args.freeze_patches)
    model = MoCoV3(backbone, args.hidden_dim, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    key_encoder = make_key_encoder(model)
    if args.compile:
        backbones.compile(backbone, key_encoder.backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    if args.optimizer == "adamw":  # of all parameters, officially
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999),
                                      weight_decay=args.weight_decay, fused=True)
    else:
        weights, others = optim.split_by_dimension(model)
        groups = [
            {"params": weights},
            {"params": others, "decay": False, "adapt": False},
        ]
        optimizer = optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                               trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    with Training(args, world, images, build_views(args),
                  chance_loss=2 * 2 * args.temperature * math.log(args.batch_size),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, key_encoder=key_encoder, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.0,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        momentum_of_step = optim.cosine(args.momentum, 1.0, run.total_steps)
        for step, batch in run.steps(export=model.backbone):  # 1. two views
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                q = ddp_model(batch.views)  # 2. queries
                update_ema(key_encoder, model, momentum_of_step[step])  # 3. keys
                with torch.no_grad():
                    k = key_encoder(batch.views)
            # 4. identify the key of the other view
            loss = (contrastive_loss(q[0], k[1], args.temperature)
                    + contrastive_loss(q[1], k[0], args.temperature))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, q[0], k[1])


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
