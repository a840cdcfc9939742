"""Pretext tasks: rotation (RotNet, arXiv 1803.07728), jigsaw (arXiv 1603.09246) and relative
location (arXiv 1505.05192). An image is made into a puzzle whose answer is known.

1. Make a puzzle of every image.
   rotation: turn it by 0, 90, 180 or 270 degrees; the answer is the angle.
   jigsaw: cut nine patches, one from each of 3 x 3 cells, and put them in one of K orders; the
   answer is the order's number. The K orders are chosen once, far from one another.
   location: pair the middle patch with each of the eight around it; the answer is which one.
2. Backbone: every image or patch by itself, to h.
3. Head: joins the h of a puzzle, and gives a logit for each answer.
4. Cross-entropy of the answer.

Letters: N images per process, K answers, H backbone width, C channels, S, s sides in pixels.

Differs from the official codes (gidariss/FeatureLearningRotNet; VISSL; MMSelfSup): images are
mirrored before they are turned, as RotNet's. VISSL mirrors afterwards, where 90 degrees of an image
are 270 of its mirror image and half of these answers are wrong; and it turns before the crop, which
puts black rims beside images that are not square at 90 and 270 degrees alone. Patches lie anywhere
in their cells, in VISSL at 21 of the 22 places along each side. Whole images are grayed and
normalised, as in VISSL; the jigsaw paper normalises each patch. Batch norm sees the middle patch
once an image, in MMSelfSup eight times, whose cells overlap by a pixel. VISSL decays the biases of
linear layers too, changes the rate of its warm-up once an epoch, and fetches its 2,000 orders.
Dropout depends on the number of processes.

    python pretext.py
    python pretext.py --task jigsaw
    torchrun --nproc_per_node=8 pretext.py --data /path/to/imagenet --output runs/rotation
"""

import functools
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # rotation as in VISSL
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.08, 1.0], flip=True, grayscale=0.0, angles="one",
    epochs=105, batch_size=256, lr=0.1, lr_drops=[0.286, 0.571, 0.857, 0.952], lr_factor=0.1,
    warmup_epochs=0, warmup_start=0.0, nesterov=False,
    weight_decay=1e-4, head_decay=1.0, decay_norms=False, sync_bn=False,
)
RECIPES = {  # of rotation
    "imagenet": IMAGENET,
    "imagenet_all": IMAGENET | dict(  # MMSelfSup
        angles="all", epochs=70, batch_size=128, lr=0.4, lr_drops=[0.429, 0.714],
        warmup_epochs=5, warmup_start=0.1, decay_norms=True, sync_bn=True,
    ),
    # RotNet's code for CIFAR-10, there with a network in network; rate .1 for 128 images.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        crop_scale=None, resize=32, crop_padding=4, angles="all",
        epochs=200, batch_size=128, lr=0.2, lr_drops=[0.3, 0.6, 0.8], lr_factor=0.2, nesterov=True,
        weight_decay=5e-4, decay_norms=True,
    ),
    # Ours, for the built-in digits. Rotation learns from them although some look alike when turned:
    # k-NN with one label a class .59, untrained .49. Jigsaw and location gain nothing there (.48,
    # .46), but with five labels (.65, .67, untrained .58): where a stroke is says little about the
    # digit.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], flip=False, angles="all",
        epochs=40, batch_size=128, lr=0.1, lr_drops=[0.5, 0.75], warmup_epochs=2,
    ),
}
PATCHES = dict(crop_scale=None, angles=None, resize=256, crop_padding=0, grayscale=0.66,
               jigsaw_size=255, jigsaw_patch_size=64)
SMALL = dict(crop_scale=[0.6, 1.0], resize=None, crop_padding=None, grayscale=0.0,
             jigsaw_size=48, jigsaw_patch_size=12)
TINY = dict(angles=None, jigsaw_size=24, jigsaw_patch_size=7)
TASKS = {
    "rotation": RECIPES,
    "jigsaw": {
        "imagenet": IMAGENET | PATCHES | dict(  # VISSL
            num_permutations=2000, head_dim=1000,
            warmup_epochs=5, warmup_start=0.25,
        ),
        "cifar10": RECIPES["cifar10"] | PATCHES | SMALL | dict(  # ours
            num_permutations=100, head_dim=256,
        ),
        "digits": RECIPES["digits"] | TINY | dict(  # ours
            num_permutations=20, head_dim=64,
        ),
    },
    "location": {
        "imagenet": IMAGENET | PATCHES | dict(  # MMSelfSup
            mean=[124 / 255, 117 / 255, 104 / 255], std=[59 / 255, 58 / 255, 58 / 255],
            resize=292, flip=False, head_dim=4096, dropout=0.5,
            epochs=70, batch_size=512, lr_drops=[0.429, 0.714], warmup_epochs=5, warmup_start=0.1,
            head_decay=5.0, decay_norms=True,
        ),
        "cifar10": RECIPES["cifar10"] | PATCHES | SMALL | dict(  # ours
            flip=False, head_dim=256, dropout=0.0,
        ),
        "digits": RECIPES["digits"] | TINY | dict(head_dim=64, dropout=0.0),  # ours
    },
}
OWN = {  # flags that a task has and another has not
    "rotation": {"angles"},
    "jigsaw": {"jigsaw_size", "jigsaw_patch_size", "head_dim", "num_permutations"},
    "location": {"jigsaw_size", "jigsaw_patch_size", "head_dim", "dropout"},
}


