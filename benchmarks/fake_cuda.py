"""Run the training loops and evaluations as on a GPU, on a machine without one.

    python benchmarks/fake_cuda.py                           # every method, a line each: minutes
    python benchmarks/fake_cuda.py --all                     # other recipes and protocols too
    python benchmarks/fake_cuda.py --only dino mae           # cases whose names start so
    python benchmarks/fake_cuda.py --only simclr --detail    # with launches, copies, collectives
    python benchmarks/fake_cuda.py --repo /path/to/another/checkout

Needs gcc and a CUDA build of torch (tried: 2.11, 2.14). Tensors on the CPU are real, those on
`cuda` are FakeTensors of the recipe's sizes: shapes, strides, dtypes and devices are followed
through augmentation, forward under autocast, loss, backward, optimiser and state, values are not.
The scripts' own `main` runs; replaced are the DataLoader (no images are decoded), DDP (the bare
module), the collectives (local copies; `x8` cases pretend to be process 3 of 8) and Run's saving.

Reported for a case, in the two steps that write no log line (the first one does):
  mismatch   an op on tensors of two devices, or any other exception: the case fails
  sync       the host waits for the GPU: item, bool, tolist, nonzero, boolean index, blocking copy
  pageable   copies to the GPU from memory that is not pinned, for which the driver may wait
  launches   kernels a step, estimated: ops that are no views; foreach ops by the rules of their
             fast route; one for a fused op; ops inside torch.compile are not modelled
  ms         max(bytes / 2.8 TB/s, FLOP / rate, 2.5 us) an op; rates in TFLOP/s: bf16 600, TF32 300,
             float32 45, float64 30
  GB         largest sum of live storages (activations, state; without workspaces, fragments)
Exit status 1 if a case has a mismatch or syncs in a step. Nothing here replaces a run on a GPU: no
value, kernel, stream, NCCL or allocator is real. `--seconds` bounds a case.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import weakref

STEPS = 3  # the first writes a log line, the others are counted
CASES = {  # name: script, processes, flags; sizes are of one process
    "simclr": ("simclr", 1, "--batch-size 512"),
    "simclr-x8": ("simclr", 8, "--batch-size 4096"),
    "simclr-grad-cache": ("simclr_multicrop", 1, "--recipe imagenet --batch-size 4096 "
                          "--no-sync-bn --grad-cache 512"),
    "simclr-multicrop-x8": ("simclr_multicrop", 8, "--batch-size 2048"),
    "simclr-cifar10": ("simclr", 1, "--recipe cifar10"),
    "moco": ("moco", 1, "--batch-size 256"),
    "moco-x8": ("moco", 8, "--batch-size 256"),
    "moco-v1": ("moco", 1, "--batch-size 256 --version 1"),
    "moco-cifar10": ("moco", 1, "--recipe cifar10"),
    "densecl-x8": ("densecl", 8, "--batch-size 256 --dense-warmup-steps 0"),
    "swav": ("swav", 1, "--batch-size 256"),
    "swav-x8": ("swav", 8, "--batch-size 2048"),
    "swav-queue-x4": ("swav", 4, "--recipe imagenet_small_batch --queue-start-epoch 0 "
                      "--queue-length 256 --freeze-prototypes-epochs 0"),
    "swav-teacher-x8": ("swav", 8, "--batch-size 2048 --teacher-momentum 0.99"),
    "swav-cifar10": ("swav", 1, "--recipe cifar10"),
    "dino": ("dino", 1, "--batch-size 128"),
    "dino-x8": ("dino", 8, "--batch-size 1024 --freeze-last-layer-epochs 0"),
    "dino-recompute": ("dino", 1, "--batch-size 128 --grad-checkpoint"),
    "dino-resnet50": ("dino", 1, "--recipe imagenet_resnet50 --batch-size 64"),
    "dino-cifar10": ("dino", 1, "--recipe cifar10"),
    "dinov2": ("dinov2", 1, "--batch-size 64"),
    "dinov2-recompute": ("dinov2", 1, "--batch-size 64 --grad-checkpoint"),
    "dinov2-large-x8": ("dinov2", 8, "--recipe dinov2_large --batch-size 128"),
    "ibot-x8": ("dinov2", 8, "--recipe ibot_imagenet --batch-size 512"),
    "barlow_twins": ("barlow_twins", 1, "--batch-size 256"),
    "barlow_twins-x8": ("barlow_twins", 8, "--batch-size 2048"),
    "barlow_twins-cifar10": ("barlow_twins", 1, "--recipe cifar10"),
    "mae": ("mae", 1, "--batch-size 512 --accum-steps 2"),
    "mae-x8": ("mae", 8, "--batch-size 4096"),
    "mae-cifar10": ("mae", 1, "--recipe cifar10"),
    "npid": ("npid_pirl", 1, "--batch-size 256"),
    "npid-cifar10": ("npid_pirl", 1, "--recipe cifar10"),
    "pirl": ("npid_pirl", 1, "--method pirl --batch-size 128"),
    "pirl-x8": ("npid_pirl", 8, "--method pirl --batch-size 1024"),
    "pirl-cifar10": ("npid_pirl", 1, "--method pirl --recipe cifar10"),
    "deepcluster_v2": ("deepcluster_v2", 1,
                       "--batch-size 256 --limit 768 --num-clusters 300 300 300"),
    "deepcluster_v2-x8": ("deepcluster_v2", 8,
                          "--batch-size 2048 --limit 6144 --num-clusters 3000 3000 3000"),
    "deepcluster-x8": ("deepcluster_odc", 8,
                       "--batch-size 512 --limit 4096 --num-clusters 300"),
    "simsiam-x8": ("simsiam", 8, "--batch-size 512"),
    "byol-x8": ("byol", 8, "--batch-size 4096"),
    "moco_v3-x8": ("moco_v3", 8, "--batch-size 4096"),
    "moco_v3-vit-x8": ("moco_v3", 8, "--recipe imagenet_vit_base --batch-size 1024"),
    "vicreg-x8": ("vicreg", 8, "--batch-size 2048"),
    "lejepa-x8": ("lejepa", 8, "--recipe imagenet_resnet50 --batch-size 512"),
    "ijepa-x8": ("ijepa", 8, "--batch-size 2048"),
    "simmim-x8": ("simmim", 8, "--batch-size 2048"),
    "cae-x8": ("cae", 8, "--batch-size 512"),
    "rotation": ("pretext", 1, "--batch-size 256"),
    "jigsaw-x8": ("pretext", 8, "--task jigsaw --batch-size 256"),
    "location-x8": ("pretext", 8, "--task location --batch-size 512"),
    "eval_knn": ("eval_knn", 1, "--checkpoint random pixels --data fake --arch resnet50 "
                 "--stem imagenet --image-size 224 --in-chans 3 --k 20 200 --draws 50"),
    "eval_knn-loo": ("eval_knn", 1, "--checkpoint pixels --data digits --leave-one-out --shots"),
    "eval_linear": ("eval_linear", 1, "--checkpoint pixels --data digits"),
    "eval_linear-x8": ("eval_linear", 8, "--checkpoint pixels --data digits"),
    "eval_linear-moco": ("eval_linear", 1, "--checkpoint random --protocol moco --data fake "
                         "--arch resnet50 --stem imagenet --image-size 224 --in-chans 3"),
    "eval_linear-mae": ("eval_linear", 1, "--checkpoint random --protocol mae --data fake "
                        "--arch vit_base --image-size 224 --in-chans 3 --train-batch-size 1024"),
    "eval_linear-vissl-x8": ("eval_linear", 8, "--checkpoint random --protocol vissl --data fake "
                             "--arch resnet50 --stem imagenet --image-size 224 --in-chans 3"),
    "eval_linear-dino": ("eval_linear", 1, "--checkpoint random --protocol dino --data fake "
                         "--arch vit_small --image-size 224 --in-chans 3"),
    "eval_segmentation": ("eval_segmentation", 1, "--checkpoint random --method linear --data "
                          "digits --arch resnet50 --stem imagenet --image-size 224"),
    "eval_linear-aim": ("eval_linear", 1, "--checkpoint random --probe attentive --data fake "
                        "--arch vit_small --image-size 224 --in-chans 3 --amp bf16"),
    "finetune-mae": ("finetune", 1, "--checkpoint random --protocol mae --data fake "
                     "--batch-size 128"),
    "finetune-semi_swav-x8": ("finetune", 8, "--checkpoint random --protocol semi_swav --data "
                              "fake"),
}
USUAL = ("simclr", "simclr-x8", "moco", "moco-x8", "swav", "swav-x8", "dino", "dino-x8",
         "barlow_twins", "barlow_twins-x8", "mae", "mae-x8", "npid", "pirl", "pirl-x8",
         "deepcluster_v2", "deepcluster_v2-x8", "eval_knn-loo", "eval_linear", "eval_linear-x8",
         "eval_linear-moco")
# Every method at a tiny size: for the tests.
TINY = ("--recipe cifar10 --image-size 16 --batch-size 64 --limit 1024 --epochs 2 "
        "--warmup-epochs 0 --arch ")
CROPS = " --num-crops 2 2 --crop-sizes 16 8 --crop-scales 0.4 1 0.05 0.4"
SCRIPTS = {
    "simclr": "resnet_tiny", "moco": "resnet_tiny --queue-length 256", "mae": "vit_micro",
    "densecl": "resnet_tiny --queue-length 256 --dense-warmup-steps 0",
    "simclr_multicrop": "resnet_tiny" + CROPS,
    "swav": "resnet_tiny --queue-length 0 --queue-start-epoch 0" + CROPS,
    "dino": "vit_micro --clip-per-parameter 3 --freeze-last-layer-epochs 0" + CROPS,
    "dinov2": "vit_micro --freeze-last-layer-epochs 0" + CROPS,
    "barlow_twins": "resnet_tiny", "npid_pirl": "resnet_tiny --method pirl --num-negatives 64",
    "deepcluster_v2": "resnet_tiny --num-clusters 8 8", "simsiam": "resnet_tiny",
    "byol": "resnet_tiny", "moco_v3": "resnet_tiny", "vicreg": "resnet_tiny",
    "pretext": "resnet_tiny --task jigsaw --jigsaw-size 24 --jigsaw-patch-size 7",
    "lejepa": "resnet_tiny" + CROPS, "deepcluster_odc": "resnet_tiny --num-clusters 8",
    "simmim": "vit_micro --drop-path 0.1 --relative-positions", "ijepa": "vit_micro",
    "cae": "vit_micro --drop-path 0.1 --vocabulary-size 64",
}
CASES |= {f"tiny-{script}-x{size}": (script, size, TINY + own)
          for size in (1, 8) for script, own in SCRIPTS.items()}
IMAGES = 1_281_167  # of `--data fake`: as many as ImageNet's, so that banks have its size
SHIM = r"""
/* torch asks how many GPUs there are before a backward; its stand-in guard for fake tensors says 8.
   None of the driver's functions is ever reached but the first. */
