import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch

import swav
from common import backbones, distributed as comm, optim
from common.images import open_images
from common.loader import Loader
from helpers import TINY, check_joined, lines, own_gradients, own_rows, state_of, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = swav.parse_args(["--recipe", "imagenet"])
    assert (args.num_crops, args.crop_sizes) == ([2, 6], [224, 96])
    assert args.crop_scales == [0.14, 1.0, 0.05, 0.14] and args.image_size == 224
    assert (args.num_prototypes, args.temperature, args.epsilon) == ([3000], 0.1, 0.05)
    assert (args.sinkhorn_iterations, args.queue_length, args.weight_decay) == (3, 0, 1e-6)
    scale = args.batch_size / 256
    assert args.lr * scale == pytest.approx(4.8)
    assert args.start_lr * scale == pytest.approx(0.3)
    assert args.final_lr * scale == pytest.approx(0.0048)
    assert args.std[0] == 0.228  # as in the released runs


def test_the_small_batch_recipe_has_the_queue_of_the_paper():
    args = swav.parse_args(["--recipe", "imagenet_small_batch"])
    assert (args.batch_size, args.lr, args.final_lr, args.warmup_epochs) == (256, 0.6, 0.0006, 0)
    assert (args.queue_length, args.queue_start_epoch) == (3840, 15)


SMALL_CROPS = ["--num-crops", "2", "2", "--crop-sizes", "16", "8", "--crop-scales", "0.6", "1",
               "0.3", "0.6"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--queue-length", "300"], "300 is not a multiple of --batch-size 256; try 256 or 512"),
        (["--crop-sizes", "16"], "--crop-sizes 1"),
        (["--crop-sizes", "16", "8", "--image-size", "24"], "--image-size 24"),
        (["--sinkhorn-iterations", "0"], "'0'"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        swav.parse_args([*SMALL_CROPS, *flags])
    assert named in capsys.readouterr().err


def test_a_queue_longer_than_the_data_is_refused_with_a_length_that_works(tmp_path):
    with pytest.raises(comm.RunError, match="48 is more than the 40 images of --data; at most 32"):
        train(swav, tmp_path, "--limit", "40", "--queue-length", "48")


# -------------------------------------------------------------------------------------------- views


def test_crops_come_global_ones_first_with_the_papers_strengths():
    views = swav.build_views(swav.parse_args(["--recipe", "imagenet"]))
    assert [view.size[0] for view in views] == [224] * 2 + [96] * 6
    assert [view.geometry[0].scale for view in views[1:3]] == [(0.14, 1), (0.05, 0.14)]
    jitter, gray, blur, _ = views[0].colour
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p)
    assert strengths == (0.8, 0.8, 0.8, 0.2, 0.8) and (gray.p, blur.p) == (0.2, 0.5)
    crop, flip = views[0].geometry
    assert (crop.interpolation, flip.p) == ("bilinear", 0.5)


# -------------------------------------------------------------------------------------------- model


def small_model(prototypes=(7,)):
    torch.manual_seed(0)
    backbone = swav.backbones.build_backbone("resnet_tiny", stem="small", in_chans=3,
                                             zero_init_residual=False)
    return swav.SwAV(backbone, 32, 8, prototypes)


def test_the_backbone_is_called_once_per_resolution():
    model, sizes = small_model((7, 5)), []
    model.backbone.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    views = [torch.rand(4, 3, side, side) for side in (16, 16, 8, 8, 8)]
    z, scores = model(views)
    assert [tuple(shape) for shape in sizes] == [(8, 3, 16, 16), (12, 3, 8, 8)]
    assert z.shape == (5, 4, 8) and [s.shape for s in scores] == [(5, 4, 7), (5, 4, 5)]
    assert torch.allclose(z.norm(dim=2), torch.ones(5, 4))
    assert torch.allclose(scores[0], z @ model.prototypes[0].weight.T)


def test_prototypes_are_scaled_to_unit_norm_in_place():
    model = small_model()
    before = model.prototypes[0].weight.detach().clone()
    model.normalize_prototypes()
    after = model.prototypes[0].weight
    assert torch.allclose(after, before / before.norm(dim=1, keepdim=True)) and after.requires_grad


# ----------------------------------------------------------------------------------------- sinkhorn


def cosines(n=12, k=5, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, size=(n, k))


def sinkhorn_loops(scores, epsilon, iterations):
    """Equations 3 to 5, one number at a time."""
    n, k = scores.shape
    q = [[math.exp(float(s) / epsilon) for s in row] for row in scores]
    for _ in range(iterations):
        for j in range(k):
            mass = sum(q[i][j] for i in range(n))
            for i in range(n):
                q[i][j] /= mass * k
        for i in range(n):
            mass = sum(q[i])
            for j in range(k):
                q[i][j] /= mass
    return np.array(q)


@pytest.mark.parametrize("epsilon, iterations", [(0.05, 1), (0.05, 3), (0.5, 10), (0.01, 3)])
def test_sinkhorn_equals_loops(epsilon, iterations):
    codes = swav.sinkhorn(torch.from_numpy(cosines()), epsilon, iterations)
    np.testing.assert_allclose(codes, sinkhorn_loops(cosines(), epsilon, iterations), rtol=1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.01])
