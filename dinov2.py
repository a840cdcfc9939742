"""DINOv2, arXiv 2304.07193, and iBOT, arXiv 2111.07832: DINO on whole images and on patches.

1. Make two global crops and some local ones of every image; mask blocks of patches in about half
   of the global crops.
2. The teacher embeds the global crops alone, unmasked. Targets are made of its logits of the class
   tokens, and of the masked patches: less a centre and divided by a low temperature, or balanced
   over the outputs by Sinkhorn's iteration. No gradient reaches the teacher.
3. The student embeds all crops, a mask token in the place of the masked patches. From each class
   token it predicts the class targets of the other global crops, and at the masked patches the
   patch targets of the same crop. KoLeo spreads the class tokens' features over the sphere.
4. Step; the gradient is clipped in parts, the last layers are frozen at first.
5. Move the teacher a little towards the student (EMA), less and less over the run.
6. Move the centres, if there are any, towards the mean of the teacher's logits.

Letters: N images per process, V crops of an image, G of them global, L patches of a global crop, M
masked patches on this process, D bottleneck of a head, K outputs of a head, H backbone width.

iBOT is `--recipe ibot_imagenet`, without KoLeo. Whose other rules hold, `--method` says:

                          dinov2                                  ibot
    masked crops          exactly half of a batch's               each crop draws whether it is
    masked shares         evenly spread over a range              each crop draws its own
    stochastic depth      alike in all blocks                     rises from block to block
    temperatures rise     every step                              once an epoch
    patches' centre       follows the masked patches              follows all patches
    gradients clipped     backbone and heads, each as a whole     each parameter by itself
    frozen last layers    have rate 0, Adam's moments go on       have no gradient

Differs from the official code (facebookresearch/dinov2, bytedance/ibot): half of the crops is half
of the batch over all processes, there of each process's; likewise the patches' centre follows the
mean over all processes, there a mean of their means; KoLeo's neighbours are of one process in both.
Rates grow with the batch, in DINOv2 with its square root: for 64 images its rule is `--lr 0.004`.
DINOv2's depth is dropped by sample, there for a random part of the batch; its tokens start as in
timm; MLPs have GELU, there in large models SwiGLU. As in dino.py: positions are resized to the
exact grid, last layers are in float32, blur is a true Gaussian.

    python dinov2.py
    torchrun --nproc_per_node=8 dinov2.py --data /path/to/imagenet --grad-checkpoint
"""

import copy
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

