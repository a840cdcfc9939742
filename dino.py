"""DINO: Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294.

1. Make two global crops and some local ones, smaller in pixels and in area, of every image.
2. The teacher embeds the global crops alone. Its logits, less a centre and divided by a low
   temperature, make sharp targets: the centre keeps one output from winning all, the sharpness
   keeps the targets from being uniform. No gradient reaches the teacher.
3. The student embeds all crops and predicts each target from every other crop of the image.
4. Step; the gradient of each parameter is clipped on its own, the last layer is frozen at first.
5. Move the teacher a little towards the student (EMA), less and less over the run.
6. Move the centre towards the mean of the teacher's logits over all processes.

Letters: N images per process, V crops of an image, G of them global, D bottleneck of the head,
K outputs of the head, H backbone width.

Differs from the official code (facebookresearch/dino): position embeddings are resized to the exact
grid of a local crop; the last layer is computed in float32 regardless of autocast; its weight is
kept as `directions` and `scales`. Blur is a true Gaussian, there Pillow's chain of box filters.
Left out: its LARS.

    python dino.py
    torchrun --nproc_per_node=8 dino.py --data /path/to/imagenet --output runs/dino
"""

import copy
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, section 3.2 and appendix C, with the official README's 300 epochs; its
    # first command is: --epochs 100 --batch-size 512 --final-lr 5e-7 --teacher-temperature .04
    # --norm-last-layer
    arch="vit_small", stem="imagenet", patch_size=16, drop_path=0.1, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", num_crops=[2, 8], crop_sizes=[224, 96], crop_scales=[0.4, 1.0, 0.05, 0.4],
    jitter_strength=0.5, blur=True,
    hidden_dim=2048, bn_in_head=False, bottleneck_dim=256, num_outputs=65536,
    norm_last_layer=False, freeze_last_layer_epochs=1, student_temperature=0.1,
    teacher_temperature=0.07, warmup_teacher_temperature=0.04,
    warmup_teacher_temperature_epochs=30, center_momentum=0.9, momentum=0.996,
    optimizer="adamw", epochs=300, batch_size=1024, lr=5e-4, final_lr=1e-6 / 4,
    weight_decay=0.04, final_weight_decay=0.4, clip_per_parameter=3.0, warmup_epochs=10,
    sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Official README.
    "imagenet_resnet50": IMAGENET | dict(
        arch="resnet50", crop_scales=[0.14, 1.0, 0.05, 0.14],
        norm_last_layer=True, teacher_temperature=0.04, warmup_teacher_temperature_epochs=0,
        optimizer="sgd", epochs=100, batch_size=512, lr=0.03, final_lr=1e-6 / 2,
        weight_decay=1e-4, final_weight_decay=1e-4,
    ),
    # The authors give none: backbone, crop sizes, head, rate, momentum, batch and epochs of
    # lightly's benchmark.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", patch_size=4, drop_path=0.0,
        num_crops=[2], crop_sizes=[32], crop_scales=[0.4, 1.0], blur=False,
        hidden_dim=512, bn_in_head=True, bottleneck_dim=64, num_outputs=2048,
        norm_last_layer=True, teacher_temperature=0.04, warmup_teacher_temperature_epochs=0,
        momentum=0.99, optimizer="sgd", epochs=800, batch_size=512, lr=0.12, final_lr=0.0,
        weight_decay=5e-4, final_weight_decay=5e-4,
    ),
    # Ours, chosen on the built-in digits: about a minute on two cores. A ResNet: in so few steps a
    # transformer hardly learns (--arch vit_micro: k-NN .496 where .477 is untrained).
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", patch_size=4, drop_path=0.0, mean=[0.5], std=[0.5],
        views="digits", num_crops=[2], crop_sizes=[16], crop_scales=[0.6, 1.0], blur=False,
        hidden_dim=256, bn_in_head=True, bottleneck_dim=64, num_outputs=512,
        norm_last_layer=True, teacher_temperature=0.03, warmup_teacher_temperature=0.03,
        warmup_teacher_temperature_epochs=0, momentum=0.98,
        epochs=40, batch_size=128, lr=4e-3, final_lr=1e-5, final_weight_decay=0.1,
        warmup_epochs=3,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.NAMES, crops="multi")
    group.add_argument("--patch-size", type=cli.pos_int,
                       help="transformer: side of a patch in pixels; smaller is better, and slower")
    group.add_argument("--drop-path", type=cli.fraction,
                       help="transformer: stochastic depth of the student's last block")
    group.add_argument("--grad-checkpoint", action=cli.Switch, default=False,
                       help="transformer: recompute its blocks in the backward; less memory, the "
                       "same gradient")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--jitter-strength", type=cli.not_negative, help="strength of colour jitter")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur, of each crop its own rate")
    group.add_argument("--hidden-dim", type=cli.pos_int, help="width of the head's hidden layers")
    group.add_argument("--bn-in-head", action=cli.Switch,
                       help="batch norm in the hidden layers: without it short runs give every "
                       "image the same embedding first")
    group.add_argument("--bottleneck-dim", type=cli.pos_int, help="D, before the last layer")
    group.add_argument("--num-outputs", type=cli.pos_int,
                       help="K; more is better on large data, a few hundred do for small")
    group.add_argument("--norm-last-layer", action=cli.Switch,
                       help="keep the last layer's rows at norm 1: steadier; without it a small "
                       "transformer may do better, a large one diverges")
    group.add_argument("--freeze-last-layer-epochs", type=cli.nonneg_int,
                       help="last layer frozen so long (0 with --init); more, if the loss does "
                       "not fall")
    group.add_argument("--student-temperature", type=cli.positive,
                       help="temperature of the predictions")
    group.add_argument("--teacher-temperature", type=cli.positive,
                       help="temperature of the targets, after its warm-up; lower is sharper: "
                       "lower it if the teacher's entropy stays at ln K; above .07 is seldom "
                       "stable")
    group.add_argument("--warmup-teacher-temperature", type=cli.positive,
                       help="the same in the first epoch; lower it if the loss does not fall")
    group.add_argument("--warmup-teacher-temperature-epochs", type=cli.nonneg_int,
                       help="epochs from the first to the last teacher temperature")
    group.add_argument("--center-momentum", type=cli.fraction,
                       help="EMA momentum of the centre; lower it if one output wins all")
    group.add_argument("--momentum", type=cli.fraction,
                       help="EMA momentum of the teacher in the first step, a cosine takes it to "
                       "1; higher for small batches (.9995 with 256 images of ImageNet)")
    group.add_argument("--optimizer", choices=("adamw", "sgd"),
                       help="adamw for transformers; sgd (momentum .9) for ResNets")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256, where the cosine ends")
    group.add_argument("--final-weight-decay", type=cli.not_negative,
                       help="where a cosine takes it; a low start lets the loss fall early")
    group.add_argument("--clip-per-parameter", type=cli.not_negative,
                       help="largest gradient norm of each parameter by itself; 0: none; lower it "
                       "if the loss jumps")
    args = cli.parse(parser, RECIPES, argv)
    given = cli.peek(argv, "--freeze-last-layer-epochs") is not None
    if args.init and args.freeze_backbone_epochs and not given:
        args.freeze_last_layer_epochs = 0  # new heads are to fit while the backbone is frozen
    if args.arch not in backbones.VITS and cli.peek(argv, "--drop-path", float):
        parser.error(f"--drop-path is for transformers, and --arch is {args.arch}")
    cli.check_patches(parser, args)
    if args.arch not in backbones.VITS and args.grad_checkpoint:
        parser.error(f"--grad-checkpoint would count the batches of --arch {args.arch} twice in "
                     "its batch norm; it is for transformers")
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


