"""lightly's methods as its documentation shows them, for `throughput.py` and `quality.py`.

Each function takes the settings of our script of that name, as its `parse_args` gives them, and
returns lightly's views, modules and loss at the same backbone, sizes and strengths.
"""

import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torchvision
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    LeJEPALoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from lightly.models import utils
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    LeJEPAProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, DINOTransform, MAETransform, SimCLRTransform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from lightly.transforms.multi_crop_transform import MultiCropTranform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.swav_transform import SwaVViewTransform
from lightly.transforms.vicreg_transform import VICRegViewTransform
from lightly.utils.dist import gather
from lightly.utils.lars import LARS
from torch import nn

from common import backbones

GATHER = int(os.environ.get("WORLD_SIZE", 1)) > 1


class Method(NamedTuple):
    """What one of lightly's methods consists of.

    transform: an image to its views.
    build: makes the model.
    step: (model, views, share of the run that is done) to the loss.
    """

    transform: Callable
    build: Callable
    step: Callable


class Embedder(nn.Module):
    """A ResNet and a projection head."""

    def __init__(self, args, head: Callable, zero_init_residual=False):
        super().__init__()
        self.backbone = backbones.build_backbone(
            args.arch, stem=args.stem, in_chans=args.in_chans,
            zero_init_residual=zero_init_residual,
        )
        self.head = head(self.backbone.num_features)

    def forward(self, images):
        return self.head(self.backbone(images).flatten(start_dim=1))


def crop_bicubic(transform):
    """Let lightly's crops be resized as ours: SimCLR, BYOL, Barlow Twins, VICReg, DINO."""
    crops = [step for view in transform.transforms for step in view.transform.transforms
             if type(step).__name__ == "RandomResizedCrop"]  # of torchvision's v1 or v2
    assert crops, "lightly's views have no crop where we look for it"
    for crop in crops:
        crop.interpolation = torchvision.transforms.InterpolationMode.BICUBIC


def bare(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)  # without DDP


def normalize(args) -> dict:
    return {"mean": args.mean, "std": args.std}


def simclr(args) -> Method:
    criterion = NTXentLoss(temperature=args.temperature, gather_distributed=GATHER)
    transform = SimCLRTransform(
        input_size=args.image_size, cj_strength=args.jitter_strength, min_scale=args.crop_scale[0],
        gaussian_blur=0.0, normalize=normalize(args),
    )

    def head(width):
        return SimCLRProjectionHead(width, args.projector_dim, args.embedding_dim)

    def step(model, views, done):
        return criterion(*[model(view) for view in views])

    return Method(transform, lambda: Embedder(args, head, zero_init_residual=True), step)


def byol_views(args) -> Callable:
    same = dict(input_size=args.image_size, min_scale=args.crop_scale[0], gaussian_blur=0.0,
                normalize=normalize(args))
    return BYOLTransform(BYOLView1Transform(**same), BYOLView2Transform(**same))


def moco_v2_views(args) -> Callable:
    return SimCLRTransform(
        input_size=args.image_size, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.4,
        cj_hue=0.1, min_scale=args.crop_scale[0], gaussian_blur=0.0, normalize=normalize(args),
    )


def barlow_twins(args) -> Method:
    criterion = BarlowTwinsLoss(lambda_param=args.lambda_, gather_distributed=GATHER)
    transform = byol_views(args)

    def head(width):
        return BarlowTwinsProjectionHead(width, args.projector_dim, args.embedding_dim)

    def step(model, views, done):
        return criterion(*[model(view) for view in views])

    return Method(transform, lambda: Embedder(args, head, zero_init_residual=True), step)


def vicreg(args) -> Method:
    criterion = VICRegLoss(lambda_param=args.sim_weight, mu_param=args.std_weight,
                           nu_param=args.cov_weight, gather_distributed=GATHER)
    same = dict(
        input_size=args.image_size, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.2,
        cj_hue=0.1, min_scale=args.crop_scale[0], gaussian_blur=0.0, normalize=normalize(args),
    )
    transform = MultiViewTransform(
        [VICRegViewTransform(solarize_prob=p, **same) for p in args.solarize]
    )

    def head(width):
        return VICRegProjectionHead(width, args.projector_dim, args.embedding_dim)

    def step(model, views, done):
        return criterion(*[model(view) for view in views])

    return Method(transform, lambda: Embedder(args, head, zero_init_residual=True), step)