def parse_args(argv=None):
    recipes = TASKS.get(cli.peek(argv, "--task", str), RECIPES)
    parser, group = cli.method_parser(__file__, __doc__, backbones.RESNETS, crops="one")
    group.add_argument("--task", choices=tuple(TASKS), default="rotation", help="the puzzle")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--resize", type=cli.pos_int, metavar="PX", help="shorter side before a "
                       "crop of the view's size, in the place of --crop-scale")
    group.add_argument("--crop-padding", type=cli.nonneg_int, metavar="PX",
                       help="with --resize: black pixels on each side")
    group.add_argument("--flip", action=cli.Switch, help="mirror half of the images")
    group.add_argument("--grayscale", type=cli.fraction, metavar="P",
                       help="chance of a gray image: hides the shifts between a lens's colours")
    group.add_argument("--angles", choices=("one", "all"), help="rotation: angles of an image")
    group.add_argument("--jigsaw-size", type=cli.pos_int, metavar="PX", help="jigsaw, location: "
                       "side of the crop that is cut into 3 x 3 cells; --image-size is then that "
                       "of the evaluations")
    group.add_argument("--jigsaw-patch-size", type=cli.pos_int, metavar="PX",
                       help="jigsaw, location: side of a patch, which lies anywhere in its cell")
    group.add_argument("--num-permutations", type=cli.two_or_more, metavar="K",
                       help="jigsaw: how many of the 362,880 orders")
    group.add_argument("--head-dim", type=cli.pos_int,
                       help="jigsaw: numbers that the head has of a patch; location: hidden width")
    group.add_argument("--dropout", type=cli.fraction, help="location: of the hidden layer")
    group.add_argument("--lr-drops", type=cli.fraction, nargs="+",
                       help="when the rate falls: shares of the run, rounded to whole epochs")
    group.add_argument("--lr-factor", type=cli.fraction, help="what it is multiplied by then")
    group.add_argument("--warmup-start", type=cli.fraction, help="share of --lr at the very start")
    group.add_argument("--nesterov", action=cli.Switch, help="Nesterov's momentum")
    group.add_argument("--head-decay", type=cli.not_negative,
                       help="weight decay of the head, as a multiple of --weight-decay")
    group.add_argument("--decay-norms", action=cli.Switch, help="decay biases and norms as well")
    args = cli.parse(parser, recipes, argv)
    if args.task != "rotation" and cli.peek(argv, "--output", str) is None:
        args.output += f"-{args.task}"
    for name in sorted(set().union(*OWN.values()) - OWN[args.task]):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not a flag of "
                         f"--task {args.task}")
    if args.resize and args.crop_scale:
        parser.error(f"--resize {args.resize} and --crop-scale take crops in two ways, and the "
                     f"recipe {args.recipe} has one of them; choose another --recipe")
    if args.crop_padding and not args.resize:
        parser.error(f"--crop-padding {args.crop_padding} needs --resize")
    if args.views == "digits" and (args.flip or args.grayscale or args.resize):
        parser.error("--flip, --grayscale and --resize are not for --views digits")
    side = args.image_size if args.task == "rotation" else args.jigsaw_size
    if args.resize and args.resize + 2 * args.crop_padding < side:
        parser.error(f"--resize {args.resize} is too small for crops of {side} px")
    if args.task != "rotation" and args.jigsaw_patch_size > side // 3:
        parser.error(f"--jigsaw-patch-size {args.jigsaw_patch_size} does not fit into the cells of "
                     f"{side // 3} px that --jigsaw-size {side} has")
    if args.dropout == 1:
        parser.error("--dropout 1 leaves nothing; pass less")
    if args.num_permutations and args.num_permutations > math.factorial(9):
        parser.error(f"--num-permutations {args.num_permutations}: nine patches have "
                     f"{math.factorial(9)} orders")
    return args


# -------------------------------------------------------------------------------- views and puzzles