# DINOv2's short recipe, for ImageNet-1k. Its 100 "epochs" of 1250 steps are 200 of 625 steps here.
IMAGENET = dict(
    method="dinov2", arch="vit_large", patch_size=16, drop_path=0.3, layer_scale=1e-5, registers=0,
    in_chans=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", num_crops=[2, 8], crop_sizes=[224, 96], crop_scales=[0.32, 1.0, 0.05, 0.32],
    jitter_strength=0.5, blur=True, mask_probability=0.5, mask_ratio=[0.1, 0.5],
    hidden_dim=2048, bottleneck_dim=256, num_outputs=65536, head_std=0.02, patch_head=[],
    norm_last_layer=False, freeze_last_layer_epochs=2, student_temperature=0.1,
    teacher_temperature=0.07, warmup_teacher_temperature=0.04, patch_temperature=0.07,
    warmup_patch_temperature=0.04, warmup_teacher_temperature_epochs=60, targets="centering",
    center_momentum=0.9, patch_weight=1.0, koleo_weight=0.1, momentum=0.992,
    epochs=200, batch_size=2048, lr=0.004 * 2**0.5 / 8, final_lr=1e-6 / 8, layer_decay=0.9,
    patch_embed_lr=0.2, weight_decay=0.04, final_weight_decay=0.4, clip_norm=3.0, warmup_epochs=20,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Its long recipe, for the 14 million images of ImageNet-22k: 625,000 steps are 135 epochs. Last
    # layers are frozen for an epoch, 4,621 steps, there for 1,250 steps.
    "dinov2_large": IMAGENET | dict(
        patch_size=14, drop_path=0.4, crop_sizes=[224, 98], bottleneck_dim=384, num_outputs=131072,
        patch_head=[2048, 256, 131072], freeze_last_layer_epochs=1,
        warmup_teacher_temperature_epochs=8, targets="sinkhorn", momentum=0.994,
        epochs=135, batch_size=3072, lr=2e-4 * 3**0.5 / 12, final_lr=1e-6 / 12, layer_decay=1.0,
        final_weight_decay=0.2, warmup_epochs=22,
    ),
    # iBOT's README.
    "ibot_imagenet": IMAGENET | dict(
        method="ibot", arch="vit_small", drop_path=0.1, layer_scale=0.0,
        num_crops=[2, 10], crop_scales=[0.25, 1.0, 0.05, 0.25], num_outputs=8192,
        freeze_last_layer_epochs=1, warmup_teacher_temperature_epochs=30, koleo_weight=0.0,
        momentum=0.996, epochs=800, batch_size=1024, lr=5e-4, final_lr=1e-6 / 4, layer_decay=1.0,
        patch_embed_lr=1.0, warmup_epochs=10,
    ),
    # Ours, not trained to its end; Sinkhorn, for small batches.
    "cifar10": IMAGENET | dict(
        arch="vit_tiny", patch_size=4, drop_path=0.1, layer_scale=0.0,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        num_crops=[2, 4], crop_sizes=[32, 16], crop_scales=[0.3, 1.0, 0.1, 0.3], blur=False,
        hidden_dim=1024, bottleneck_dim=128, num_outputs=4096, head_std=0.03,
        freeze_last_layer_epochs=1, warmup_teacher_temperature_epochs=0, teacher_temperature=0.04,
        patch_temperature=0.04, targets="sinkhorn", momentum=0.996,
        epochs=400, batch_size=256, lr=1e-3, final_lr=1e-6, layer_decay=1.0, patch_embed_lr=1.0,
        final_weight_decay=0.2, warmup_epochs=20,
    ),
    # Ours, chosen on the built-in digits. Targets sharp enough that they do not fade before the
    # class tokens differ, which KoLeo sees to.
    "digits": IMAGENET | dict(
        arch="vit_micro", patch_size=4, drop_path=0.0, layer_scale=0.0, mean=[0.5], std=[0.5],
        views="digits", num_crops=[2], crop_sizes=[16], crop_scales=[0.6, 1.0], blur=False,
        hidden_dim=256, bottleneck_dim=64, num_outputs=128, head_std=0.08, norm_last_layer=True,
        freeze_last_layer_epochs=0, teacher_temperature=0.02, warmup_teacher_temperature=0.02,
        patch_temperature=0.03, warmup_patch_temperature=0.03,
        warmup_teacher_temperature_epochs=0, targets="sinkhorn", momentum=0.98,
        epochs=50, batch_size=64, lr=4e-3, final_lr=1e-5, layer_decay=1.0, patch_embed_lr=1.0,
        final_weight_decay=0.1, warmup_epochs=3,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.VITS, crops="multi",
                                      batch_norm=False)
    group.add_argument("--method", choices=("dinov2", "ibot"), help="whose rules hold, see above")
    group.add_argument("--patch-size", type=cli.pos_int, help="side of a patch in pixels")
    group.add_argument("--drop-path", type=cli.fraction, help="stochastic depth of the student")
    group.add_argument("--layer-scale", type=cli.not_negative, help="start of the scales; 0: none")
    group.add_argument("--registers", type=cli.nonneg_int, help="tokens beside the class token")
    group.add_argument("--grad-checkpoint", action=cli.Switch, default=False,
                       help="recompute the blocks in the backward; less memory, the same gradient")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--jitter-strength", type=cli.not_negative, help="strength of colour jitter")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur, of each crop its own rate")
    group.add_argument("--mask-probability", type=cli.fraction, help="share of masked global crops")
    group.add_argument("--mask-ratio", type=cli.fraction, nargs=2,
                       help="smallest, largest share of a masked crop's patches")
    group.add_argument("--hidden-dim", type=cli.pos_int, help="width of the head's hidden layers")
    group.add_argument("--bottleneck-dim", type=cli.pos_int, help="D, before the last layer")
    group.add_argument("--num-outputs", type=cli.pos_int,
                       help="K; more is better on large data, a few hundred do for small")
    group.add_argument("--head-std", type=cli.positive, help="deviation of a projector's weights "
                       "at the start; larger for narrow ones, whose biases outgrow them")
    group.add_argument("--patch-head", type=cli.pos_int, nargs="*", metavar="SIZE",
                       help="what patches have of their own: nothing; K outputs: a last layer; "
                       "hidden width, D and K: a head")
    group.add_argument("--norm-last-layer", action=cli.Switch,
                       help="keep the last layers' rows at norm 1: steadier")
    group.add_argument("--freeze-last-layer-epochs", type=cli.nonneg_int,
                       help="last layers frozen so long (0 with --init); more, if the loss does "
                       "not fall")
    group.add_argument("--student-temperature", type=cli.positive,
                       help="temperature of the predictions")
    for name, what in (("teacher", "class tokens'"), ("patch", "patches'")):
        group.add_argument(f"--{name}-temperature", type=cli.positive, help=f"temperature of the "
                           f"{what} targets, after its warm-up; lower is sharper")
        group.add_argument(f"--warmup-{name}-temperature", type=cli.positive,
                           help="the same at first; lower it if the loss does not fall")
    group.add_argument("--warmup-teacher-temperature-epochs", type=cli.nonneg_int,
                       help="epochs from the first to the last temperatures")
    group.add_argument("--targets", choices=("centering", "sinkhorn"),
                       help="what keeps one output from winning all")
    group.add_argument("--center-momentum", type=cli.fraction,
                       help="EMA momentum of the centres; lower it if one output wins all")
    group.add_argument("--patch-weight", type=cli.not_negative, help="weight of the patches' loss")
    group.add_argument("--koleo-weight", type=cli.not_negative, help="KoLeo's, for a global crop")
    group.add_argument("--momentum", type=cli.fraction,
                       help="EMA momentum of the teacher in the first step, a cosine takes it to "
                       "1; higher for small batches")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256, where the cosine ends")
    group.add_argument("--layer-decay", type=cli.positive,
                       help="a block's rate as a share of the next one's")
    group.add_argument("--patch-embed-lr", type=cli.positive,
                       help="further factor of the patch projection's rate")
    group.add_argument("--final-weight-decay", type=cli.not_negative,
                       help="where a cosine takes it; a low start lets the loss fall early")
    group.add_argument("--clip-norm", type=cli.not_negative,
                       help="largest gradient norm; 0: none; lower it if the loss jumps")
    args = cli.parse(parser, RECIPES, argv)
    given = cli.peek(argv, "--freeze-last-layer-epochs") is not None
    if args.init and args.freeze_backbone_epochs and not given:
        args.freeze_last_layer_epochs = 0  # new heads are to fit while the backbone is frozen
    cli.check_patches(parser, args)
    if args.mask_ratio[0] > args.mask_ratio[1]:
        parser.error("--mask-ratio {:g} {:g} is not a range".format(*args.mask_ratio))
    side = args.crop_sizes[0] // args.patch_size
    if args.patch_weight and (side == 1 or int(side**2 * args.mask_ratio[1]) == 0):
        parser.error(f"--mask-ratio {args.mask_ratio[1]:g} masks none of {side} x {side} patches; "
                     "use more or smaller ones, or pass --patch-weight 0")
    if len(args.patch_head) not in (0, 1, 3):
        parser.error(f"--patch-head has {len(args.patch_head)} values; give none, one or three")
    if args.targets == "sinkhorn" and cli.peek(argv, "--center-momentum", float) is not None:
        parser.error(f"--center-momentum {args.center_momentum} is of --targets centering")
    if args.koleo_weight and args.batch_size < 2 * cli.processes():
        parser.error(f"--batch-size {args.batch_size} gives one image to each of "
                     f"{cli.processes()} processes, and KoLeo needs two; pass --koleo-weight 0")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(crops, jitter, blur):
    """Crops that differ in size, in how often they are blurred, and in solarisation.

    As in BYOL: the first global crop is always blurred, the others seldom, and sometimes
    solarised; local crops are blurred half of the time.
    """
    views = []
    for group, (count, size, scale) in enumerate(crops):
        for number in range(count):
            blur_p, solarize_p = (0.5, 0.0) if group else (0.1, 0.2) if number else (1.0, 0.0)
            views.append((size, [
                augment.RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
                augment.HorizontalFlip(p=0.5),
                augment.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.4 * jitter, 0.2 * jitter, p=0.8),
                augment.Grayscale(p=0.2),
                augment.GaussianBlur(sigma=(0.1, 2.0), p=blur_p if blur else 0.0),
                augment.Solarize(threshold=128 / 255, p=solarize_p),
            ]))
    return views


