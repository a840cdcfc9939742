"""How good a backbone is while it trains: the accuracy of `eval_knn.py`, and effective rank."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from common import augment, cli, distributed as comm, features, labelled
from common.distributed import World
from common.images import NoSplit, evenly
from common.knn import count_right
from common.workers import start_worker

NEIGHBOURS, TEMPERATURE = 20, 0.07  # what eval_knn.py takes first
RANKED = 4096  # images whose features are ranked, at most


class Probe:
    """Measures the exported backbone of a run; the run itself is left as it is, bit for bit.

    Args:
        args: the shared flags (`cli.method_parser`).
        images: the training images, measured where there are no labelled splits.

    Raises:
        RunError: `--probe-data` has no labelled splits.
    """

    def __init__(self, args, world: World, images):
        self.args, self.world = args, world
        self.settings = features.settings_of(args)
        data = args.probe_data or args.data
        try:
            self.splits = labelled.open_splits(
                data, args.in_chans, **cli.sources(args) | dict(limit=None))
            comm.print_main(f"probe: all {len(self.splits[0])} training and {len(self.splits[1])} "
                            f"test images of {data}")
        except NoSplit as error:
            if args.probe_data:
                raise NoSplit(str(error).replace("--data", "--probe-data", 1)) from error
            why = str(error).partition(";")[0]  # its remedy is an evaluation's
            comm.print_main(f"probe: effective rank alone, for there are no labels ({why}); "
                            "--probe-data can name images that have some")
            self.splits = [images.subset(evenly(len(images), RANKED))]

    def measure(self, backbone: nn.Module) -> dict[str, float]:
        """Numbers of a backbone by name; all processes call it and get the same."""
        with torch.random.fork_rng([self.world.device] if self.world.device.type == "cuda" else []):
            frozen = features.build(self.settings)
            frozen.load_state_dict(backbone.state_dict())
            frozen = features.freeze(frozen, None, self.world)
            rows = [self.rows(frozen, images) for images in self.splits]
        found = {}
        if len(rows) == 2:
            found["probe_knn"] = self.accuracy(*rows)
        ranked = rows[0][evenly(len(rows[0]), RANKED)].to(self.world.device)
        found["probe_effective_rank"] = features.effective_rank(ranked).item()
        return found

    def rows(self, backbone: nn.Module, images) -> torch.Tensor:
        """Features (len(images), D) as the evaluations take them."""
        view = features.central_view(self.settings, augment.CenterCrop, "bicubic")
        function = functools.partial(features.layers, backbone)
        (rows,) = features.extract(function, images, view, self.world, batch_size=256,
                                   workers=self.args.workers, start_worker=start_worker).values()
        return rows

    def accuracy(self, train, test) -> float:
        """Share of the test images that their neighbours among the training images name rightly."""
        world, m = self.world, len(test)
        shard = world.part(m)
        bank, queries = (normalize(x.to(world.device), dim=1) for x in (train, test[shard]))
        labels, truth = (torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
                         for images in self.splits)
        classes = int(max(labels.max(), truth.max())) + 1
        right, _ = count_right(bank, labels.to(world.device), queries,
                               truth[shard].to(world.device), [(NEIGHBOURS, TEMPERATURE)], classes,
                               self_index=None, chunk=2048)
        return (comm.sum_over_processes(right) / m).item()