def photo_view(size, crop_scale, resize, padding, flip, grayscale):
    """One view of a photograph, to be made a puzzle of: no jitter of colours."""
    crop = augment.RandomCrop(resize, padding, interpolation="bilinear") if resize else (
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"))
    flip = augment.HorizontalFlip(p=0.5 if flip else 0.0)
    return size, [crop, flip, augment.Grayscale(p=grayscale)]


def draw_puzzles(index: Tensor, step: int, steps_per_epoch: int, seed: int, answers: int,
                 places: int) -> Tensor:
    """Draw an answer and the places of nine patches for each image: functions of seed and epoch.

    Args:
        index: (N,) data-set indices.
        answers, places: how many there are, along each side for the places.

    Returns:
        Integers (N, 19): the answer; then row and column of each patch within its cell.
    """
    bounds, epoch = [answers] + [places] * 18, step // steps_per_epoch
    return torch.from_numpy(np.stack([
        rng.philox(seed, rng.PUZZLES, epoch, image).integers(bounds) for image in index.tolist()]))


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Turn images (N, C, S, S) by 0 to 3 quarters, counter-clockwise.

    Returns:
        Images (4N, C, S, S), the four of an image together, and their quarter turns (4N,).
    """
    turned = torch.stack([torch.rot90(images, turns, dims=(2, 3)) for turns in range(4)], dim=1)
    return turned.flatten(0, 1), torch.arange(4, device=images.device).repeat(len(images))


def cut_patches(images: Tensor, places: Tensor, side: int) -> Tensor:
    """Cut a patch (C, side, side) out of each of 3 x 3 cells.

    Args:
        images: (N, C, S, S).
        places: (N, 9, 2) row and column of the patch within its cell, cells row by row.

    Returns:
        Patches (N, 9, C, side, side).
    """
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    cell, pixel = torch.arange(9, device=images.device), torch.arange(side, device=images.device)
    corners = torch.stack([cell // 3, cell % 3], dim=1) * (images.shape[2] // 3) + places
    rows, columns = (corners[..., None] + pixel).unbind(2)  # (N, 9, side)
    patches = images.movedim(1, 3)[image, rows[..., None], columns[:, :, None]]
    return patches.movedim(4, 2)


def rotation_puzzles(images: Tensor, drawn: Tensor, angles: str) -> tuple[Tensor, Tensor]:
    """Images (N, C, S, S) turned by drawn[:, 0] quarters, or (4N, ...) by "all" four; answers."""
    turned, answers = rotations(images)
    if angles == "one":
        answers = drawn[:, 0]
        turned = turned[4 * torch.arange(len(images), device=images.device) + answers]
    return turned.contiguous(memory_format=torch.channels_last), answers


def jigsaw_puzzles(images: Tensor, drawn: Tensor, side: int, permutations: Tensor
                   ) -> tuple[Tensor, Tensor]:
    """Shuffle nine patches of each image (N, C, S, S): drawn (N, 19) are answer and corners.

    Args:
        permutations: (K, 9), one per answer.

    Returns:
        Patches (9N, C, s, s), the j-th of an image from cell permutations[answer, j]; answers (N,).
    """
    patches, answers = cut_patches(images, drawn[:, 1:].view(-1, 9, 2), side), drawn[:, 0]
    image = torch.arange(len(images), device=images.device)[:, None]
    return patches[image, permutations[answers]].flatten(0, 1), answers


def location_puzzles(images: Tensor, drawn: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cut nine patches from each image (N, C, S, S), at the corners drawn[:, 1:] (N, 18).

    Returns:
        Patches (9N, C, s, s), cells row by row; answers (8N,), those cells but the middle.
    """
    patches = cut_patches(images, drawn[:, 1:].view(-1, 9, 2), side)
    return patches.flatten(0, 1), torch.arange(8, device=images.device).repeat(len(images))


def hamming_permutations(count: int, pieces: int, criterion: str, rng: np.random.Generator
                         ) -> np.ndarray:
    """Choose permutations that are far from one another, greedily.

    The first is any; then always the one with the largest "mean" or smallest ("min") Hamming
    distance to those chosen, the lexicographically first of several.

    Returns:
        (count, pieces) int64.

    Raises:
        ValueError: there are fewer, or another criterion.

    Reference: Noroozi and Favaro, arXiv 1603.09246, algorithm 1.
    """
    total = math.factorial(pieces)
    if not 1 <= count <= total or criterion not in ("mean", "min"):
        raise ValueError(f"{count} of {total} permutations by the {criterion}")
    every = itertools.chain.from_iterable(itertools.permutations(range(pieces)))
    pool = np.fromiter(every, np.int8, total * pieces).reshape(total, pieces)
    columns = np.ascontiguousarray(pool.T)
    # Of each to all that are chosen: the running sum or minimum of distances.
    closeness = np.full(total, 0 if criterion == "mean" else pieces, np.int32)
    chosen = [int(rng.integers(total))]
    while len(chosen) < count:
        distance = np.zeros(total, np.int8)
        for column in columns:
            distance += (column != column[chosen[-1]]).view(np.int8)
        update = np.add if criterion == "mean" else np.minimum
        update(closeness, distance, out=closeness)
        closeness[chosen[-1]] = -(2**30)  # each at most once
        chosen.append(int(closeness.argmax()))
    return pool[chosen].astype(np.int64)


# -------------------------------------------------------------------------------------------- model


class Pairs(nn.Module):
    """Join the middle one of nine h (9N, H) with each of the others: (8N, 2H), the middle first."""

    def forward(self, h: Tensor) -> Tensor:
        h = h.unflatten(0, (-1, 9))
        others = torch.cat([h[:, :4], h[:, 5:]], dim=1)
        return torch.cat([h[:, 4:5].expand_as(others), others], dim=2).flatten(0, 1)


def build_head(task: str, width: int, hidden: int | None, answers: int, dropout: float | None
               ) -> nn.Module:
    """From the h (rows, H) of N images to logits, a row a puzzle: (N or 4N, 4), (N, K), (8N, 8)."""
    if task == "rotation":
        return nn.Linear(width, answers)
    if task == "jigsaw":
        return nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Unflatten(0, (-1, 9)), nn.Flatten(), nn.Linear(9 * hidden, answers),
        )
    head = nn.Sequential(
        Pairs(),
        nn.Linear(2 * width, hidden, bias=False), nn.BatchNorm1d(hidden, momentum=0.003),
        nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(hidden, answers),
    )
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.normal_(head[5].weight, std=0.005)
    nn.init.zeros_(head[5].bias)
    return head


