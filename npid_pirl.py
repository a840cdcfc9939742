"""NPID, arXiv 1805.01978, and PIRL, arXiv 1912.01991: instance discrimination with a memory bank.

1. Make one view of every image. PIRL adds a jigsaw: nine patches of another crop, shuffled.
2. Embed it: backbone h, head, unit length. PIRL joins the embeddings of the nine patches.
3. The memory bank keeps one unit row for every image of the data set. The image's own row is the
   positive, the rows of K images drawn at random are the negatives.
4. Identify the image's row: NCE, or the softmax over these 1 + K (`--loss cross_entropy`), or over
   the whole bank (`--num-negatives 0`). PIRL's two embeddings face the same rows, at half weight.
5. Move the image's row towards its embedding.

Letters: N images per process, W processes, V views (NPID 1, PIRL 2), D embedding size, K negatives,
n rows of the bank, T temperature.

Memory: the bank takes 4 n D bytes, a step 4 (1 + K) N D (4.2 GB for batch 256, D 128, K 32,000), or
4 n (D + V N) where n is at most 50,000 and all logits are computed.

Differs from the official codes (zhirongw/lemniscate.pytorch; PIRL and NPID++: VISSL): negatives are
never the image itself, which both may draw, and are drawn for each (seed, step, row of the batch);
the bank starts with unit rows, lemniscate's have unit norm only in expectation; an image that a
batch holds twice moves its row once, from the old value, to its last embedding. PIRL's chain
of posterize, sharpness, solarize and autocontrast on two thirds of its patches and images is left
out; its patches lie anywhere in their cells, there at 21 of the 22 places along each side. NPID++
jitters colours before the crop there, and decays the head's bias. NPID's CIFAR-10 run jitters
before it grays, and the last, short batch of an epoch is kept there. NCE's epsilon is lemniscate's
1e-7, VISSL's is 1.19e-7. The official runs are float32; here CUDA has bf16 unless `--amp none`.

    python npid_pirl.py
    python npid_pirl.py --method pirl --output runs/pirl-digits
    torchrun --nproc_per_node=8 npid_pirl.py --data /path/to/imagenet --output runs/npid
"""

import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # NPID: paper, section 4, and its code
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="npid", crop_scale=[0.2, 1.0], flip=True, blur=False,
    mlp_head=False, embedding_dim=128, loss="nce", num_negatives=4096, temperature=0.07,
    memory_momentum=0.5, schedule="step",
    epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4, decay_norms=True, warmup_epochs=0,
    sync_bn=False,
)
RECIPES = {
    "imagenet": IMAGENET,
    # NPID++, appendix of the PIRL paper.
    "imagenet_plus": IMAGENET | dict(
        views="npid_plus", crop_scale=[0.08, 1.0], num_negatives=32000, schedule="cosine",
        epochs=800, batch_size=1024, decay_norms=False,
    ),
    # NPID's code for CIFAR-10: the full softmax; rate .03 for 128 images.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010], flip=False,
        loss="cross_entropy", num_negatives=0, temperature=0.1,
        batch_size=128, lr=0.06, weight_decay=5e-4,
    ),
    # Ours, chosen on the built-in digits: under a minute on two cores. Not NCE: at this rate it
    # collapsed, with K 16 as with 512. An epoch of 11 steps fills the bank with rows of an
    # untrained network, far more alike than those that Z was estimated on.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], flip=False,
        embedding_dim=64, loss="cross_entropy", num_negatives=512, temperature=0.1,
        schedule="cosine", epochs=60, batch_size=128, lr=0.12, warmup_epochs=5,
    ),
}
JIGSAW = dict(views="pirl", jigsaw_size=255, jigsaw_crop_scale=[0.6, 1.0], jigsaw_patch_size=64)
PIRL = {  # what `--method pirl` changes
    # Paper, section 3, and its code.
    "imagenet": JIGSAW | dict(
        crop_scale=[0.08, 1.0], num_negatives=32000, schedule="cosine",
        epochs=800, batch_size=1024, decay_norms=False,
    ),
    # The code's later setting: MLP heads, strong colours and blur, InfoNCE.
    "imagenet_plus": JIGSAW | dict(blur=True, mlp_head=True, loss="cross_entropy", temperature=0.1),
    # Ours, on NPID's settings.
    "cifar10": JIGSAW | dict(flip=True, jigsaw_size=48, jigsaw_patch_size=12),
    "digits": JIGSAW | dict(views="digits", jigsaw_size=24, jigsaw_patch_size=7, epochs=40),
}