# -------------------------------------------------------------------------------------------- model


class DINO(nn.Module):
    """Backbone, projector H -> hidden -> hidden -> D, and a weight-normalised last layer D -> K.

    With `bn_in_head` the projector has batch norm before both activations.

    The last layer's weight is `scales` times the unit rows of `directions`, which alone are trained
    where `norm_last_layer`.
    """

    def __init__(self, backbone: nn.Module, hidden_dim: int, bottleneck_dim: int, num_outputs: int,
                 norm_last_layer: bool, bn_in_head: bool):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, hidden_dim),
            nn.BatchNorm1d(hidden_dim) if bn_in_head else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim) if bn_in_head else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        # A transformer's too; before the last layer is there, which starts as torch's Linear does.
        backbones.init_linears(self, lambda weight: nn.init.trunc_normal_(weight, std=0.02))
        self.last_layer = nn.ParameterDict({
            "directions": nn.Parameter(torch.empty(num_outputs, bottleneck_dim)),
            "scales": nn.Parameter(torch.ones(num_outputs, 1), requires_grad=not norm_last_layer),
        })
        nn.init.uniform_(self.last_layer.directions, -bottleneck_dim**-0.5, bottleneck_dim**-0.5)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Embed V views (N, C, H, W), sorted by size, in one backbone pass per size.

        Returns:
            Unit embeddings (V, N, D) and logits (V, N, K), in float32 or float64.
        """
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        h = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        z = self.projector(h)
        with torch.autocast(z.device.type, enabled=False):  # a low temperature needs full precision
            z = F.normalize(comm.upcast(z), dim=1)
            z = z.view(len(views), -1, z.shape[1])
            rows = F.normalize(self.last_layer.directions, dim=1)
            return z, z @ (rows * self.last_layer.scales).T


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy that is never trained and has no stochastic depth; in train mode like the student."""
    return backbones.without_dropping(copy.deepcopy(student).requires_grad_(False))


