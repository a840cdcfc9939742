"""A training run behind one loop: images, checkpoints, log, signals, and the looks at it.

    with Training(args, world, images, views) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        for step, batch in run.steps(export=model.backbone):
            ...
            run.log(loss, lr, indicators, z)

A run saves between two steps: at every epoch's end, every --save-every-minutes, on a stop signal.
"""

import contextlib
import hashlib
import math
import os
import time

import numpy as np
import torch
from torch import nn

from common import backbones, cli, distributed as comm, features, rng, trunks, weights
from common.checkpoint import Run, atomic_write
from common.distributed import RunError
from common.loader import Loader, check_batch_size
from common.log import Log
from common.probe import Probe
from common.profiling import WARM_UP, profiled
from common.workers import start_worker


class Training:
    """A run in `args.output`, to be used as a context.

    Args:
        args: the shared flags (`cli.method_parser`).
        images: a source (`images.open_images`).
        views: one `augment.View` for every view of an image.
        chance_loss: the loss of a model that knows nothing, shown beside the first one, if known.
        floors, ceilings: collapse indicators by name, and the value below or above which to warn.
        settings: what a resumed run must repeat, if not all of `args` that changes weights.
        product: the file that every save writes `export` to.
        draw: what a step needs besides its views, see `Loader`; it comes as `batch.drawn`.
        start: name of the flag that says which weights a new run starts from.

    Attributes:
        step: steps done. total_steps: of the whole run. steps_per_epoch.
    """

    def __init__(self, args, world, images, views, *, chance_loss=None, floors=None, ceilings=None,
                 settings=None, product="backbone.pth", draw=None, start="init"):
        self.args, self.world, self.images, self.views = args, world, images, views
        self.draw = draw
        self.bounds = dict(chance_loss=chance_loss, floors=floors or {}, ceilings=ceilings)
        self.initial, settings = None, settings or cli.settings(args)
        if self.option(start) and (start, self.option(start)) != ("checkpoint", "random"):
            with comm.same_error_on_all_ranks():
                self.initial, content = starting_weights(args, start)
            settings |= {start: content}
        if self.option("tensorboard"):
            with comm.same_error_on_all_ranks():
                check_tensorboard()
        self.folder = Run(args.output, settings, images, world, resume=args.resume,
                          save_every_minutes=args.save_every_minutes, product=product)
        check_batch_size(images, args.batch_size, world)  # before anything is replaced
        self.steps_per_epoch = len(images) // args.batch_size
        self.total_steps = args.epochs * self.steps_per_epoch
        self.probe = Probe(args, world, images) if self.option("probe_every") else None

    def option(self, name: str):
        """The value of a flag that not every user of a run has."""
        return getattr(self.args, name, None)

    def __enter__(self):
        self.folder.__enter__()
        return self

    def __exit__(self, *error):
        return self.folder.__exit__(*error)

    # ---------------------------------------------------------------------------------- starting

    def resume(self, **state) -> None:
        """Load the newest checkpoint into modules, optimisers and tensors, if there is one.

        Otherwise the `backbone` of every module, of the student as of a teacher, starts from
        `--init`, if that is given.
        """
        args, size = self.args, self.world.size
        tenth = " (a tenth of the recipe's, for --init)" if self.option("lr_divided") else ""
        comm.print_main(f"{len(self.images)} images; batch {args.batch_size} = "
                        f"{args.batch_size // size} on each of {size}; lr {args.lr:g}{tenth} x "
                        f"{args.batch_size} / 256 = {args.lr * args.batch_size / 256:g}")
        found = [part.backbone for part in state.values() if hasattr(part, "backbone")]
        for backbone in found:  # before anything is replaced
            trunks.check_sizes(backbone, args.in_chans, {view.size for view in self.views})
        self.state, new = state, self.folder.checkpoint is None
        self.step = self.folder.start(state)
        for backbone in found if new and self.initial else ():
            backbone.load_state_dict(self.initial)
        self.initial = None
        self.freeze(found, (self.option("freeze_backbone_epochs") or 0) * self.steps_per_epoch)
        self.watch_gradients()

    def freeze(self, found: list[nn.Module], steps: int) -> None:
        """Keep backbones as they are until so many steps are done: no gradient, eval mode."""
        self.frozen, self.frozen_steps = [], steps
        if self.step < steps:
            self.frozen = [(part, part.training) for whole in found for part in whole.modules()]
            for whole in found:
                whole.eval()
        elif steps:
            self.thaw()

    def thaw(self) -> None:
        """Train the backbones from now on."""
        for part, training in self.frozen:
            part.training = training
        self.frozen = []
        for optimizer in self.state.values():
            if isinstance(optimizer, torch.optim.SGD) and optimizer.state:  # all buffers or none
                for p in [p for group in optimizer.param_groups for p in group["params"]]:
                    optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    def watch_gradients(self) -> None:
        """Have every optimiser drop frozen gradients, and the log see the norm of all others."""
        self.grad_norm = None
        for part in self.state.values():
            if isinstance(part, torch.optim.Optimizer):
                part.register_step_pre_hook(self.before_optimizer)
            elif isinstance(part, torch.amp.GradScaler):
                part.unscale_ = self.measuring(part.unscale_)

    def measuring(self, unscale):
        """A scaler's `unscale_`, after which gradients may be clipped, and before that measured."""

        def unscale_and_measure(optimizer):
            unscale(optimizer)
            self.before_optimizer(optimizer)

        return unscale_and_measure

    def before_optimizer(self, optimizer, *_) -> None:
        """Before a step, and before clipping if there is any."""
        for part, _ in self.frozen:
            for p in part.parameters(recurse=False):
                p.grad = None
        if self.grad_norm is None and self.writer.due(self.step + 1):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            scale = getattr(optimizer, "grad_scale", None)  # of a fused step with float16
            self.grad_norm = norm if scale is None else norm / scale

    # ---------------------------------------------------------------------------------- the loop

    def steps(self, export, order=None):
        """Yield (step, batch) to the end; `export` is the backbone that every save writes.

        `order(epoch)`, if given, says which images an epoch goes through, see `Loader`. It is
        called where an epoch begins, before its first batch is loaded, and where a run goes on.
        """
        if self.folder.stopping:  # a stop signal came during `first_epoch`
            return
        args = self.args
        left = self.total_steps - self.step
        if self.option("profile") and args.profile + WARM_UP > left:
            raise RunError(f"--profile {args.profile} needs {args.profile} + {WARM_UP} steps, and "
                           f"{left} are left of the run; pass more --epochs or a smaller profile")
        self.loader = self.load(self.views, epochs=args.epochs, start_step=self.step,
                                draw=self.draw, order=order)
        self.writer = Log(args.output, self.world, batch_size=args.batch_size,
                          total_steps=self.total_steps, first_step=self.step,
                          every=args.log_every, tensorboard=self.option("tensorboard"),
                          **self.bounds)
        if self.every("probe_every") and not self.writer.has(self.step, "probe_effective_rank"):
            self.measure(export)
        profiler = contextlib.nullcontext(lambda: False)
        if self.option("profile"):
            profiler = profiled(args.profile, self.state, self.loader, args.output, self.world)
        with profiler as recorded:
            for epoch in range(self.step // self.steps_per_epoch, args.epochs):
                for batch in self.loader.epoch(epoch):
                    if self.frozen and self.step == self.frozen_steps:
                        self.thaw()
                    self.grad_norm = None
                    self.seed_step()
                    yield self.step, batch
                    self.step += 1
                    if recorded():
                        self.folder.stop_requested = self.folder.profiled = True
                    save, stop = self.folder.agree(self.step % self.steps_per_epoch == 0)
                    if save:
                        self.writer.check()
                        keep_as = f"backbone-epoch{epoch + 1:04d}.pth"
                        self.folder.save(self.step, self.state, export,
                                         keep_as if self.every("keep_every") else None)
                    if stop:
                        return
                    if self.every("probe_every"):
                        self.measure(export)

    def seed_step(self) -> None:
        """Make what a step draws from torch's generators (stochastic depth, dropout) its own.

        A function of the seed, the step and the process: resuming draws the same.
        """
        draws = rng.philox(self.args.seed, rng.DEPTH, self.step, self.world.rank)
        torch.manual_seed(int(draws.integers(2**63)))

    def every(self, name: str) -> bool:
        """Whether a flag of so many epochs is given, and so many are just done."""
        epochs = self.option(name)
        return bool(epochs) and self.step % (epochs * self.steps_per_epoch) == 0

    def measure(self, export) -> None:
        """Probe the backbone, and write what is found."""
        started, epoch = time.perf_counter(), self.step // self.steps_per_epoch
        try:
            numbers = self.probe.measure(export)
        except RunError as error:  # on every process: an image that training replaces by another
            numbers = {"probe_effective_rank": math.nan}
            comm.print_main(f"warning: no probe after epoch {epoch}: {error}")
        else:
            knn = f"k-NN top-1 {numbers['probe_knn']:.4f}, " if "probe_knn" in numbers else ""
            comm.print_main(f"probe after epoch {epoch}: {knn}effective rank "
                            f"{numbers['probe_effective_rank']:.1f}")
        self.writer.append({"step": self.step, "epoch": epoch, **numbers})
        self.writer.last_time += time.perf_counter() - started

    def first_epoch(self, views):
        """Yield the first epoch's images once more before it, in crops that no epoch trains on."""
        first = rng.epoch_order(self.args.seed, 0, len(self.images))
        loader = self.load(views, epochs=self.args.epochs + 1, start_step=self.total_steps,
                           order=lambda _: first)
        for batch in loader.epoch(self.args.epochs):
            yield batch
            if self.folder.agree(False)[1]:
                return

    def features(self, function, view, images=None) -> torch.Tensor:
        """Rows (len(images), D), on the CPU, that `function` makes of one view of every image.

        Meanwhile all modules of the state are in eval mode, with the first process's buffers.

        Args:
            function: images (n, C, H, W) to rows (n, D).
            view: an `augment.View` that draws no random numbers.
            images: those of the run if not given.
        """
        modes = {part: part.training for whole in self.state.values()
                 if isinstance(whole, nn.Module) for part in whole.modules()}
        for part in modes:
            part.training = False
            comm.copy_from_first(*part.buffers(recurse=False))
        found = features.extract(
            lambda given: {"trained": function(given)}, images or self.images, view, self.world,
            batch_size=256, workers=self.args.workers, start_worker=start_worker, blanks=True)
        for part, mode in modes.items():
            part.training = mode
        return found["trained"]

    def write_array(self, name: str, x: torch.Tensor) -> None:
        """Write a tensor that is equal on every process to a .npy in the run's folder."""
        with comm.same_error_on_all_ranks(writing=self.args.output):
            if self.world.is_main:
                with atomic_write(self.folder.path(name)) as file:
                    np.save(file, x.cpu().numpy())

    def load(self, views, **which):
        args = self.args
        return Loader(self.images, views, batch_size=args.batch_size, seed=args.seed,
                      world=self.world, workers=args.workers, **which)

    def log(self, loss, lr: float, indicators, *tensors) -> None:
        """Note a step's loss; now and then write a line, with what `indicators(*tensors)` says.

        The first of `tensors` are embeddings (..., N, D), whose effective rank is logged, or, where
        a method has none, something of four dimensions.
        """
        step, seen = self.step + 1, {}
        if self.writer.due(step):
            seen = dict(indicators(*tensors))
            z = tensors[0] if tensors and isinstance(tensors[0], torch.Tensor) else torch.empty(())
            if 2 <= z.ndim <= 3:
                seen["effective_rank"] = features.effective_rank(z.flatten(0, -2))
            if self.grad_norm is not None:
                seen["grad_norm"] = self.grad_norm
        self.writer.write(step, epoch=self.step // self.steps_per_epoch, loss=loss, lr=lr,
                          wait_seconds=self.loader.wait_seconds, **seen)


def starting_weights(args, flag: str) -> tuple[dict, str]:
    """The backbone that a flag names, as a state dict, and a hash of the file.

    A transformer's positions are resampled to the image size.

    Raises:
        RunError: no such file; another backbone, stem or number of channels; a tensor is missing,
            unknown, of another shape or not finite.
    """
    named = f"--{flag} {getattr(args, flag)}"
    given = features.resolve_checkpoint(getattr(args, flag), f"--{flag}", baselines=())
    if os.path.realpath(os.path.dirname(given.weights)) == os.path.realpath(args.output):
        raise RunError(f"{named} is in --output, where it would be replaced; choose "
                       "another --output")
    settings = features.settings_of(args)
    for name in ("arch", *features.of_this_kind(settings), "in_chans"):
        if given.settings.get(name, settings[name]) != settings[name]:
            kind = f"--{name.replace('_', '-')}"
            raise RunError(f"{kind} {settings[name]}, and {named} is of {kind} "
                           f"{given.settings[name]}; a backbone starts from one of its own kind")
    backbone = features.build(settings)
    shapes = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    wanted = getattr(backbone, "grid", None)
    weights.load_backbone(backbone, given.weights)
    features.print_doubts(given, settings)
    state = backbone.state_dict()
    if wanted and backbone.grid != wanted:
        first, table = state["pos_embed"].tensor_split([-math.prod(backbone.grid)], dim=1)
        table = backbones.resample_positions(table, backbone.grid, wanted, backbone.antialias)
        state["pos_embed"] = torch.cat([first, table], dim=1)
        comm.print_main("positions resampled from {} x {} patches to {} x {}".format(
            *backbone.grid, *wanted))
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(shapes.keys() | found.keys()):  # a transformer takes the parts of its file
        ours, theirs = (each.get(name, "none") for each in (shapes, found))
        if ours != theirs:
            raise RunError(f"{named} does not fit: {name} is {theirs} there and {ours} here; are "
                           "flags of the backbone, such as --layer-scale and --registers, right?")
    digest = hashlib.sha256()
    with open(given.weights, "rb") as file:
        for part in iter(lambda: file.read(2**24), b""):
            digest.update(part)
    return state, digest.hexdigest()[:12]


def check_tensorboard() -> None:
    """Raise a RunError where the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise RunError(f"--tensorboard: {error}; pip install tensorboard") from error
