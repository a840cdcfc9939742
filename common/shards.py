"""Where the images inside tars are: an index made once by reading the headers alone, and kept.

Nothing is ever unpacked. An image is read by its place, so that any image can be the next one: the
order of an epoch, loader processes and resuming are those of files.
"""

import contextlib
import fcntl
import functools
import math
import os
import posixpath
import stat
import tarfile
import tempfile
import zlib
from dataclasses import dataclass

import numpy as np

from common import distributed as comm
from common.distributed import RunError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
VERSION = 2  # of the index's file
OPEN = 64  # tars that a process keeps open


@dataclass(frozen=True)
class Tar:
    """A tar as it was when it was indexed.

    Attributes:
        size, mtime: bytes and nanoseconds.
        names: (N,) bytes of each image, `folder/name`; of a tar inside the tar `tar/folder/name`,
            without its `.tar`.
        inner: (N,) how many bytes of a name are those of inner tars. offsets, sizes: (N,) in bytes.
        classes: (N,) what the `.cls` file beside an image holds (`class_of`), or b"".
    """

    path: str
    size: int
    mtime: int
    names: np.ndarray
    inner: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray


def read_member(path: str, size: int, mtime: int, offset: int, count: int) -> bytes:
    """Bytes of a tar, by place.

    Raises:
        RunError: the tar is gone, or of another size or time than when it was indexed.
    """
    try:
        file = opened(path, size, mtime)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    found = os.fstat(file.number)
    if (found.st_size, found.st_mtime_ns) != (size, mtime):
        opened.cache_clear()
        raise RunError(f"{path} has changed since it was indexed; start again, to index it anew")
    return os.pread(file.number, count, offset)


class Opened:
    """A file that is closed when nothing refers to it any more."""

    def __init__(self, path: str):
        self.number = None
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close):  # at the interpreter's exit `os` may be gone
        if self.number is not None:
            close(self.number)


@functools.lru_cache(maxsize=OPEN)
def opened(path: str, size: int, mtime: int) -> Opened:
    """A tar that is open. `pread` has no position, so forked processes may share it."""
    return Opened(path)


def read_index(path: str, folder: str | None, is_data) -> Tar:
    """The index of a tar: the one kept in a folder if it is the tar's, else a new one.

    Of several processes the first makes it, and the others wait.

    Args:
        path: of the tar. folder: where its index is kept; None: nowhere.
        is_data: whether a file of a name, such as `folder/name`, is an image, or with an ending
            as a second argument, one of that kind.

    Raises:
        RunError: the tar cannot be read, is compressed or cut short; the folder cannot be written.
    """
    if path.lower().endswith(COMPRESSED):
        raise RunError(compressed(path))
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path} is not a file, so its images cannot be read by place")
    known = found.st_size, found.st_mtime_ns
    if folder is None:
        return make_index(path, *known, is_data)
    place = zlib.crc32(os.fsencode(os.path.realpath(path)))
    kept = os.path.join(folder, f"{os.path.basename(path)}-{place:08x}.npz")
    if tar := load_index(kept, path, *known):
        return tar
    size = f" {found.st_size / 1e6:,.0f} MB" if found.st_size >= 1e6 else ""
    comm.print_main(f"{path}: indexing{size}" + (
        ", for it has changed since it was indexed" if os.path.exists(kept) else ""))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, ".lock"), "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: each makes its own
                fcntl.flock(lock, fcntl.LOCK_EX)
            tar = load_index(kept, path, *known)
            if tar is None:
                tar = make_index(path, *known, is_data)
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                    try:
                        np.savez(file, version=VERSION, size=tar.size, mtime=tar.mtime,
                                 headers=headers_of(path, tar.offsets),
                                 **{name: getattr(tar, name) for name in ARRAYS})
                        os.chmod(file.name, 0o644)
                        os.replace(file.name, kept)
                    except BaseException:
                        os.remove(file.name)
                        raise
    except OSError as error:
        raise RunError(f"--index {folder}: {error.strerror or error}; name a folder that can be "
                       "written") from error
    return tar


ARRAYS = ("names", "inner", "offsets", "sizes", "classes")


def load_index(kept: str, path: str, size: int, mtime: int) -> Tar | None:
    """An index that is kept, if it is whole and of a tar of this size, time and headers."""
    try:
        with np.load(kept, allow_pickle=False) as file:
            if (int(file["version"]), int(file["size"]), int(file["mtime"])) != (
                    VERSION, size, mtime):
                return None
            tar = Tar(path, size, mtime, *[file[name] for name in ARRAYS])
            headers = int(file["headers"])
        inside = len(tar.sizes) == 0 or (tar.offsets + tar.sizes).max() <= size
        whole = inside and len({len(getattr(tar, name)) for name in ARRAYS}) == 1
        return tar if whole and headers == headers_of(path, tar.offsets) else None
    except Exception:  # a torn file raises many things
        return None