def block_mask(rng: np.random.Generator, rows: int, columns: int, count: int,
               smallest: int = 4) -> np.ndarray:
    """Mask blocks of patches until `count` are masked, or no further block fits.

    A block has an area, uniform from `smallest` to what is left of `count` (half of the grid at
    most), a logarithmic aspect, uniform between those of 0.3 and 1 / 0.3, and any place. It fits if
    it adds at least one patch and not more than are left; ten are tried for each.

    Returns:
        bool (rows, columns), True for a masked patch: at most `count`.

    Reference: BEiT, arXiv 2106.08254, algorithm 1, with DINOv2's sizes.
    """
    mask, done = np.zeros((rows, columns), bool), 0
    while done < count:
        for _ in range(10):
            largest = min(count - done, rows * columns / 2)
            area = smallest + (largest - smallest) * rng.random()
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - block.sum() <= count - done:
                block[:] = True
                break
        else:
            break
        done = mask.sum()
    return mask


def batch_ratios(rng: np.random.Generator, num_crops: int, probability: float, low: float,
                 high: float) -> np.ndarray:
    """Masked shares (num_crops,) of a batch's crops in random order.

    A share `probability` of them, rounded down, has ratios, one from each of as many equal parts of
    the range from low to high; the others have 0.
    """
    masked = int(num_crops * probability)
    ratios = np.zeros(num_crops)
    ratios[:masked] = low + (high - low) * (np.arange(masked) + rng.random(masked)) / max(1, masked)
    return rng.permutation(ratios)