static signed char cards = 0;
void fake_cuda_cards(int n) { cards = n; }
signed char _ZN3c104cuda12device_countEv(void) { return cards; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) { return *f = *active = 0; }
"""


# -------------------------------------------------------------------------------------- the parent


def make_shim(folder: str) -> str:
    """A library that answers torch's question about cards, and stands in for libcuda.so.1."""
    import importlib.util

    lib = os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib")
    with open(os.path.join(lib, "libcaffe2_nvrtc.so"), "rb") as file:
        names = set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", file.read()))
    names -= {b"cuDevicePrimaryCtxGetState"}
    source, made = os.path.join(folder, "shim.c"), os.path.join(folder, "shim.so")
    with open(source, "w") as file:
        file.write(SHIM)
        file.writelines(f"int {n.decode()}(void) {{ return 999; }}\n" for n in sorted(names))
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", made, source],
                   check=True)
    return made


def parent(args) -> int:
    chosen = [n for n in CASES if n.startswith(tuple(args.only or [""]))
              and (args.only or n in USUAL or args.all and not n.startswith("tiny"))]
    tiny = {size: [n for n in chosen if n.startswith("tiny") and CASES[n][1] == size]
            for size in (1, 8)}
    bad = 0
    with tempfile.TemporaryDirectory(prefix="fake-cuda-") as folder:
        shim = make_shim(folder)
        jobs = [[n] for n in chosen if not n.startswith("tiny")]
        for names in [*jobs, *filter(None, tiny.values())]:  # tiny ones share a process
            world = CASES[names[0]][1]
            env = dict(os.environ, LD_PRELOAD=shim, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE",
                       RANK="3" if world > 1 else "0", WORLD_SIZE=str(world), LOCAL_RANK="0",
                       LOCAL_WORLD_SIZE="1", PYTHONDONTWRITEBYTECODE="1")
            started, errors = time.monotonic(), "died"
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--repo", args.repo, "--case", *names],
                    env=env, cwd=folder, capture_output=True, text=True, timeout=args.seconds)
                printed, errors = done.stdout, (done.stderr.strip().splitlines() or ["died"])[-1]
            except subprocess.TimeoutExpired as late:
                printed, errors = (late.stdout or b"").decode(), f"more than {args.seconds} s"
            found = dict(json.loads(line[5:]) for line in printed.splitlines()
                         if line.startswith("CASE "))
            for name in names:
                case = found.get(name, {"error": errors})
                bad += show(name, case, time.monotonic() - started, args.detail)
                if args.json:
                    with open(args.json, "a") as file:
                        file.write(json.dumps({"case": name, **case}) + "\n")
    print(f"{len(chosen)} cases, {bad} with a device mismatch or a sync in a step")
    return 1 if bad else 0