# --------------------------------------------------------------------------------------------- loss


@comm.outside_autocast
def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temperature: float,
              teacher_temperature: float) -> Tensor:
    """Compute the cross-entropy of predicting each global crop's target from every other crop.

    Args:
        student: logits (V, N, K) of all crops, the global ones first.
        teacher: logits (G, N, K) of the global crops, detached.
        center: (K,), subtracted from the teacher's logits, detached.
        student_temperature, teacher_temperature: divide the logits.

    Returns:
        Scalar: mean over the G (V - 1) pairs of different crops and the N images.

    Reference: section 3.1, equations 1 to 3, and algorithm 1.
    """
    student, teacher = (comm.upcast(x) for x in (student, teacher))
    targets = ((teacher.detach() - center.detach()) / teacher_temperature).softmax(2)
    log_p = (student / student_temperature).log_softmax(2)
    pairs = torch.einsum("gnk,vnk->ngv", targets.to(log_p.dtype), log_p).sum(0)
    g, v = pairs.shape
    return -(pairs.sum() - pairs.diagonal().sum()) / (g * (v - 1) * student.shape[1])


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, momentum: float) -> None:
    """Move the centre to the mean of the teacher's logits over all crops, images and processes.

    Args:
        center: (K,), written in place; it keeps a share `momentum` of itself.
        teacher: this process's logits (G, N, K), not centred.

    Reference: section 3.1, equation 4.
    """
    mean = comm.mean_over_processes(teacher.to(center.dtype).mean((0, 1)))
    center.lerp_(mean, 1 - momentum)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to the student's, keeping a share `momentum` of their own.

    Buffers stay as they are: the teacher's batch statistics come from its own forwards.
    """
    torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - momentum)


@torch.no_grad()
def clip_per_parameter(module: nn.Module, max_norm: float) -> None:
    """Scale the gradient of each parameter by itself down to norm `max_norm`, if it is above."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    scales = (max_norm / (norms + 1e-6)).clamp(max=1)
    torch._foreach_addcmul_(grads, (scales - 1).unbind(), grads)  # grad + (scale - 1) grad


