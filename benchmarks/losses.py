"""Our losses beside lightly's on the same embeddings, in float64: values and gradients.

    python benchmarks/losses.py

What differs between two runs of `quality.py` is then not the loss. The last line is a JSON object.
"""

import json
import sys
import time
from pathlib import Path

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    LeJEPALoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models.utils import select_most_similar
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import barlow_twins
import byol
import densecl
import dino
import dinov2
import lejepa
import moco
import simclr
import simsiam
import swav
import vicreg

N, D, K = 64, 32, 50


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def of_simclr(z):
    return simclr.nt_xent(z[0], z[1], 0.5), NTXentLoss(temperature=0.5)(z[0], z[1])


def with_queue(queue):
    peer = NTXentLoss(temperature=0.1, memory_bank_size=(K, D))
    peer.memory_bank.bank = queue.clone()
    peer.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    return peer


def of_moco(z):
    queue, keys = unit(K, D), z[1].detach()
    return moco.info_nce(z[0], keys, queue, 0.1), with_queue(queue)(z[0], keys)


def of_densecl(z):
    queue, cells = unit(K, D), unit(2, N // 4, 4, D)  # 4 cells an image, of the map and embedded
    q, k = z.view(2, N // 4, 4, D)
    found = select_most_similar(*cells, k.detach()).flatten(0, 1)
    ours = densecl.dense_info_nce(q, k, densecl.match_cells(*cells), queue, 0.1)
    return ours, with_queue(queue)(q.flatten(0, 1), found)


def of_barlow_twins(z):
    return (barlow_twins.barlow_twins_loss(z[0], z[1], 0.0051),
            BarlowTwinsLoss(lambda_param=0.0051)(z[0], z[1]))


def of_simsiam(z):
    return simsiam.negative_cosine(z[0], z[1]), NegativeCosineSimilarity()(z[0], z[1].detach())


def of_byol(z):
    peer = NegativeCosineSimilarity()(z[0], z[1].detach())
    return byol.byol_loss(z[0], z[1]), 2 + 2 * peer  # lightly's has another scale and constant


def of_vicreg(z):
    return vicreg.vicreg_loss(z[0], z[1], 25.0, 25.0, 1.0), VICRegLoss()(z[0], z[1])


def of_lejepa(z):
    directions = lejepa.draw_directions(0, 0, D, K)
    peer = LeJEPALoss(lambda_param=0.05).double()  # its table of the integral is float32
    peer.sigreg._generate_unit_vectors = lambda *_: directions
    ours = 0.05 * lejepa.sigreg(z, directions) + 0.95 * lejepa.invariance(z, 2)
    return ours, peer(local_proj=z[2:], global_proj=z[:2])


def of_swav(z):
    prototypes = unit(K, D)
    scores = nn.functional.normalize(z, dim=-1) @ prototypes.T
    codes = swav.compute_codes(scores[:2].detach(), None, prototypes, 0.05, 3)
    peer = SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05, sinkhorn_iterations=3)
    ours = swav.swapped_prediction_loss(scores, codes, 0.1)
    return ours, peer(list(scores[:2]), list(scores[2:]))


def of_dino(z):
    teacher, center = torch.randn(2, N, D, dtype=z.dtype), torch.randn(D, dtype=z.dtype)
    peer = DINOLoss(output_dim=D, warmup_teacher_temp_epochs=1, teacher_temp=0.04).double()
    peer.center.copy_(center)
    return dino.dino_loss(z, teacher, center, 0.1, 0.04), peer(list(teacher), list(z), epoch=1)


def of_ibot(z):
    """Of 4 crops, whose masked patches are not as many, the third without any."""
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    for crop, count in enumerate((10, 33, 0, N - 43)):
        mask[crop].view(-1)[:count] = True
    center = torch.randn(D, dtype=z.dtype)
    peer = IBOTPatchLoss(output_dim=D, teacher_temp=0.0625).double()
    peer.center.center.copy_(center)
    targets = dinov2.centered_targets(z[1].detach(), center, 0.0625)
    weights = dinov2.spread_masks(mask.flatten().nonzero()[:, 0], 4, 64)[1]
    return (dinov2.patch_loss(z[0], targets, weights, 4, 0.1),
            peer(z[1].detach(), z[0], mask))


def of_koleo(z):
    return dinov2.koleo_loss(z[0]), KoLeoLoss()(z[0])


def main():
    torch.manual_seed(0)
    found = {}
    for name, views, pair in (
        ("SimCLR", 2, of_simclr), ("MoCo", 2, of_moco), ("Barlow Twins", 2, of_barlow_twins),
        ("SimSiam", 2, of_simsiam), ("BYOL", 2, of_byol),
        ("SwAV, 2 + 4 crops", 6, of_swav), ("DINO, 2 + 4 crops", 6, of_dino),
        ("VICReg", 2, of_vicreg), ("LeJEPA, 2 + 4 crops", 6, of_lejepa),
        ("DenseCL, cells", 2, of_densecl), ("iBOT, patches", 2, of_ibot),
        ("DINOv2, KoLeo", 1, of_koleo),
    ):
        z = torch.randn(views, N, D, dtype=torch.float64, requires_grad=True)
        ours, theirs = pair(z)
        grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (ours, theirs)]
        apart = ((grads[0] - grads[1]).norm() / grads[0].norm()).item()
        found[name] = {"ours": ours.item(), "lightly": theirs.item(), "gradients_apart": apart}
        print(f"{name:19} ours {ours.item():.10f}  lightly {theirs.item():.10f}  "
              f"gradients apart by {apart:.1e} of their norm")
    print(json.dumps({"benchmark": "losses", "date": time.strftime("%Y-%m-%d"),
                      "torch": torch.__version__, "losses": found}))


if __name__ == "__main__":
    main()