def lejepa(args) -> Method:
    brightness, contrast, saturation, hue = args.jitter
    colours = VICRegViewTransform(
        cj_strength=1.0, cj_bright=brightness, cj_contrast=contrast, cj_sat=saturation, cj_hue=hue,
        solarize_prob=args.solarize, gaussian_blur=0.0, normalize=normalize(args),
    ).transform.transforms[1:]  # without its crop
    transform = MultiCropTranform(
        crop_sizes=args.crop_sizes, crop_counts=args.num_crops,
        crop_min_scales=args.crop_scales[::2], crop_max_scales=args.crop_scales[1::2],
        transforms=torchvision.transforms.Compose(colours),
    )
    criterion = LeJEPALoss(gather_distributed=GATHER, sigreg_num_vectors=args.num_directions)

    def head(width):
        return LeJEPAProjectionHead(width, args.projector_dim, args.embedding_dim)

    def step(model, views, done):
        z = torch.stack([model(view) for view in views])
        centre = z[: args.num_crops[0]]  # the whole `criterion` wants local views as well
        distance = lejepa_invariance_loss(all_proj=z, global_proj=centre)
        return args.lambda_ * criterion.to(z.device).sigreg(z) + (1 - args.lambda_) * distance

    return Method(transform, lambda: Embedder(args, head, zero_init_residual=True), step)


class MoCo(Embedder):
    """With a key encoder; shuffling and splitting of batch norm are left out, as there."""

    def __init__(self, args):
        def head(width):
            return MoCoProjectionHead(width, width, args.embedding_dim)

        super().__init__(args, head)
        self.keys = Embedder(args, head)
        self.keys.load_state_dict(
            {name: value for name, value in self.state_dict().items() if "keys" not in name}
        )
        deactivate_requires_grad(self.keys)


def moco(args) -> Method:
    criterion = NTXentLoss(temperature=args.temperature,
                           memory_bank_size=(args.queue_length, args.embedding_dim))
    transform = moco_v2_views(args)

    def step(model, views, done):
        inner = bare(model)
        update_momentum(inner.backbone, inner.keys.backbone, args.momentum)
        update_momentum(inner.head, inner.keys.head, args.momentum)
        with torch.no_grad():
            keys = inner.keys(views[1])
        return criterion(model(views[0]), keys)

    return Method(transform, lambda: MoCo(args), step)


class Siamese(nn.Module):
    """An embedder, a predictor and, where asked for, a momentum copy of the first."""

    def __init__(self, args, head: Callable, predictor: Callable, has_target: bool):
        super().__init__()
        self.online = Embedder(args, head, zero_init_residual=True)
        self.backbone, self.predictor = self.online.backbone, predictor()
        self.target = self.online
        if has_target:
            self.target = Embedder(args, head)
            self.target.load_state_dict(self.online.state_dict())
            deactivate_requires_grad(self.target)

    def forward(self, views, momentum=None):
        """Predictions, and what the other view's are to predict."""
        z = [self.online(view) for view in views]
        p = [self.predictor(each) for each in z]
        if self.target is not self.online:
            update_momentum(self.online, self.target, momentum)
            with torch.no_grad():
                z = [self.target(view) for view in views]
        return p, [each.detach() for each in z[::-1]]


def rising(momentum: float, done: float) -> float:
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * done)) / 2


def simsiam(args) -> Method:
    criterion, d = NegativeCosineSimilarity(), args.embedding_dim

    def build():
        return Siamese(args, lambda h: SimSiamProjectionHead(h, args.projector_dim, d),
                       lambda: SimSiamPredictionHead(d, args.predictor_dim, d), has_target=False)

    def step(model, views, done):
        return sum(map(criterion, *model(views))) / 2

    return Method(moco_v2_views(args), build, step)


def byol(args) -> Method:
    criterion, d = NegativeCosineSimilarity(), args.embedding_dim

    def build():
        return Siamese(args, lambda h: BYOLProjectionHead(h, args.projector_dim, d),
                       lambda: BYOLPredictionHead(d, args.predictor_dim, d), has_target=True)

    def step(model, views, done):  # at the scale of the paper, as ours
        return sum(2 + 2 * criterion(*pair)
                   for pair in zip(*model(views, rising(args.momentum, done)), strict=True))

    return Method(byol_views(args), build, step)


