"""lightly's methods in the loop that its documentation shows, for `throughput.py`.

Each function takes the benchmark's settings, the part to measure ("data": the loader alone, "step":
one fixed batch, "both") and `tick`, to be called before every batch. Views, sizes and strengths are
those of our recipe of the same name.
"""

import os

import torch
import torchvision
from lightly.loss import BarlowTwinsLoss, NTXentLoss
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, MoCoV2Transform, SimCLRTransform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from lightly.utils.lars import LARS


def loop(args, part, tick, transform, build, criterion, step=None, sgd=False):
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


LIGHTLY = {"simclr": simclr, "barlow_twins": barlow_twins, "moco": moco}
