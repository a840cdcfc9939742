"""CAE: Context Autoencoder for Self-Supervised Representation Learning, arXiv 2202.03026.

1. Make one view of every image, a crop, and cut it into patches; mask blocks of about half of them.
2. A tokenizer gives each masked patch its visual token, here called word: patches have a vocabulary
   as texts have.
3. Encode the visible patches alone.
4. The regressor predicts the latents of the masked patches: mask tokens at their places look at the
   visible latents by cross-attention, and do not change them.
5. The decoder, a light transformer on these predictions alone, predicts the words.
6. Align the predictions with the encoder's own latents of the masked patches, from a second pass
   without gradient. So encoding is left to the encoder, and what is special to the words to the
   decoder.

Letters: N images per process, C channels, P patch side, L patches of an image, V of them visible
and M masked, D width of all networks, K words of the vocabulary.

`--tokenizer FILE` is the paper's: the encoder of DALL-E's discrete VAE, of which FILE is the state
dict (MMSelfSup's dalle_encoder.pth is one). It could not be tried here with the released weights.
`--tokenizer kmeans` needs no file: words are k-means centroids of normalised patches of central
crops of training images, made before the first step. No published number belongs to it.

Evaluate `--layers patches`: nothing trains the class token but attention, though it is what the
authors' linear probe reads.

Differs from the official code (Atten4Vis/CAE): which patches are masked depends on seed, epoch and
image alone, and where blocks fail to fill up the number, single patches do; the discrete VAE, in
float32, sees the view reduced to 8 pixels a patch, there a crop of its own of the same box, in
float16; keys have a bias, which changes nothing; columns come first in the positions, there rows.
As there: the regressor's perceptron adds to what is normalised, not to what comes before; the
second pass drops depth as well.

    python cae.py
    torchrun --nproc_per_node=8 cae.py --data /path/to/imagenet --tokenizer dalle_encoder.pth
"""

import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, features, optim, rng
from common.discrete_vae import load_encoder
from common.images import open_images
from common.kmeans import first_centroids, kmeans, nearest_centroids, own_part
from common.training import Training
from common.weights import fingerprint

IMAGENET = dict(  # the official script of 800 epochs; of 300 and 1600: --warmup-epochs 10, 40
    arch="vit_base", patch_size=16, image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.08, 1.0], mask_ratio=0.5, min_block=16,
    tokenizer="kmeans", vocabulary_size=8192, vocabulary_images=2048, kmeans_iterations=20,
    regressor_depth=4, decoder_depth=4, align_weight=2.0, layer_scale=0.1, drop_path=0.1,
    epochs=800, batch_size=2048, lr=1.5e-3 / 8, final_lr=1e-5 / 8, weight_decay=0.05,
    warmup_epochs=20, clip=3.0,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Ours, not promised; backbone, patch, batch and epochs as mae.py has them.
    "cifar10": IMAGENET | dict(
        arch="vit_small", patch_size=4, image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        min_block=4, vocabulary_size=1024, vocabulary_images=5000,
        epochs=1000, batch_size=256, lr=5e-4, final_lr=1e-6, warmup_epochs=10,
    ),
    # Ours, chosen on the built-in digits.
    "digits": IMAGENET | dict(
        arch="vit_micro", patch_size=4, image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], min_block=2,
        vocabulary_size=32, vocabulary_images=1000, regressor_depth=2, decoder_depth=2,
        drop_path=0.0, epochs=80, batch_size=128, lr=4e-3, final_lr=4e-5, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.VITS, crops="one",
                                      batch_norm=False)
    group.add_argument("--patch-size", type=cli.pos_int, help="P, side of a patch in pixels")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--mask-ratio", type=cli.fraction, help="fraction of the patches masked")
    group.add_argument("--min-block", type=cli.pos_int, metavar="PATCHES",
                       help="area that a block has at least, while so many are left to mask")
    group.add_argument("--tokenizer", metavar="WHAT",
                       help="kmeans, or a file with the discrete VAE's encoder, see above")
    group.add_argument("--vocabulary-size", type=cli.two_or_more, help="kmeans: K, words")
    group.add_argument("--vocabulary-images", type=cli.pos_int,
                       help="kmeans: at most so many images give all their patches")
    group.add_argument("--kmeans-iterations", type=cli.pos_int, help="kmeans: at most")
    group.add_argument("--regressor-depth", type=cli.pos_int, help="blocks of the regressor")
    group.add_argument("--decoder-depth", type=cli.nonneg_int, help="blocks of the decoder")
    group.add_argument("--align-weight", type=cli.not_negative, help="weight of the alignment")
    group.add_argument("--layer-scale", type=cli.not_negative,
                       help="start of the trained scale of every branch; 0: none")
    group.add_argument("--drop-path", type=cli.fraction, help="stochastic depth, last blocks")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256 images, at the end")
    group.add_argument("--clip", type=cli.positive, help="largest norm of all gradients together")
    args = cli.parse(parser, RECIPES, argv)
    cli.check_patches(parser, args)
    num_patches = (args.image_size // args.patch_size) ** 2
    if not 1 <= int(num_patches * args.mask_ratio) < num_patches:
        parser.error(f"--mask-ratio {args.mask_ratio} masks {int(num_patches * args.mask_ratio)} "
                     f"of {num_patches} patches")
    if args.tokenizer != "kmeans":
        if args.in_chans != 3:
            parser.error(f"--in-chans {args.in_chans}: the discrete VAE sees 3; pass --tokenizer "
                         "kmeans")
        for flag in ("--vocabulary-size", "--vocabulary-images", "--kmeans-iterations"):
            if cli.peek(argv, flag, str) is not None:
                parser.error(f"{flag} is of --tokenizer kmeans; the words of {args.tokenizer} are "
                             "in the file")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale):
    """One view, without changes of colour."""
    return [(image_size, [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
        augment.HorizontalFlip(p=0.5),
    ])]