def headers_of(path: str, offsets: np.ndarray) -> int:
    """A checksum of some images' headers: another tar can have a tar's size and time."""
    crc = 0
    with open(path, "rb") as file:
        for offset in np.sort(offsets)[:: math.ceil(len(offsets) / 64) or 1].tolist():
            crc = zlib.crc32(os.pread(file.fileno(), 512, offset - 512), crc)
    return crc


def make_index(path: str, size: int, mtime: int, is_data) -> Tar:
    """Read all headers of a tar and of the tars in it."""
    images, links, classes = {}, {}, {}
    try:
        with open(path, "rb") as file:
            read_headers(path, file, (0, size), "", is_data, images, links, classes)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    while found := [name for name, (_, target) in links.items() if target in images]:
        for name in found:  # a link may be one to a link
            inner, target = links.pop(name)
            images[name] = inner, *images[target][1:]
    if links:
        comm.print_main(f"warning: {path}: left out, for they are links to what is no image in it: "
                        f"{len(links)}, such as {min(links)}")
    names = sorted(images)
    rows = np.array([images[name] for name in names], dtype=np.int64).reshape(-1, 3)
    return Tar(path, size, mtime, as_bytes(names), *rows.T,
               as_bytes([class_of(name, classes) for name in names]))


def read_headers(path, file, bounds, inner, is_data, images, links, classes) -> None:
    """Note the images of a tar that lies between two bytes of a file.

    Args:
        path: of the outermost tar. inner: names of the tars in it that lead here.
        images: by name (length of `inner`, offset, size), to add to. links: likewise
            (length of `inner`, name of the image).
        classes: contents of the `.cls` files by their names without it.
    """
    where = os.path.join(path, inner).rstrip("/")
    start, end = bounds
    file.seek(start)
    if file.read(6).startswith(MAGIC):
        raise RunError(compressed(where))
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (tar.firstmember or tar.offset < end) and (member := tar.next()):
            tar.members = []  # it would keep them all
            name = posixpath.normpath(member.name).lstrip("/")
            if name.split("/")[0] == "..":
                raise RunError(f"{where}: its member {member.name} lies outside of it; make it "
                               "anew from the folder that holds the images")
            at, count, full = member.offset_data, member.size, inner + name
            links.pop(full, None)  # the last one of a name counts
            if member.issparse():
                raise RunError(f"{where}: {name} is stored in pieces; make it without --sparse")
            if member.isreg() and at + count > end:
                raise RunError(f"{where} is cut short: {name} ends at byte {at + count - start:,} "
                               f"of {end - start:,}; fetch or make it again")
            if member.isreg() and is_data(name, COMPRESSED):
                raise RunError(compressed(f"{where}/{name}"))
            if member.isreg() and is_data(name, ".tar"):
                read_headers(path, file, (at, at + count), full[:-4] + "/", is_data, images,
                             links, classes)
            elif member.isreg() and name.endswith(".cls") and count <= 64:
                file.seek(at)
                classes[full[:-4]] = file.read(count).strip()
            elif not is_data(name):
                continue
            elif member.isreg():
                images[full] = len(inner), at, count
            elif member.islnk():
                links[full] = len(inner), inner + posixpath.normpath(member.linkname).lstrip("/")
            elif member.issym():
                beside = posixpath.join(posixpath.dirname(name), member.linkname)
                links[full] = len(inner), inner + posixpath.normpath(beside)
    except tarfile.TarError as error:
        raise RunError(f"{where}: {error}: not a tar, or cut short; fetch it again") from error
    file.seek(tar.offset)
    block = file.read(min(512, max(0, end - tar.offset)))
    if block != bytes(512):  # tarfile takes both for its end
        what = "has no header" if len(block) == 512 else "the tar's end is missing: it is cut short"
        raise RunError(f"{where}: at byte {tar.offset - start:,} {what}; fetch or make it again")
    if file.read(min(2**20, max(0, end - tar.offset - 512))).strip(b"\0"):
        raise RunError(f"{where}: more follows behind its end at byte {tar.offset - start:,}, as "
                       "of tars joined by cat; pass each of them to --data")


def class_of(name: str, classes: dict[str, bytes]) -> bytes:
    """What the `.cls` file of an image holds: of the one of its whole name, `2026.07.cls` beside
    `2026.07.jpg`, else of all before the first dot, WebDataset's convention; b"" without one."""
    folder, slash, file = name.rpartition("/")
    sample = f"{folder}{slash}{file.partition('.')[0]}"
    return classes.get(posixpath.splitext(name)[0], classes.get(sample, b""))


def compressed(path: str) -> str:
    """What is said of a compressed tar."""
    return (f"{path} is compressed, so that its images cannot be read by place; decompress it "
            "(gunzip, bunzip2, unxz, zstd -d)")


def as_bytes(names: list) -> np.ndarray:
    """Names or paths as an array, of a byte a character, not four."""
    return np.array([os.fsencode(name) for name in names], dtype=bytes if names else "S1")
