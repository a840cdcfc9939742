"""Sets to retrieve from, which say what is relevant to a query: revisited Oxford, Paris; copies.

Both functions give a database and its queries, whose `truth` is, by the name of a row of the table
and the number of a query, two arrays: rows of the database that are relevant, and that are ignored.
"""

import os
import pickle
import re

import numpy as np

from common.distributed import RunError
from common.images import FileImages, walk

# What is relevant to a query of revisited Oxford or Paris, and what is ignored, by setting.
SETTINGS = {
    "medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}
# What pickles of sets and arrays call, by the names of Python 2 and 3 and of NumPy 1 and 2.
PLAIN = {
    "builtins": {"set": set, "bytes": bytes},
    "_codecs": {"encode": lambda text, _: text.encode("latin1")},  # bytes
    "numpy": {"ndarray": np.ndarray, "dtype": np.dtype},
    "numpy._core.multiarray": {"_reconstruct": np.zeros(1).__reduce__()[0],
                               "scalar": np.float64(0).__reduce__()[0]},
    "numpy._core.numeric": {"_frombuffer": np.zeros(1).__reduce_ex__(5)[0]},
}


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and arrays; calls nothing but what makes arrays."""

    def find_class(self, module, name):
        now = module.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        if name not in PLAIN.get(now, ()):
            raise RunError(f"it asks for {module}.{name}, and annotations are plain lists and "
                           "arrays; nothing in it was run")
        return PLAIN[now][name]


def read_annotations(path: str):
    """Read a pickle of containers, strings, numbers and arrays.

    Raises:
        RunError: there is no such file, it is no pickle, or there is anything else in it.
    """
    if not os.path.isfile(path):
        raise RunError(f"{path}: no such file; --data-root is the folder that holds the set's")
    with open(path, "rb") as file:
        try:
            return PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle raises whatever it likes
            told = str(error) if isinstance(error, RunError) else repr(error)
            raise RunError(f"{path} is refused: {told}") from error


class BoxedImages(FileImages):
    """Image files out of which boxes are cut: left, top, right, bottom in pixels, (N, 4)."""

    boxes = None

    def read(self, index):
        planes = super().read(index)
        left, top, *ends = np.maximum(np.rint(self.boxes[index]), 0).astype(int).tolist()
        right, bottom = map(min, ends, planes[0].size)
        if left >= right or top >= bottom:
            raise RunError(f"{self.name(index)}: its box {self.boxes[index].tolist()} is beside "
                           "the image")
        return [plane.crop((left, top, right, bottom)) for plane in planes]


def revisited(folder: str, name: str, channels: int, crop: bool) -> list[FileImages]:
    """Revisited Oxford or Paris: `jpg/` and `gnd_<name>.pkl` in a folder.

    Args:
        crop: whether queries are cut out by their boxes.

    Raises:
        RunError: the annotation is not there, not plain or not of this kind; an image is missing.
    """
    path = os.path.join(folder, f"gnd_{name}.pkl")
    given = read_annotations(path)
    try:
        files = [[os.path.join(folder, "jpg", f"{image}.jpg") for image in given[key]]
                 for key in ("imlist", "qimlist")]
        boxes = np.array([each["bbx"] for each in given["gnd"]], dtype=float)
        rows = [{kind: np.array(each[kind], dtype=np.int64).reshape(-1)
                 for kind in ("easy", "hard", "junk")} for each in given["gnd"]]
        if boxes.shape != (len(files[1]), 4) or not np.isfinite(boxes).all():
            raise ValueError(f"{len(files[1])} queries, boxes of shape {boxes.shape}")
        for each in rows:
            found = np.concatenate([*each.values()])
            if len(np.unique(found)) < len(found) or not set(found) <= set(range(len(files[0]))):
                raise ValueError("an image that is not in imlist, or twice at one query")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{path} is no annotation of {name} ({error!r}): it wants imlist, qimlist, "
                       "and gnd with easy, hard, junk and bbx") from error
    missing = [file for file in sum(files, []) if not os.path.isfile(file)]
    if missing:
        raise RunError(f"{folder}: {len(missing)} of {len(sum(files, []))} images are missing, "
                       f"such as {missing[0]}")
    database = FileImages(files[0], None, channels, folder)
    queries = (BoxedImages if crop else FileImages)(files[1], None, channels, folder)
    queries.boxes = boxes
    queries.truth = {
        setting: {query: [np.concatenate([each[kind] for kind in kinds]) for kinds in both]
                  for query, each in enumerate(rows)} for setting, both in SETTINGS.items()}
    return [database, queries]


def copies(folder: str, channels: int) -> list[FileImages]:
    """Originals and distractors as the database, and copies as queries, as Copydays names them.

    An image with distractor in its path is one. Of the others, those in a folder named original are
    the originals, and those in other folders copies, a row of the table each folder; but a folder
    named train is left out. 200305.jpg is a copy of 200300.jpg: the hundreds tell.

    Raises:
        RunError: no copies; a name without a number; a copy without its original.
    """
    if not os.path.isdir(folder):
        raise RunError(f"no folder {folder}; --data-root is the folder above it")
    distractors, blocks = [], {}  # and by folder, paths and hundreds
    for parent, files in walk(folder):
        part = os.path.relpath(parent, folder)
        for file in files:
            path, number = os.path.join(parent, file), re.match(r"\d+", file)
            if "distractor" in os.path.join(part, file):
                distractors.append(path)
            elif "train" not in part.split(os.sep):
                if not number:
                    raise RunError(f"{path} begins with no number, which tells its original")
                part_of = "original" if "original" in part else part
                blocks.setdefault(part_of, []).append((path, int(number[0]) // 100))
    originals = sorted(blocks.pop("original", []))
    asked = [(part, *image) for part in sorted(blocks, key=lambda part: (part != "strong", part))
             for image in sorted(blocks[part])]  # strong copies first: the usual number
    if not asked:
        raise RunError(f"{folder}: no copies; it wants the folders original, and strong or others")
    of_original, truth = np.array([block for _, block in originals]), {}
    for query, (part, path, block) in enumerate(asked):
        rows = np.flatnonzero(of_original == block)
        if not len(rows):
            raise RunError(f"{path}: no original {block}00 in a folder original of {folder}")
        truth.setdefault(part, {})[query] = [rows, rows[:0]]
    paths = [path for path, _ in originals] + sorted(distractors)
    queries = FileImages([path for _, path, _ in asked], None, channels, folder)
    queries.truth = truth
    return [FileImages(paths, None, channels, folder), queries]