def block_mask(draw: np.random.Generator, rows: int, columns: int, count: int,
               min_block: int) -> np.ndarray:
    """Mask blocks of patches until `count` are masked.

    A block has an area, uniform between `min_block` and what is left of `count`, a logarithmic
    aspect, uniform between those of 0.3 and 1 / 0.3, and any place. It is masked if it adds at
    least one patch and not more than are left. What 1000 blocks leave is drawn patch by patch.

    Returns:
        bool (rows, columns), True for a masked patch: exactly `count`.

    Reference: BEiT, arXiv 2106.08254, algorithm 1.
    """
    mask = np.zeros((rows, columns), bool)
    for _ in range(1000):
        left = count - mask.sum()
        if left == 0:
            return mask
        area = min_block + (left - min_block) * draw.random()
        aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, at = draw.integers(rows - height + 1), draw.integers(columns - width + 1)
        block = mask[top : top + height, at : at + width]
        if 0 < block.size - block.sum() <= left:
            block[:] = True
    free = np.flatnonzero(~mask)
    mask.flat[draw.choice(free, count - mask.sum(), replace=False)] = True
    return mask


def draw_masks(index: Tensor, step: int, *, seed: int, steps_per_epoch: int, rows: int,
               columns: int, count: int, min_block: int) -> list[Tensor]:
    """Rising places of visible (N, V) and masked (N, M) patches, for the images of index (N,)."""
    masks = np.stack([
        block_mask(rng.philox(seed, rng.MASK, step // steps_per_epoch, i), rows, columns, count,
                   min_block).ravel() for i in index.tolist()])
    order = torch.from_numpy(masks.argsort(axis=1, kind="stable"))
    return list(order.tensor_split([rows * columns - count], dim=1))


# -------------------------------------------------------------------------------------------- model


class RegressorBlock(backbones.Block):
    """Attention of queries to the visible latents and each other, then a two-layer perceptron."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, layer_scale: float):
        super().__init__(dim, num_heads, drop_path, layer_scale)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm_keys, self.norm_values = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, queries: Tensor, visible: Tensor, asked: Tensor, places: Tensor) -> Tensor:
        """Queries (N, M, D), at positions `asked`; visible and queries are at `places`."""
        tokens = torch.cat([visible, queries], dim=1)
        found = self.attn(self.norm1(queries + asked), self.norm_keys(tokens + places),
                          self.norm_values(tokens), need_weights=False)[0]
        x = self.norm2(queries + self.dropped(self.ls1(found)))
        return x + self.dropped(self.ls2(self.mlp(x)))


class CAE(nn.Module):
    """An encoder of the visible patches, a regressor of the others' latents, and a decoder."""

    def __init__(self, backbone: nn.Module, num_words: int, regressor_depth: int,
                 decoder_depth: int, drop_path: float, layer_scale: float):
        super().__init__()
        dim, heads = backbone.num_features, backbone.blocks[0].attn.num_heads
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.regressor, self.decoder = (
            nn.ModuleList(kind(dim, heads, rate, layer_scale)
                          for rate in torch.linspace(0, drop_path, depth).tolist())
            for kind, depth in ((RegressorBlock, regressor_depth), (backbones.Block, decoder_depth))
        )
        self.regressor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, num_words)

        backbones.init_linears(self, nn.init.xavier_uniform_)
        for block in self.regressor:
            for part in block.attn.in_proj_weight.detach().chunk(3):
                nn.init.xavier_uniform_(part)
        for weight in (backbone.patch_embed.proj.weight, backbone.cls_token, self.mask_token):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(backbone.patch_embed.proj.bias)

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, ...]:
        """Predict the masked patches (N, M) of images (N, C, H, W) from the visible ones (N, V).

        Returns:
            Logits of words (N, M, K), predicted latents (N, M, D), and the encoder's own (N, M, D),
            without gradient.
        """
        patches = self.backbone.embed(images)
        seen = self.encode(patches, visible)
        with torch.no_grad():
            targets = self.encode(patches, masked)
        positions = self.backbone.pos_embed[0, 1:]
        asked, places = positions[masked], positions[torch.cat([visible, masked], dim=1)]
        x = self.mask_token.expand(*masked.shape, -1)
        for block in self.regressor:
            x = block(x, seen, asked, places)
        latents = self.regressor_norm(x)
        x = latents + asked
        for block in self.decoder:
            x = block(x)
        return self.predict(self.decoder_norm(x)), latents, targets

    def encode(self, patches: Tensor, places: Tensor) -> Tensor:
        """Latents of some of the embedded patches (N, L, D), without the class token's."""
        some = patches.gather(1, places[:, :, None].expand(-1, -1, patches.shape[2]))
        return self.backbone.encode(some)[0][:, 1:]


