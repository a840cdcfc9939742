"""The linear probe `auto` beside scikit-learn's logistic regression, on the same features.

Both have standardised features and choose their regularisation by 5-fold cross-validation on the
training images: of 10 values here as scikit-learn's `LogisticRegressionCV` has them, of 7 there.

    python eval_knn.py --checkpoint runs/simclr-digits-resnet_tiny --save-features simclr.npz
    python benchmarks/linear.py simclr.npz
"""

import argparse
import os
import statistics
import sys
import time
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import eval_linear
from common import distributed as comm, features, solver


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="made by --save-features")
    world = comm.World(0, 1, torch.device("cpu"))
    differences = []
    print(f"{'features':<40}{'auto':>8}{'s':>7}{'sklearn':>9}{'s':>7}")
    for path in parser.parse_args().files:
        found = features.read(path)
        for layer, rows in found.train.layers.items():
            start = time.perf_counter()
            ours = solver.cross_validated(
                rows, found.train.labels, found.test.layers[layer], found.test.labels,
                decays=eval_linear.DECAYS, folds=5, seed=0, world=world,
                num_classes=int(found.train.labels.max()) + 1,
            )
            middle = time.perf_counter()
            theirs = make_pipeline(StandardScaler(), LogisticRegressionCV(
                Cs=10, cv=5, max_iter=1000, use_legacy_attributes=True, l1_ratios=(0,)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs.fit(rows.numpy(), found.train.labels)
            top1 = theirs.score(found.test.layers[layer].numpy(), found.test.labels)
            end = time.perf_counter()
            differences.append(100 * (ours["top1"] - top1))
            print(f"{os.path.basename(path) + ' ' + layer:<40}{ours['top1']:>8.4f}"
                  f"{middle - start:>7.1f}{top1:>9.4f}{end - middle:>7.1f}", flush=True)
    print(f"auto - sklearn in points: mean {statistics.fmean(differences):+.2f}, "
          f"from {min(differences):+.2f} to {max(differences):+.2f}")


if __name__ == "__main__":
    main()
