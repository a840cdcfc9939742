"""Our k-NN beside scikit-learn's on the same features: seconds, peak memory, and the same answers.

Each side runs in a fresh process and in turn with the other; on a busy machine, CPU seconds (of all
threads) say more than seconds. Features are noise around class
centres, since only their size counts: 50,000 x 2,048 in the bank and 10,000 queries by default.

    python benchmarks/knn.py
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402

CLASSES = 1000


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bank", type=int, default=50_000, help="images in the bank")
    parser.add_argument("--queries", type=int, default=10_000, help="images to classify")
    parser.add_argument("--dim", type=int, default=2048, help="numbers in a feature")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    parser.add_argument("--chunk", type=int, default=2048, help="our queries at a time")
    parser.add_argument("--pairs", type=int, default=1, help="ours and theirs in turn")
    return parser.parse_args(argv)


def noise(args):
    """Features and labels of bank and queries, float32."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, args.dim), dtype=np.float32)
    parts = []
    for count in (args.bank, args.queries):
        labels = rng.integers(0, CLASSES, count)
        rows = rng.standard_normal((count, args.dim), dtype=np.float32)
        rows *= 4
        for start in range(0, count, 1000):
            rows[start : start + 1000] += centres[labels[start : start + 1000]]
        parts += [rows, labels]
    return parts


def ours(args, bank, labels, queries):
    import torch

    import eval_knn

    bank, labels, queries = (torch.from_numpy(x) for x in (bank, labels, queries))
    started = time.perf_counter()
    scores = eval_knn.knn_predict(bank, labels, queries, args.k, args.temperature, CLASSES,
                                  chunk=args.chunk)
    return time.perf_counter() - started, scores.argmax(1).numpy()


def sklearns(args, bank, labels, queries):
    from sklearn.neighbors import KNeighborsClassifier

    started = time.perf_counter()
    model = KNeighborsClassifier(
        args.k, metric="cosine", algorithm="brute",
        weights=lambda distances: np.exp((1 - distances.astype(np.float64)) / args.temperature),
    )
    answers = model.fit(bank, labels).predict(queries)
    return time.perf_counter() - started, answers


def measure(function, args, answers):
    bank, labels, queries, truth = noise(args)
    function(args, bank[:500], labels[:500], queries[:50])  # imports and warms up
    before = time.process_time()
    seconds, predicted = function(args, bank, labels, queries)
    cpu = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers.put((seconds, cpu, peak, float((predicted == truth).mean()), predicted))


def main(args):
    context, runs = multiprocessing.get_context("spawn"), []
    for pair in range(args.pairs):
        both = {}
        for function in (ours, sklearns):
            answers = context.Queue()
            process = context.Process(target=measure, args=(function, args, answers))
            process.start()
            both[function.__name__] = answers.get()
            process.join()
        same = float((both["ours"][4] == both["sklearns"][4]).mean())
        ratio = both["sklearns"][0] / both["ours"][0]
        line = {"pair": pair, "ratio": ratio, "cpu_ratio": both["sklearns"][1] / both["ours"][1],
                "same_answers": same}
        for name, (seconds, cpu, peak, top1, _) in both.items():
            line[name] = {"seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak / 1e9,
                          "top1": top1}
        print(json.dumps(line), flush=True)
        runs.append(ratio)
    settings = {**vars(args), "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count())}
    print(json.dumps({"ratio": statistics.median(runs), **settings}))


if __name__ == "__main__":
    main(parse_args())