# ---------------------------------------------------------------------------------------- tokenizer


def normalized_patches(images: Tensor, patch_size: int) -> Tensor:
    """Patches (N, L, C*P*P) of images (N, C, H, W), each less its mean, by its deviation."""
    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
    return F.layer_norm(patches, patches.shape[2:], eps=1e-6)


def learn_words(patches: Tensor, num_words: int, iterations: int, seed: int,
                device: torch.device) -> Tensor:
    """Centroids (K, C*P*P) of patches (n, C*P*P) that are equal on every process, by k-means.

    Each process works on a part of the patches, on its device; the start is drawn from the seed.
    """
    own = own_part(patches).to(device)
    start = first_centroids(own, num_words, rng.philox(seed, rng.CLUSTERS))
    return kmeans(own, start, iterations)[0]


def kmeans_words(images: Tensor, vocabulary: Tensor, patch_size: int) -> Tensor:
    """Words int64 (N, L) of images (N, C, H, W): the nearest rows of the vocabulary."""
    patches = normalized_patches(images, patch_size)
    return nearest_centroids(patches.flatten(0, 1), vocabulary).view(patches.shape[:2])


@comm.outside_autocast
def vae_words(images: Tensor, vae: nn.Module, mean: list[float], std: list[float],
              grid: tuple[int, int]) -> Tensor:
    """Words int64 (N, L) of normalised images (N, 3, H, W)."""
    mean, std = (augment.constant(tuple(x), images.dtype, images.device).view(-1, 1, 1)
                 for x in (mean, std))
    return vae(images * std + mean, *grid)


# --------------------------------------------------------------------------------------------- loss


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the mean cross-entropy of logits (N, M, K) with the words (N, M) of the patches.

    With as many masked patches on every process, the mean over processes of the result is the loss
    of the joined batch, and so is the gradient that DDP averages.

    Reference: section 3.2 (loss function).
    """
    return F.cross_entropy(comm.upcast(logits).flatten(0, 1), tokens.flatten())


def alignment_loss(latents: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean squared difference of latents (N, M, D) from targets, which are detached.

    Over processes as `token_loss`.

    Reference: section 3.2 (loss function).
    """
    return F.mse_loss(comm.upcast(latents), comm.upcast(targets.detach()))