def show(name: str, found: dict, seconds: float, detail: bool) -> bool:
    """Print a case's line; whether it is bad."""
    if "error" in found:
        print(f"{name:22} FAILS  {found['error']}", flush=True)
        if detail and "trace" in found:
            print(found["trace"])
        return True
    syncs = found["syncs"]
    word = f"SYNCS {sum(syncs.values()):g} a step" if syncs else "runs, no sync"
    phases = "  ".join(f"{p} {v['launches']:.0f} ({v['ms']:.1f} ms)"
                       for p, v in found["phases"].items())
    print(f"{name:22} {word:16} launches {found['launches']:.0f}, {found['ms']:.1f} ms: {phases}; "
          f"{found['gb']:.1f} GB; pageable {found['pageable']:.0f} "
          f"({found['pageable_mb']:.1f} MB)  [{seconds:.0f} s]", flush=True)
    for place, count in sorted(syncs.items(), key=lambda item: -item[1])[: None if detail else 12]:
        print(f"{'':22}   sync x{count:g} a step: {place}")
    if detail:
        for key in ("allowed", "augmentation", "lines", "slow", "copies", "collectives", "ops",
                    "warnings", "notes"):
            for place, count in found.get(key, {}).items():
                print(f"{'':22}   {key}: {count} {place}")
    return bool(syncs)


# --------------------------------------------------------------------------------------- the child


class Stopped(Exception):
    """Enough steps were seen."""


