"""lightly's methods in the loop that its documentation shows, for `throughput.py`.

Each function takes the benchmark's settings, the part to measure ("data": the loader alone, "step":
one fixed batch, "both") and `tick`, to be called before every batch. Views, sizes and strengths are
those of our recipe of the same name.
"""

import os

import torch
import torchvision
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, SwaVLoss
from lightly.models import utils
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    DINOProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    DINOTransform,
    MAETransform,
    MoCoV2Transform,
    SimCLRTransform,
)
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from lightly.transforms.multi_crop_transform import MultiCropTranform
from lightly.transforms.swav_transform import SwaVViewTransform
from lightly.utils.lars import LARS


def loop(args, part, tick, transform, build, criterion, step=None, sgd=False,
         adamw=False):
    """Load, augment and train as lightly's examples do, on one process or several.

    `step(model, views)` gives the loss of a batch; by default the criterion of all embeddings.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if size > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    images = torchvision.datasets.ImageFolder(os.path.join(args.data, "train"), transform=transform)
    sampler = torch.utils.data.distributed.DistributedSampler(images) if size > 1 else None
    loader = torch.utils.data.DataLoader(
        images, batch_size=args.batch_size // size, shuffle=sampler is None, sampler=sampler,
        drop_last=True, num_workers=args.workers, pin_memory=cuda,
    )
    if part == "data":
        while True:
            for _ in loader:
                tick()
    model = build().to(device)
    if size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if adamw:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
    else:
        kind = torch.optim.SGD if sgd else LARS
        optimizer = kind(trained, lr=0.1, momentum=0.9, weight_decay=1e-6)
    autocast = torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, args.peer_amp == "bf16")

    def batches():
        fixed = next(iter(loader))[0] if part == "step" else None
        while fixed is not None:
            tick()
            yield fixed
        while True:
            iterator = iter(loader)
            for _ in range(len(loader)):
                tick()
                yield next(iterator)[0]

    for views in batches():
        with autocast:
            views = [view.to(device) for view in views]
            loss = step(model, views) if step else criterion(*[model(view) for view in views])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class TwoViews(torch.nn.Module):
    """A ResNet with torchvision's stem and a projection head, as in lightly's examples."""

    def __init__(self, arch, head):
        super().__init__()
        backbone = torchvision.models.get_model(arch)
        self.backbone = torch.nn.Sequential(*list(backbone.children())[:-1])
        self.head = head

    def forward(self, images):
        return self.head(self.backbone(images).flatten(start_dim=1))


def simclr(args, part, tick):
    transform = SimCLRTransform(input_size=args.image_size, cj_strength=0.5, gaussian_blur=0.0)
    loop(args, part, tick, transform,
         lambda: TwoViews(args.arch, SimCLRProjectionHead(512, 512, 128)),
         NTXentLoss(temperature=0.5, gather_distributed=int(os.environ.get("WORLD_SIZE", 1)) > 1))


def barlow_twins(args, part, tick):
    transform = BYOLTransform(
        view_1_transform=BYOLView1Transform(input_size=args.image_size, gaussian_blur=0.0),
        view_2_transform=BYOLView2Transform(input_size=args.image_size, gaussian_blur=0.0),
    )
    loop(args, part, tick, transform,
         lambda: TwoViews(args.arch, BarlowTwinsProjectionHead(512, 2048, 2048)),
         BarlowTwinsLoss(gather_distributed=int(os.environ.get("WORLD_SIZE", 1)) > 1))


class MoCo(TwoViews):
    """The same with a key encoder; shuffling and splitting of batch norm are left out, as there."""

    def __init__(self, arch):
        super().__init__(arch, MoCoProjectionHead(512, 512, 128))
        self.keys = TwoViews(arch, MoCoProjectionHead(512, 512, 128))
        deactivate_requires_grad(self.keys)


def moco(args, part, tick):
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def step(model, views):
        update_momentum(model.backbone, model.keys.backbone, 0.99)
        update_momentum(model.head, model.keys.head, 0.99)
        with torch.no_grad():
            keys = model.keys(views[1])
        return criterion(model(views[0]), keys)

    transform = MoCoV2Transform(input_size=args.image_size, gaussian_blur=0.0)
    loop(args, part, tick, transform, lambda: MoCo(args.arch), criterion, step, sgd=True)


class SwAV(TwoViews):
    def __init__(self, arch):
        super().__init__(arch, SwaVProjectionHead(512, 2048, 128))
        self.prototypes = SwaVPrototypes(128, 3000)

    def forward(self, views):
        z = [torch.nn.functional.normalize(super(SwAV, self).forward(v), dim=1) for v in views]
        return [self.prototypes(each) for each in z]


def swav(args, part, tick):
    """Two full crops, and with --small-crops that many of half the size."""
    small = args.small_crops
    transform = MultiCropTranform(
        crop_sizes=(args.image_size, args.image_size // 2), crop_counts=(2, small),
        crop_min_scales=(0.14, 0.05), crop_max_scales=(1.0, 0.14),
        transforms=SwaVViewTransform(gaussian_blur=0.0),
    )
    if not small:
        transform.transforms = transform.transforms[:2]
    criterion = SwaVLoss(
        sinkhorn_gather_distributed=int(os.environ.get("WORLD_SIZE", 1)) > 1
    )

    def step(model, views):
        bare = model.module if hasattr(model, "module") else model
        bare.prototypes.normalize()
        scores = model(views)
        return criterion(scores[:2], scores[2:])

    loop(args, part, tick, transform, lambda: SwAV(args.arch), criterion, step)


def vit(args):
    """The transformer of our `--arch vit_tiny`, from timm, as in lightly's examples."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=args.image_size, patch_size=4, embed_dim=192, depth=12,
                             num_heads=3, num_classes=0, dynamic_img_size=args.small_crops > 0)