class Pretext(nn.Module):
    """Backbone and head."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The h (rows, H) of images or patches (rows, C, s, s), and logits (puzzles, K)."""
        h = self.backbone(images)
        return h, self.head(h)


# --------------------------------------------------------------------------------------------- loss


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the answers, in float32 at least."""
    return F.cross_entropy(comm.upcast(logits), answers)


@torch.no_grad()
def indicators(h: Tensor, logits: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Logged: how often the answer is right, and would be by chance; beside it the rank of h."""
    right = (logits.argmax(1) == answers).float().mean()
    return {
        "pretext_accuracy": right,
        "chance_accuracy": torch.full_like(right, 1 / logits.shape[1]),
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    size = args.image_size if args.task == "rotation" else args.jigsaw_size
    if args.views == "digits":
        views = augment.digit_views([(1, size, args.crop_scale)], jitter=0.5, blur=False)
    else:
        views = [photo_view(size, args.crop_scale, args.resize, args.crop_padding, args.flip,
                            args.grayscale)]
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=False)
    answers = args.num_permutations or {"rotation": 4, "location": 8}[args.task]
    head = build_head(args.task, backbone.num_features, args.head_dim, answers, args.dropout)
    model = comm.prepare(Pretext(backbone, head), world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    groups = []
    for part, decay in ((model.backbone, 1.0), (model.head, args.head_decay)):
        weights, others = optim.split_by_dimension(part)
        decay *= args.weight_decay
        groups += [{"params": weights, "weight_decay": decay},
                   {"params": others, "weight_decay": decay if args.decay_norms else 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=args.nesterov, fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    side = args.jigsaw_patch_size
    draw = functools.partial(
        draw_puzzles, steps_per_epoch=len(images) // args.batch_size, seed=args.seed,
        answers=answers, places=args.jigsaw_size // 3 - side + 1 if side else 1)
    with Training(args, world, images, build_views(args), draw=draw,
                  chance_loss=math.log(answers)) as run:
        if args.task == "rotation":
            puzzles = functools.partial(rotation_puzzles, angles=args.angles)
        elif args.task == "jigsaw":
            orders = hamming_permutations(answers, 9, "mean",
                                          rng.philox(args.seed, rng.PERMUTATIONS))
            puzzles = functools.partial(jigsaw_puzzles, side=side,
                                        permutations=torch.from_numpy(orders).to(world.device))
        else:
            puzzles = functools.partial(location_puzzles, side=side)
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        drops = [max(1, round(share * args.epochs)) for share in args.lr_drops]
        lr_of_step = optim.lr_by_epoch(lr, drops, args.epochs, args.warmup_epochs,
                                       run.steps_per_epoch, start=lr * args.warmup_start,
                                       gamma=args.lr_factor)
        for step, batch in run.steps(export=model.backbone):
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            parts, answer = puzzles(batch.views[0], batch.drawn)  # 1. puzzles
            with autocast():
                h, logits = ddp_model(parts)  # 2. backbone, 3. head
            loss = answer_loss(logits, answer)  # 4. which answer is right
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            first = h[:: len(h) // len(batch.index)]  # of each image
            run.log(loss, lr_of_step[step], indicators, first, logits, answer)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