def temperature_schedule(first: float, last: float, warmup_epochs: int, epochs: int) -> list[float]:
    """The teacher's temperature in every epoch: in equal steps from first to last, then constant.

    The warm-up's last epoch has the last temperature already.
    """
    warmup = np.linspace(first, last, warmup_epochs).tolist()
    return [*warmup, *[last] * epochs][:epochs]


@torch.no_grad()
def indicators(z: Tensor, teacher: Tensor, center: Tensor, teacher_temperature: float,
               loss: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged; z (N, D) are the student's embeddings of one crop."""
    targets = ((teacher - center) / teacher_temperature).softmax(2)
    entropy = torch.special.entr(targets).sum(2).mean()
    return {
        "teacher_entropy": entropy,  # 0: one output wins all; ln K: the targets are uniform
        "teacher_student_kl": loss.detach() - entropy,  # what there is to learn; 0 in collapse
        "z_std": z.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    make = {"photo": photo_views, "digits": augment.digit_views}[args.views]
    views = make(cli.crops(args), args.jitter_strength, args.blur)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, stem=args.stem, zero_init_residual=False,
        image_size=args.image_size, patch_size=args.patch_size, positions="learned",
        drop_path=args.drop_path)
    model = DINO(backbone, args.hidden_dim, args.bottleneck_dim, args.num_outputs,
                 args.norm_last_layer, args.bn_in_head)
    model = comm.prepare(model, world, args.sync_bn)
    teacher = make_teacher(model)
    if args.compile:
        backbones.compile(backbone, teacher.backbone)
    backbone.recompute = args.grad_checkpoint
    center = torch.zeros(args.num_outputs, device=world.device)

    # Optimiser
    lr, final_lr = args.lr * args.batch_size / 256, args.final_lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)  # tokens and the last layer decay, officially
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)  # fused could not freeze a layer
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    num_global, max_entropy = args.num_crops[0], math.log(args.num_outputs)
    with Training(args, world, images, build_views(args), chance_loss=max_entropy,
                  floors={"teacher_entropy": 0.01 * max_entropy,
                          "z_std": 0.1 / math.sqrt(args.bottleneck_dim)},
                  ceilings={"teacher_entropy": 0.99 * max_entropy}) as run:
        run.resume(model=model, teacher=teacher, center=center, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=final_lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=True)
        decay_of_step = optim.cosine(args.weight_decay, args.final_weight_decay, run.total_steps)
        momentum_of_step = optim.cosine(args.momentum, 1.0, run.total_steps)
        temperature_of_epoch = temperature_schedule(
            args.warmup_teacher_temperature, args.teacher_temperature,
            args.warmup_teacher_temperature_epochs, args.epochs)
        for step, batch in run.steps(export=teacher.backbone):  # 1. global and local crops
            epoch = step // run.steps_per_epoch
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.param_groups[0]["weight_decay"] = decay_of_step[step]
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                with torch.no_grad():
                    _, teacher_logits = teacher(batch.views[:num_global])  # 2. targets
                z, logits = ddp_model(batch.views)
            loss = dino_loss(logits, teacher_logits, center, args.student_temperature,
                             temperature_of_epoch[epoch])  # 3. predict
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if args.clip_per_parameter > 0:
                clip_per_parameter(model, args.clip_per_parameter)
            if epoch < args.freeze_last_layer_epochs:
                model.last_layer.zero_grad(set_to_none=True)
            scaler.step(optimizer)  # 4. step
            scaler.update()
            update_ema(teacher, model, momentum_of_step[step])  # 5. teacher
            run.log(loss, lr_of_step[step], indicators, z[0], teacher_logits, center,
                    temperature_of_epoch[epoch], loss)
            update_center(center, teacher_logits, args.center_momentum)  # 6. centre


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