def moco_v3(args) -> Method:
    """lightly's modules; it has no loss without a queue, so that is torch's cross-entropy."""
    hidden, d = args.hidden_dim, args.embedding_dim

    def build():
        def head(width):
            layers = MoCoProjectionHead(width, hidden, d, num_layers=2, batch_norm=True)
            return nn.Sequential(layers, nn.BatchNorm1d(d, affine=False))

        return Siamese(args, head, lambda: MoCoProjectionHead(d, hidden, d, batch_norm=True),
                       has_target=True)

    def criterion(q, k):
        q, k = nn.functional.normalize(q, dim=1), nn.functional.normalize(k, dim=1)
        rank = torch.distributed.get_rank() if GATHER else 0
        own = torch.arange(len(q), device=q.device) + rank * len(q)
        k = torch.cat(gather(k)) if GATHER else k
        loss = nn.functional.cross_entropy(q @ k.T / args.temperature, own)
        return 2 * args.temperature * loss

    def step(model, views, done):
        return sum(map(criterion, *model(views, rising(args.momentum, done))))

    return Method(byol_views(args), build, step)


class SwAV(Embedder):
    def __init__(self, args):
        width, count = args.embedding_dim, args.num_prototypes[0]
        super().__init__(args, lambda h: SwaVProjectionHead(h, args.projector_dim, width))
        self.prototypes = SwaVPrototypes(width, count)

    def forward(self, views):
        z = [nn.functional.normalize(super(SwAV, self).forward(v), dim=1) for v in views]
        return [self.prototypes(each) for each in z]


