import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common import augment, distributed as comm, rng, workers
from common.distributed import RunError, World
from common.images import ArrayImages, open_images
from common.loader import Loader, RankBatches, fitting_batch
from helpers import random_images

WORLD = World(0, 1, torch.device("cpu"))


def small_views(channels=3, size=8):
    steps = [
        augment.RandomResizedCrop(scale=(0.2, 1), ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    ]
    return [augment.View(size, steps, channels), augment.View(size + 3, steps, channels)]


def loader(images, batch_size=4, epochs=2, seed=0, **options):
    options = {"world": WORLD, "workers": 0, **options}
    views = options.pop("views", None) or small_views(images.channels)
    return Loader(images, views, batch_size=batch_size, epochs=epochs, seed=seed, **options)


def batches(loader, epochs=2):
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


# -------------------------------------------------------------------------------------------- order


def test_an_epoch_drops_the_last_short_batch_and_repeats_no_image():
    made = loader(ArrayImages(random_images(21), None, 3))
    for epoch in range(2):
        seen = torch.cat([batch.index for batch in made.epoch(epoch)]).tolist()
        assert len(seen) == 20 == len(set(seen)) and seen == rng.epoch_order(0, epoch, 21)[
            :20].tolist()


def drawn(rank, size, workers, context=None):
    """What a process gets in two epochs before the colour work, and after it."""
    images = ArrayImages(random_images(), None, 3)
    world = World(rank, size, torch.device("cpu"))
    made = loader(images, world=world, workers=workers, multiprocessing_context=context)
    raw, finished = [], []
    finish = augment.View.finish
    try:
        augment.View.finish = lambda view, c, p, d: raw.append((c, p)) or finish(view, c, p, d)
        finished = batches(made)
    finally:
        augment.View.finish = finish
    return raw, finished


@pytest.mark.parametrize("size, workers", [(1, 4), (2, 0), (2, 2), (4, 0), (4, 1)])
def test_workers_and_processes_change_no_crop_and_no_parameter(size, workers):
    whole_raw, whole = drawn(0, 1, 0)
    parts = [drawn(rank, size, workers) for rank in range(size)]
    for number, (crops, parameters) in enumerate(whole_raw):
        assert torch.equal(torch.cat([raw[number][0] for raw, _ in parts]), crops)
        assert torch.equal(torch.cat([raw[number][1] for raw, _ in parts]), parameters)
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([f[number].index for _, f in parts]), batch.index)
        for view in range(2):
            joined = torch.cat([f[number].views[view] for _, f in parts])
            assert torch.allclose(joined, batch.views[view], atol=1e-5)


def test_workers_are_started_only_where_there_are_any(monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "worker_context", lambda: asked.append(1))  # None: torch's own way
    images = ArrayImages(random_images(), None, 3)
    assert len(batches(loader(images, workers=0))) == 10 and asked == []
    assert len(batches(loader(images, workers=1))) == 10 and asked == [1]


def test_spawned_workers_give_the_same():
    forked, spawned = drawn(0, 1, 1)[0], drawn(0, 1, 1, "spawn")[0]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(forked, spawned, strict=True))


def test_a_start_in_the_middle_of_an_epoch_goes_on_exactly():
    images = ArrayImages(random_images(), None, 3)
    whole, late = batches(loader(images)), batches(loader(images, start_step=3))
    assert len(late) == len(whole) - 3
    for a, b in zip(whole[3:], late, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.views[1], b.views[1])