@torch.no_grad()
def indicators(z: Tensor, logits: Tensor, tokens: Tensor, losses: dict[str, Tensor]
               ) -> dict[str, Tensor]:
    """Logged beside the loss: on latents (N, D) of images, logits (N, M, K), words (N, M)."""
    counts = torch.zeros_like(logits[0, 0], dtype=torch.float32)
    counts.index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten(), dtype=counts.dtype))
    return {
        "z_std": comm.upcast(z).std(0, correction=0).mean(),  # of a channel over images; collapse 0
        "token_accuracy": (logits.argmax(2) == tokens).float().mean(),
        "token_entropy": torch.special.entr(counts / tokens.numel()).sum(),  # of their frequencies
        **losses,
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    make = {"photo": photo_views, "digits": augment.moved_digit}[args.views]
    views = make(args.image_size, args.crop_scale)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def build_draw(args, steps_per_epoch):
    side = args.image_size // args.patch_size
    return functools.partial(draw_masks, seed=args.seed, steps_per_epoch=steps_per_epoch, rows=side,
                             columns=side, count=int(side**2 * args.mask_ratio),
                             min_block=args.min_block)


def visible_patches(args, index: Tensor) -> list[tuple[int, Tensor]]:
    """For a picture: the view's number, and bool (N, rows, columns) of what is not masked."""
    visible, side = build_draw(args, 1)(index, 0)[0], args.image_size // args.patch_size
    shown = torch.zeros(len(index), side**2).scatter(1, visible, 1.0)
    return [(0, shown.view(-1, side, side) == 1)]


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Tokenizer
    grid, num_words = (args.image_size // args.patch_size,) * 2, args.vocabulary_size
    if args.tokenizer == "kmeans":
        some = images.subset(rng.epoch_order(args.seed, 0, len(images))[: args.vocabulary_images])
        if args.batch_size <= len(images) and num_words > len(some) * math.prod(grid):
            raise comm.RunError(f"--vocabulary-size {num_words} is more than the patches of "
                                f"{len(some)} images, {len(some) * math.prod(grid)}; lower it")
        vocabulary = torch.zeros(num_words, args.in_chans * args.patch_size**2,
                                 device=world.device)
        kept, settings = {"vocabulary": vocabulary}, cli.settings(args)
        name_words = functools.partial(kmeans_words, vocabulary=vocabulary,
                                       patch_size=args.patch_size)
    else:
        with comm.same_error_on_all_ranks():
            vae = load_encoder(args.tokenizer, "--tokenizer").to(world.device)
        num_words, kept = vae.num_words, {}
        settings = cli.settings(args) | {"tokenizer": fingerprint(vae)}
        name_words = functools.partial(vae_words, vae=vae, mean=args.mean, std=args.std, grid=grid)

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, drop_path=args.drop_path, image_size=args.image_size,
        patch_size=args.patch_size, positions="sincos", layer_scale=args.layer_scale)
    model = CAE(backbone, num_words, args.regressor_depth, args.decoder_depth, args.drop_path,
                args.layer_scale)
    model = model.to(world.device, memory_format=torch.channels_last)
    if args.compile:
        backbones.compile(model)

    # Optimiser
    lr, final_lr = args.lr * args.batch_size / 256, args.final_lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)  # both tokens decay, as officially
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    draw = build_draw(args, len(images) // args.batch_size)
    with Training(args, world, images, build_views(args), draw=draw, settings=settings,
                  floors={"z_std": 0.02}) as run:
        run.resume(model=model, **kept, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=final_lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=True)
        if kept and run.step == 0:
            whole = features.central_view(vars(args), augment.CenterCrop, "bilinear")
            rows = run.features(lambda x: normalized_patches(x, args.patch_size).flatten(1), whole,
                                some).view(-1, vocabulary.shape[1])
            vocabulary.copy_(learn_words(rows, num_words, args.kmeans_iterations, args.seed,
                                         world.device))
        for step, batch in run.steps(export=model.backbone):  # 1. one view
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            view, (visible, masked) = batch.views[0], batch.drawn
            tokens = name_words(view).gather(1, masked)  # 2. words
            with autocast():
                logits, latents, targets = ddp_model(view, visible, masked)  # 3., 4., 5.
            losses = {"token_loss": token_loss(logits, tokens),
                      "align_loss": alignment_loss(latents, targets)}  # 6. align
            loss = losses["token_loss"] + args.align_weight * losses["align_loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, targets.mean(1), logits, tokens, losses)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