def swav(args) -> Method:
    full, *small = args.num_crops
    sizes = (*args.crop_sizes, args.crop_sizes[0] // 2)[:2]
    smallest, largest = ((*args.crop_scales[i::2], 0.1)[:2] for i in (0, 1))
    transform = MultiCropTranform(
        crop_sizes=sizes, crop_counts=(full, *(small or [0])), crop_min_scales=smallest,
        crop_max_scales=largest,
        transforms=SwaVViewTransform(cj_strength=args.jitter_strength, gaussian_blur=0.0,
                                     normalize=normalize(args)),
    )
    if not small:
        transform.transforms = transform.transforms[:full]
    criterion = SwaVLoss(
        temperature=args.temperature, sinkhorn_epsilon=args.epsilon,
        sinkhorn_iterations=args.sinkhorn_iterations, sinkhorn_gather_distributed=GATHER,
    )

    def step(model, views, done):
        inner = bare(model)
        inner.prototypes.requires_grad_(done >= args.freeze_prototypes_epochs / args.epochs)
        inner.prototypes.normalize()
        scores = model(views)
        return criterion(scores[:full], scores[full:])

    return Method(transform, lambda: SwAV(args), step)


def vit(args) -> nn.Module:
    """The transformer of our `--arch`, from timm, as in lightly's examples."""
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = backbones.VIT_SIZES[args.arch]
    return VisionTransformer(
        img_size=args.image_size, patch_size=args.patch_size, embed_dim=width, depth=depth,
        num_heads=heads, num_classes=0, dynamic_img_size=len(getattr(args, "num_crops", [])) > 1,
    )


class StudentAndTeacher(nn.Module):
    def __init__(self, args):
        super().__init__()
        is_vit = args.arch in backbones.VITS

        def one(freeze):
            def head(width):
                return DINOProjectionHead(
                    width, args.hidden_dim, args.bottleneck_dim, args.num_outputs,
                    batch_norm=args.bn_in_head, freeze_last_layer=freeze,
                    norm_last_layer=args.norm_last_layer,
                )

            if not is_vit:
                return Embedder(args, head)
            body = MaskedVisionTransformerTIMM(vit(args))
            return nn.Sequential(body, head(body.vit.embed_dim))

        self.student, self.teacher = one(args.freeze_last_layer_epochs), one(-1)
        self.teacher.load_state_dict(self.student.state_dict())
        deactivate_requires_grad(self.teacher)

    def forward(self, views, full):
        with torch.no_grad():
            teacher = [self.teacher(view) for view in views[:full]]
        return teacher, [self.student(view) for view in views]


def dino(args) -> Method:
    full, *small = args.num_crops
    sizes = (*args.crop_sizes, args.crop_sizes[0] // 2)[:2]
    scales = (*args.crop_scales, 0.05, 0.4)[:4]
    transform = DINOTransform(
        global_crop_size=sizes[0], global_crop_scale=scales[:2], local_crop_size=sizes[1],
        local_crop_scale=scales[2:], n_local_views=sum(small), cj_strength=args.jitter_strength,
        gaussian_blur=(0.0, 0.0, 0.0), normalize=normalize(args),
    )
    criterion = DINOLoss(
        output_dim=args.num_outputs, warmup_teacher_temp=args.warmup_teacher_temperature,
        teacher_temp=args.teacher_temperature, student_temp=args.student_temperature,
        warmup_teacher_temp_epochs=args.warmup_teacher_temperature_epochs,
        center_momentum=args.center_momentum,
    )

    def step(model, views, done):
        inner = bare(model)
        update_momentum(inner.student, inner.teacher, rising(args.momentum, done))
        teacher, student = model(views, full)
        return criterion.to(teacher[0].device)(teacher, student, epoch=int(done * args.epochs))

    return Method(transform, lambda: StudentAndTeacher(args), step)


class MAE(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(vit(args))
        self.length, self.patch = self.backbone.sequence_length, args.patch_size
        self.decoder = MAEDecoderTIMM(
            num_patches=self.length - 1, patch_size=self.patch,
            embed_dim=self.backbone.vit.embed_dim, decoder_embed_dim=args.decoder_dim,
            decoder_depth=args.decoder_depth, decoder_num_heads=args.decoder_heads,
        )
        self.ratio = args.mask_ratio

    def forward(self, images):
        n = len(images)
        keep, masked = utils.random_token_mask((n, self.length), self.ratio, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (n, self.length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        decoded = self.decoder.decode(tokens)
        predicted = self.decoder.predict(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        return predicted, utils.normalize_mean_var(target)


def mae(args) -> Method:
    criterion = nn.MSELoss()
    transform = MAETransform(input_size=args.image_size, min_scale=args.crop_scale[0],
                             normalize=normalize(args))
    return Method(transform, lambda: MAE(args),
                  lambda model, views, done: criterion(*model(views[0])))


def make_loader(data: str, transform: Callable, batch_size: int, workers: int, pinned: bool):
    """Batches of the images under train/, shuffled, as lightly's examples load them."""
    images = torchvision.datasets.ImageFolder(os.path.join(data, "train"), transform=transform)
    sampler = torch.utils.data.distributed.DistributedSampler(images) if GATHER else None
    return torch.utils.data.DataLoader(
        images, batch_size=batch_size, shuffle=sampler is None, sampler=sampler, drop_last=True,
        num_workers=workers, pin_memory=pinned,
    )


def loop(args, part: str, limit: Callable, method: Method, optimizer: str):
    """Load, augment and train as lightly's examples do, on one process or several.

    Args:
        args: of `throughput.py`.
        part: "data" (the loader alone), "step" (one fixed batch) or "both".
        limit: batches without end to those of the loop.
        optimizer: lars, sgd or adamw.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if size > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    loader = make_loader(args.data, method.transform, args.batch_size // size, args.workers, cuda)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    if part == "data":
        for _ in limit(batches):
            pass
        return
    model = method.build().to(device)
    if args.peer_channels_last:
        torch.backends.cudnn.benchmark = True
        model = model.to(memory_format=torch.channels_last)
    if size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
    else:
        kind = torch.optim.SGD if optimizer == "sgd" else LARS
        optimizer = kind(trained, lr=0.1, momentum=0.9, weight_decay=1e-6)
    autocast = torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, args.peer_amp == "bf16")

    def to_device(batch):
        return [view.to(device, non_blocking=True) for view in batch[0]]

    batches = map(to_device, batches)
    if part == "step":
        batches = itertools.repeat(next(batches))
    for views in limit(batches):
        with autocast:
            loss = method.step(model, views, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


LIGHTLY = {
    "simclr": simclr, "barlow_twins": barlow_twins, "moco": moco, "swav": swav, "dino": dino,
    "mae": mae, "simsiam": simsiam, "byol": byol, "moco_v3": moco_v3, "vicreg": vicreg,
    "lejepa": lejepa,
}