def draw_masks(index: Tensor, step: int, *, steps_per_epoch: int, seed: int, rank: int, size: int,
               method: str, num_global: int, grid: tuple[int, int], probability: float,
               ratio: list[float]) -> Tensor:
    """Draw which patches of a batch's global crops are masked.

    How much of a crop is a function of seed, step and place in the batch over all processes with
    DINOv2's rules; all else of seed, epoch, image and crop.

    Args:
        index: (N,) data-set indices of the rows of process `rank` of `size`, on the CPU.

    Returns:
        int64 (M,), on the CPU: places of the masked patches among G N L, counted by crop, image,
        row, column. M is another in each step.
    """
    shape = num_global, size, len(index)
    shares = batch_ratios(rng.philox(seed, rng.SHUFFLE, step), math.prod(shape), probability,
                          *ratio).reshape(shape)[:, rank]
    smallest = 4 if method == "dinov2" else (min(grid) // 3) ** 2  # patches of a block
    masks = np.zeros((num_global, len(index), *grid), bool)
    for crop, row in np.ndindex(*masks.shape[:2]):
        generator = rng.philox(seed, rng.MASK, step // steps_per_epoch, int(index[row]), crop)
        share = shares[crop, row]
        if method == "ibot":
            share = generator.uniform(*ratio) if generator.random() < probability else 0.0
        masks[crop, row] = block_mask(generator, *grid, int(share * grid[0] * grid[1]), smallest)
    return torch.from_numpy(masks.ravel().nonzero()[0])


# -------------------------------------------------------------------------------------------- model


class Head(nn.Module):
    """Projector H -> hidden -> hidden -> D, and a weight-normalised last layer D -> K.

    The last layer's weight is `scales` times the unit rows of `directions`, which alone are trained
    where `norm_last_layer`. Without `projects` there is the last layer alone.
    """

    def __init__(self, width: int, hidden_dim: int, bottleneck_dim: int, num_outputs: int,
                 std: float, norm_last_layer: bool, projects: bool = True):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        ) if projects else None
        backbones.init_linears(self, lambda weight: nn.init.trunc_normal_(weight, std=std))
        self.last_layer = nn.ParameterDict({  # starts as torch's Linear does
            "directions": nn.Parameter(torch.empty(num_outputs, bottleneck_dim)),
            "scales": nn.Parameter(torch.ones(num_outputs, 1), requires_grad=not norm_last_layer),
        })
        nn.init.uniform_(self.last_layer.directions, -bottleneck_dim**-0.5, bottleneck_dim**-0.5)

    def embed(self, h: Tensor) -> Tensor:
        """Unit embeddings (..., D) of features (..., H), in float32 at least."""
        return F.normalize(comm.upcast(self.projector(h)), dim=-1)

    def forward(self, z: Tensor) -> Tensor:
        """Logits (..., K) of unit embeddings (..., D)."""
        with torch.autocast(z.device.type, enabled=False):  # a low temperature needs full precision
            rows = F.normalize(self.last_layer.directions, dim=1)
            return z @ (rows * self.last_layer.scales).T


class DINOv2(nn.Module):
    """Backbone, mask token, a head of class tokens, and what patches have of their own.

    `sizes` are hidden, D and K of the head. `patch_sizes` are () where patches have the same head,
    (K,) where they have a last layer of their own, (hidden, D, K) of a head of their own.
    """

    def __init__(self, backbone: nn.Module, sizes, patch_sizes, std: float, norm_last_layer: bool):
        super().__init__()
        self.backbone, width = backbone, backbone.num_features
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head, self.patch_head = Head(width, *sizes, std, norm_last_layer), None
        if patch_sizes:
            whole = [*sizes[: 3 - len(patch_sizes)], *patch_sizes]
            self.patch_head = Head(width, *whole, std, norm_last_layer, len(patch_sizes) == 3)

    def forward(self, global_views: list[Tensor], local_views: list[Tensor], masked: Tensor,
                mask: Tensor | None = None, mean_of_all: bool = False) -> tuple[Tensor, ...]:
        """Embed views (N, C, H, W), the local ones sorted by size, in one backbone pass per size.

        Args:
            masked: places (M,) of masked patches, see `draw_masks`; the head sees these alone.
            mask: bool (G N, L): where it is True, the mask token is in the patch's place.
            mean_of_all: return the mean of all patches too, masked or not.

        Returns:
            Of class tokens: features (V, N, H), unit embeddings (V, N, D), logits (V, N, K). Of
            patches: logits (M, K), and logits (M, K) or (1, K) whose mean moves their centre.
        """
        x = self.backbone.embed(torch.cat(global_views), mask, self.mask_token)
        tokens = self.backbone.encode(x)[0]
        sizes = itertools.groupby(local_views, key=lambda view: view.shape[-2:])
        h = torch.cat([tokens[:, 0], *(self.backbone(torch.cat(list(same))) for _, same in sizes)])
        h = h.unflatten(0, (-1, len(global_views[0])))
        z, patch_head = self.head.embed(h), self.patch_head or self.head
        embed = (patch_head if patch_head.projector else self.head).embed
        patches = tokens[:, 1:].flatten(0, 1)
        logits = patch_head(embed(patches.index_select(0, masked)))
        # The last layer is linear: the mean of logits is that of the mean embedding.
        rows = patch_head(embed(patches).mean(0, keepdim=True)) if mean_of_all else logits
        return h, z, self.head(z), logits, rows


def spread_masks(masked: Tensor, num_crops: int, num_patches: int) -> tuple[Tensor, Tensor]:
    """Turn places (M,) of masked patches into a mask, and weights of the patches.

    Returns:
        bool (num_crops, L), and (M,): 1 / number of masked patches of the crop.
    """
    mask = torch.zeros(num_crops * num_patches, dtype=torch.bool, device=masked.device)
    mask = mask.index_fill_(0, masked, True).view(num_crops, num_patches)
    return mask, (1 / mask.sum(1))[masked // num_patches]


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy that is never trained, in eval mode: without stochastic depth."""
    return copy.deepcopy(student).requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Turn teacher logits (..., K), less a centre (K,), into probabilities.

    Reference: DINO, arXiv 2104.14294, section 3.1.
    """
    return ((comm.upcast(logits) - center) / temperature).softmax(-1)


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Turn teacher logits (M, K) into probabilities that use every output equally.

    One iteration scales each output to the same mass over all processes, then each row to mass 1.
    On logarithms: exp(logit / temperature) may overflow. M may differ between processes, and be 0.

    Reference: DINOv2, section 4; SwAV, arXiv 2006.09882, section 3.1.
    """
    log_p = comm.upcast(logits) / temperature
    for _ in range(iterations):
        masses = log_p.logsumexp(0, keepdim=True)  # (1, K) of this process, -inf without rows
        log_p -= comm.all_gather_no_grad(masses).logsumexp(0)  # of all
        log_p -= log_p.logsumexp(1, keepdim=True)
    return log_p.exp_()


@comm.outside_autocast
def dino_loss(student: Tensor, targets: Tensor, student_temperature: float) -> Tensor:
    """Compute the cross-entropy of predicting each global crop's target from every other crop.

    Args:
        student: logits (V, N, K) of all crops, the global ones first.
        targets: probabilities (G, N, K) of the global crops, detached.
        student_temperature: divides the logits.

    Returns:
        Scalar: mean over the G (V - 1) pairs of different crops and the N images.

    Reference: DINO, section 3.1, equations 1 to 3.
    """
    log_p = (comm.upcast(student) / student_temperature).log_softmax(2)
    pairs = torch.einsum("gnk,vnk->ngv", targets.detach().to(log_p.dtype), log_p).sum(0)
    g, v = pairs.shape
    return -(pairs.sum() - pairs.diagonal().sum()) / (g * (v - 1) * student.shape[1])


@comm.outside_autocast
def patch_loss(student: Tensor, targets: Tensor, weights: Tensor, num_crops: int,
               student_temperature: float) -> Tensor:
    """Compute the cross-entropy of predicting the targets at the masked patches.

    Args:
        student: logits (M, K) at the masked patches; M may be 0.
        targets: probabilities (M, K), detached.
        weights: (M,) 1 / masked patches of the crop.
        num_crops: global crops of this process, masked or not; as many on every process.
        student_temperature: divides the logits.

    Returns:
        Scalar: the mean over crops of the mean over their masked patches, 0 where there are none.

    Reference: iBOT, section 3.2, equation 2; DINOv2, section 4.
    """
    log_p = (comm.upcast(student) / student_temperature).log_softmax(1)
    losses = -torch.einsum("mk,mk->m", targets.detach().to(log_p.dtype), log_p)
    return (losses * weights.to(losses.dtype)).sum() / num_crops


@comm.outside_autocast
def koleo_loss(z: Tensor) -> Tensor:
    """Compute the mean of -log of the distance to the nearest other row, which spreads the rows.

    Neighbours are looked for on this process alone, as officially, so the loss depends on the
    number of processes. z (N, H), two rows at least, is of one view and normalised inside.

    Reference: section 4; Sablayrolles et al., arXiv 1806.03198, equation 4.
    """
    z, eps = F.normalize(comm.upcast(z), dim=1, eps=1e-8), 1e-8
    with torch.no_grad():
        nearest = (z @ z.T).fill_diagonal_(-math.inf).argmax(1)
    distances = (z - z[nearest] + eps).norm(dim=1)  # never 0: equal rows have a gradient too
    return -(distances + eps).log().mean()


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, momentum: float) -> None:
    """Move the centre (K,) to the mean of the teacher's logits over the rows of all processes.

    It keeps a share `momentum` of itself, and all of it where there are no rows. `teacher` are this
    process's logits (M, K), not centred; M may differ between processes.

    Reference: DINO, section 3.1, equation 4.
    """
    teacher = teacher.to(center.dtype)
    total = torch.cat([teacher.sum(0), teacher.new_full((1,), len(teacher))])
    total, count = comm.sum_over_processes(total).tensor_split([-1])
    center.lerp_(total / count.clamp(min=1), (1 - momentum) * (count > 0).to(total.dtype))


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to the student's, keeping a share `momentum` of their own."""
    torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - momentum)


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float, together: bool) -> None:
    """Scale gradients down to norm `max_norm`, that of all together or of each by itself."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    norms = norms.norm().expand(len(grads)) if together else norms
    scales = (max_norm / (norms + 1e-6)).clamp(max=1)
    torch._foreach_addcmul_(grads, (scales - 1).unbind(), grads)  # grad + (scale - 1) grad


def temperature_schedule(first: float, last: float, warmup: int, total: int) -> list[float]:
    """The teacher's temperature in every epoch, or step: in equal steps to the last, then constant.

    The warm-up's last epoch has the last temperature already.
    """
    rising = np.linspace(first, last, warmup).tolist()
    return [*rising, *[last] * total][:total]


def parameter_groups(model: nn.Module, layer_decay: float, patch_embed_lr: float) -> list[dict]:
    """Trainable parameters, grouped by rate, decay (not of biases, norms, scales) and last layers.

    A rate is layer_decay^n of the others' for what has n blocks behind it, counting the last norm
    as one; of the patches' projection, `patch_embed_lr` times that.
    """
    depth, groups = len(model.backbone.blocks), {}
    for name, p in model.named_parameters():
        before = 0 if name.startswith(("backbone.", "mask_token")) else depth + 1
        if name.startswith("backbone.blocks."):
            before = int(name.split(".")[2]) + 1
        elif name.startswith("backbone.norm."):
            before = depth + 1
        scale = layer_decay ** (depth + 1 - before)
        scale *= patch_embed_lr if "patch_embed" in name else 1
        if p.requires_grad:
            groups.setdefault((scale, p.ndim > 1, "last_layer" in name), []).append(p)
    return [{"params": params, "lr_scale": scale, "decays": decays, "last_layer": last}
            for (scale, decays, last), params in groups.items()]


@torch.no_grad()
def indicators(z: Tensor, targets: Tensor, patch_targets: Tensor,
               losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collapse indicators, logged; z (N, D) are the student's embeddings of one crop."""
    entropy = torch.special.entr(targets).sum(2).mean()
    of_patches = torch.special.entr(patch_targets).sum() / max(1, len(patch_targets))
    return {
        "teacher_entropy": entropy,  # 0: one output wins all; ln K: the targets are uniform
        "patch_entropy": of_patches,  # the same of the patches' targets
        "teacher_student_kl": losses["class_loss"] - entropy,  # what there is to learn
        "z_std": z.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
        **losses,
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    make = {"photo": photo_views, "digits": augment.digit_views}[args.views]
    views = make(cli.crops(args), args.jitter_strength, args.blur)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def build_draw(args, steps_per_epoch: int, rank: int = 0, size: int = 1):
    """`draw_masks` as a function of indices and step."""
    side = args.crop_sizes[0] // args.patch_size
    return functools.partial(
        draw_masks, steps_per_epoch=steps_per_epoch, seed=args.seed, rank=rank, size=size,
        method=args.method, num_global=args.num_crops[0], grid=(side, side),
        probability=args.mask_probability, ratio=args.mask_ratio)


def visible_patches(args, index: Tensor) -> list[tuple[int, Tensor]]:
    """For a picture: views by number, and bool (N, rows, columns) of what the student sees."""
    grid = (args.crop_sizes[0] // args.patch_size,) * 2
    num_crops = args.num_crops[0] * len(index)
    mask, _ = spread_masks(build_draw(args, 1)(index, 0), num_crops, math.prod(grid))
    return list(enumerate(~mask.unflatten(1, grid).unflatten(0, (-1, len(index)))))


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    ibot = args.method == "ibot"
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, image_size=args.image_size, patch_size=args.patch_size,
        positions="learned", drop_path=args.drop_path, uniform_drop_path=not ibot,
        layer_scale=args.layer_scale, registers=args.registers)
    model = DINOv2(backbone, (args.hidden_dim, args.bottleneck_dim, args.num_outputs),
                   args.patch_head, args.head_std, args.norm_last_layer)
    model = model.to(world.device, memory_format=torch.channels_last)
    teacher = make_teacher(model)
    if args.compile:  # not the whole: the number of masked patches is another in each step
        backbones.compile(*model.backbone.blocks, *teacher.backbone.blocks)
    backbone.recompute = args.grad_checkpoint
    outputs = {"center": args.num_outputs,
               "patch_center": args.patch_head[-1] if args.patch_head else args.num_outputs}
    centers = {name: torch.zeros(k, device=world.device) for name, k in outputs.items()
               if args.targets == "centering"}

    # Optimiser
    lr, final_lr = args.lr * args.batch_size / 256, args.final_lr * args.batch_size / 256
    groups = parameter_groups(model, args.layer_decay, args.patch_embed_lr)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    networks = [[*backbone.parameters(), model.mask_token],
                *([*head.parameters()] for head in (model.head, model.patch_head) if head)]
    last_layers = [p for group in groups if group["last_layer"] for p in group["params"]]
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    num_global, num_patches = args.num_crops[0], math.prod(backbone.grid)
    max_entropy = math.log(args.num_outputs)
    of_patches = args.mask_probability * math.log(outputs["patch_center"])
    draw = build_draw(args, len(images) // args.batch_size, world.rank, world.size)
    with Training(args, world, images, build_views(args), draw=draw,
                  chance_loss=max_entropy + args.patch_weight * of_patches,
                  floors={"teacher_entropy": 0.01 * max_entropy,
                          "z_std": 0.1 / math.sqrt(args.bottleneck_dim)},
                  ceilings={"teacher_entropy": 0.99 * max_entropy}) as run:
        if args.koleo_weight:
            comm.print_main("the chance level is that of class and patch loss, without KoLeo's")
        run.resume(model=model, teacher=teacher, **centers, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=final_lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=True)
        decay_of_step = optim.cosine(args.weight_decay, args.final_weight_decay, run.total_steps)
        momentum_of_step = optim.cosine(args.momentum, 1.0, run.total_steps)
        period = run.steps_per_epoch if ibot else 1
        warmup = args.warmup_teacher_temperature_epochs * run.steps_per_epoch // period
        temperatures = [temperature_schedule(*ends, warmup, run.total_steps // period) for ends in (
            (args.warmup_teacher_temperature, args.teacher_temperature),
            (args.warmup_patch_temperature, args.patch_temperature))]
        for step, batch in run.steps(export=teacher.backbone):  # 1. crops and masks
            frozen = step < args.freeze_last_layer_epochs * run.steps_per_epoch
            optim.set_lr(optimizer, lr_of_step[step])
            for group in optimizer.param_groups:
                group["weight_decay"] = decay_of_step[step] * group["decays"]
                if frozen and group["last_layer"]:
                    group["lr"] = 0.0  # Adam's moments go on
            optimizer.zero_grad(set_to_none=True)
            global_views, local_views = batch.views[:num_global], batch.views[num_global:]
            num_crops = num_global * len(batch.index)
            mask, weights = spread_masks(batch.drawn, num_crops, num_patches)
            with autocast():
                with torch.no_grad():
                    *_, teacher_logits, teacher_patch_logits, patch_rows = teacher(
                        global_views, [], batch.drawn, mean_of_all=ibot)
                h, z, logits, patch_logits, _ = ddp_model(
                    global_views, local_views, batch.drawn, mask)
            temperature, patch_temperature = (t[step // period] for t in temperatures)
            if centers:  # 2. targets
                targets = centered_targets(teacher_logits, centers["center"], temperature)
                patch_targets = centered_targets(teacher_patch_logits, centers["patch_center"],
                                                 patch_temperature)
            else:
                targets = sinkhorn_targets(teacher_logits.flatten(0, 1), temperature, 3)
                targets = targets.view_as(teacher_logits)
                patch_targets = sinkhorn_targets(teacher_patch_logits, patch_temperature, 3)
            losses = {  # 3. predict
                "class_loss": dino_loss(logits, targets, args.student_temperature),
                "patch_loss": patch_loss(patch_logits, patch_targets, weights, num_crops,
                                         args.student_temperature)}
            loss = losses["class_loss"] + args.patch_weight * losses["patch_loss"]
            if args.koleo_weight:
                losses["koleo_loss"] = sum(koleo_loss(view) for view in h[:num_global])
                loss = loss + args.koleo_weight * losses["koleo_loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            for network in networks if args.clip_norm else ():
                clip_gradients(network, args.clip_norm, together=not ibot)
            for p in last_layers if frozen and ibot else ():
                p.grad = None
            scaler.step(optimizer)  # 4. step
            scaler.update()
            update_ema(teacher, model, momentum_of_step[step])  # 5. teacher
            run.log(loss, lr_of_step[step], indicators, z[0], targets, patch_targets, losses)
            if centers:  # 6. centres
                update_center(centers["center"], teacher_logits.flatten(0, 1), args.center_momentum)
                update_center(centers["patch_center"], patch_rows, args.center_momentum)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