class DINO(torch.nn.Module):
    def __init__(self, args, freeze):
        super().__init__()
        is_vit = args.arch.startswith("vit")
        self.backbone = MaskedVisionTransformerTIMM(vit(args)) if is_vit else TwoViews(
            args.arch, torch.nn.Identity())
        self.head = DINOProjectionHead(192 if is_vit else 512, 2048, 256, 4096,
                                       freeze_last_layer=freeze)

    def forward(self, images):
        return self.head(self.backbone(images))


class StudentAndTeacher(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.student, self.teacher = DINO(args, 1), DINO(args, -1)
        deactivate_requires_grad(self.teacher)

    def forward(self, views):
        with torch.no_grad():
            teacher = [self.teacher(view) for view in views[:2]]
        return teacher, [self.student(view) for view in views]


def dino(args, part, tick):
    transform = DINOTransform(
        global_crop_size=args.image_size, local_crop_size=args.image_size // 2,
        n_local_views=args.small_crops, gaussian_blur=(0.0, 0.0, 0.0),
    )
    criterion = DINOLoss(output_dim=4096)

    def step(model, views):
        bare = model.module if hasattr(model, "module") else model
        update_momentum(bare.student, bare.teacher, 0.996)
        teacher, student = model(views)
        return criterion(teacher, student, epoch=0)

    loop(args, part, tick, transform, lambda: StudentAndTeacher(args), criterion, step,
         adamw=True)


class MAE(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(vit(args))
        self.length = self.backbone.sequence_length
        self.decoder = MAEDecoderTIMM(num_patches=self.length - 1, patch_size=4, embed_dim=192,
                                      decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)

    def forward(self, images):
        n = len(images)
        keep, masked = utils.random_token_mask((n, self.length), 0.75, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (n, self.length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        decoded = self.decoder.decode(tokens)
        predicted = self.decoder.predict(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, 4), masked - 1)
        return predicted, utils.normalize_mean_var(target)


def mae(args, part, tick):
    criterion = torch.nn.MSELoss()
    loop(args, part, tick, MAETransform(input_size=args.image_size), lambda: MAE(args), criterion,
         lambda model, views: criterion(*model(views[0])), adamw=True)


LIGHTLY = {
    "simclr": simclr, "barlow_twins": barlow_twins, "moco": moco, "swav": swav, "dino": dino,
    "mae": mae,
}