def parse_args(argv=None):
    recipes = RECIPES
    if cli.peek(argv, "--method", str) == "pirl":
        recipes = {name: recipe | PIRL[name] for name, recipe in RECIPES.items()}
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one")
    group.add_argument("--method", choices=("npid", "pirl"), default="npid",
                       help="pirl adds the jigsaw, and sets what its paper sets")
    group.add_argument("--views", choices=("npid", "npid_plus", "pirl", "digits"),
                       help="kind of augmentation")
    group.add_argument("--flip", action=cli.Switch, help="mirror half of the views and patches")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of half of the views; for "
                       "pirl, stronger colours too")
    group.add_argument("--jigsaw-size", type=cli.pos_int, metavar="PX",
                       help="pirl: side of the crop that is cut into 3 x 3 cells")
    group.add_argument("--jigsaw-crop-scale", type=cli.fraction, nargs=2,
                       help="pirl: smallest, largest area fraction of that crop")
    group.add_argument("--jigsaw-patch-size", type=cli.pos_int, metavar="PX",
                       help="pirl: side of a patch, which lies anywhere in its cell")
    group.add_argument("--mlp-head", action=cli.Switch, help="a hidden layer in the heads")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--loss", choices=("nce", "cross_entropy"), help="among 1 + K rows")
    group.add_argument("--num-negatives", type=cli.nonneg_int, metavar="K",
                       help="rows of other images; 0: the softmax over the bank, whatever --loss")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    group.add_argument("--memory-momentum", type=cli.fraction, help="EMA momentum of the bank")
    group.add_argument("--schedule", choices=("cosine", "step"), help="once an epoch: a cosine to "
                       "a thousandth, or divided by 10 at 60 %% and 80 %%")
    group.add_argument("--decay-norms", action=cli.Switch, help="decay biases and norms as well")
    args = cli.parse(parser, recipes, argv)
    if args.method == "pirl" and cli.peek(argv, "--output", str) is None:
        args.output += "-pirl"
    if args.loss == "nce" and args.num_negatives and args.temperature < 0.0125:
        parser.error(f"--temperature {args.temperature} is too low for nce in float32; try 0.07, "
                     "or --loss cross_entropy")
    if args.method == "npid":
        for name, value in vars(args).items():
            if name.startswith("jigsaw") and value is not None:
                parser.error(f"--{name.replace('_', '-')} {value} needs --method pirl")
    elif args.jigsaw_patch_size > args.jigsaw_size // 3:
        parser.error(f"--jigsaw-patch-size {args.jigsaw_patch_size} does not fit into the cells of "
                     f"{args.jigsaw_size // 3} px that --jigsaw-size {args.jigsaw_size} has")
    return args


# -------------------------------------------------------------------------------------------- views


