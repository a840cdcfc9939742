"""A training run behind one loop: images, checkpoints, log, signals.

    with Training(args, world, images, views) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        for step, batch in run.steps(export=model.backbone):
            ...
            run.log(loss, lr, indicators, z)

A run saves between two steps: at every epoch's end, every --save-every-minutes, on a stop signal.
"""

from common import cli, distributed as comm
from common.checkpoint import Run
from common.loader import Loader, check_batch_size
from common.log import Log


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

    Attributes:
        step: steps done. total_steps: of the whole run. steps_per_epoch.
    """

    def __init__(
        self, args, world, images, views, *, chance_loss=None, floors=None, ceilings=None,
        settings=None, product="backbone.pth",
    ):
        self.args, self.world, self.images, self.views = args, world, images, views
        self.bounds = dict(chance_loss=chance_loss, floors=floors or {}, ceilings=ceilings)
        self.folder = Run(args.output, settings or cli.settings(args), images, world,
                          resume=args.resume, save_every_minutes=args.save_every_minutes,
                          product=product)
        check_batch_size(images, args.batch_size, world)  # before anything is replaced
        self.steps_per_epoch = len(images) // args.batch_size
        self.total_steps = args.epochs * self.steps_per_epoch

    def __enter__(self):
        self.folder.__enter__()
        return self

    def __exit__(self, *error):
        return self.folder.__exit__(*error)

    def resume(self, **state) -> None:
        """Load the newest checkpoint, if there is one, into modules, optimisers and tensors."""
        args, size = self.args, self.world.size
        comm.print_main(f"{len(self.images)} images; batch {args.batch_size} = "
                        f"{args.batch_size // size} on each of {size}; lr {args.lr:g} x "
                        f"{args.batch_size} / 256 = {args.lr * args.batch_size / 256:g}")
        self.state = state
        self.step = self.folder.start(state)

    def steps(self, export):
        """Yield (step, batch) to the end; `export` is the backbone that every save writes."""
        if self.folder.stopping:  # a stop signal came during `first_epoch`
            return
        args = self.args
        self.loader = self.load(self.views, epochs=args.epochs, start_step=self.step)
        self.writer = Log(args.output, self.world, batch_size=args.batch_size,
                          total_steps=self.total_steps, first_step=self.step,
                          every=args.log_every, **self.bounds)
        for epoch in range(self.step // self.steps_per_epoch, args.epochs):
            for batch in self.loader.epoch(epoch):
                yield self.step, batch
                self.step += 1
                save, stop = self.folder.agree(self.step % self.steps_per_epoch == 0)
                if save:
                    self.writer.check()
                    self.folder.save(self.step, self.state, export)
                if stop:
                    return

    def first_epoch(self, views):
        """Yield the first epoch's images once more before it, in crops that no epoch trains on."""
        loader = self.load(views, epochs=self.args.epochs + 1, start_step=self.total_steps,
                           order_epoch=0)
        for batch in loader.epoch(self.args.epochs):
            yield batch
            if self.folder.agree(False)[1]:
                return

    def load(self, views, **which):
        args = self.args
        return Loader(self.images, views, batch_size=args.batch_size, seed=args.seed,
                           world=self.world, workers=args.workers, **which)

    def log(self, loss, lr: float, indicators, *tensors) -> None:
        """Note a step's loss; now and then write a line, with what `indicators(*tensors)` says."""
        step = self.step + 1
        seen = indicators(*tensors) if self.writer.due(step) else {}
        self.writer.write(step, epoch=self.step // self.steps_per_epoch, loss=loss, lr=lr,
                          wait_seconds=self.loader.wait_seconds, **seen)
