"""lightly's methods in the loop that its documentation shows, for `throughput.py`.

Each function takes the benchmark's settings, the part to measure ("data": the loader alone, "step":
one fixed batch, "both") and `tick`, to be called before every batch. Views, sizes and strengths are
those of our recipe of the same name.
"""

import os

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightly.utils.lars import LARS


def loop(args, part, tick, transform, build, criterion):
    """Load, augment and train as lightly's examples do, on one process or several."""
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
    optimizer = LARS(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
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
            embeddings = [model(view.to(device)) for view in views]
            loss = criterion(*embeddings)
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


LIGHTLY = {"simclr": simclr}
