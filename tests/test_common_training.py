import signal

import numpy as np
import pytest
import torch
from torch import nn

from common import augment, checkpoint, cli, distributed as comm
from common.images import ArrayImages
from common.training import Training
from helpers import lines, state_of

VALUES = dict(arch="toy", image_size=4, in_chans=3, mean=[0.0], std=[1.0], crop_scale=[0.3, 1.0],
              epochs=3, batch_size=4, lr=0.5, weight_decay=0.0, warmup_epochs=0)


@pytest.fixture(autouse=True)
def _same_signal_handlers():
    before = {number: signal.getsignal(number) for number in checkpoint.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Toy:
    """A method that notes what it is given: step, images, mean of the view."""

    def __init__(self, folder, *flags):
        parser, _ = cli.method_parser("toy.py", "", ["toy"], crops="one", batch_norm=False)
        self.args = cli.parse(parser, {"imagenet": VALUES, "digits": VALUES}, [
            "--output", str(folder), "--workers", "0", "--log-every", "2", *flags])
        self.model, self.seen, self.asked = nn.Linear(1, 1), [], []
        self.first = []  # what `first_epoch` gave

    def indicators(self, step):
        self.asked.append(step)
        return {"twice": torch.tensor(2.0 * step)}

    def run(self, stop_at=None, fill=False, stop_filling=False):
        world = comm.setup("cpu")
        pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), dtype=np.uint8)
        crop = augment.RandomResizedCrop((0.3, 1), ratio=(1, 1), interpolation="bilinear")
        views = augment.normalized([(4, [crop])], 3, [0.0], [1.0])
        with Training(self.args, world, ArrayImages(pixels, None, 3), views,
                      chance_loss=1.25, floors={"twice": 0.0}) as run:
            assert (run.steps_per_epoch, run.total_steps) == (2, 6)
            run.resume(model=self.model)
            if fill and run.step == 0:
                for batch in run.first_epoch(views):
                    self.first.append((batch.index.tolist(), batch.views[0].mean().item()))
                    if stop_filling:
                        signal.raise_signal(signal.SIGUSR1)
            for step, batch in run.steps(export=self.model):
                self.seen.append((step, batch.index.tolist(), batch.views[0].mean().item()))
                with torch.no_grad():
                    self.model.weight.fill_(step)
                run.log(torch.tensor(0.5 + step), 0.1 * step, self.indicators, step)
                if step == stop_at:
                    signal.raise_signal(signal.SIGUSR1)
        return self


def test_every_step_has_its_images_and_every_few_a_line(tmp_path, capsys):
    toy = Toy(tmp_path).run()
    assert [step for step, *_ in toy.seen] == list(range(6))
    for epoch in range(3):
        index = sum((index for _, index, _ in toy.seen[2 * epoch : 2 * epoch + 2]), [])
        assert len(index) == len(set(index)) == 8
    written = [tuple(line[name] for name in ("step", "epoch", "loss", "twice"))
               for line in lines(tmp_path)]
    assert written == [(1, 0, 0.5, 0), (2, 0, 1.5, 2), (4, 1, 3.5, 6), (6, 2, 5.5, 10)]
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0, 0.1, 0.3, 0.5])
    assert toy.asked == [0, 1, 3, 5]  # indicators cost nothing where no line is due
    said = capsys.readouterr().out
    assert "9 images; batch 4 = 4 on each of 1; lr 0.5 x 4 / 256 = 0.0078125" in said
    assert "first loss 0.5000 (chance: 1.2500)" in said
    assert torch.load(tmp_path / "backbone.pth", weights_only=True)["weight"].item() == 5
    previous = torch.load(tmp_path / "checkpoint.prev.pt", weights_only=True)
    assert previous["step"] == 4 and previous["state"]["model"]["weight"].item() == 3


def test_a_stopped_run_goes_on_with_the_next_step(tmp_path):
    whole = Toy(tmp_path / "whole").run().seen
    cut = tmp_path / "cut"
    assert Toy(cut).run(stop_at=2).seen == whole[:3]
    assert state_of(cut)["model"]["weight"].item() == 2
    toy = Toy(cut).run()
    assert toy.seen == whole[3:]
    assert [line["step"] for line in lines(cut)] == [1, 2, 4, 6]
    assert Toy(cut).run().seen == []  # it is finished


def test_the_first_epoch_before_it_has_its_images_in_crops_of_its_own(tmp_path):
    toy = Toy(tmp_path).run(fill=True)
    assert [index for index, _ in toy.first] == [index for _, index, _ in toy.seen[:2]]
    assert not {mean for _, mean in toy.first} & {mean for *_, mean in toy.seen}
    assert toy.seen == Toy(tmp_path / "without").run().seen


def test_a_stop_in_the_first_epoch_ends_the_run_before_its_first_step(tmp_path, capsys):
    toy = Toy(tmp_path).run(fill=True, stop_filling=True)
    assert len(toy.first) == 1 and toy.seen == []
    assert "stopped before the first step" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint.pt").exists()
    again = Toy(tmp_path).run(fill=True)
    assert len(again.first) == 2 and len(again.seen) == 6


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    toy = Toy(tmp_path, "--log-every", "100")
    toy.indicators = lambda step: {"twice": torch.tensor(0.0)}
    plain = Training.log

    def spoil(self, loss, *rest):
        plain(self, torch.tensor(float("nan")) if self.step == 2 else loss, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(comm.RunError, match="of step 3 is"):
        patch.setattr(Training, "log", spoil)
        toy.run()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