def child(repo: str, names: list[str]) -> None:
    import ctypes
    import importlib
    import warnings

    import numpy as np
    import torch
    from PIL import Image
    from torch import nn
    from torch._library.custom_ops import OPDEFS
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_map_only
    from torch.utils.flop_counter import flop_registry
    from torch.utils.weak import WeakTensorKeyDictionary

    torch.set_num_threads(1)
    script, size, flags = CASES[names[0]]
    aten = torch.ops.aten
    with FakeTensorMode():
        pass  # now torch has its stand-in guard for a card
    ctypes.CDLL(None).fake_cuda_cards(64)
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None  # 2.11 makes a tensor
    torch.autograd.set_multithreading_enabled(False)

    # What a machine with a card would say
    for attribute, value in dict(
        is_available=True, device_count=1, is_initialized=True, current_device=0, set_device=None,
        is_bf16_supported=True, get_device_name="none: fake", max_memory_allocated=0,
        manual_seed_all=None, synchronize=None, is_current_stream_capturing=False,
        _is_in_bad_fork=False, get_rng_state=torch.empty(0, dtype=torch.uint8),
    ).items():
        setattr(torch.cuda, attribute, lambda *_, _value=value, **__: _value)

    def memory_format(x, weight, _):  # cuDNN's rule: channels last if one of both is
        last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
                   and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if last and x.dtype != torch.float64 else torch.contiguous_format

    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = memory_format
    here = os.path.realpath(repo)
    functions = os.path.join(os.path.dirname(torch.__file__), "nn", "modules", "_functions")

    def where() -> str:
        """The line of the checkout that is running; with torch's own module, if it is in one."""
        frame, inner = sys._getframe(2), ""
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(here) and path != __file__:
                return f"{os.path.relpath(path, here)}:{frame.f_lineno}{inner}"
            if not inner and path.startswith(functions):
                inner = f" (torch/nn/modules/_functions.py:{frame.f_lineno})"
            frame = frame.f_back
        return f"torch{inner}"

    class Watch:
        """What is counted, by step."""

        live = 0
        storages, pinned, shadows = {}, {}, WeakTensorKeyDictionary()

        @classmethod
        def begin(cls):
            cls.phase, cls.step, cls.peak = "loss and state", 0, cls.live
            cls.tally = collections.defaultdict(lambda: collections.defaultdict(float))
            cls.notes = collections.Counter()

        @classmethod
        def counted(cls):
            return 1 <= cls.step < STEPS

        @classmethod
        def add(cls, what, key, amount=1):
            if cls.counted():
                cls.tally[what][key] += amount
            elif what == "sync":
                cls.tally["allowed"][key] += amount

    @contextlib.contextmanager
    def phase(word):
        before = Watch.phase
        if before == "loss and state":
            Watch.phase = word
        try:
            yield
        finally:
            Watch.phase = before

    def on_card(x):
        return isinstance(x, torch.Tensor) and x.device.type == "cuda"

    def nbytes(x):
        sides = zip(x.shape, x.stride(), strict=True)  # an expanded tensor is read once
        return x.element_size() * math.prod(n for n, step in sides if step or n == 1)

    def launches(func, args, out) -> int:
        """About how many kernels an op starts."""
        word = func._schema.name.removeprefix("aten::")
        if word.startswith("_foreach_"):
            lists = [a for a in args if isinstance(a, (list, tuple)) and a
                     and isinstance(a[0], torch.Tensor)]
            n = len(lists[0])
            if word.startswith(("_foreach_copy", "_foreach_zero")):
                return max(1, n // 50)
            zero_dim = len(lists) == 3 and "addc" in word and all(t.dim() == 0 for t in lists[1])
            same = all(
                len(row) == len(lists) and len({(t.shape, t.dtype) for t in row}) == 1
                and all(dim == 1 or len({t.stride()[i] for t in row}) == 1
                        for i, dim in enumerate(row[0].shape))
                for row in zip(*lists, strict=True))
            if not (same or zero_dim):
                Watch.add("slow foreach", f"{word} of {n} tensors at {where()}")
                return n
            chunks = sum(-(-t.numel() // 65536) for t in lists[0])
            room = {1: 110, 2: 64, 3: 48, 4: 36}.get(len(lists) + (not word.endswith("_")), 30)
            return max(-(-n // room), -(-chunks // 320), 1) + ("norm" in word)
        if word.startswith("_fused_"):
            n, total = len(args[0]), sum(t.numel() for t in args[0])
            return max(-(-n // 36), -(-total // (65536 * 320)), 1)
        return {"convolution_backward": 3, "native_layer_norm_backward": 2, "sort": 2, "topk": 2,
                "_scaled_dot_product_flash_attention_backward": 3}.get(word, 1)

    def millis(func, args, kwargs, out, moved) -> float:
        flops, kind = 0, None
        formula = flop_registry.get(func._overloadpacket)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if formula is not None and tensors:
            try:
                flops = formula(*args, **kwargs, out_val=out)
            except Exception as error:  # a formula that does not know an argument
                Watch.notes[f"no FLOP for {func}: {error}"] += 1
            kind = tensors[0].dtype
        half = (torch.bfloat16, torch.float16)
        rate = 600e12 if kind in half else 30e12 if kind == torch.float64 else 45e12
        if kind == torch.float32 and "conv" in str(func):
            rate = 300e12  # TF32: torch's default for convolutions
        if flops:
            Watch.add("flop", Watch.phase, flops)
        return 1e3 * max(moved / 2.8e12, flops / rate, 2.5e-6)

    WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default,
             aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
             aten.bincount.default, aten.is_nonzero.default}
    FACTORY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach",
               "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_"}
    GUESS = {torch.bool: True}  # a value that nobody knows: true, -1 (no bad step so far), 0.5

    def guess(dtype):
        return GUESS.get(dtype, 0.5 if dtype.is_floating_point else -1)

    class Card(TorchDispatchMode):
        """Ops with a tensor on the card run on fake tensors, all others as always."""

        fake = FakeTensorMode()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            flat = tree_flatten((args, kwargs))[0]
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            target = kwargs.get("device")
            target = None if target is None else torch.device(target).type
            fakes = [x for x in tensors if isinstance(x, FakeTensor)]
            if not fakes and target != "cuda":
                return func(*args, **kwargs)
            if func.namespace == "common":  # an operator of the checkout: what is in it
                body = next(op._backend_fns["cuda"] for name, op in OPDEFS.items()
                            if name == func._schema.name)
                with self:
                    return body(*args)
            if func.namespace == "prim":  # questions about a tensor
                return func(*args, **kwargs)
            if func in SPECIAL:
                return self.note(func, args, kwargs, SPECIAL[func](*args, **kwargs))
            word = func._schema.name.removeprefix("aten::")

            if word.startswith("_fused_"):  # some have no shapes in torch
                devices = {t.device for t in tensors if t.dim() or t.device.type == "cuda"}
                if len(devices) != 1:
                    raise RuntimeError(f"{word}: tensors on {devices}")
                return self.note(func, args, kwargs, None)

            # From the card to the host
            if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
                Watch.add("sync", f"copy to the CPU at {where()}")
                return args[0].fill_(guess(args[0].dtype))
            if func is aten._to_copy.default and target == "cpu" and fakes:
                Watch.add("sync", f"copy to the CPU at {where()}")
                shadow = Watch.shadows.get(args[0])
                if shadow is not None:
                    return shadow.to(kwargs.get("dtype") or shadow.dtype)
                made = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                if made.dtype == torch.int64 and made.dim():
                    return made.zero_()  # classes and indices
                return made.fill_(guess(made.dtype))
            if func in WAITS:
                Watch.add("sync", f"{word} at {where()}")
                return self.waited(func, args, kwargs)

            # A boolean index is a nonzero; an index on the CPU is a blocking copy
            if word in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
                indices = list(args[1])
                for i, index in enumerate(indices):
                    if index is None:
                        continue
                    if index.dtype in (torch.bool, torch.uint8):
                        Watch.add("sync", f"boolean index at {where()}")
                        if isinstance(index, FakeTensor):
                            with self.fake:
                                rows = [torch.zeros(index.numel(), dtype=torch.int64, device="cuda")
                                        for _ in range(index.dim())]
                            indices[i : i + 1] = rows
                    elif not isinstance(index, FakeTensor):
                        Watch.add("sync", f"index on the CPU at {where()}")
                args = (args[0], indices, *args[2:])

            # From the host to the card
            def entering(source, waits):
                if isinstance(source, FakeTensor) or not source.dim():
                    return
                size_of = source.numel() * source.element_size()
                pinned = source.untyped_storage()._cdata in Watch.pinned
                if waits:
                    Watch.add("sync", f"blocking copy to the card at {where()}")
                if not (pinned and source.is_contiguous()):
                    Watch.add("pageable", where())
                    Watch.add("pageable bytes", where(), size_of)
                else:
                    Watch.add("pinned", where())

            if func is aten._to_copy.default and target == "cuda":
                entering(args[0], not kwargs.get("non_blocking"))
            if func is aten.copy_.default and not isinstance(args[1], FakeTensor):
                entering(args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking")))

            def convert(x):
                return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            shadow = self.shadow(func, args, kwargs, tensors)
            fargs, fkwargs = tree_map_only(torch.Tensor, convert, (args, kwargs))
            with self.fake:
                out = func(*fargs, **fkwargs)
            if shadow is not None:
                for each, value in zip(tree_flatten(out)[0], tree_flatten(shadow)[0], strict=True):
                    Watch.shadows[each] = value
            for position, argument in enumerate(func._schema.arguments):  # written: value unknown
                if argument.alias_info and argument.alias_info.is_write and position < len(args):
                    written = args[position]
                    if isinstance(written, torch.Tensor) and shadow is None:
                        Watch.shadows.pop(written, None)
            return self.note(func, fargs, fkwargs, out)

        def shadow(self, func, args, kwargs, tensors):
            """The true value of a small whole number on the GPU, if all its sources are known."""
            if any(t.numel() > 4096 or t.dtype.is_floating_point for t in tensors):
                return None
            known = [Watch.shadows.get(t, None if isinstance(t, FakeTensor) else t)
                     for t in tensors]
            if any(k is None for k in known) or (not tensors and (
                    kwargs.get("dtype") not in (torch.int64, torch.bool, torch.int32))):
                return None
            if not tensors and np.prod(args[0] if isinstance(args[0], (list, tuple)) else 1) > 4096:
                return None
            swap = {id(t): k for t, k in zip(tensors, known, strict=True)}
            rargs, rkwargs = tree_map_only(torch.Tensor, lambda t: swap[id(t)], (args, kwargs))
            if "device" in rkwargs:
                rkwargs = {**rkwargs, "device": torch.device("cpu")}
            try:
                return func(*rargs, **rkwargs)
            except Exception:  # only a value is lost
                return None

        def waited(self, func, args, kwargs):
            x = args[0]
            if func is aten._local_scalar_dense.default:
                shadow = Watch.shadows.get(x)
                return guess(x.dtype) if shadow is None else shadow.item()
            if func in (aten.equal.default, aten.is_nonzero.default):
                return True
            with self.fake:
                if func is aten.nonzero.default:
                    return torch.zeros(x.numel(), x.dim(), dtype=torch.int64, device=x.device)
                if func is aten.bincount.default:
                    n = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
                    return torch.zeros(max(1, n), dtype=torch.int64, device=x.device)
                if func is aten.masked_select.default:
                    return x.new_zeros(x.numel())
            raise NotImplementedError(f"the result of {func} on a card")

        def note(self, func, args, kwargs, out):
            """Count an op."""
            outs = [x for x in tree_flatten(out)[0] if on_card(x)]
            for x in outs:
                self.track(x)
            word = func._schema.name.removeprefix("aten::")
            if getattr(func, "is_view", False) or word in FACTORY or not Watch.counted():
                return out
            number = launches(func, args, out)
            if word == "convolution" and not (
                    args[0].is_contiguous(memory_format=torch.channels_last)):
                Watch.notes[f"a convolution's input is not channels last at {where()}"] += 1
            seen, moved = set(), 0
            for x in [*tree_flatten((args, kwargs))[0], *outs]:
                if on_card(x) and id(x) not in seen:
                    seen.add(id(x))
                    moved += nbytes(x)
            if word.endswith("_") and word.startswith("_f"):
                moved *= 1.5
            took = max(millis(func, args, kwargs, out, moved), 2.5e-3 * number)
            Watch.add("launches", Watch.phase, number)
            Watch.add("ms", Watch.phase, took)
            Watch.add("bytes", Watch.phase, moved)
            place = f"{Watch.phase} at {where()}"
            Watch.add("lines", place, number)
            Watch.add("line ms", place, took)
            dtypes = {str(x.dtype)[6:] for x in tree_flatten(args)[0] if on_card(x)
                      and x.dtype.is_floating_point and x.dim()}
            if Watch.phase == "augmentation":
                Watch.add("augmentation", f"{word} at {where()}", number)
            Watch.add("ops", f"{word} {'/'.join(sorted(dtypes))}", number)
            return out

        def track(self, x):
            storage = x.untyped_storage()
            key = storage._cdata
            if key in Watch.storages:
                return
            amount = storage.nbytes()

            def gone(_, key=key, amount=amount):
                Watch.storages.pop(key, None)
                Watch.live -= amount

            Watch.storages[key] = weakref.ref(storage, gone)
            Watch.live += amount
            if Watch.live > Watch.peak:
                Watch.peak = Watch.live

    card = Card()

    def like(x, *shape, dtype=torch.float32):
        with card.fake:
            return torch.empty(*shape, dtype=dtype, device=x.device)

    def elemt(x, *_):
        with card.fake:
            return torch.empty_like(x)

    SPECIAL = {  # of torch's SyncBatchNorm: no shapes in torch
        aten.batch_norm_stats.default: lambda x, eps: (like(x, x.shape[1]), like(x, x.shape[1])),
        aten.batch_norm_gather_stats_with_counts.default:
            lambda x, *_: (like(x, x.shape[1]), like(x, x.shape[1])),
        aten.batch_norm_elemt.default: elemt,
        aten.batch_norm_backward_reduce.default:
            lambda g, x, *_: tuple(like(x, x.shape[1]) for _ in range(4)),
        aten.batch_norm_backward_elemt.default: elemt,
    }

    # Modules go to the card by new parameters: fake ones cannot be swapped
    def apply(self, fn, recurse=True):
        for module in self.children():
            module._apply(fn)
        for key, p in self._parameters.items():
            if p is not None:
                with torch.no_grad():
                    self._parameters[key] = nn.Parameter(fn(p), p.requires_grad)
        for key, b in self._buffers.items():
            if b is not None:
                self._buffers[key] = fn(b)
        return self

    nn.Module._apply = apply
    sys.modules["torch.optim.optimizer"]._foreach_supported_types.append(FakeTensor)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") asks for no card
    plain_deepcopy = torch.Tensor.__deepcopy__

    def deepcopy(self, memo):
        if not isinstance(self, FakeTensor):
            return plain_deepcopy(self, memo)
        if id(self) not in memo:
            made = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = (nn.Parameter(made, self.requires_grad)
                              if isinstance(self, nn.Parameter) else made)
        return memo[id(self)]

    torch.Tensor.__deepcopy__ = FakeTensor.__deepcopy__ = deepcopy

    # Which attention kernel to take, torch asks the card
    attend = nn.functional.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, *args, **kwargs):
        if q.device.type != "cuda" or args not in ((), (0.0, False)) or kwargs:
            return attend(q, k, v, attn_mask, *args, **kwargs)
        mask = attn_mask
        if torch.is_autocast_enabled("cuda"):
            q, k, v, mask = (x if x is None else x.to(torch.get_autocast_dtype("cuda"))
                             for x in (q, k, v, mask))
        if any(x.stride(-1) != 1 for x in (q, k, v)) or q.shape[-1] > 256:
            Watch.notes[f"attention: no fused kernel at {where()}"] += 1
        if mask is None and q.dtype in (torch.bfloat16, torch.float16):
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, mask if mask is None else mask.expand(*q.shape[:3], k.shape[2]),
            torch.is_grad_enabled() and q.requires_grad)[0]

    nn.functional.scaled_dot_product_attention = attention

    # Phases
    call = nn.Module.__call__

    def module_call(self, *args, **kwargs):
        with phase("forward"):
            return call(self, *args, **kwargs)

    nn.Module.__call__ = module_call
    backward = torch.Tensor.backward

    def tensor_backward(self, *args, **kwargs):
        with phase("backward"):
            return backward(self, *args, **kwargs)

    torch.Tensor.backward = tensor_backward
    held = []

    def before(optimizer, *_):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and any(
                    n != 1 and a != b
                    for n, a, b in zip(p.shape, p.stride(), p.grad.stride(), strict=True)):
                Watch.notes["gradients whose strides are not their parameters'"] += 1
        held.append(phase("optimiser"))
        held[-1].__enter__()

    def after(*_):
        held.pop().__exit__(None, None, None)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)

    # Batches without images: nothing is decoded or cropped, parameters are drawn
    def pin(x):
        if isinstance(x, torch.Tensor):
            x = x.contiguous()
            Watch.pinned[x.untyped_storage()._cdata] = x  # kept alive: addresses are not reused
        return type(x)(map(pin, x)) if isinstance(x, (list, tuple)) else x

    torch.Tensor.pin_memory = lambda self, *_: pin(self)

    class Loader:
        def __init__(self, dataset, sampler=None, pin_memory=False, **_):
            if not pin_memory:
                Watch.notes["the loader does not pin memory"] += 1
            self.dataset = dataset
            self.sampler = range(len(dataset)) if sampler is None else sampler
            made_of = getattr(getattr(dataset, "function", None), "args", ())  # of an evaluation
            views = getattr(dataset, "views", None) or [v for v in made_of if hasattr(v, "crop")]
            if not views:  # images with label maps, read once for a check
                return
            planes = [Image.new("RGB", (256, 256))]
            dataset.images.read = lambda index: planes
            for view in views:
                blank = np.zeros((view.channels, *view.size), np.uint8)
                view.crop = lambda planes, parameters, blank=blank: blank

        def __iter__(self):
            return (pin(self.dataset[item]) for item in self.sampler)

    torch.utils.data.DataLoader = Loader

    # Processes
    world = torch.distributed

    def gathered(word, x):
        Watch.add("collectives", f"{word} {x.device.type} {str(x.dtype)[6:]} "
                  f"{x.numel() * x.element_size() / 1e6:.3g} MB at {where()}")
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            raise RuntimeError(f"{word} of a tensor that is not contiguous")

    def all_gather(parts, x, *_, **__):
        gathered("all_gather", x)
        if not x.is_contiguous():
            raise RuntimeError("all_gather of a tensor that is not contiguous")
        for part in parts:
            if part.device != x.device or part.dtype != x.dtype:
                raise RuntimeError(f"all_gather from {x.device} to {part.device}")
            part.copy_(x, non_blocking=True)

    def all_gather_single(out, x, *_, **__):
        gathered("all_gather_into_tensor", x)
        if out.device != x.device:
            raise RuntimeError(f"all_gather from {x.device} to {out.device}")
        out.view(size, *x.shape).copy_(x)

    def all_reduce(x, *_, **__):
        gathered("all_reduce", x)
        x.mul_(1)

    def broadcast(x, *_, **__):
        gathered("broadcast", x)

    class Group:
        def _get_backend_name(self):
            return "nccl"

    class Plain(nn.Module):
        """In the place of DDP."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

        no_sync = staticmethod(contextlib.nullcontext)

    if size > 1:
        for attribute, value in dict(
            all_gather=all_gather, all_gather_into_tensor=all_gather_single, all_reduce=all_reduce,
            all_gather_single=all_gather_single, broadcast=broadcast,
            is_initialized=lambda: True, get_rank=lambda *_: 3, get_world_size=lambda *_: size,
            init_process_group=lambda *_, **__: None, barrier=lambda *_, **__: None,
        ).items():
            setattr(world, attribute, value)
        world.GroupMember.WORLD = Group()
        nn.parallel.DistributedDataParallel = Plain

    # The checkout
    sys.path.insert(0, here)
    from common import checkpoint, distributed as comm, images, loader, log, solver

    if size > 1:
        comm.all_gather_objects = lambda value: [value] * size
    fake = images.fake

    def many(split, channels):
        noise = fake(split, channels).images
        n = 512 if split == "test" else 4096 if script.startswith(("eval", "finetune")) else IMAGES
        return images.ArrayImages(noise, np.arange(n) % 10, channels, rows=np.arange(n) % 64)

    images.fake = many
    make = loader.Loader.__init__

    def loader_init(self, source, views, **kwargs):
        for kind in {type(view) for view in views}:
            if not hasattr(kind, "_plain"):
                kind._plain = kind.finish

                def finish(self, *args, _plain=kind.finish, **kwargs):
                    with phase("augmentation"):
                        return _plain(self, *args, **kwargs)

                kind.finish = finish
        make(self, source, views, **{**kwargs, "workers": 0})

    loader.Loader.__init__ = loader_init
    write = log.Log.write

    def log_write(self, step, **kwargs):
        write(self, step, **kwargs)
        Watch.step += 1
        if Watch.step == STEPS and script.startswith(("eval", "finetune")):
            raise Stopped
        if Watch.step == 1:
            Watch.peak = Watch.live

    log.Log.write = log_write
    checkpoint.Run.agree = lambda self, ends: (False, Watch.step >= STEPS)
    checkpoint.Run.save = lambda self, *_: None
    checkpoint.Run.__exit__ = lambda self, *_: None
    if not any("--protocol" in CASES[name][2] for name in names):
        minimise = solver.minimise
        solver.minimise = lambda *a, iterations, **k: minimise(*a, iterations=3, **k)

    for name in names:
        script, _, flags = CASES[name]
        Watch.begin()
        module = importlib.import_module(script)
        argv = flags.split() + ["--device", "cuda"]
        if script in SCRIPTS:
            argv += ["--data", "fake", "--log-every", "1000000", "--output", name]
            if "--warmup-epochs" not in argv and "deepcluster" in script:
                argv += ["--epochs", "100"]
        elif "--protocol" in argv:
            argv += ["--log-every", "1000000", "--epochs", "100"]
        if script.startswith(("eval", "finetune")):
            argv += ["--workers", "0"]
        sys.argv = [f"{script}.py", *argv]
        result = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                parsed = module.parse_args(argv)
                with card, contextlib.redirect_stdout(sys.stderr):
                    module.main(parsed)
            except Stopped:
                pass
            except BaseException as error:
                frames = [f"{os.path.relpath(f.filename, here)}:{f.lineno}"
                          for f in traceback.extract_tb(error.__traceback__)
                          if f.filename.startswith(here) and f.filename != __file__]
                message = str(error).splitlines()[0] if str(error) else ""
                place = " < ".join(frames[::-1][:3])
                result = {"error": f"{type(error).__name__}: {message[:300]} at {place}",
                          "trace": traceback.format_exc()[-3000:]}
        if not result:
            counted = max(1, min(Watch.step, STEPS) - 1)
            if script.startswith(("eval", "finetune")) and not Watch.step:
                counted = 1
            tally = {what: {key: value / counted for key, value in found.items()}
                     for what, found in Watch.tally.items()}
            order = ("augmentation", "forward", "loss and state", "backward", "optimiser")

            def top(what, count=14, tally=tally):
                found = sorted(tally.get(what, {}).items(), key=lambda item: -item[1])[:count]
                return {key: round(value, 3) for key, value in found}

            result = {
                "syncs": tally.get("sync", {}),
                "phases": {p: {"launches": tally["launches"].get(p, 0), "ms": tally["ms"].get(p, 0),
                               "gb": tally["bytes"].get(p, 0) / 1e9,
                               "tflop": tally.get("flop", {}).get(p, 0) / 1e12}
                           for p in order if p in tally.get("launches", {})},
                "launches": sum(tally.get("launches", {}).values()),
                "ms": sum(tally.get("ms", {}).values()), "gb": Watch.peak / 1e9,
                "pageable": sum(tally.get("pageable", {}).values()),
                "pageable_mb": sum(tally.get("pageable bytes", {}).values()) / 1e6,
                "allowed": {k: v for k, v in Watch.tally.get("allowed", {}).items()},
                "lines": top("lines", 16), "line_ms": top("line ms"),
                "copies": top("pageable bytes"),
                "augmentation": top("augmentation", 60), "slow": top("slow foreach"),
                "collectives": top("collectives", 30), "ops": top("ops", 30),
                "notes": dict(Watch.notes),
                "warnings": dict(collections.Counter(
                    f"{w.category.__name__}: {str(w.message).splitlines()[0][:160]}"
                    for w in caught)),
            }
        print("CASE " + json.dumps([name, result]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--repo", default=root, help="the checkout to run: this one")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--detail", action="store_true")
    parser.add_argument("--json", help="append every case's figures to this file")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repo = os.path.abspath(args.repo)
    if args.case:
        child(args.repo, args.case)
        return 0
    return parent(args)


if __name__ == "__main__":
    sys.exit(main())