def crop_steps(views, crop_scale, flip):
    """Where a view is taken from: a random crop; digits are moved before."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5 if flip else 0.0),
    ]
    if views == "digits":
        steps.insert(0, augment.RandomAffine(degrees=15, translate=0.1, scale=(0.8, 1.2), shear=10,
                                             fill=0, interpolation="bilinear"))
    return steps


def color_steps(views, blur):
    """What is done to the colours of a view, or of one patch."""
    gray, jitter = augment.Grayscale(p=0.2), augment.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)
    s, p = (0.8, 0.8) if blur else (0.4, 1.0)
    steps = {
        "npid": [gray, jitter],  # gray first, as in lemniscate
        "npid_plus": [jitter],
        "pirl": [augment.ColorJitter(s, s, saturation=s, hue=0.2, p=p), gray],
        "digits": [augment.ColorJitter(0.5, 0.5, saturation=0.0, hue=0.0, p=0.8)],
    }[views]
    sigma = (0.1, 1.0 if views == "digits" else 2.0)
    return [*steps, augment.GaussianBlur(sigma, p=0.5 if blur else 0.0)]


class JigsawView:
    """Nine patches of one crop in random order, each with its own flip and colours (PIRL).

    The crop has 3 x 3 cells; each patch lies anywhere in its cell. To the loader this is a view
    like `augment.View`: until `finish`, the patches stand in one image, below each other.

    Args:
        crop: the view that is cut up; its size gives the cells'.
        patch: size and colour steps of a patch.
        flip: mirror half of the patches.
    """

    def __init__(self, crop: augment.View, patch: augment.View, flip: bool):
        self.whole, self.patch, self.flip_p = crop, patch, 0.5 if flip else 0.0
        self.cell, self.side = crop.size[0] // 3, patch.size[0]
        self.size = (9 * self.side, self.side)
        self.channels, self.left_out = patch.channels, patch.left_out
        self.kind = (self.size, patch.kind)
        self.num_uniforms = crop.num_uniforms + 9 * (4 + patch.num_uniforms)

    def draw(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Turn uniform numbers (n, num_uniforms) into parameters; see `augment.View.draw`.

        Behind the crop's own stand (n, 9, 3) integers: top, left, and whether to mirror.
        """
        n, own = len(uniforms), self.whole.num_uniforms
        crop, _ = self.whole.draw(uniforms[:, :own], sizes)
        u = uniforms[:, own:].reshape(n, 9, -1)
        order = u[:, :, 0].argsort(axis=1)  # all 9! orders are alike
        corners = self.cell * np.stack([order // 3, order % 3], axis=2)
        corners += np.floor(u[:, :, 1:3] * (self.cell - self.side + 1)).astype(int)
        places = np.concatenate([corners, u[:, :, 3:4] < self.flip_p], axis=2)
        _, colour = self.patch.draw(u[:, :, 4:].reshape(9 * n, -1), np.repeat(sizes, 9, axis=0))
        return [*crop, places], colour.reshape(n, -1)

    def crop(self, planes: list, parameters: list[np.ndarray]) -> np.ndarray:
        """Cut the patches out of one image, given as Pillow planes; uint8 (C, 9 * side, side)."""
        *crop, places = parameters
        whole = self.whole.crop(planes, crop)
        patches = [whole[:, top : top + self.side, left : left + self.side][:, :, :: 1 - 2 * flip]
                   for top, left, flip in places.tolist()]
        return np.concatenate(patches, axis=1)

    def finish(self, crops: Tensor, parameters: Tensor, device: torch.device) -> Tensor:
        """Move the patches to the device and apply the colour steps; (9n, C, side, side)."""
        crops = crops.to(device, non_blocking=True)
        patches = crops.unflatten(2, (9, self.side)).transpose(1, 2).flatten(0, 1)
        return self.patch.finish(patches, parameters.view(len(patches), -1), device)


# -------------------------------------------------------------------------------------------- model


class NPID(nn.Module):
    """Backbone and heads without batch norm: H -> D, or H -> H -> D; a jigsaw's 9 D -> D on top."""

    def __init__(self, backbone: nn.Module, jigsaw: bool, mlp_head: bool, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features

        def head(*after):
            hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if mlp_head else []
            return nn.Sequential(*hidden, nn.Linear(width, embedding_dim), *after)

        self.head = head()
        if jigsaw:
            self.patch_head = head(nn.ReLU(inplace=True)) if mlp_head else head()
            self.jigsaw_head = nn.Linear(9 * embedding_dim, embedding_dim)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Embed images (N, C, H, W) and patches (9N, C, h, w), each with its own batch statistics.

        Returns:
            Embeddings (V, N, D): of the images, then of the jigsaws if there are any.
        """
        images, *jigsaw = views
        z = []
        for patches in jigsaw:  # first, so that running statistics end with those of images
            each = self.patch_head(self.backbone(patches))  # (9N, D)
            z.append(self.jigsaw_head(each.view(len(images), -1)))
        return torch.stack([self.head(self.backbone(images)), *z])


# ---------------------------------------------------------------------------------- loss and memory


def unit_rows(x: Tensor) -> Tensor:
    """Give every row unit length, in float32 at least."""
    return F.normalize(comm.upcast(x), dim=-1)


def draw_negatives(index: Tensor, num_images: int, num_negatives: int, seed: int, step: int,
                   rank: int) -> Tensor:
    """Draw the negatives of every image: other images, uniformly and with replacement.

    Args:
        index: (N,) data-set indices of the rows of process `rank`, on the CPU.

    Returns:
        Data-set indices (N, K), on the CPU: a function of seed, step, the image's index and its
        place in the global batch.
    """
    rows = [
        rng.philox(seed, rng.NEGATIVES, step, rank * len(index) + row).integers(
            num_images - 1, size=num_negatives, dtype=np.int32)
        for row in range(len(index))
    ]
    drawn = torch.from_numpy(np.stack(rows))
    return drawn + (drawn >= index[:, None])  # skips the image itself


@comm.outside_autocast
def memory_logits(z: Tensor, memory: Tensor, index: Tensor, negatives: Tensor | None,
                  temperature: float) -> Tensor:
    """Compare embeddings with rows of the bank.

    Args:
        z: unit embeddings (V, N, D).
        memory: unit rows (n, D), detached.
        index: (N,) the positive rows.
        negatives: (N, K) the negative rows, or None for all.
        temperature: divides the cosines.

    Returns:
        Logits (V, N, 1 + K), the positive in column 0; without negatives (V, N, n) in the bank's
        order.
    """
    z = comm.upcast(z)
    memory = memory.detach().to(z.dtype)
    if negatives is None:
        return z @ memory.T / temperature
    columns = torch.cat([index[:, None], negatives], dim=1)  # (N, 1 + K)
    if len(memory) <= 50_000:  # cheaper than to gather rows
        return (z @ memory.T).gather(2, columns.expand(len(z), -1, -1)) / temperature
    rows = memory.index_select(0, columns.flatten()).unflatten(0, columns.shape)  # (N, 1 + K, D)
    return (rows @ z.permute(1, 2, 0)).permute(2, 0, 1) / temperature


@torch.no_grad()
def estimate_z(logits: Tensor, num_images: int) -> Tensor:
    """Estimate the constant Z of P(i | v) = exp(logit) / Z from the logits (N, 1 + K) of a batch.

    That is the mean of exp(logits) over all columns and processes, times the number of images.

    Reference: NPID, section 3.2.
    """
    logits = comm.upcast(logits)
    return comm.mean_over_processes(logits.exp().mean()) * num_images


def nce_loss(logits: Tensor, num_images: int, z: Tensor | float) -> Tensor:
    """Compute the noise-contrastive estimation of the positive row among K drawn ones.

    Args:
        logits: (N, 1 + K), the positive in column 0, divided by the temperature.
        num_images: n; noise draws each image with probability 1 / n.
        z: the constant Z.

    Returns:
        Scalar: with P = exp(logit) / Z and c = K / n, the mean over rows of
        -log(P_0 / (P_0 + c + eps)) - sum over k of log(c / (P_k + c + eps)), eps = 1e-7.

    Reference: NPID, section 3.2.
    """
    logits = comm.upcast(logits)
    probability = logits.exp() / z
    c, eps = (logits.shape[1] - 1) / num_images, 1e-7
    positive = torch.log1p((c + eps) / probability[:, 0])
    negative = torch.log1p((probability[:, 1:] + eps) / c).sum(1)
    return (positive + negative).mean()


@torch.no_grad()
def update_memory(memory: Tensor, index: Tensor, embedding: Tensor, momentum: float) -> None:
    """Move the rows of the images of all processes to their embeddings.

    Args:
        memory: unit rows (n, D), written in place: normalise(momentum old + (1 - momentum) new).
        index: (N,) the images; of one that stands there twice, the last in rank order counts.
        embedding: their unit embeddings (N, D).
        momentum: share that a row keeps of itself.
    """
    index, embedding = comm.all_gather_no_grad(index), comm.all_gather_no_grad(embedding)
    last = {image: row for row, image in enumerate(index.tolist())}
    images, rows = (comm.send(torch.tensor(list(x)), memory.device)
                    for x in (last.keys(), last.values()))
    moved = momentum * memory[images] + (1 - momentum) * embedding[rows].to(memory.dtype)
    memory[images] = F.normalize(moved, dim=1)


def chance_loss(loss: str, num_negatives: int, num_images: int) -> float:
    """Expect this loss where all rows are alike to the model."""
    if num_negatives == 0:
        return math.log(num_images)
    softmax = math.log(1 + num_negatives)
    return softmax + (num_negatives * math.log1p(1 / num_negatives) if loss == "nce" else 0)


@torch.no_grad()
def indicators(z: Tensor, logits: Tensor, column: Tensor, temperature: float) -> dict[str, Tensor]:
    """Collapse indicators, logged; on z (N, D); column (N,) is that of the image's row."""
    return {
        "contrast_accuracy": (logits.argmax(1) == column).float().mean(),
        "positive_similarity": logits.gather(1, column[:, None]).mean() * temperature,
        "z_std": z.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    colors = color_steps(args.views, args.blur)
    specs = [(args.image_size, [*crop_steps(args.views, args.crop_scale, args.flip), *colors])]
    if args.method == "pirl":  # patches are mirrored one by one
        crop = crop_steps(args.views, args.jigsaw_crop_scale, flip=False)
        specs += [(args.jigsaw_size, crop), (args.jigsaw_patch_size, colors)]
    image, *jigsaw = augment.normalized(specs, args.in_chans, args.mean, args.std)
    return [image, JigsawView(*jigsaw, args.flip)] if jigsaw else [image]


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))
    if len(images) < 2:
        raise comm.RunError("--data holds one image: there is nothing to tell it from")

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=False)
    model = NPID(backbone, args.method == "pirl", args.mlp_head, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)
    memory = unit_rows(torch.randn(len(images), args.embedding_dim)).to(world.device)
    nce_z = torch.zeros((), device=world.device)  # estimated in the first step

    # Optimiser
    lr = args.lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)
    decay = args.weight_decay if args.decay_norms else 0.0
    groups = [{"params": weights}, {"params": others, "weight_decay": decay}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    draw = functools.partial(draw_negatives, num_images=len(images), seed=args.seed,
                             num_negatives=args.num_negatives, rank=world.rank)
    with Training(args, world, images, build_views(args), draw=draw if args.num_negatives else None,
                  chance_loss=chance_loss(args.loss, args.num_negatives, len(images)),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, memory=memory, constant_z=nce_z, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        schedule = [0.6 * args.epochs, 0.8 * args.epochs] if args.schedule == "step" else "cosine"
        lr_of_step = optim.lr_by_epoch(lr, schedule, args.epochs, args.warmup_epochs,
                                       run.steps_per_epoch, final=0.001, gamma=0.1)
        for step, batch in run.steps(export=model.backbone):  # 1. an image, a jigsaw
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                z = ddp_model(batch.views)
            z = unit_rows(z)  # 2. embeddings
            index, negatives = batch.index.to(world.device, non_blocking=True), batch.drawn
            column = index if negatives is None else torch.zeros_like(index)  # of the image's row
            logits = memory_logits(z, memory, index, negatives, args.temperature)  # 3. rows
            # 4. identify the image's row
            if args.loss == "nce" and args.num_negatives:
                if step == 0:
                    nce_z.copy_(estimate_z(logits[-1], len(images)))
                losses = [nce_loss(each, len(images), nce_z) for each in logits]
            else:
                losses = [F.cross_entropy(each, column) for each in logits]
            loss = torch.stack(losses).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z[0], logits[0], column, args.temperature)
            update_memory(memory, batch.index, z[0], args.memory_momentum)  # 5. move the row


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
