"""What the memory bank of `npid_pirl.py` costs in a step: negatives, logits, loss, update.

    python benchmarks/npid_memory.py --num-negatives 4096 32000 --num-images 50000 1281167

Every part runs alone on random data, at batch 256 and D 128 unless told otherwise: the median of
`--repeats` after a warm-up, the device waited for at both ends. The share is that of all parts in a
step of them and of a backbone's forward, backward and SGD update (float32 on a CPU, bf16 on CUDA).
The last line is a JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from throughput import machine_name  # noqa: E402

import npid_pirl  # noqa: E402
from common import backbones, optim  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-negatives", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--num-images", type=int, nargs="+", default=[50_000, 1_281_167])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", default="small")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def seconds(function, repeats: int, device: torch.device, before=None) -> float:
    """Median time of a call, after one that is not counted; `before` is called ahead, untimed."""
    times = []
    for _ in range(repeats + 1):
        if before:
            before()
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def backbone_step(args, device: torch.device) -> float:
    """A step without the bank: backbone and head, forward, backward, SGD."""
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=3,
                                        zero_init_residual=False)
    model = npid_pirl.NPID(backbone, False, False, args.embedding_dim)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, fused=True)
    autocast, _ = optim.precision("auto", device)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    def step():
        with autocast():
            z = model([images])
        z.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds(step, args.repeats, device)


def bank_parts(args, num_images: int, num_negatives: int, device: torch.device) -> dict:
    """Seconds of each part of what a step does with the bank."""
    memory = nn.functional.normalize(torch.randn(num_images, args.embedding_dim, device=device))
    z = nn.functional.normalize(torch.randn(1, args.batch_size, args.embedding_dim, device=device),
                                dim=2).requires_grad_()
    on_cpu = torch.randperm(num_images)[: args.batch_size]
    index, found = on_cpu.to(device), {}

    def negatives():
        drawn = npid_pirl.draw_negatives(on_cpu, num_images, num_negatives, seed=0, step=1,
                                         rank=0)
        found["negatives"] = drawn.to(device)

    def logits():
        found["logits"] = npid_pirl.memory_logits(z, memory, index, found["negatives"], 0.07)

    def loss():
        npid_pirl.nce_loss(found["logits"][0], num_images, found["z"]).backward()

    def update():
        npid_pirl.update_memory(memory, on_cpu, z[0].detach(), 0.5)

    times = {"negatives": seconds(negatives, args.repeats, device)}
    times["logits"] = seconds(logits, args.repeats, device)
    found["z"] = npid_pirl.estimate_z(found["logits"][0].detach(), num_images)
    times["loss and backward"] = seconds(loss, args.repeats, device, before=logits)
    times["update"] = seconds(update, args.repeats, device)
    return times


def main(args):
    device = torch.device(args.device)
    machine = machine_name()
    print(f"{machine}; {torch.get_num_threads()} threads; torch {torch.__version__}")
    backbone = backbone_step(args, device)
    print(f"{args.arch} at {args.image_size} px, batch {args.batch_size}: {1000 * backbone:.1f} ms")
    results = []
    names = ("negatives", "logits", "loss and backward", "update")
    print(f"{'images':>9} {'K':>6}" + "".join(f"{name + ' ms':>22}" for name in names)
          + f"{'share of the step':>19}")
    for num_images in args.num_images:
        for num_negatives in args.num_negatives:
            parts = bank_parts(args, num_images, num_negatives, device)
            total = sum(parts.values())
            share = total / (total + backbone)
            print(f"{num_images:>9} {num_negatives:>6}"
                  + "".join(f"{1000 * parts[name]:>22.1f}" for name in names) + f"{share:>19.3f}",
                  flush=True)
            results.append({"num_images": num_images, "num_negatives": num_negatives,
                            "seconds": parts, "share": share})
    print(json.dumps({"machine": machine, "backbone_seconds": backbone, "setting": vars(args),
                      "date": time.strftime("%Y-%m-%d"), "results": results}))


if __name__ == "__main__":
    main(parse_args())