def test_an_epoch_can_take_the_images_of_another_one_with_its_own_crops():
    images = ArrayImages(random_images(), None, 3)
    second, taken = loader(images, start_step=5), rng.epoch_order(0, 1, 20)
    usual, ordered = (list(loader(images, **how).epoch(0)) for how in (
        {}, {"order": lambda _: taken}))
    for one, other, later in zip(ordered, usual, second.epoch(1), strict=True):
        assert torch.equal(one.index, later.index) and not torch.equal(one.index, other.index)
        assert not torch.equal(one.views[0], later.views[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_method_can_say_which_images_an_epoch_takes_when_it_begins(workers):
    images, asked = ArrayImages(random_images(), None, 3), []

    def order(epoch):
        asked.append(epoch)
        return np.repeat([3, 7], 10) if epoch == 1 else None

    made = loader(images, workers=workers, order=order)
    usual = [batch.index.tolist() for batch in loader(images).epoch(0)]
    assert asked == [] and [batch.index.tolist() for batch in made.epoch(0)] == usual
    assert asked == [0]
    second = [batch.index.tolist() for batch in made.epoch(1)]
    assert second == [[3] * 4, [3] * 4, [3, 3, 7, 7], [7] * 4, [7] * 4] and asked == [0, 1]
    late = loader(images, workers=workers, order=order, start_step=7)
    assert [batch.index.tolist() for batch in late.epoch(1)] == second[2:]


def test_views_epochs_and_seeds_draw_differently():
    images = ArrayImages(random_images(4), None, 3)
    views = small_views()[:1] * 2
    shares = [RankBatches(images, views, 4, seed, 0, 1) for seed in (0, 1)]
    sorted_rows = []
    for share in shares:
        for epoch in (0, 1):
            [(_, parameters)], index, *_ = share[epoch]
            sorted_rows += [p[index.argsort()] for p in parameters.chunk(2)]
    for i, one in enumerate(sorted_rows):
        assert not any(torch.equal(one, other) for other in sorted_rows[:i])


def test_views_of_a_kind_are_finished_in_one_call_and_as_they_would_be_alone(monkeypatch):
    often, never = (
        [augment.RandomResizedCrop((0.2, 1), (3 / 4, 4 / 3), interpolation="bilinear"),
         augment.ColorJitter(0.4, 0.4, saturation=0.4, hue=0.1, p=p)] for p in (0.8, 0.0))
    views = augment.normalized([(8, often), (6, often), (8, never), (8, often)], 3, [0.4], [0.2])
    images, calls, finish = ArrayImages(random_images(), None, 3), [], augment.View.finish
    monkeypatch.setattr(augment.View, "finish",
                        lambda view, c, p, d: calls.append(len(c)) or finish(view, c, p, d))
    together = next(loader(images, views=views).epoch(0))
    assert calls == [12, 4]
    for number, view in enumerate(views):
        uniforms = np.stack([
            rng.philox(0, rng.SAMPLE, 0, i, number).random(view.num_uniforms)
            for i in together.index.tolist()])
        geometry, colour = view.draw(uniforms, np.full((4, 2), 12))
        crops = [view.crop(images.read(i), [p[row] for p in geometry])
                 for row, i in enumerate(together.index.tolist())]
        alone = finish(view, torch.from_numpy(np.stack(crops)), torch.from_numpy(colour),
                       torch.device("cpu"))
        torch.testing.assert_close(together.views[number], alone, rtol=0, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    images = ArrayImages(random_images(), None, 3)
    by_index = {}
    for batch_size in (4, 10):
        for batch in loader(images, batch_size=batch_size).epoch(0):
            for i, view in zip(batch.index.tolist(), batch.views[0], strict=True):
                by_index.setdefault(i, []).append(view)
    assert len(by_index) == 20
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in by_index.values())


def test_fewer_images_than_a_batch_names_both_and_a_size_that_fits():
    images = ArrayImages(random_images(10), None, 3)
    with pytest.raises(RunError, match=r"--batch-size 64 .*10 images.*--batch-size 10 fits"):
        loader(images, batch_size=64)


def test_a_batch_that_images_do_not_fill_is_a_power_of_two():
    images = ArrayImages(random_images(20), None, 3)
    assert [fitting_batch(size, images, WORLD) for size in (6, 20, 21, 256)] == [6, 20, 16, 16]
    with pytest.raises(RunError, match="batch norm wants 2 or more"):
        fitting_batch(4, images.subset(np.arange(1)), WORLD)


# --------------------------------------------------------------------------------- unreadable files


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 JPEGs of mixed sizes; five of them cut short, and one that is text."""
    root = tmp_path_factory.mktemp("thousand")
    rng = np.random.default_rng(0)
    for number in range(1000):
        size = (*rng.integers(10, 40, 2), 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / f"{number:04d}.jpg")
    for number in (0, 111, 222, 333, 999):
        whole = (root / f"{number:04d}.jpg").read_bytes()
        (root / f"{number:04d}.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "0500.jpg").write_text("this is no image")
    return root


BAD = [0, 111, 222, 333, 500, 999]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_replaced_and_named_once(thousand, workers, capsys):
    images = open_images(str(thousand), "pretrain", 3)
    for batch in batches(loader(images, batch_size=50, workers=workers)):
        assert len(set(batch.index.tolist())) == 50 and not set(BAD) & set(batch.index.tolist())
    told = [line for line in capsys.readouterr().out.splitlines() if "unreadable" in line]
    assert sorted(line.split("/")[-1][:4] for line in told) == [f"{number:04d}" for number in BAD]


def indices(rank, size, root):
    images = open_images(root, "pretrain", 3)
    shares = RankBatches(images, small_views(), 40, 0, rank, size)
    return [shares[step][1].tolist() for step in range(25)]


@pytest.mark.parametrize("size", [2, 4])
def test_unreadable_files_leave_the_batches_equal_for_any_number_of_processes(thousand, size):
    whole = indices(0, 1, str(thousand))
    parts = [indices(rank, size, str(thousand)) for rank in range(size)]
    assert [sum((part[step] for part in parts), []) for step in range(25)] == whole


def test_the_replacement_stands_in_the_same_slot_of_the_next_batch(thousand):
    images = open_images(str(thousand), "pretrain", 3)
    shares = RankBatches(images, small_views(), 50, 0, 0, 1)
    order = rng.epoch_order(0, 0, 1000)
    for bad in BAD:
        step, slot = divmod(int(np.flatnonzero(order == bad)[0]), 50)
        expected = int(order[(step + 1) % 20 * 50 + slot])
        assert expected not in BAD and shares[step][1][slot] == expected


def spoiled(thousand, tmp_path, count):
    shutil.copytree(thousand, tmp_path / "spoiled")
    for number in range(1, 1 + count):
        (tmp_path / "spoiled" / f"{number * 7:04d}.jpg").write_text("spoiled")
    return open_images(str(tmp_path / "spoiled"), "pretrain", 3)


def test_too_many_unreadable_files_stop_the_run(thousand, tmp_path):
    images = spoiled(thousand, tmp_path, 50)
    with pytest.raises(RunError, match=r"of 1000 files cannot be read \(at most 10 may\)"):
        batches(loader(images, batch_size=50))


def bad_on_one_process(root, batch_size):
    images = open_images(root, "pretrain", 3)
    world = World(comm.rank(), comm.size(), torch.device("cpu"))
    try:
        batches(loader(images, batch_size=batch_size, world=world))
    except RunError as error:
        return str(error)
    return None


def test_all_processes_stop_with_the_same_words(thousand, tmp_path, pool):
    images = spoiled(thousand, tmp_path, 50)
    said = pool.run(2, bad_on_one_process, images.root, 50)
    assert said[0] == said[1] and "cannot be read" in said[0]


def test_a_16_bit_file_stops_the_run_and_is_named(tmp_path, pool):
    for number in range(8):
        pixels = random_images(1)[0]
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(tmp_path / "8.png")
    Image.fromarray(random_images(1)[0]).save(tmp_path / "9.png")
    said = pool.run(2, bad_on_one_process, str(tmp_path), 2)
    assert said[0] == said[1] and "8.png has more than 8 bits" in said[0]


def test_too_many_unreadable_files_are_counted_not_listed(tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number}.png").write_text("this is no image")
    images = open_images(str(tmp_path), "pretrain", 3)
    with pytest.raises(RunError, match=r"of 40 files cannot be read \(at most 1 may\)"):
        batches(loader(images, batch_size=8))
    assert capsys.readouterr().out == ""


def test_a_slot_without_any_readable_image_stops_the_run(tmp_path):
    for number in range(4):
        Image.fromarray(random_images(1)[0]).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("spoiled")
    images = open_images(str(tmp_path), "pretrain", 3)
    with pytest.raises(RunError, match=r"could stand in slot .*2\.png"):
        batches(loader(images, batch_size=4))


def index_and_step(index, step):
    return torch.stack([index, torch.full_like(index, step)])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_method_draws_for_a_batch_is_drawn_for_its_indices_and_step(workers):
    images = ArrayImages(random_images(), None, 3)
    made = loader(images, workers=workers, start_step=3, draw=index_and_step)
    for step, batch in enumerate(batches(made), start=3):
        assert torch.equal(batch.drawn, index_and_step(batch.index, step))
    assert step == 9 and next(loader(images).epoch(0)).drawn is None