def test_sinkhorn_in_float32_is_right_down_to_epsilon_of_one_hundredth(epsilon):
    scores = cosines(64, 300)
    codes = swav.sinkhorn(torch.from_numpy(scores).float(), epsilon, 3)
    assert codes.dtype == torch.float32
    np.testing.assert_allclose(codes, sinkhorn_loops(scores, epsilon, 3), atol=1e-5)


def test_many_iterations_use_all_prototypes_alike():
    codes = swav.sinkhorn(torch.from_numpy(cosines(40, 8)), 0.05, 100)
    np.testing.assert_allclose(codes.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(codes.sum(0), 5, rtol=1e-3)


def own_codes(scores):
    return swav.sinkhorn(own_rows(scores), 0.05, 3).numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_codes_are_those_of_the_joined_batch(pool, size):
    codes = np.concatenate(pool.run(size, own_codes, cosines()))
    np.testing.assert_allclose(codes, sinkhorn_loops(cosines(), 0.05, 3), rtol=1e-9)
    alone = np.concatenate([sinkhorn_loops(part, 0.05, 3) for part in np.split(cosines(), size)])
    assert np.abs(alone - codes).max() > 0.01  # what codes of each process alone would be


# --------------------------------------------------------------------------------------------- loss


def test_the_loss_equals_loops_over_pairs():
    rng = np.random.default_rng(3)
    scores, codes = rng.uniform(-1, 1, (4, 6, 5)), rng.dirichlet(np.ones(5), (2, 6))
    terms = []
    for a in range(2):
        for v in range(4):
            if v != a:
                for n in range(6):
                    p = np.exp(scores[v, n] / 0.1)
                    terms.append(-(codes[a, n] * np.log(p / p.sum())).sum())
    loss = swav.swapped_prediction_loss(torch.from_numpy(scores), torch.from_numpy(codes), 0.1)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_zero_scores_give_ln_k_exactly():
    codes = swav.sinkhorn(torch.zeros(6, 16), 0.05, 3)
    loss = swav.swapped_prediction_loss(torch.zeros(3, 6, 16), torch.stack([codes] * 2), 0.1)
    assert torch.allclose(codes, torch.full_like(codes, 1 / 16))
    assert loss.item() == pytest.approx(math.log(16), rel=1e-6)


def test_gradient_flows_through_the_scores_of_the_predictions_alone():
    scores = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    codes = torch.softmax(scores[:2], 2)  # would carry a gradient, were they not detached
    swav.swapped_prediction_loss(scores, codes, 0.1).backward()
    p = (scores / 0.1).softmax(2).detach()
    q = codes.detach()
    wanted = torch.stack([p[0] - q[1], p[1] - q[0], 2 * p[2] - q[0] - q[1]]) / (0.1 * 2 * 2 * 4)
    assert torch.allclose(scores.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_raised(dtype):
    scores = torch.rand(3, 4, 5).to(dtype)
    assert swav.sinkhorn(scores[0], 0.01, 3).dtype == torch.float32
    loss = swav.swapped_prediction_loss(scores, scores[:2].softmax(2), 0.1)
    assert loss.dtype == torch.float32


def own_gradient(z, prototypes):
    """Codes, loss and gradient of this process's rows, as in the script."""
    prototypes = torch.from_numpy(prototypes)

    def loss(z):
        scores = torch.nn.functional.normalize(z, dim=2) @ prototypes.T
        codes = swav.compute_codes(scores[:2].detach(), None, prototypes, 0.05, 3)
        return swav.swapped_prediction_loss(scores, codes, 0.1)

    return own_gradients(loss, z, dim=1)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    rng = np.random.default_rng(4)
    z, prototypes = rng.normal(size=(3, 8, 6)), rng.normal(size=(5, 6))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    check_joined(pool, size, own_gradient, z, prototypes, dim=1)


# -------------------------------------------------------------------------------------------- queue


def filled_queue(steps, n):
    """A queue of 12 rows after some steps of 4 images; image i of step t is the number 4 t + i."""
    queue, pointer = torch.zeros(2, 12, 1), 0
    share = n // comm.size()
    for step in range(steps):
        numbers = n * step + comm.rank() * share + torch.arange(share, dtype=torch.float32)
        z = torch.stack([numbers, -numbers])[:, :, None]
        pointer = swav.update_queue(queue, pointer, z)
    return queue[:, :, 0].tolist(), pointer


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_the_queue_the_oldest_leaves_first(pool, size):
    for queue, pointer in pool.run(size, filled_queue, 5, 4):
        assert queue[0] == [12, 13, 14, 15, 16, 17, 18, 19, 8, 9, 10, 11] and pointer == 8
        assert queue[1] == [-number for number in queue[0]]


def queued_codes(scores, queue, prototypes):
    own = own_rows(scores, dim=1)
    queue, prototypes = torch.from_numpy(queue), torch.from_numpy(prototypes)
    return swav.compute_codes(own, queue, prototypes, 0.05, 3).numpy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_codes_with_a_queue_are_the_last_rows_of_the_joint_codes(pool, size):
    rng = np.random.default_rng(5)
    scores, queue = rng.uniform(-1, 1, (2, 4, 5)), rng.normal(size=(2, 8, 3))
    prototypes = rng.normal(size=(5, 3))
    found = np.concatenate(pool.run(size, queued_codes, scores, queue, prototypes), axis=1)
    for a in range(2):
        joint = np.concatenate([queue[a] @ prototypes.T, scores[a]])
        wanted = sinkhorn_loops(joint, 0.05, 3)[-4:]
        np.testing.assert_allclose(found[a], wanted, rtol=1e-9)


# --------------------------------------------------------------------------------------------- main

RUN = ["--limit", "64", "--epochs", "2", "--freeze-prototypes-epochs", "1", *SMALL_CROPS]


def watched(folder, *flags):
    """Losses of each step, and what each step's codes were made with."""
    queues, weights = [], []
    compute_codes = swav.compute_codes

    def watch(scores, queue, prototypes, *rest):
        queues.append(None if queue is None else queue.clone().numpy())
        weights.append(prototypes.detach().clone().numpy())
        return compute_codes(scores, queue, prototypes, *rest)

    with mock.patch.object(swav, "compute_codes", watch):
        return train(swav, folder, *RUN, *flags), queues, weights


QUEUE = ["--queue-length", "32", "--queue-start-epoch", "0"]


@pytest.mark.parametrize("size", [1, 2])
def test_the_queue_is_used_once_full_and_prototypes_stay_on_the_unit_sphere(pool, size, tmp_path):
    losses, queues, weights = pool.run(size, watched, tmp_path, *QUEUE)[0]
    assert [queue is None for queue in queues] == [True] * 2 + [False] * 6
    assert all((np.abs(np.linalg.norm(queue, axis=2) - 1) < 1e-9).all() for queue in queues[2:])
    frozen, moved = weights[1:5], weights[5]  # step 5 is the first after a step of the second epoch
    assert all(np.allclose(w, weights[0], atol=1e-12) for w in frozen)
    assert np.abs(moved - weights[0]).max() > 1e-9
    assert all(np.allclose(np.linalg.norm(w, axis=1), 1) for w in weights)


def test_the_queue_starts_to_fill_when_told_to(tmp_path, monkeypatch):
    written, update_queue = [], swav.update_queue

    def watch(queue, pointer, z):
        written.append((pointer, queue.abs().sum().item() > 0))
        return update_queue(queue, pointer, z)

    monkeypatch.setattr(swav, "update_queue", watch)
    flags = ["--queue-length", "32", "--queue-start-epoch", "1", "--epochs", "3"]
    _, queues, _ = watched(tmp_path, *flags)
    assert written == [(0, False), (16, True), *[(0, True), (16, True)] * 3]  # in 8 of 12 steps
    assert [queue is None for queue in queues] == [True] * 6 + [False] * 6  # 4 steps an epoch


def test_a_queue_that_would_never_start_is_refused(capsys):
    with pytest.raises(SystemExit):
        swav.parse_args(["--queue-length", "256", "--queue-start-epoch", "40"])
    assert "--queue-start-epoch 40 comes after" in capsys.readouterr().err


TEACHER = ["--teacher-momentum", "0.9"]


@pytest.mark.parametrize("teacher", [[], TEACHER], ids=["", "teacher"])
def test_two_processes_compute_what_one_does(teacher, pool, tmp_path):
    one = pool.run(1, watched, tmp_path / "one", *QUEUE, *teacher)[0]
    two = pool.run(2, watched, tmp_path / "two", *QUEUE, *teacher)
    for losses, queues, _ in two:
        np.testing.assert_allclose(losses, one[0], atol=1e-9)
        np.testing.assert_allclose(queues[-1], one[1][-1], atol=1e-7)


def test_a_teacher_keeps_its_share_and_copies_the_running_statistics():
    backbone = backbones.build_backbone("resnet_tiny", stem="small", in_chans=3,
                                        zero_init_residual=False)
    student = swav.SwAV(backbone, 6, 5, [4, 3])
    teacher = copy.deepcopy(student)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    student([torch.randn(4, 3, 8, 8)] * 2)
    swav.update_teacher(teacher, student, 0.9)
    now, names = student.state_dict(), dict(teacher.named_parameters())
    for name, value in teacher.state_dict().items():
        wanted = 0.9 * before[name] + 0.1 * now[name] if name in names else now[name]
        if name.startswith("prototypes"):
            wanted = wanted / wanted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(value, wanted)


def test_the_state_holds_a_teacher_where_there_is_one(tmp_path):
    train(swav, tmp_path / "none", *RUN)
    assert "teacher" not in state_of(tmp_path / "none")
    train(swav, tmp_path / "one", *RUN, *TEACHER)
    state = state_of(tmp_path / "one")
    student, teacher = state["model"], state["teacher"]
    for name, value in teacher.items():
        same = torch.equal(value, student[name])
        assert same == ("running_" in name or "num_batches" in name), name
    assert torch.allclose(teacher["prototypes.0.weight"].norm(dim=1), torch.ones(60).double())


def test_the_steps_with_a_teacher_one_by_one(tmp_path):
    """Student, EMA, teacher, codes with a queue, loss and LARC against the loop of `main`."""
    flags = ["--limit", "64", "--freeze-prototypes-epochs", "0", *SMALL_CROPS, *TEACHER,
             "--queue-length", "16", "--queue-start-epoch", "0", "--start-lr", "0.5"]
    losses = train(swav, tmp_path, *flags)
    rates = [line["lr"] for line in lines(tmp_path)]
    args = swav.parse_args([*TINY, *flags])
    torch.manual_seed(args.seed)
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=False)
    model = swav.SwAV(backbone, args.projector_dim, args.embedding_dim, args.num_prototypes)
    teacher = copy.deepcopy(model)
    optimizer = optim.LARC(model.parameters(), lr=0.0, momentum=0.9, trust_coefficient=0.001,
                           weight_decay=args.weight_decay)
    images = open_images("digits", "pretrain", 3, limit=64)
    loader = Loader(images, swav.build_views(args), batch_size=16, epochs=1, seed=args.seed,
                    workers=0, world=comm.World(0, 1, torch.device("cpu")))
    queue = None
    for step, batch in enumerate(loader.epoch(0)):
        c, c_teacher = model.prototypes[0].weight, teacher.prototypes[0].weight
        with torch.no_grad():
            c.div_(c.norm(dim=1, keepdim=True))
        _, (scores,) = model(batch.views)
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                old.copy_(0.9 * old + 0.1 * new)
            for old, new in zip(teacher.buffers(), model.buffers(), strict=True):
                old.copy_(new)
            c_teacher.div_(c_teacher.norm(dim=1, keepdim=True))
            # One view at a time: in eval mode nothing depends on the others of the batch.
            z = [teacher.eval()([view])[0][0] for view in batch.views[:2]]
        loss = 0
        for a in range(2):
            rows = z[a] @ c_teacher.T
            if queue is not None:
                rows = torch.cat([queue[a] @ c_teacher.T, rows])
            codes = sinkhorn_loops(rows.detach().numpy(), args.epsilon, 3)[-16:]
            for v in {0, 1, 2, 3} - {a}:
                p = (scores[v] / args.temperature).exp()
                p = p / p.sum(1, keepdim=True)
                loss = loss - (torch.from_numpy(codes) * p.log()).sum(1).mean() / (2 * 3)
        assert loss.item() == pytest.approx(losses[step], rel=1e-9)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = z  # as long as a batch
    assert step == 3
    torch.testing.assert_close(state_of(tmp_path)["queue"], torch.stack(queue), atol=1e-9, rtol=0)


def test_several_sets_of_prototypes_train(tmp_path):
    assert len(train(swav, tmp_path, *RUN, "--num-prototypes", "10", "20", dtype="float32")) == 8


def test_collapsed_features_raise_the_named_warning_within_an_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(swav.SwAV, "forward", lambda self, views: collapsed(self, views))
    train(swav, tmp_path, *RUN, "--epochs", "1", dtype="float32")
    said = capsys.readouterr().out
    assert "warning: prototype_entropy is 0" in said and "warning: z_std is 0" in said


def collapsed(model, views):
    """All images get the same embedding; the parameters stay in the graph."""
    still = 0 * sum(p.sum() for p in model.backbone.parameters())
    z = torch.nn.functional.normalize(torch.ones(len(views), len(views[0]), 64), dim=2) + still
    return z, [layer(z) for layer in model.prototypes]
